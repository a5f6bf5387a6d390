"""Writing the candidates one after the other, trying each on validation data, and keeping one."""

import inspect
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator
from transformers.utils import logging

from ..checkpoint import DEFAULT_SHARD_SIZE, CheckpointWriter, atomic_folder
from ..distributed import on_main_process
from ..model_tensors import is_adapter
from ..predictors import Average, KNOWNPredictor, Predictor, get_predictor
from .plan import PredictionPlan
from .residuals import ResidualReport
from .result import PredictionResult, recalibrate_checkpoint
from .selection import REFERENCE, GateResult, check_reference, check_rule, choose

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Gate:
    """What a prediction is tried on before it is written: `predict_overflowed_weights(..., gate=Gate(...))`.

    Tried are Θ0, the other states, every number of steps up to the one asked for, and the average of the states;
    with `recalibrate_with` all of them with BatchNorm statistics computed anew, and Θ0 also as it is. Give either
    `compute_loss` or `dataset`.

    <Tip>

    The data is used up by choosing: the loss of what was chosen is too good on it. Report on other data.

    </Tip>

    Args:
        compute_loss (callable, *optional*): From a model in evaluation mode to its loss on validation data, lower is
            better: a list with one value an example or batch, at least 10, the same ones in the same order for every
            model; or one number, which needs `margin`, since nothing says how much of it is noise.
        dataset (`torch.utils.data.Dataset`, *optional*): Validation examples with labels. The model's own loss of each
            batch is one value.
        data_collator (callable, *optional*): From a list of examples to a batch, as of `Trainer`; examples of
            different lengths need one that pads, such as `DataCollatorWithPadding(tokenizer)`.
        batch_size (`int`, *optional*, defaults to `8`): Examples of a batch of `dataset`.
        metric (`str`, *optional*, defaults to `"validation loss"`): What the values are called in result and card.
        level (`float`, *optional*, defaults to `0.05`): Bound on the chance that anything is chosen that is not better
            than Θ0, whatever the number of candidates. It is approximate: with fewer than some 50 values, of which a
            few are far larger than the others, the chance can be several times that.
        margin (`float`, *optional*): How much lower than that of Θ0 a loss must be at least, 0 by default; in the
            units of the loss. It alone decides where nothing says how much of a difference is noise: of one number,
            and of losses that all differ from those of Θ0 by the same amount, which without it are not better.
        base_model (`PreTrainedModel`, *optional*): For adapters, the model they belong to; it is given back as it was.
        device (`torch.device` or `str`, *optional*): Where models are tried; by default the accelerator's, or the CPU.
        seed (`int`, *optional*, defaults to `0`): Of the bootstrap, and of torch in each call of `compute_loss`.
        remove_unused_columns (`bool`, *optional*, defaults to `True`): Whether columns that the model does not take
            are dropped before `data_collator`, as by `Trainer`.

    Raises:
        `ValueError`: when both or none of `compute_loss` and `dataset` are given, or a number is off.
    """

    compute_loss: Callable[[Any], float | Sequence[float]] | None = None
    dataset: Any = None
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None
    batch_size: int = 8
    metric: str = "validation loss"
    level: float = 0.05
    margin: float | None = None
    base_model: PreTrainedModel | None = None
    device: torch.device | str | None = None
    seed: int = 0
    remove_unused_columns: bool = True

    def __post_init__(self) -> None:
        if (self.compute_loss is None) == (self.dataset is None):
            raise ValueError("a gate needs either compute_loss or dataset, the validation data; not both")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: choose at least 1 example")
        check_rule(self.level, self.margin)

    @torch.no_grad()
    def losses(self, model: Any) -> float | list[float]:
        """The loss of a model, as `compute_loss` gives it, or one value a batch of `dataset`."""
        model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            found = self._batch_losses(model) if self.compute_loss is None else self.compute_loss(model)
        try:
            return torch.as_tensor(found, dtype=torch.float64).tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"compute_loss is to give one number or a list of numbers, got {found!r}") from error

    def _batch_losses(self, model: Any) -> list[float]:
        collate: Any = self.data_collator or _collated
        if self.remove_unused_columns:
            taken = inspect.signature((model.get_base_model() if is_adapter(model) else model).forward).parameters
            collate = RemoveColumnsCollator(collate, {*taken, "label", "label_ids"})
        values = []
        for batch in DataLoader(self.dataset, self.batch_size, collate_fn=collate):
            moved = {name: _as_taken(value, name, model) for name, value in batch.items()}
            loss = model(**moved).loss
            if loss is None:
                raise ValueError(
                    f"{type(model).__name__} gives no loss for batches of {', '.join(moved)}; the validation examples"
                    " need labels, or give compute_loss"
                )
            values.append(float(loss))
        return values


