"""The objective of the search: how well combined weights transfer, minus the best control on the same draws.

The screening utility of weights is the accuracy of ridge regressions on features of the target task, a soft maximum
over penalties: a penalty is relative to the variance of the features, so larger weights alone earn nothing.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from meta_tasks import MetaTask, meta_tasks, read_split
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from know_hf import WeightTrajectory
from know_hf.batch_norm import recalibrate_batch_norm
from know_hf.evaluation import batches
from know_hf.evaluation.fine_tuning import evaluate_classifier
from know_hf.evaluation.linear_probe import features
from know_hf.evaluation.splits import Split
from know_hf.evaluation.trials import logits, ridge_heads
from know_hf.known import TensorBasis, combine, tensor_basis
from know_hf.model_tensors import names_in_memory
from know_hf.prediction.tensor_contexts import tensor_contexts

Coefficients = Mapping[str, float]
Rule = Callable[["RecordedTask"], Mapping[str, Coefficients]]  # from a task to the coefficients of its tensors

DRAWS = 8  # of the target task
PENALTIES = (0.01, 0.1, 1.0)
TEMPERATURE = 0.01  # of the soft maximum, in accuracy
LOSS_WEIGHT = 0.1  # accuracy that a source loss of 1 above that of Θ0 costs
LARGEST_COST = 0.1  # of source loss, in accuracy: a diverged model is not worse than a useless one
_BATCH = 20  # examples of a batch for BatchNorm statistics


def soft_maximum(values: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return `t log mean exp(values / t)` over the last axis.

    It is between mean and maximum: a maximum, but less than one for a method that needs an exact setting.
    """
    return temperature * (values / temperature).logsumexp(-1) - temperature * float(np.log(values.shape[-1]))


