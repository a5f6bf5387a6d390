"""Initial weights of arms: made from the recorded states, from other models, or by prediction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, default_data_collator

from ..batch_norm import recalibrate_batch_norm
from ..known import KNOWNModel
from ..model_tensors import is_adapter, names_in_memory
from ..prediction import PredictionPlan, PredictionResult, TensorSource, WriteOptions, write_checkpoint
from ..prediction.choosing import CrossFit, Gate
from ..prediction.choosing.batch_losses import batch_losses
from ..prediction.choosing.cross_fit import write_cross_fitted
from ..prediction.choosing.gate import gate_batch_size, write_best_candidate
from ..prediction.engine import PredictedTensors
from ..prediction.selection import MINIMUM_VALUES
from ..prediction.tensor_sources import full_tensors
from ..prediction.write_checkpoint import measure
from ..predictors import Rescale
from ..roles import PREDICTED_DTYPES
from ..trajectory import WeightTrajectory, load_pretrained
from ..trajectory.merging import merge_adapter
from .fine_tuning import Examples, batches, rows_of, trimmed

LARGEST_SIDE = 4096  # of matrices to decompose; larger ones would take hours
_SHUFFLING_SEED = 20250805


@dataclass(frozen=True)
class ArmSources:
    """What the arms of one seed are made from: a [`ComparisonTask`], whose callables are given the seed, and its data.

    `source` has validation examples of the source task, never those that arms are tested on. `train` has its training
    examples in the order in which the trainings get them.
    """

    trajectory: WeightTrajectory
    output_dir: Path  # of the predicted checkpoints, one subfolder per arm
    batches: Sequence[Mapping[str, Tensor]]  # source training data for the BatchNorm statistics of every arm
    fresh_model: Callable[[], PreTrainedModel] | None = None
    oracle_model: Callable[[], PreTrainedModel] | None = None
    known: KNOWNModel | str | Path | None = None
    pretrained_model: Callable[[], PreTrainedModel] | None = None
    train_further: Callable[[PreTrainedModel, list[int]], PreTrainedModel] | None = None
    branch_trajectory: Callable[[], WeightTrajectory] | None = None
    base_model: Callable[[], PreTrainedModel] | None = None  # adapters are merged into it
    model_class: type[PreTrainedModel] | None = None
    device: torch.device | None = None  # the CPU by default
    source: Examples | None = None  # for a gate
    train: Examples | None = None  # for cross-fitting
    target: Examples | None = None  # training examples of the target task: `gate-few` uses as many of `source`

    def recalibrate(self, model: PreTrainedModel) -> None:
        """Compute BatchNorm statistics on the source data, in place.

        Raises:
            `ValueError`: If the model has BatchNorm and there is no source data.
        """
        try:
            recalibrate_batch_norm(model, self.batches)
        except ValueError as error:
            raise ValueError(f"{error}: the training examples of the task's source") from error

    def state(self, index: int) -> PreTrainedModel:
        """Load a state, [`merged`]."""
        return self.merged(self.trajectory.load_model(index, self.model_class, self.base()))

    def base(self) -> PreTrainedModel | None:
        """Load the base model of a trajectory of adapters."""
        return None if self.base_model is None else self.base_model()

    def merged(self, model: Any) -> PreTrainedModel:
        """Return the model in float32 on the device, with an adapter merged into its base model."""
        model = model.float()
        return (merge_adapter(model, self.trajectory) if is_adapter(model) else model).to(self.device)


def trained_on(sources: ArmSources) -> PreTrainedModel:
    """Train Θ0 for the optimizer steps of the later states, but on all data."""
    assert sources.train_further is not None
    theta = sources.trajectory.load_model(0, sources.model_class, sources.base())
    return sources.merged(sources.train_further(theta, [state.steps for state in sources.trajectory.states[1:]]))


def shuffled(sources: ArmSources) -> PreTrainedModel:
    """Shuffle the values of each tensor of Θ0."""
    model = sources.state(0)
    generator = torch.Generator().manual_seed(_SHUFFLING_SEED)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        parameter.data.copy_(parameter.data.flatten()[order].view_as(parameter))
    return model


def predicted(sources: ArmSources, folder: Path, plan: PredictionPlan) -> PreTrainedModel:
    """Predict the weights."""
    return _written(sources, folder, PredictedTensors(plan))


@torch.no_grad()
def rescaled(sources: ArmSources, model: PreTrainedModel, options: Mapping[str, Any]) -> PreTrainedModel:
    """Rescale a model, Θ0 or a prediction from it, in place by the factors of Θ0; `options` are fields of [`Rescale`].

    Of an adapter these are the merged weights: factors of A and B cancel in their product. Outputs of Θ0 are compared
    on the first batch of the sources. They may differ by 5% of the largest, as the epsilon of BatchNorm layers has an
    effect and their statistics are recalibrated.
    """
    batch = next(({name: value.to(model.device) for name, value in batch.items()} for batch in sources.batches), None)
    rescaling = Rescale(**{"batch": batch, "tolerance": 0.05, **options}).rescaling(sources.state(0))
    in_memory, tensors = names_in_memory(model), model.state_dict()
    factors = {tensors[in_memory[name]].data_ptr(): (name, factor) for name, factor in rescaling.factors.items()}
    for name, factor in factors.values():  # a tied tensor once
        tensor = tensors[in_memory[name]]
        tensor.copy_(factor.scale(tensor))
    return model


def chosen_by_gate(
    sources: ArmSources, folder: Path, plan: PredictionPlan, few: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Choose from the family of a [`Gate`] by its default metric, on batches of 8 source validation examples, or of
    fewer for at least 10 batches. The BatchNorm statistics of every candidate are recalibrated.

    With `few`, only as many examples are used as the target task has training labels, but at least 10.

    Returns:
        The weights, and `{"chosen": name of the candidate, "kept": whether it is Θ0, "num_candidates",
        "forward_passes": examples times candidates}`.
    """
    assert sources.source is not None
    examples = sources.source
    if few:
        assert sources.target is not None
        most = max(len(sources.target["labels"]), MINIMUM_VALUES)
        examples = {name: tensor[:most] for name, tensor in examples.items()}
    count = len(examples["labels"])

    def losses(model: Any) -> list[float]:
        sources.recalibrate(model)
        return batch_losses(model, batches(examples, gate_batch_size(count)))[1]

    gate = Gate(losses, base_model=sources.base(), device=sources.device)
    result = write_best_candidate(gate, plan, folder, _options(sources))
    return _loaded(sources, folder), _choice(result, count)


