"""[`predict_overflowed_weights`]: plan, choose or write, add a card, push."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .cards import checkpoint_card
from .cards.model_loading import loading_line
from .distributed import on_main_process
from .hub import PushOptions, architecture_of, check_push, push_checkpoint
from .known import KNOWNModel
from .plotting import forgetting_picture, save_figure
from .prediction import CrossFit, Gate, PredictionPlan, PredictionResult, WriteOptions, plan_prediction
from .prediction.choosing.cross_fit import write_cross_fitted
from .prediction.choosing.gate import write_best_candidate
from .prediction.engine import write_prediction
from .prediction.plan import without_known
from .predictors import Composition, Predictor, SnapshotPredictor
from .trajectory import WeightTrajectory

logger = logging.get_logger(__name__)

_PICTURE = "forgetting.png"


def predict_overflowed_weights(
    trajectory: WeightTrajectory | str | Path,
    known: KNOWNModel | str | Path | None = None,
    steps: int = 1,
    *,
    output_dir: str | Path,
    predictor: Predictor | str | Sequence[Predictor | str] | None = None,
    gate: Gate | CrossFit | None = None,
    card: bool | Mapping[str, Any] = True,
    push_to_hub: str | None = None,
    write: WriteOptions | None = None,
    push: PushOptions | None = None,
    **options: Any,
) -> PredictionResult:
    """Run the forgetting of a trajectory backwards and write the predicted weights as an ordinary checkpoint.

    Each step predicts Θ̂(-1) = Θ0 + residual(W) for each scalar weight from its history W (KNOW paper, §3). The next
    step appends the prediction to the history and drops the most forgotten state. With ratio r, `steps` steps stand
    for r^(-steps) times the data. Convolution kernels, matrices and biases are predicted; normalisation layers,
    buffers and other parameters are those of Θ0; tensors that are equal in all states are copied bit for bit.

    Args:
        trajectory ([`WeightTrajectory`], `str` or `Path`):
            The recorded states.
        known ([`KNOWNModel`], `str` or `Path`, *optional*):
            The hyper-model, its folder or its Hub id; the shipped weights by default. With `variant="combination"`, it
            predicts complete tensors in one step, including those of normalisation layers, from the recorded states,
            start, tail and branches.
        steps (`int`, *optional*, defaults to `1`):
            Number of recursive predictions.
        output_dir (`str` or `Path`):
            Output folder. It appears complete or not at all.
        predictor ([`Predictor`], `str` or sequence of them, *optional*):
            Predictor to use instead of KNOWN, by name or as an object. If there are several, the others rescale what
            the first predicts: `"average+rescale"` or `["known", Rescale(factor=0.25)]`. `"known"` uses the weights
            given by `known`.
        gate ([`Gate`] or [`CrossFit`], *optional*):
            Validation data to choose with. Candidates are Θ0, the other states, the prediction at every number of
            steps up to `steps`, and a family of averages and moves between the states. Θ0 is written unless another
            candidate is better by more than noise. KNOWN is left out if there are too few states for it, unless you
            ask for it. [`CrossFit`] instead chooses among moves between start and Θ0 on the training data, and takes
            no `known`, `predictor` or `steps`.
        card (`bool` or `Mapping`, *optional*, defaults to `True`):
            Whether to write a model card, `README.md`, with a plot of the forgetting. A mapping passes further keyword
            arguments to [`~know_hf.cards.checkpoint_card`], such as `comparisons` and `arm`.
        push_to_hub (`str`, *optional*):
            Hub id to push the checkpoint to. The token and write access to an existing repo are checked first.
        write ([`WriteOptions`], *optional*):
            How to write. Its fields can be given as keyword arguments instead: `dtype`, `max_shard_size`, `overwrite`,
            `model_class`, `recalibrate_with` and `accelerator`.
        push ([`PushOptions`], *optional*):
            How to push. Its fields can be given as keyword arguments instead: `private`, `revision`, `create_pr` and
            `token`.
        options:
            - `predictor_options`: fields of a predictor given by its name, such as `{"factor": 0.9}`. For several
              names, the fields of each, such as `{"rescale": {"factor": 0.25}}`.
            - `norm`: `"keep"` (the default) copies weights and biases of normalisation layers from Θ0; `"predict"`
              treats them as biases.
            - `kernel`: the kernel that computes KNOWN, see [`know_hf.known.kernels`].

    Returns:
        [`PredictionResult`]: path, `load_model()` and a report per tensor and role; the same on every process.

    Raises:
        `TrajectoryError`: if a file is not the recorded one, states are out of order or have different tensors, a
            value is not finite, or the config is that of a quantised model; names tensor and state.
        `ValueError`: if the trajectory has fewer states than the predictor needs, an argument is invalid,
            `output_dir` contains or is inside a trajectory, its base model or the folder of KNOWN, a value is too
            large for `dtype` or float32, rescaling would change the function of Θ0, or the losses of a gate cannot be
            compared.
        `FileExistsError`: if `output_dir` is not empty and `overwrite` is off, or another program changed it.
        `OSError`: before any work, if the disk has too little space, another process writes or pushes `output_dir`, or
            the nodes do not share it.
        `HubError` or an error of huggingface_hub: if the checkpoint cannot be pushed; a written one stays in
            `output_dir`.
        `RuntimeError`: on the other processes, if one failed.
    """
    write = _with_keywords(write or WriteOptions(), options)
    push = _with_keywords(push or PushOptions(), options)
    accelerator = write.accelerator
    described = {"predictor_options": options.pop("predictor_options", None), "norm": options.pop("norm", "keep")}
    settings: dict[str, Any] = {"dtype": write.dtype, "kernel": options.pop("kernel", "auto"), **described}
    settings["device"] = None if accelerator is None else accelerator.device
    if options:
        raise TypeError(f"predict_overflowed_weights() got an unexpected keyword argument {min(options)!r}")
    predictor = requested_predictor(gate, trajectory, known, steps, predictor, described["predictor_options"])
    plan = plan_prediction(trajectory, known, steps, predictor=predictor, estimate_time=False, **settings)
    _check_recalibration(plan.trajectory, write)
    repo_id = None
    if push_to_hub is not None:
        repo_id = on_main_process(accelerator, lambda: _check_push(plan.trajectory, push_to_hub, push))
    more = {"repo_id": repo_id, **(card if isinstance(card, Mapping) else {})}
    finish = partial(_write_card, plan, _named(plan, predictor), write, described, more) if card else None
    result = _write(gate, plan, output_dir, write, finish)
    if accelerator is None or accelerator.is_main_process:
        for text in result.warnings:
            logger.warning(text)
    result.next_step = loading_line(plan.trajectory.path, repo_id or f"{result.path}/")
    if repo_id is not None:
        result.url = on_main_process(accelerator, lambda: _push(result.path, repo_id, push))
    return result


def requested_predictor(
    gate: Gate | CrossFit | None,
    trajectory: WeightTrajectory | str | Path,
    known: KNOWNModel | str | Path | None,
    steps: int,
    predictor: Predictor | str | Sequence[Predictor | str] | None,
    predictor_options: Mapping[str, Any] | None,
) -> Predictor | str | Sequence[Predictor | str] | None:
    """Return the predictor to plan with a gate."""
    if gate is None:
        return predictor
    if isinstance(gate, Gate):
        return without_known(trajectory, known, predictor)
    if not isinstance(gate, CrossFit):
        raise TypeError(f"gate must be a Gate or CrossFit, got {type(gate).__name__}; pass Gate(dataset=...)")
    if known is not None or predictor is not None or predictor_options or steps != 1:
        raise ValueError(
            "CrossFit chooses among its own candidates; remove known, predictor, predictor_options and steps"
        )
    return "start_interpolation"


def _write(gate: Gate | CrossFit | None, plan: PredictionPlan, *arguments: Any) -> PredictionResult:
    if gate is None:
        return write_prediction(plan, *arguments)
    if isinstance(gate, CrossFit):
        return write_cross_fitted(gate, plan, *arguments)
    return write_best_candidate(gate, plan, *arguments)


def _with_keywords(defaults: Any, options: Any) -> Any:
    """Replace the fields of an options dataclass that are given as keywords, and take these out of the keywords."""
    names = {field.name for field in fields(defaults)} & options.keys()
    return replace(defaults, **{name: options.pop(name) for name in sorted(names)})


def _named(plan: PredictionPlan, predictor: Predictor | str | Sequence[Predictor | str] | None) -> Predictor | str:
    """Return the predictor as a card shows it: by its name if it was given so, except for KNOWN."""
    if isinstance(predictor, list | tuple) and all(isinstance(item, str) for item in predictor):
        predictor = "+".join(predictor)
    if isinstance(predictor, str) and "known" not in predictor.split("+"):
        return predictor
    return plan.predictor if len(plan.members) == 1 else Composition(plan.members)


def _check_recalibration(trajectory: WeightTrajectory, write: WriteOptions) -> None:
    if write.recalibrate_with is None:
        return
    if trajectory.is_adapter or not (trajectory.path / "config.json").exists():
        kind = "adapters" if trajectory.is_adapter else "a plain nn.Module"
        raise ValueError(
            f"{trajectory.path} records {kind}; recalibrate_with needs a complete transformers model. Load the"
            " prediction into your model and call recalibrate_batch_norm(model, batches)"
        )


def _write_card(
    plan: PredictionPlan,
    predictor: Predictor | str,
    write: WriteOptions,
    described: Mapping[str, Any],
    more: Mapping[str, Any],
    folder: Path,
    result: PredictionResult,
) -> None:
    steps, recalibrated = plan.steps, write.recalibrate_with is not None
    options = described["predictor_options"] if isinstance(predictor, str) else None
    if result.gate is not None and (recipe := result.gate.recipe) is not None:
        steps, recalibrated = recipe["steps"], recipe["recalibrated"]
        if recipe["predictor"] is not None:
            options = recipe["predictor_options"]
            predictor = result.predictor if options is None and result.predictor else recipe["predictor"]
    picture = forgetting_picture(plan.trajectory)
    if picture is not None:
        save_figure(picture, folder / _PICTURE)
    checkpoint_card(
        plan.trajectory,
        result,
        predictor,
        steps,
        predictor_options=options,
        norm="predict" if isinstance(result.predictor, SnapshotPredictor) else described["norm"],
        dtype=None if write.dtype is None else str(write.dtype).removeprefix("torch."),
        recalibrated=recalibrated,
        gate=None if result.gate is None else result.gate.to_dict(),
        picture=None if picture is None else _PICTURE,
        **more,
    ).save(folder / "README.md")


def _check_push(trajectory: WeightTrajectory, repo_id: str, push: PushOptions) -> str:
    if trajectory.is_adapter:
        return check_push(repo_id, kind="adapter", **vars(push))
    architecture = architecture_of(trajectory.path / "config.json")
    return check_push(repo_id, kind="checkpoint", architecture=architecture, **vars(push))


def _push(folder: Path, repo_id: str, push: PushOptions) -> str:
    try:
        return push_checkpoint(folder, repo_id, **vars(push))
    except (OSError, ValueError) as error:  # of know_hf, huggingface_hub or the connection
        error.add_note(f"The checkpoint is complete in {folder}; push it with: know-hf push {folder} {repo_id}")
        raise