@dataclass(frozen=True)
class Utility:
    """Utility of weights on one task.

    Attributes:
        per_draw (`np.ndarray` of shape `(D,)`):
            Soft maximum of the accuracy on each draw of the target task, minus the penalty.
        source_loss (`float`):
            Loss on source test data.
        accuracy (`float`):
            Mean of the soft maxima, without the penalty.
    """

    per_draw: np.ndarray
    source_loss: float
    accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the mean `"utility"`, as JSON values."""
        return {**vars(self), "per_draw": self.per_draw.tolist(), "utility": float(self.per_draw.mean())}


class RecordedTask:
    """A meta-task in memory: the basis of every tensor, and the data of the objective.

    Args:
        task ([`MetaTask`]):
            A recorded task.
        draws (`int`):
            Draws of the target task.
    """

    def __init__(self, task: MetaTask, draws: int) -> None:
        self.task, self.draws = task, draws
        nested, branches = (WeightTrajectory(task.folder / name) for name in ("nested", "branches"))
        model = nested.load_model(0, task.suite_task.suite.model.model_class)
        self.model: PreTrainedModel = model.float().eval()
        in_memory = names_in_memory(self.model)  # transformers renames tensors of ViT
        self.theta0 = {in_memory[name]: tensor.float() for name, tensor in nested.state_dict(0).items()}
        contexts = tensor_contexts(nested)
        names = [name for name, role in nested.roles.items() if role.role in ("conv", "fc", "bias", "norm")]
        self.contexts = {in_memory[name]: contexts[name] for name in names}
        self._snapshots: dict[str, dict[str, Any]] = {
            in_memory[name]: {
                "states": [nested.tensor(name, index) for index in range(1, nested.num_states)],
                "start": nested.tensor(name, "start"),
                "tail": [nested.tensor(name, record.name) for record in nested.tail],
                "branches": [branches.tensor(name, record.name) for record in branches.branches],
            }
            for name in names
        }
        self._bases: dict[tuple[str, ...], dict[str, TensorBasis]] = {}
        self.bases = self.bases_without(())
        further = {in_memory[name]: tensor for name, tensor in load_file(task.further / "model.safetensors").items()}
        for name, basis in self.bases.items():  # not an element that KNOWN has: the control needs another training
            elements = {**basis.elements, "further": further[name].float() - self.theta0[name]}
            self.bases[name] = replace(basis, elements=elements)
        self.num_tail = len(nested.tail)
        self.num_states = nested.num_states
        self._read_data()

    def _read_data(self) -> None:
        suite_task, seed = self.task.suite_task, self.task.seed
        self.source = suite_task.source_split(seed)
        target, pool = suite_task.suite.target, suite_task._splits(suite_task.suite.target)[0]  # noqa: SLF001
        rows = [pool.rows([seed, 1, draw]) for draw in range(self.draws)]  # as target_split
        self.images = pool.take(rows[0])
        position = {row: index for index, row in enumerate(rows[0])}
        order = torch.tensor([[position[row] for row in of_draw] for of_draw in rows])
        self.train, self.test = order[:, : target.train], order[:, target.train :]
        self.num_labels = len(pool.classes)

    def bases_without(self, left_out: Sequence[str]) -> dict[str, TensorBasis]:
        """Return the basis of every tensor as if these snapshots, or the `"losses"`, were not recorded."""
        key = tuple(sorted({"states", "start", "tail", "branches", "losses"}.intersection(left_out)))
        if key not in self._bases:
            unknown = {"train_losses": (), "eval_losses": ()} if "losses" in key else {}
            self._bases[key] = {
                name: tensor_basis(
                    self.theta0[name],
                    **{kind: values for kind, values in snapshots.items() if kind not in key},
                    origin=snapshots["start"],
                    context=replace(self.contexts[name], **unknown),
                )
                for name, snapshots in self._snapshots.items()
            }
        return self._bases[key]

    def weights(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        """Return Θ0 plus the combination of the basis of each tensor; BatchNorm statistics are those of Θ0."""
        moved = {
            name: self.theta0[name] + combine(self.bases[name].elements, of_tensor)
            for name, of_tensor in coefficients.items()
        }
        return {**self.theta0, **moved}

    def load(self, weights: Mapping[str, Tensor]) -> PreTrainedModel:
        """Load weights into the model of this task, with BatchNorm statistics of the source data."""
        self.model.load_state_dict(weights)
        recalibrate_batch_norm(self.model, batches({"pixel_values": self.source.train["pixel_values"]}, _BATCH))
        return self.model

    def utility(self, weights: Mapping[str, Tensor], half: int | None = None) -> Utility:
        """Return the screening utility of weights, tested on the drawings of one half or on all."""
        reference = self.source_loss  # of Θ0, which it loads
        model = self.load(weights)
        loss = evaluate_classifier(model, self.source.test)["loss"]
        inputs, labels = features(model, self.images), self.images["labels"]
        accuracies = soft_maximum(self._accuracies(inputs, labels, half)).numpy()
        cost = min(LOSS_WEIGHT * max(0.0, loss - reference), LARGEST_COST)
        return Utility(accuracies - cost, loss, float(accuracies.mean()))

    @cached_property
    def source_loss(self) -> float:
        """Loss of Θ0 on source test data."""
        return evaluate_classifier(self.load(self.theta0), self.source.test)["loss"]

    def target_split(self, draw: int) -> Split:
        """Return the examples of a draw for fine-tuning; its training examples are those of the screening."""
        return self.task.suite_task.target_split(self.task.seed, draw)

    def copy_of(self, weights: Mapping[str, Tensor]) -> PreTrainedModel:
        return copy.deepcopy(self.load(weights))

    def of_characters(self, wanted: Sequence[int]) -> "RecordedTask":
        """Return the task with these target characters only."""
        task, labels = copy.copy(self), self.images["labels"]
        new = torch.full((self.num_labels,), -1)
        new[list(wanted)] = torch.arange(len(wanted))
        # draws have equally many drawings of each character
        task.train, task.test = (rows[new[labels[rows]] >= 0].view(len(rows), -1) for rows in (self.train, self.test))
        task.images = {**self.images, "labels": new[labels]}
        task.num_labels = len(wanted)
        return task

    def is_tested(self, half: int | None) -> Tensor:
        """Return which test drawings of each draw `(D, N)` are of a half of the drawings of each class."""
        halves = torch.empty_like(self.images["labels"])
        for label in range(self.num_labels):
            of_class = self.images["labels"] == label
            halves[of_class] = torch.arange(int(of_class.sum())) % 2
        return torch.ones_like(self.test, dtype=torch.bool) if half is None else halves[self.test] == half

    def _accuracies(self, inputs: Tensor, labels: Tensor, half: int | None) -> Tensor:
        """Return the test accuracy `(D, penalties)`."""
        heads = ridge_heads(inputs[self.train], labels[self.train], self.num_labels, PENALTIES)
        predicted = logits(inputs[self.test], heads).argmax(-1)
        is_tested = self.is_tested(half)[:, None]
        is_right = (predicted == labels[self.test][:, None]) & is_tested
        return is_right.sum(-1) / is_tested.sum(-1)


def uniform(coefficients: Coefficients, norm: bool = True) -> Rule:
    """Return the rule that gives every tensor the same coefficients; without `norm`, norm weights stay at Θ0."""
    return lambda task: {
        name: coefficients for name, context in task.contexts.items() if norm or context.role != "norm"
    }


def controls(task: RecordedTask) -> dict[str, Rule]:
    """Return the controls as rules; they learn nothing."""
    states, tail = task.num_states, task.num_tail
    rules = {
        "naive": uniform({}),
        **{f"shrink-{factor}": uniform({"theta0": 1 - factor}, norm=False) for factor in (0.9, 0.8, 0.5)},
        "average": uniform({f"state-{index}": 1 / states for index in range(1, states)}),
        **{f"start-{scale}": uniform({"start": scale - 1}) for scale in (0.5, 0.8, 1.2)},
        **{f"task-vector{scale:+}": uniform({f"state-{states - 1}": -scale}) for scale in (-0.5, 0.25, 0.5)},
        "state-1": uniform({"state-1": 1.0}),
        "tail-average": uniform({"tail": tail / (tail + 1)}),
        "branch-average": uniform({"branches": 1.0}),
        "branches+theta0": uniform({"branches": 2 / 3}),
        "jackknife": uniform({"branches": -1.0}),
        "spectral-filter": _spectral_filter,
        "shrunken-jackknife": _shrunken_jackknife,
        "compute-matched": uniform({"further": 1.0}),
    }
    return rules


def _spectral_filter(task: RecordedTask) -> dict[str, Coefficients]:
    return {
        name: {"start": -1.0, "filtered": 1.0} for name, basis in task.bases.items() if "filtered" in basis.elements
    }


def _shrunken_jackknife(task: RecordedTask) -> dict[str, Coefficients]:
    return {name: {"branches": -shrinkage(basis)} for name, basis in task.bases.items()}


def shrinkage(basis: TensorBasis) -> float:
    """Return the James–Stein factor λ of the jackknife's correction."""
    from know_hf.known.combination_network import TENSOR_FEATURES

    return float(basis.tensor_features[TENSOR_FEATURES.index("branches_shrinkage")])


