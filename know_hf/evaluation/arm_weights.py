"""Where the initial weights of an arm come from: a state, a prediction, a training, or what is left of one of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..batch_norm import recalibrate_batch_norm
from ..known import KNOWNModel
from ..model_tensors import is_adapter
from ..prediction import PredictionPlan, TensorSource, WriteOptions, plan_prediction, write_checkpoint
from ..prediction.engine import PredictedTensors
from ..prediction.tensor_sources import full_tensors
from ..prediction.write_checkpoint import measure
from ..predictors import get_predictor
from ..trajectory import WeightTrajectory, load_pretrained
from ..trajectory.merging import merge_adapter
from .task_singular_vectors import merge_task_singular_vectors

if TYPE_CHECKING:
    from .arms import Arm

_SHUFFLING_SEED = 20250805


@dataclass(frozen=True)
class ArmSources:
    """What the arms of one seed are made from.

    Args:
        trajectory ([`WeightTrajectory`]): The recorded states.
        output_dir (`Path`): Folder for the predicted checkpoints, one folder an arm.
        batches (sequence of mappings): Source training data; every arm's BatchNorm statistics are measured on it.
        fresh_model (callable, *optional*): Makes a newly initialised model of the recorded architecture.
        oracle_model (callable, *optional*): Makes the model that was really trained on more data.
        known ([`KNOWNModel`], `str` or `Path`, *optional*): The KNOWN weights; by default the shipped ones.
        pretrained_model (callable, *optional*): Makes the model that the recording started from.
        train_further (callable, *optional*): Trains a model on all source data, as the stages of the trajectory were
            trained, and returns it: `train_further(model, steps)` with the optimizer steps of each stage.
        base_model (callable, *optional*): For a trajectory of adapters, makes the model that they belong to. Adapters
            are merged into it: arms are whole models.
        model_class (`type`, *optional*): The model's class, where transformers has none of its name.
        device (`torch.device`, *optional*): Where models are put; by default on the CPU.
    """

    trajectory: WeightTrajectory
    output_dir: Path
    batches: Sequence[Mapping[str, Tensor]]
    fresh_model: Callable[[], PreTrainedModel] | None = None
    oracle_model: Callable[[], PreTrainedModel] | None = None
    known: KNOWNModel | str | Path | None = None
    pretrained_model: Callable[[], PreTrainedModel] | None = None
    train_further: Callable[[PreTrainedModel, list[int]], PreTrainedModel] | None = None
    base_model: Callable[[], PreTrainedModel] | None = None
    model_class: type[PreTrainedModel] | None = None
    device: torch.device | None = None

    def recalibrate(self, model: PreTrainedModel) -> None:
        """Measures BatchNorm statistics on the source data, in place.

        Raises:
            `ValueError`: when the model has BatchNorm and there is no source data.
        """
        try:
            recalibrate_batch_norm(model, self.batches)
        except ValueError as error:
            raise ValueError(f"{error}: the training examples of the task's source") from error

    def state(self, index: int) -> PreTrainedModel:
        """The model with the weights of a state, as a whole model."""
        base = None if self.base_model is None else self.base_model()
        return self.whole(self.trajectory.load_model(index, self.model_class, base))

    def whole(self, model: Any) -> PreTrainedModel:
        """The model itself in float32; of an adapter, its base model with the adapter merged into it."""
        model = model.float()
        return merge_adapter(model, self.trajectory) if is_adapter(model) else model


def initial_model(arm: "Arm", sources: ArmSources) -> PreTrainedModel:
    """Makes the initial weights of an arm, in float32 whatever the dtype of the recording: a small learning rate
    changes next to nothing in bfloat16. BatchNorm statistics are measured on the source data, for every arm alike.

    Args:
        arm ([`Arm`]): What is made.
        sources ([`ArmSources`]): What it is made from.

    Raises:
        `ValueError`: when the sources lack what the arm is made from.
    """
    model = _MAKERS[arm.kind](arm, sources).float().to(sources.device)
    sources.recalibrate(model)
    return model


def _state(arm: "Arm", sources: ArmSources) -> PreTrainedModel:
    if arm.state >= sources.trajectory.num_states:
        raise ValueError(f"arm {arm.name!r} is state {arm.state}, but {sources.trajectory} has no such state")
    return sources.state(arm.state)


def _fresh(arm: "Arm", sources: ArmSources) -> PreTrainedModel:
    return _given(arm, sources.fresh_model, "fresh_model", "newly initialised")()


def _pretrained(arm: "Arm", sources: ArmSources) -> PreTrainedModel:
    return _given(arm, sources.pretrained_model, "pretrained_model", "pretrained")()


def _oracle(arm: "Arm", sources: ArmSources) -> PreTrainedModel:
    return sources.whole(_given(arm, sources.oracle_model, "oracle_model", "an oracle")())


def _trained_on(arm: "Arm", sources: ArmSources) -> PreTrainedModel:
    """What the same optimizer steps give without forgetting: each stage as it was, but on all data."""
    train_further = _given(arm, sources.train_further, "train_further", "trained further")
    steps = [state.steps for state in sources.trajectory.states[1:]]
    base = None if sources.base_model is None else sources.base_model()
    model = sources.trajectory.load_model(0, sources.model_class, base)
    return sources.whole(train_further(model, steps))


def _shuffled(arm: "Arm", sources: ArmSources) -> PreTrainedModel:
    model = sources.state(0)
    generator = torch.Generator().manual_seed(_SHUFFLING_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return model


def _predicted(arm: "Arm", sources: ArmSources) -> PreTrainedModel:
    plan = _plan(arm, sources)
    return _written(arm, sources, PredictedTensors(plan))


def _matched_shrink(arm: "Arm", sources: ArmSources) -> PreTrainedModel:
    """Scale each predicted tensor of Θ0 by the shrink factor of the prediction."""
    trajectory = sources.trajectory
    plan = _plan(arm, sources)
    reports = measure(trajectory, PredictedTensors(plan))

    def shrunk(name: str, start: int, stop: int) -> Tensor | None:
        if not reports[name].predicted:
            return None
        return reports[name].shrink_factor * trajectory.read(name, start, stop).float()

    return _written(arm, sources, shrunk)


def _task_singular_vectors(arm: "Arm", sources: ArmSources) -> PreTrainedModel:
    trajectory, scale = sources.trajectory, arm.options.get("scale", 1.0)

    def merged(name: str) -> Tensor | None:
        if trajectory.roles[name].role == "copied" or trajectory.is_unchanged(name):
            return None
        newest_first = trajectory.history(name).flip(0)
        moves = list(newest_first[:-1] - newest_first[1:])
        return newest_first[0] + scale * merge_task_singular_vectors(moves)

    return _written(arm, sources, full_tensors(merged))


def _written(
    arm: "Arm", sources: ArmSources, tensors: TensorSource | Callable[[str, int, int], Tensor | None]
) -> PreTrainedModel:
    """Write tensors as a float32 checkpoint and load it."""
    folder = sources.output_dir / arm.name
    options = WriteOptions(dtype=torch.float32, overwrite=True, model_class=sources.model_class)
    write_checkpoint(sources.trajectory, tensors, folder, options)
    return _loaded(folder, sources)


def _plan(arm: "Arm", sources: ArmSources) -> PredictionPlan:
    is_known = arm.predictor == "known" and not arm.options
    return plan_prediction(
        sources.trajectory,
        (arm.known or sources.known) if is_known else None,
        arm.steps,
        predictor=None if is_known else get_predictor(arm.predictor, **arm.options),
        norm=arm.norm,
        estimate_time=False,
    )


def _loaded(folder: Path, sources: ArmSources) -> PreTrainedModel:
    base = None if sources.base_model is None else sources.base_model()
    return sources.whole(load_pretrained(folder, sources.model_class, base))


def _given(arm: "Arm", maker: Callable[..., Any] | None, name: str, what: str) -> Callable[..., Any]:
    if maker is None:
        raise ValueError(f"arm {arm.name!r} is {what}, but the sources have no {name}")
    return maker


_MAKERS: dict[str, Callable[["Arm", ArmSources], PreTrainedModel]] = {
    "state": _state,
    "fresh": _fresh,
    "pretrained": _pretrained,
    "oracle": _oracle,
    "shuffled": _shuffled,
    "trained_on": _trained_on,
    "predicted": _predicted,
    "matched_shrink": _matched_shrink,
    "task_singular_vectors": _task_singular_vectors,
}
