"""Progress bar, evaluation and logs of the stages."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..data.rows import random_seeds, restart_collator
from ..data.subsets import Subset
from ..distributed import is_sharded, on_main_process, share_buffers
from ..markdown import percent
from ..model_tensors import memory_key
from ..trajectory import StateRecord, WeightTrajectory
from ..trajectory.summary import displacement, metrics_summary
from .chance import chance_warning

logger = logging.get_logger(__name__)

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}  # by bytes per element
_TIMINGS = ("_runtime", "_per_second", "_preparation_time")


class Progress:
    """Shows, evaluates and logs the stages of a recording of `num_states` states.

    The trainer evaluates the states; its loggers get the values under `forgetting/`.
    """

    def __init__(self, trainer: Trainer, trajectory: WeightTrajectory, num_states: int) -> None:
        self._trainer, self._trajectory = trainer, trajectory
        self._steps = [state.steps for state in trajectory.trained]
        self._metrics: dict[int, dict[str, float]] = {}
        self._written: dict[int, dict[str, float]] = {}
        self._last_move = ""
        self._is_main = trainer.accelerator.is_main_process
        self._bar = tqdm(
            total=num_states,
            initial=len(self._steps),
            desc="forgetting",
            unit="state",
            disable=trainer.args.disable_tqdm or not self._is_main,
        )

    def begin(self, index: int, subset: Subset) -> None:
        """Show the stage that begins."""
        self._log()
        self._bar.set_postfix_str(f"{self._name(index).replace('-', ' ')}: {subset.size}{self._last_move}")

    def on_written(self, record: StateRecord) -> None:
        """Note the displacement of a state; called by the thread that wrote it."""
        moved = displacement(self._trajectory, record.name)
        stage = len(self._steps)
        values = {"state": stage, "displacement": moved, "num_examples": record.num_examples}
        self._steps.append(record.steps)
        self._last_move = f", {record.label} moved by {percent(moved)}" if stage else ""
        self._written[stage] = {key: value for key, value in values.items() if value is not None}
        self._bar.update()

    def evaluate(self, index: int, weights: list[int] | None = None) -> None:
        """Evaluate the state that the model holds, while it is written, and record its finite metrics.

        `weights` is the [`weights_checksum`] of the state; by default, the model is known to hold it.
        """
        if self._trainer.eval_dataset is None:
            return
        share_buffers(self._trainer)
        evaluated = _EvaluatedWeights(self._trainer)
        weights = weights_checksum(self._trainer) if weights is None else weights
        self._trainer.add_callback(evaluated)
        restart_collator(self._trainer.data_collator)
        try:
            with random_seeds(self._trainer.args.seed):  # the same masks for every state
                results: Mapping[str, Any] = self._trainer.evaluate()
        finally:
            self._trainer.remove_callback(evaluated)
        if evaluated.checksum not in (None, weights):
            logger.warning(
                f"the evaluation of state {index} used other weights than the recorded ones, so its metrics are not"
                " recorded. Change the weights, as for an exponential moving average, in on_train_end of a callback"
            )
            results = {}  # no return: all processes meet below
        metrics, has_diverged = {}, False
        for name, value in results.items():
            if name == "epoch" or name.endswith(_TIMINGS) or "_mem_" in name:
                continue
            if (number := _finite_number(value)) is None:
                has_diverged = True
                logger.warning(f"{name} of state {index} is not a finite number ({value!r}) and is not recorded")
            else:
                metrics[name] = number
        self._metrics[index] = metrics
        if index == 0 and self._is_main and not has_diverged:
            if text := chance_warning(self._trainer, metrics):
                logger.warning(text)
        on_main_process(self._trainer.accelerator, lambda: self._trajectory.update_metrics(self._name(index), metrics))
        self._log()

    def finish(self) -> None:
        """Wait for the last state, raise its write error, if any, and print the metrics of all states."""
        self._trajectory.check(wait=True)
        self._log()
        args = self._trainer.args
        if self._is_main and not args.disable_tqdm and args.logging_strategy != IntervalStrategy.NO:
            self._bar.write(f"\n{metrics_summary(self._trajectory)}\n")

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()

    def _name(self, stage: int) -> str:
        schedule = self._trajectory.schedule
        is_branch = stage > 0 and schedule is not None and schedule.kind == "complementary"
        return f"branch-{stage - 1}" if is_branch else f"state-{stage}"

    def _log(self) -> None:
        state = self._trainer.state
        step = state.global_step
        for index in sorted(self._written):
            values = {**self._written.pop(index), **self._metrics.pop(index, {})}
            # Every stage counts its steps from 0, but loggers expect them to rise.
            state.global_step = sum(self._steps[k] for k in range(index + 1))
            self._trainer.log({f"forgetting/{name}": value for name, value in values.items()})
        state.global_step = step


class _EvaluatedWeights(TrainerCallback):
    """Notes the weights of the first prediction step."""

    checksum: list[int] | None = None

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_prediction_step(self, *others: Any, **kwargs: Any) -> None:
        if self.checksum is None:
            self.checksum = weights_checksum(self._trainer)


def weights_checksum(trainer: Trainer) -> list[int] | None:
    """Return the sum of the bits of every trainable parameter; `None` if the parameters are sharded."""
    if is_sharded(trainer):
        return None
    return [_sum_of_bits(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad]


def other_checksums(trainer: Trainer) -> dict[str, int]:
    """Return the sum of the bits of every tensor in modules of the trainer that is not one of its model.

    Such a module is the reference of TRL's trainers. Empty if the parameters are sharded.
    """
    if is_sharded(trainer):
        return {}
    modules = {key: value for key, value in vars(trainer).items() if isinstance(value, nn.Module)}
    state = {f"{key}.{name}": tensor for key, m in modules.items() for name, tensor in m.state_dict().items()}
    own = {memory_key(tensor) for tensor in trainer.model.state_dict().values() if isinstance(tensor, torch.Tensor)}
    return {
        name: _sum_of_bits(tensor)
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta and memory_key(tensor) not in own
    }


def warn_about_others(trainer: Trainer, before: Mapping[str, int]) -> bool:
    """Warn when a training changed modules beside the model, of which no state holds the tensors.

    `before` has the [`other_checksums`] before the training.
    """
    after = other_checksums(trainer) if before else {}
    changed = [name for name, checksum in before.items() if after.get(name) != checksum]
    if changed:
        logger.warning(
            f"the training changes {changed[0]!r} of the trainer, which no state holds: a resumed run ends in other"
            " weights. Make it part of the model, or do not interrupt the recording"
        )
    return bool(changed)


def _sum_of_bits(tensor: torch.Tensor) -> int:
    values = tensor.detach().flatten()
    return int(values.view(_BITS[values.itemsize]).sum(dtype=torch.int64))


def _finite_number(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