def best_fixed(utilities: Sequence[Mapping[str, Any]]) -> str:
    """Return the control with the best mean over tasks, given `{control: mean utility}` of each task."""
    names = utilities[0]
    return max(names, key=lambda name: float(np.mean([of_task[name] for of_task in utilities])))


def load_tasks(split: Path, part: str, data: str, output_dir: Path, draws: int = DRAWS) -> list[RecordedTask]:
    """Load the recorded tasks of a part.

    Raises:
        `ValueError`:
            If none is recorded.
    """
    tasks = [task for task in meta_tasks(read_split(split), part, data, output_dir) if task.is_recorded]
    if not tasks:
        raise ValueError(f"{output_dir} has no recorded task of the part {part!r}; run record.py first")
    return [RecordedTask(task, draws) for task in tqdm(tasks, f"loading {part} tasks", unit="task")]


def cached_controls(task: RecordedTask) -> dict[str, dict[str, Any]]:
    """Return the utility of every control on a task as JSON values; a file of the task keeps them."""
    path = task.task.folder / f"capped-controls-{task.draws}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    missing = {name: rule for name, rule in controls(task).items() if name not in stored}
    if missing:
        stored |= {name: task.utility(task.weights(rule(task))).to_dict() for name, rule in missing.items()}
        path.write_text(json.dumps(stored))
    return stored
