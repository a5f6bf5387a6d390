"""Record, predict and choose with your own model, data and Trainer; see README.md.

python recipes/first_run/first_run.py
"""

from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from know_hf import ForgettingSchedule, Gate, induce_forgetting, predict_overflowed_weights

pixels, labels = load_digits(return_X_y=True)  # or your dataset, model and Trainer
digits = Dataset.from_dict({"pixel_values": pixels.reshape(-1, 1, 8, 8) / 16, "labels": labels}).with_format("torch")
train_set, validation_set = digits.select(range(400)), digits.select(range(400, 700))
config = ResNetConfig(num_channels=1, num_labels=10, embedding_size=32, hidden_sizes=[64], depths=[1])
args = TrainingArguments("first_run/trainer", num_train_epochs=6, learning_rate=5e-3, save_strategy="no")
trainer = Trainer(ResNetForImageClassification(config), args, train_dataset=train_set, eval_dataset=validation_set)

# Instead of trainer.train(): trains on all data, then for one epoch each on 1/2, 1/4, … of it. Resumes if run again.
schedule = ForgettingSchedule(ratio=0.5, num_states=5, epochs_per_stage=1, stratify_by="labels", seed=0)
trajectory = induce_forgetting(trainer, schedule, "first_run/trajectory")
# Writes your original weights unless a candidate is significantly better on the validation set (at least 73 examples).
gate = Gate(dataset=validation_set)
enhanced = predict_overflowed_weights(trajectory, steps=2, output_dir="first_run/enhanced", gate=gate, overwrite=True)
print(enhanced)
model = enhanced.load_model()  # or ResNetForImageClassification.from_pretrained("first_run/enhanced")
