"""A predictor, an arm and a protocol of your own in one comparison; see README.md.

python recipes/extend/extend.py --output-dir outputs/extend
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from know_hf import ForgettingSchedule, WeightTrajectory, compare_arms, induce_forgetting, register_predictor
from know_hf.evaluation import Arm, ComparisonReport, ComparisonTask, Split, Trial, ZeroShot
from know_hf.terminal import run_program


@register_predictor("median")
@dataclass
class Median:
    """The median of the states, weight by weight, minus Θ0."""

    strength: float = 1.0
    num_states: int | None = None  # any number of states

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        """Return what is added to Θ0, `(N,)`, from histories `(N, S)`: most forgotten state first, Θ0 last."""
        return self.strength * (history.median(dim=1).values - history[:, -1])


HALFWAY = Arm("halfway", "predicted", "halfway to the median", predictor="median", options={"strength": 0.5})


@dataclass(frozen=True)
class NoisyInputs:
    """The source task with Gaussian noise on the inputs, without further training."""

    std: float = 0.5
    name: str = "noisy-inputs"
    on_source = True
    what = "the source task with noisy inputs"

    def trials(
        self, model: PreTrainedModel, split: Split, seed: int, evaluate: Any, *_: Any, **__: Any
    ) -> Iterator[Trial]:
        generator = torch.Generator().manual_seed(seed)  # the same noise for every arm
        noisy = [self._noisy(examples, generator) for examples in (split.validation, split.test)]
        yield Trial(None, *(evaluate(model, examples) for examples in noisy))

    def _noisy(self, examples: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
        pixels = examples["pixel_values"]
        return {**examples, "pixel_values": pixels + self.std * torch.randn(pixels.shape, generator=generator)}

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "noisy_inputs", "name": self.name, "std": self.std}


def images(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Four classes of 8 × 8 images, each with another bright quadrant."""
    labels = torch.arange(count) % 4
    pixels = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for image, label in zip(pixels, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[0, row : row + 4, column : column + 4] += 0.5
    return {"pixel_values": pixels, "labels": labels}


def source(seed: int) -> Split:
    return Split(images(64, 3 * seed), images(64, 3 * seed + 1), images(256, 3 * seed + 2))


def record(seed: int, folder: Path) -> WeightTrajectory:
    set_seed(seed)
    sizes = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "num_labels": 4}
    model = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic"))
    args = TrainingArguments(
        str(folder.with_name(f"{folder.name}-trainer")),
        num_train_epochs=4,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=seed,
    )
    data = Dataset.from_dict({name: tensor.tolist() for name, tensor in images(64, 3 * seed).items()})
    trainer = Trainer(model, args, train_dataset=data.with_format("torch"))
    return induce_forgetting(trainer, ForgettingSchedule(num_states=3, seed=seed), folder)


def run(output_dir: str | Path, seeds: Sequence[int] = range(3)) -> ComparisonReport:
    task = ComparisonTask(record, source=source)
    arms = ["naive", "median", HALFWAY, "average"]
    return compare_arms(task, output_dir, protocols=[ZeroShot(), NoisyInputs()], arms=arms, seeds=seeds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare a predictor, an arm and a protocol of your own.")
    parser.add_argument("--output-dir", default="outputs/extend", help="folder of the comparison")
    arguments = parser.parse_args()
    sys.exit(run_program("extend.py", lambda: print(run(arguments.output_dir))))
