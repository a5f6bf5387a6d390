"""Arms: the ways to initialise the downstream task that are compared with each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..batch_norm import recalibrate_batch_norm
from ..modeling_known import KNOWNModel
from ..prediction import predict_overflowed_weights
from ..predictors import get_predictor
from ..trajectory import WeightTrajectory


@dataclass(frozen=True)
class ArmSources:
    """What the arms of one seed are made from.

    Args:
        trajectory ([`WeightTrajectory`]): The recorded states.
        output_dir (`Path`): Folder for the predicted checkpoints, one folder an arm.
        batches (sequence of mappings): Source training data; every arm's BatchNorm statistics are measured on it.
        fresh_model (callable): Makes a newly initialised model of the recorded architecture.
        oracle_model (callable, *optional*): Makes the model that was really trained on more data.
        known ([`KNOWNModel`], `str` or `Path`, *optional*): The KNOWN weights; by default the shipped ones.
    """

    trajectory: WeightTrajectory
    output_dir: Path
    batches: Sequence[Mapping[str, torch.Tensor]]
    fresh_model: Callable[[], PreTrainedModel]
    oracle_model: Callable[[], PreTrainedModel] | None = None
    known: KNOWNModel | str | Path | None = None


@dataclass(frozen=True)
class Arm:
    """One way to get initial weights.

    Args:
        name (`str`): What tables and reports call it.
        kind (`str`): `"state"` (a state of the trajectory as it is), `"fresh"` (newly initialised), `"oracle"` (really
            trained on more data), or `"predicted"`.
        description (`str`): For people.
        predictor (`str`, *optional*, defaults to `"known"`): Name of the predictor of a `"predicted"` arm.
        options (`Mapping[str, Any]`, *optional*): Fields of the predictor.
        steps (`int`, *optional*, defaults to `1`): Recursive predictions.
        state (`int`, *optional*, defaults to `0`): Index of the state of a `"state"` arm.
    """

    name: str
    kind: Literal["state", "fresh", "oracle", "predicted"]
    description: str
    predictor: str = "known"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1
    state: int = 0

    @property
    def is_candidate(self) -> bool:
        """Whether a user could choose this arm instead of naive; the others are points of reference."""
        return self.kind == "predicted" or (self.kind == "state" and self.state > 0)

    def initial_model(self, sources: ArmSources) -> PreTrainedModel:
        """Makes the initial weights, BatchNorm statistics measured on the source data.

        Args:
            sources ([`ArmSources`]): What they are made from; a predicted checkpoint is written to
                `sources.output_dir / name`, in place of an earlier one.

        Raises:
            `ValueError`: for an oracle arm without `sources.oracle_model`.
        """
        if self.kind == "predicted":
            return self._predict(sources)
        if self.kind == "state":
            model = sources.trajectory.load_model(self.state)
        elif self.kind == "fresh":
            model = sources.fresh_model()
        elif sources.oracle_model is not None:
            model = sources.oracle_model()
        else:
            raise ValueError(f"arm {self.name!r} is an oracle, but the sources have no oracle_model")
        recalibrate_batch_norm(model, sources.batches)
        return model

    def _predict(self, sources: ArmSources) -> PreTrainedModel:
        is_known = self.predictor == "known" and not self.options
        result = predict_overflowed_weights(
            sources.trajectory,
            sources.known if is_known else None,
            self.steps,
            output_dir=sources.output_dir / self.name,
            predictor=None if is_known else get_predictor(self.predictor, **self.options),
            recalibrate_with=sources.batches,
            overwrite=True,
        )
        return result.load_model()


NAIVE = Arm("naive", "state", "Θ0, trained on all source data")
RANDOM = Arm("random", "fresh", "newly initialised")
ORACLE = Arm("oracle", "oracle", "really trained on 1/r times the source data")
AVERAGE = Arm("average", "predicted", "mean of all states", predictor="average")


def known_arm(steps: int, ratio: float) -> Arm:
    """KNOWN at a number of steps, named by the amount of data it stands for: `known-x4` for 2 steps at ratio 0.5."""
    times = f"{ratio**-steps:.3g}"
    return Arm(
        f"known-x{times}", "predicted", f"KNOWN, {steps} step(s), standing for {times} times the data", steps=steps
    )


def shrink_arm(factor: float) -> Arm:
    """Every predicted weight times a constant."""
    return Arm("shrink", "predicted", f"every weight times {factor:g}", predictor="shrink", options={"factor": factor})