def _collated(examples: list[Any]) -> Mapping[str, Any]:
    try:
        return default_data_collator(examples)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{len(examples)} examples of the gate's dataset can't be made one batch ({error}); pass data_collator=,"
            " where their lengths differ one that pads, such as DataCollatorWithPadding(tokenizer)"
        ) from error


def _as_taken(value: Any, name: str, model: Any) -> Any:
    """A batch's value where the model is, in its dtype, which need not be that of the dataset's images."""
    if not isinstance(value, torch.Tensor):
        return value
    is_input = value.is_floating_point() and not name.startswith("label")
    return value.to(model.device, model.dtype) if is_input else value.to(model.device)


def predict_through_gate(
    gate: Gate,
    plan: PredictionPlan,
    *,
    output_dir: str | Path,
    norm: Literal["keep", "predict"] = "keep",
    recalibrate_with: Iterable[Mapping[str, torch.Tensor]] | None = None,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    accelerator: Accelerator | None = None,
    overwrite: bool = False,
    finish: Callable[[Path, PredictionResult, GateResult], object] | None = None,
) -> tuple[PredictionResult, GateResult]:
    """Writes every candidate, tries it, and moves the one that is chosen to `output_dir`.

    Candidates stay on the disk until one is chosen; one model is in memory at a time. On several processes the main
    one tries them while the others wait.

    Args:
        gate ([`Gate`]): The validation data and the rule.
        plan ([`PredictionPlan`]): Trajectory, predictor, and the largest number of steps.
        output_dir, norm, recalibrate_with, model_class, dtype, max_shard_size, accelerator, overwrite: As of
            [`predict_overflowed_weights`].
        finish (callable, *optional*): Called on the main process with the folder before it takes its final name, what
            was chosen, and the choice; such as to write a card into it.

    Returns:
        `tuple[PredictionResult, GateResult]`: what was chosen, at `output_dir`, and the choice.

    Raises:
        `ValueError`: for a plan with adapters and a gate without `base_model`, a trajectory of a plain module,
            examples that can't be made a batch, or losses that can't be compared (see [`choose`]); and all that
            [`predict_overflowed_weights`] raises. Nothing is left behind then.
    """
    from ..predict import predict_overflowed_weights

    trajectory = plan.trajectory
    if trajectory.is_adapter and gate.base_model is None:
        raise ValueError(
            f"{trajectory.path} is one of adapters, which can only be tried on the model they belong to; pass it as"
            " base_model= of the gate"
        )
    if not trajectory.is_adapter and not (trajectory.path / "config.json").exists():
        raise ValueError(
            f"{trajectory.path} is one of a plain module, which the gate can't make: predict without a gate, load the"
            " states and the predictions into a module of yours by load_into(module), of the trajectory and of the"
            " results, and give the losses of each to know_hf.prediction.choose"
        )
    batches = None if recalibrate_with is None else list(recalibrate_with)
    candidates = _candidates(plan, batches)
    results: dict[str, PredictionResult] = {}
    losses: dict[str, float | Sequence[float]] = {}
    with ExitStack() as stack:
        whole = atomic_folder(Path(output_dir), overwrite, [trajectory.path])
        place = on_main_process(accelerator, lambda: stack.enter_context(whole))
        for number, candidate in enumerate(candidates):
            folder = place / f"candidate-{number}"
            results[candidate.name] = result = predict_overflowed_weights(
                trajectory,
                steps=candidate.steps,
                output_dir=folder,
                predictor=candidate.predictor,
                norm=norm,
                recalibrate_with=None if candidate.state else candidate.batches,
                model_class=model_class,
                dtype=dtype,
                max_shard_size=max_shard_size,
                accelerator=accelerator,
                card=False,
            )

            def try_it(
                candidate: _Candidate = candidate, result: PredictionResult = result
            ) -> tuple[float | list[float], dict[str, ResidualReport]]:
                reports = result.tensors
                if candidate.state:
                    reports = _copy_state(plan, candidate.state, result.path, max_shard_size)
                    if candidate.batches is not None:
                        recalibrate_checkpoint(result.path, candidate.batches, trajectory, model_class)
                return _tried(gate, result, accelerator), reports

            losses[candidate.name], result.tensors = on_main_process(accelerator, try_it)
            check_reference(losses[REFERENCE], gate.margin)  # it is the first

        def decide() -> GateResult:
            decided = choose(losses, metric=gate.metric, level=gate.level, margin=gate.margin, seed=gate.seed)
            winner = next(candidate for candidate in candidates if candidate.name == decided.chosen)
            decided = replace(decided, recipe=winner.facts)
            for path in list(results[winner.name].path.iterdir()):
                path.rename(place / path.name)
            for result in results.values():
                shutil.rmtree(result.path)
            if finish is not None:
                finish(place, replace(results[winner.name], path=Path(output_dir)), decided)
            stack.close()
            return decided

        decided = on_main_process(accelerator, decide)
    if accelerator is None or accelerator.is_main_process:
        logger.info(decided.sentence)
    return replace(results[decided.chosen], path=Path(output_dir)), decided


