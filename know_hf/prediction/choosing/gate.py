"""[`Gate`]: evaluate candidates on validation data and write the best; Θ0 stays unless another one is better."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from ...data.rows import random_seeds, restart_collator
from ...distributed import on_main_process
from ...model_tensors import without_adapter
from ...predictors import Predictor
from ..engine import prediction_result
from ..plan import PredictionPlan
from ..result import PredictionResult
from ..selection import MINIMUM_VALUES, REFERENCE, GateResult, check_rule
from ..tensor_sources import TensorSource
from ..write_checkpoint import WriteOptions, checkpoint_folder, fill_checkpoint
from .batch_losses import LOSS, METRICS, batch_losses
from .candidate_model import CandidateModel, unchanged
from .candidates import Candidate, PlannedCandidate, as_candidate, plan_candidates
from .screening import screen_and_choose

# gate, tensors, whether to recalibrate, batches, whether to verify
Evaluate = Callable[["Gate", TensorSource, bool, Sequence[int] | None, bool], float | list[float]]


@dataclass(frozen=True)
class Gate:
    """Validation data and the rule by which `predict_overflowed_weights(..., gate=Gate(...))` chooses what to write.

    Pass either `compute_loss` or `dataset`. The candidates are

    - Θ0 and the other states;
    - the requested prediction, at every number of steps up to the requested one;
    - the [`FAMILY`]: averages, moves between the states and beyond Θ0, and slightly smaller or larger weights;
    - if the trajectory has them, the start, tail states and branches, averages of tail and branches, and moves back
      towards the start.

    With `recalibrate_with`, all of them get recalibrated BatchNorm statistics, and Θ0 is also evaluated with its
    recorded ones.

    With a `dataset` of at least 80 batches, a random part of the batches screens the candidates, and the best few are
    tested on the other batches; see [`screen_and_choose`]. With fewer batches or with `compute_loss`, every candidate
    is tested on all values.

    <Tip>

    The gate chooses on the validation data, so the loss of the chosen candidate is optimistic. Report results on other
    data.

    </Tip>

    Args:
        compute_loss (`Callable`, *optional*):
            Maps a model in evaluation mode to its loss; lower is better. Returns one value per example or batch (at
            least 10, always in the same order), or a single number, which needs `margin`. It receives the same model
            object for all candidates, each time with other weights.
        dataset (`torch.utils.data.Dataset`, *optional*):
            Labelled validation examples. Each batch contributes one value of `metric`.
        data_collator (`Callable`, *optional*):
            Collates a list of examples into a batch, as in `Trainer`. Examples of different lengths need a collator
            that pads, such as `DataCollatorWithPadding(tokenizer)`.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of examples per batch of `dataset`, which must give at least 10 batches.
        metric (`str`, *optional*):
            What is compared with a `dataset`: `"calibrated loss"`, the cross-entropy after temperature scaling, which
            is not lower for a model that is only less confident; `"validation loss"`, the model's loss; or
            `"accuracy"`, the error rate. The default is the calibrated loss for models that give one class per
            example, the loss for others. With `compute_loss`, the name of its values in the result and the card.
        level (`float`, *optional*, defaults to `0.05`):
            Bound on the probability of choosing a candidate that is not better than Θ0, whatever the number of
            candidates, including those screened out. The bound is approximate: with fewer than about 50 values and a
            few large outliers, the probability can be several times higher. In simulations of 30 candidates and 100
            batches, it is 2% for normal differences, 5% for exponential ones, and 8% for a log-normal tail with
            σ = 1.5.
        margin (`float`, *optional*):
            Minimum improvement over Θ0, in units of the loss; 0 by default. It alone decides if the noise is unknown,
            which is the case for single numbers and for losses that all differ from Θ0's by the same amount.
        base_model (`PreTrainedModel`, *optional*):
            Base model of a trajectory of adapters, loaded again: one that was passed to `get_peft_model` has an
            adapter. It is not changed.
        device (`torch.device` or `str`, *optional*):
            Device of the evaluation; by default the accelerator's, or the CPU.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap, and of Python, NumPy and torch in each evaluation. A collator that masks at random,
            such as `DataCollatorForLanguageModeling`, gives every candidate the same batches.
        remove_unused_columns (`bool`, *optional*, defaults to `True`):
            Whether to drop columns that the model does not accept before `data_collator`, as in `Trainer`.
        candidates (sequence of `int`, `str`, [`Predictor`] or [`Candidate`], *optional*):
            Indices of states and predictors to evaluate instead of the other states and the family. Θ0 and the
            requested prediction are always candidates.
        screening (`float`, *optional*, defaults to `0.2`):
            Share of the batches that screens the candidates; 0 tests every candidate on all batches.
        num_confirmed (`int`, *optional*, defaults to `5`):
            Number of candidates that are tested after the screening.

    Raises:
        `ValueError`: if both or neither of `compute_loss` and `dataset` are given, `compute_loss` is not callable, a
            number is out of range, a dataset with a length gives fewer than 10 batches (one is enough with a
            `margin`), or a candidate is invalid (see [`Candidate`]).
    """

    compute_loss: Callable[[Any], float | Sequence[float]] | None = None
    dataset: Any = None
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None
    batch_size: int = 8
    metric: str | None = None
    level: float = 0.05
    margin: float | None = None
    base_model: PreTrainedModel | None = None
    device: torch.device | str | None = None
    seed: int = 0
    remove_unused_columns: bool = True
    candidates: Sequence[int | str | Predictor | Candidate] | None = None
    screening: float = 0.2
    num_confirmed: int = 5

    def __post_init__(self) -> None:
        if (self.compute_loss is None) == (self.dataset is None):
            raise ValueError("pass exactly one of compute_loss and dataset (the validation data)")
        if not (self.compute_loss is None or callable(self.compute_loss)):
            given = type(self.compute_loss).__name__
            raise ValueError(f"compute_loss must be a function of the model, got a {given}; pass data as dataset=")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        check_rule(self.level, self.margin)
        if self.dataset is not None and self.metric not in (None, *METRICS):
            raise ValueError(f"metric must be one of {', '.join(METRICS)} with a dataset, got {self.metric!r}")
        if not 0 <= self.screening < 1:
            raise ValueError(f"screening must be at least 0 (no screening) and below 1, got {self.screening}")
        if self.num_confirmed < 1:
            raise ValueError(f"num_confirmed must be at least 1, got {self.num_confirmed}")
        for item in self.candidates or ():
            as_candidate(item)
        if hasattr(self.dataset, "__len__"):
            count = math.ceil(len(self.dataset) / self.batch_size)
            if count < MINIMUM_VALUES and (count != 1 or self.margin is None):
                raise ValueError(
                    f"the dataset gives {count} batches of {self.batch_size} examples; at least {MINIMUM_VALUES} are"
                    " needed: add examples or lower batch_size="
                )

    def losses(self, model: Any, batches: Sequence[int] | None = None) -> float | list[float]:
        """Return what `compute_loss` returns, or one value per batch of `dataset`, in order.

        `batches` selects batches by their numbers; by default all.
        """
        return self.measure(model, batches)[1]

    @torch.no_grad()
    def measure(self, model: Any, batches: Sequence[int] | None = None) -> tuple[str, float | list[float]]:
        """Return the metric and its values, see [`Gate.losses`]."""
        model.eval()
        with torch.random.fork_rng(), random_seeds(self.seed):
            torch.manual_seed(self.seed)  # also of accelerators
            if self.compute_loss is None:
                return batch_losses(model, self._batches(model, batches), self.metric)
            values = self.compute_loss(model)
        try:
            return self.metric or LOSS, torch.as_tensor(values, dtype=torch.float64).tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"compute_loss must return a number or a list of numbers, got {values!r}") from error

    def _batches(self, model: Any, batches: Sequence[int] | None) -> Iterator[Any]:
        collate: Any = self.data_collator or _default_collate
        restart_collator(collate)
        if self.remove_unused_columns:
            accepted = inspect.signature(without_adapter(model).forward).parameters
            collate = RemoveColumnsCollator(collate, {*accepted, "label", "label_ids"})
        return self._loader(collate, batches)

    def _loader(self, collate: Any, batches: Sequence[int] | None) -> Iterator[Any]:
        """Yield batches by number. Random transforms get the same seed for a batch, whichever others are read."""
        if isinstance(self.dataset, IterableDataset):
            numbers: Iterable[int] = itertools.count() if batches is None else range(batches[-1] + 1)
            loader = DataLoader(self.dataset, self.batch_size, collate_fn=collate)
        else:
            count, size = len(self.dataset), self.batch_size
            numbers = range(math.ceil(count / size)) if batches is None else batches
            rows = [list(range(number * size, min((number + 1) * size, count))) for number in numbers]
            loader = DataLoader(self.dataset, batch_sampler=rows, collate_fn=collate)
        wanted, iterator = None if batches is None else set(batches), iter(loader)
        for number in numbers:
            try:
                with random_seeds(self.seed + number):
                    batch = next(iterator)
            except StopIteration:
                return
            if wanted is None or number in wanted:
                yield batch


def gate_batch_size(num_examples: int) -> int:
    """Return the default batch size of a [`Gate`], or a smaller one that gives enough batches."""
    return max(1, min(Gate.batch_size, num_examples // MINIMUM_VALUES))


def write_best_candidate(
    gate: Gate,
    plan: PredictionPlan,
    output_dir: str | Path,
    options: WriteOptions,
    finish: Callable[[Path, PredictionResult], None] | None = None,
) -> PredictionResult:
    """Evaluate each candidate in turn and write the chosen one to `output_dir`.

    One model is loaded, from Θ0, and gets the tensors of the candidates ([`CandidateModel`]). With several processes,
    every candidate is written, one at a time, and the main process evaluates it while the others wait. `finish` is
    called on the main process with the folder before it gets its final name.

    Returns:
        [`PredictionResult`]: the chosen checkpoint; its `gate` has all candidates.

    Raises:
        `ValueError`: for an adapter trajectory and a gate without `base_model`, a trajectory of a plain module,
            examples that cannot be collated, or losses that cannot be compared (see [`choose`]). Nothing is left on
            disk.
    """
    recalibrates = options.recalibrate_with is not None
    planned = plan_candidates(plan, gate.candidates, recalibrates)
    candidates = {candidate.name: candidate for candidate in planned}
    rule = {name: getattr(gate, name) for name in ("num_confirmed", "level", "margin", "seed")}
    rule["screening"] = 0.0 if gate.dataset is None else gate.screening

    def decide(evaluate: Evaluate) -> tuple[GateResult, PlannedCandidate]:
        def losses(name: str, batches: Sequence[int] | None) -> float | list[float]:
            candidate, verify = candidates[name], name == REFERENCE and batches is None
            return evaluate(gate, candidate.tensors, candidate.recipe["recalibrated"], batches, verify)

        decision = screen_and_choose(list(candidates), losses, **rule)
        requested = plan.name if plan.name in candidates else None
        return replace(decision, requested=requested), candidates[decision.chosen]

    return write_chosen(gate, plan, output_dir, options, decide, len(candidates), finish)


def write_chosen(
    gate: Gate,
    plan: PredictionPlan,
    output_dir: str | Path,
    options: WriteOptions,
    decide: Callable[[Evaluate], tuple[GateResult, PlannedCandidate]],
    num_evaluations: int,
    finish: Callable[[Path, PredictionResult], None] | None = None,
) -> PredictionResult:
    """Evaluate what a decision asks for, and write what it chose; see [`write_best_candidate`].

    `decide` gets a function that evaluates tensors, [`Evaluate`], and returns the result and the chosen candidate. The
    progress bar expects `num_evaluations`.
    """
    trajectory, accelerator = plan.trajectory, options.accelerator
    _check_can_load(gate, plan)
    if options.recalibrate_with is not None:
        options = replace(options, recalibrate_with=list(options.recalibrate_with))
    models = [getattr(plan.predictor, "model", None), gate.base_model]
    is_main = accelerator is None or accelerator.is_main_process
    bar = tqdm(total=num_evaluations, desc="Evaluating candidates", unit="candidate", disable=not is_main)
    device = gate.device or getattr(accelerator, "device", None)
    with checkpoint_folder(trajectory, output_dir, options, models) as folder, bar, unchanged(gate.base_model):
        model = CandidateModel(trajectory, folder / "candidate", options, gate.base_model, device)
        metric = ""

        def evaluate(
            gate: Gate, tensors: TensorSource, recalibrates: bool, batches: Sequence[int] | None, verify: bool
        ) -> float | list[float]:
            nonlocal metric
            if metric and gate.metric is None:
                gate = replace(gate, metric=metric)  # what Θ0 decided, for all candidates and batches
            model.set(tensors, recalibrates, verify)
            metric, losses = on_main_process(accelerator, lambda: gate.measure(model.model, batches))
            if bar.n == bar.total:  # those that a screening confirms are evaluated again
                bar.total += 1
            bar.update()
            return losses

        try:
            decision, winner = decide(evaluate)
        finally:
            model.close()
        recalibrates = winner.recipe["recalibrated"]
        adapted = options if recalibrates else replace(options, recalibrate_with=None)
        reports = fill_checkpoint(trajectory, winner.tensors, folder, adapted, verify=False, show_progress=False)
        is_prediction = winner.recipe["state"] is None
        result = prediction_result(winner.plan, reports, output_dir, options, is_prediction)
        metric = f"cross-fitted {metric}" if decision.is_cross_fitted else metric
        result.gate = replace(decision, recipe=winner.recipe, metric=metric)
        if finish is not None:
            on_main_process(accelerator, lambda: finish(folder, result))
    return result


def _check_can_load(gate: Gate, plan: PredictionPlan) -> None:
    path, is_adapter = plan.trajectory.path, plan.trajectory.is_adapter
    if is_adapter and gate.base_model is None:
        raise ValueError(f"{path} records adapters; pass their base model as Gate(base_model=)")
    if not is_adapter and not (path / "config.json").exists():
        raise ValueError(
            f"{path} records a plain nn.Module; Gate cannot instantiate it. Predict without a gate, load states and"
            " prediction with load_into(module), and pass their losses to know_hf.prediction.choose"
        )


def _default_collate(examples: list[Any]) -> Mapping[str, Any]:
    try:
        return default_data_collator(examples)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot collate {len(examples)} examples of the gate's dataset ({error}); pass data_collator=, for"
            " example DataCollatorWithPadding(tokenizer)"
        ) from error
