"""Fine-tune a text classifier on smaller and smaller subsets, predict weights from the states, and evaluate both.

    python recipes/text_classification/text_classification.py --output-dir outputs/imdb

Prints loss and accuracy on the test split for every recorded state and every predicted checkpoint, and writes them to
OUTPUT_DIR/results.json. A second run resumes at the first missing state.
"""

import argparse
import sys


def main(args: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from know_hf import ForgettingSchedule, induce_forgetting, predict_overflowed_weights
    from know_hf.checkpoint.safe_loading import from_safetensors

    output_dir = Path(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def load(split: str, size: int):
        data = load_dataset(args.dataset, split=split).shuffle(seed=args.seed)
        data = data.select(range(min(size, len(data)))).select_columns([args.text_column, args.label_column])
        data = data.rename_columns({args.text_column: "text", args.label_column: "label"})
        return data.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=args.max_length), batched=True
        )

    train, test = load(args.train_split, args.num_train), load(args.test_split, args.num_test)
    set_seed(args.seed)
    # a small draw may lack a class
    num_labels = getattr(train.features["label"], "num_classes", None) or max(*train["label"], *test["label"]) + 1
    options = {"num_labels": num_labels, "ignore_mismatched_sizes": True}  # a head for other classes is replaced
    model = from_safetensors(AutoModelForSequenceClassification, args.model, **options)
    training_args = TrainingArguments(
        output_dir=str(output_dir / "trainer"),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        save_strategy="no",
        seed=args.seed,
    )

    def make_trainer(model):
        return Trainer(
            model,
            training_args,
            train_dataset=train,
            eval_dataset=test,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )

    schedule = ForgettingSchedule(ratio=args.ratio, num_states=5, stratify_by="label", seed=args.seed)
    trajectory = induce_forgetting(make_trainer(model), schedule, output_dir / "trajectory")

    results = {f"state {s.index} ({s.num_examples} examples)": s.metrics for s in trajectory.states}
    for name, predictor, steps in (
        ("known-1", None, 1),
        ("known-2", None, 2),
        ("known-3", None, 3),
        ("average", "average", 1),
    ):
        enhanced = predict_overflowed_weights(
            trajectory, steps=steps, predictor=predictor, output_dir=output_dir / name, overwrite=True
        )
        print(f"\n{name}\n{enhanced}")
        metrics = make_trainer(enhanced.load_model()).evaluate()
        results[name] = {key: metrics[key] for key in ("eval_loss", "eval_accuracy")}

    print(f"\n{'weights':28}{'loss':>8}{'accuracy':>10}")
    for name, metrics in results.items():
        print(f"{name:28}{metrics['eval_loss']:8.4f}{metrics['eval_accuracy']:10.4f}")
    content = {"arguments": vars(args), "results": results}
    (output_dir / "results.json").write_text(json.dumps(content, indent=2) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output-dir", required=True, metavar="DIR", help="folder for trajectory, predicted checkpoints and results")
    add("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Hub id or folder (default: %(default)s)")
    add("--dataset", default="stanfordnlp/imdb", help="Hub id or folder (default: %(default)s)")
    add("--train-split", default="train")
    add("--test-split", default="test")
    add("--text-column", default="text")
    add("--label-column", default="label")
    add("--num-train", type=int, default=2000, help="number of training examples (default: %(default)s)")
    add("--num-test", type=int, default=1000, help="number of test examples (default: %(default)s)")
    add("--max-length", type=int, default=128, help="maximum number of tokens of a text (default: %(default)s)")
    add("--epochs", type=float, default=2, help="epochs on all data (default: %(default)s)")
    add("--learning-rate", type=float, default=5e-5)
    add("--batch-size", type=int, default=16)
    add("--ratio", type=float, default=0.5, help="share of the data that each stage keeps (default: %(default)s)")
    add("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("text_classification.py", lambda: main(arguments)))