def chosen_by_cross_fit(
    sources: ArmSources, folder: Path, plan: PredictionPlan
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Choose by [`CrossFit`], on the halves of the training examples that the branches have not seen; returns the same
    as [`chosen_by_gate`].
    """
    assert sources.train is not None
    count = len(sources.train["labels"]) // 2
    cross_fit = CrossFit(
        rows_of(sources.train),
        lambda rows: trimmed(default_data_collator(rows)),
        gate_batch_size(count),
        base_model=sources.base(),
        device=sources.device,
    )
    has_batch_norm = any(role.is_batch_norm for role in sources.trajectory.roles.values())
    options = replace(_options(sources), recalibrate_with=sources.batches if has_batch_norm else None)
    result = write_cross_fitted(cross_fit, plan, folder, options)
    return _loaded(sources, folder), _choice(result, 2 * min(count, cross_fit.max_examples))


def matched_shrink(sources: ArmSources, folder: Path, plan: PredictionPlan) -> PreTrainedModel:
    """Scale each predicted tensor of Θ0 by the shrink factor of the prediction."""
    trajectory = sources.trajectory
    reports = measure(trajectory, PredictedTensors(plan))

    def shrunk(name: str, start: int, stop: int) -> Tensor | None:
        if not reports[name].predicted:
            return None
        return reports[name].shrink_factor * trajectory.read(name, start, stop).float()

    return _written(sources, folder, shrunk)


def moved_by_singular_vectors(sources: ArmSources, folder: Path, scale: float) -> PreTrainedModel:
    """Add to Θ0 a multiple of the moves Θk − Θ(k+1), merged as [`merge_task_singular_vectors`] merges tasks."""
    trajectory = sources.trajectory

    def moved(name: str) -> Tensor | None:
        if trajectory.roles[name].role == "copied" or trajectory.is_unchanged(name):
            return None
        if trajectory.dtype(name) not in PREDICTED_DTYPES:
            return None
        newest_first = trajectory.history(name).flip(0)
        moves = list(newest_first[:-1] - newest_first[1:])
        return newest_first[0] + scale * merge_task_singular_vectors(moves)

    return _written(sources, folder, full_tensors(moved))


def merge_task_singular_vectors(differences: Sequence[Tensor]) -> Tensor:
    """Merge T matrices with less interference than their sum: `U⊥ diag(σ) V⊥ᵀ`, float32.

    TSV-Merge (Gargiulo et al., *Task Singular Vectors: Reducing Task Interference in Model Merging*, arXiv 2412.00081,
    algorithm 1). With `Δt = Ut diag(σt) Vtᵀ`, U, σ and V are the first `⌊min(m, n) / T⌋` singular triplets of each t,
    side by side. `U⊥ = P Qᵀ` for the thin decomposition `U = P D Qᵀ` is the nearest matrix with orthonormal columns,
    and V⊥ likewise. Convolution kernels are matrices `(out, in · taps)`. Vectors, and matrices with fewer rows or
    columns than T, are averaged, as all other tensors in the paper's code.

    Raises:
        `ValueError`: If the smaller side of the matrices exceeds 4,096.
    """
    stacked = torch.stack([difference.float() for difference in differences])
    matrices = stacked.flatten(2) if stacked.ndim > 2 else stacked
    rank = min(matrices.shape[1:]) // len(matrices) if matrices.ndim == 3 else 0
    if rank == 0:
        return stacked.mean(dim=0)
    if min(shape := tuple(matrices.shape[1:])) > LARGEST_SIDE:
        raise ValueError(f"a matrix of {shape} is too large for singular vectors; leave out task-singular-vectors")
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    left = torch.cat([u[:, :rank] for u in left], dim=1)
    right = torch.cat([v[:rank].T for v in right], dim=1)
    merged = _orthonormal(left) * values[:, :rank].flatten() @ _orthonormal(right).T
    return merged.reshape(stacked.shape[1:])


def _orthonormal(columns: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    return left @ right


def _written(
    sources: ArmSources, folder: Path, tensors: TensorSource | Callable[[str, int, int], Tensor | None]
) -> PreTrainedModel:
    """Write tensors as a float32 checkpoint and load it."""
    write_checkpoint(sources.trajectory, tensors, folder, _options(sources))
    return _loaded(sources, folder)


def _choice(result: PredictionResult, count: int) -> dict[str, Any]:
    gate = result.gate
    assert gate is not None
    number = len(gate.candidates) + len(gate.screened)
    choice = {"chosen": gate.chosen, "kept": gate.is_reference, "num_candidates": number}
    return {**choice, "forward_passes": number * count}


def _options(sources: ArmSources) -> WriteOptions:
    return WriteOptions(dtype=torch.float32, overwrite=True, model_class=sources.model_class)


def _loaded(sources: ArmSources, folder: Path) -> PreTrainedModel:
    return sources.merged(load_pretrained(folder, sources.model_class, sources.base()))