@dataclass(frozen=True)
class _Candidate:
    """How one is written; a state is copied over what its predictor wrote, which is the state up to rounding."""

    name: str
    predictor: Predictor
    steps: int
    recipe: Mapping[str, Any]
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None
    state: int | None = None

    @property
    def facts(self) -> dict[str, Any]:
        return {**self.recipe, "recalibrated": self.batches is not None, "state": self.state}


def _candidates(plan: PredictionPlan, batches: Sequence[Mapping[str, torch.Tensor]] | None) -> list[_Candidate]:
    """All that is tried, Θ0 first."""

    def named(name: str, predictor: str, state: int | None = None, **options: Any) -> _Candidate:
        recipe = {"predictor": predictor, "predictor_options": options, "steps": 1}
        return _Candidate(name, get_predictor(predictor, **options), 1, recipe, batches, state)

    theta = named(REFERENCE, "shrink", 0, factor=1.0)  # times 1: bit for bit, nothing to copy over it
    found = [replace(theta, batches=None)]
    if batches is not None and any("BatchNorm" in role.reason for role in plan.trajectory.roles.values()):
        found.append(replace(theta, name=f"{REFERENCE}, BatchNorm recalibrated"))
    for state in range(1, plan.trajectory.num_states):
        found.append(named(f"Θ{state}", "task_vector", state, scale=-1.0, since=state))
    kind = "KNOWN" if isinstance(plan.predictor, KNOWNPredictor) else type(plan.predictor).__name__
    for steps in range(1, plan.steps + 1):
        recipe = {"predictor": None, "predictor_options": None, "steps": steps}
        name = f"{kind}, {steps} step{'s' if steps > 1 else ''}"
        found.append(_Candidate(name, plan.predictor, steps, recipe, batches))
    return found if isinstance(plan.predictor, Average) else [*found, named("average of the states", "average")]


def _copy_state(plan: PredictionPlan, state: int, folder: Path, max_shard_size: int) -> dict[str, ResidualReport]:
    """Gives all tensors of a checkpoint the values of a state, bit for bit where the dtype is the same; says by how
    much they differ from Θ0."""
    trajectory = plan.trajectory
    writer = CheckpointWriter(folder, plan.specs, max_shard_size, adapter=trajectory.is_adapter)
    reports: dict[str, ResidualReport] = {}
    for piece in plan.pieces():
        spec, is_first = plan.specs[piece.name], piece.start == 0
        values = trajectory.read(piece.name, piece.start, piece.stop, state)
        writer.write(piece.name, values.to(spec.dtype), piece.start)
        is_unchanged = trajectory.is_unchanged(piece.name)
        report = ResidualReport(
            tensors=int(is_first),
            parameters=spec.shape.numel() if is_first else 0,
            unchanged=int(is_first and is_unchanged),
        )
        if spec.dtype.is_floating_point and values.numel() and not is_unchanged:
            history = trajectory.read_history(piece.name, piece.start, piece.stop)
            report += ResidualReport.of(history, values.float() - history[-1], None)
        reports[piece.name] = reports.get(piece.name, ResidualReport()) + report
    writer.flush()
    return reports


def _tried(gate: Gate, result: PredictionResult, accelerator: Accelerator | None) -> float | list[float]:
    device = gate.device or (None if accelerator is None else accelerator.device)
    base = gate.base_model
    home = None if base is None else base.device
    trained = {} if base is None else {parameter: parameter.requires_grad for parameter in base.parameters()}
    training = {} if base is None else {module: module.training for module in base.modules()}
    model: Any = result.load_model(base)
    try:
        return gate.losses(model if device is None else model.to(device))
    finally:
        if base is not None:
            # without its adapter, peft also gives back the modules that were trained beside it as they were before
            model.delete_adapter(model.active_adapter)
            model.unload().to(home)
            for parameter, required in trained.items():
                parameter.requires_grad_(required)
            for module, was_training in training.items():
                module.training = was_training
