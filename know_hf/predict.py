"""[`predict_overflowed_weights`]: the trajectory in, the enhanced checkpoint out, whole or not at all."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.utils import logging

from .cards import checkpoint_card
from .cards.provenance import source
from .checkpoint import (
    DEFAULT_SHARD_SIZE,
    CheckpointWriter,
    atomic_folder,
    write_json,
)
from .distributed import on_every_process, on_main_process
from .known.modeling_known import KNOWNModel
from .plotting import forgetting_picture, save_figure
from .prediction.engine import run
from .prediction.gate import Gate
from .prediction.plan import PredictionPlan, plan_prediction
from .prediction.residuals import ResidualReport, code_warnings, forgetting_warnings, range_warnings
from .prediction.result import PredictionResult, recalibrate_checkpoint
from .prediction.selection import GateResult
from .predictors import KNOWNPredictor, Predictor
from .trajectory import TrajectoryError, WeightTrajectory

logger = logging.get_logger(__name__)

_PICTURE = "forgetting.png"


def predict_overflowed_weights(
    trajectory: WeightTrajectory | str | Path,
    known: KNOWNModel | str | Path | None = None,
    steps: int = 1,
    *,
    output_dir: str | Path,
    predictor: Predictor | str | None = None,
    predictor_options: Mapping[str, Any] | None = None,
    norm: Literal["keep", "predict"] = "keep",
    recalibrate_with: Iterable[Mapping[str, torch.Tensor]] | None = None,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    kernel: str = "auto",
    accelerator: Accelerator | None = None,
    overwrite: bool = False,
    card: bool = True,
    gate: "Gate | None" = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> PredictionResult:
    """Runs the forgetting of a trajectory backwards and writes the retrodicted weights as an ordinary checkpoint.

    Each step predicts Θ̂(-1) = Θ0 + residual(W) for each scalar weight from its history W (KNOW paper, §3); the next
    step appends the prediction to the history and drops its most forgotten state. With ratio r, `steps` stand for
    r^(-steps) times the data. Convolution kernels, matrices and biases are predicted; normalisation layers, buffers
    and other parameters are those of Θ0; tensors that are equal in all states are copied bit for bit.

    Tensors are read, predicted and written in pieces, all at the same time: memory does not grow with the model
    ([`plan_prediction`] says how much is needed). The recorded files are compared with their SHA-256 meanwhile.

    Args:
        trajectory ([`WeightTrajectory`], `str` or `Path`): The recorded states.
        known ([`KNOWNModel`], `str` or `Path`, *optional*): The hyper-model, or where it is; by default the one that
            know_hf ships. It is used on the device that it is on, or on that of the accelerator.
        steps (`int`, *optional*, defaults to `1`): Number of recursive predictions.
        output_dir (`str` or `Path`): Where the checkpoint goes; it appears whole or not at all.
        predictor ([`Predictor`] or `str`, *optional*): Used instead of KNOWN, by name or as an object.
        predictor_options (`Mapping`, *optional*): Fields of a predictor given by its name, such as `{"factor": 0.9}`.
        norm (`"keep"` or `"predict"`, *optional*, defaults to `"keep"`): Whether weights and biases of normalisation
            layers are those of Θ0 or are predicted as biases are.
        recalibrate_with (iterable of batches, *optional*): Batches (keyword arguments of the model) of the source data
            from which BatchNorm statistics are computed anew for the predicted weights; by default they are Θ0's.
        model_class (`type`, *optional*): The model's class, where transformers has none of its name.
        dtype (`torch.dtype`, *optional*): Floating-point dtype to write; by default that of each tensor as recorded.
            Arithmetic is float32 in any case.
        max_shard_size (`int`, *optional*, defaults to `5_000_000_000`): Bytes of one safetensors file.
        kernel (`str`, *optional*, defaults to `"auto"`): Which form of KNOWN computes, see [`know_hf.known.kernels`].
        accelerator (`Accelerator`, *optional*): Where given, its processes share the work, on a disk that they share;
            to be called on each of them. The files are those that one process writes, byte for byte.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an existing `output_dir` may be replaced.
        card (`bool`, *optional*, defaults to `True`): Whether to write `README.md`, the model card, with a picture of
            the forgetting.
        gate ([`Gate`], *optional*): Validation data on which Θ0, the other states, all numbers of steps
            up to `steps` and the average are tried; the best is written, Θ0 when none is better by more than noise.
        push_to_hub (`str`, *optional*): Hub id that the checkpoint is pushed to; whether it can be is found out before
            the work.
        private, revision, create_pr, token (*optional*): Of the push, see [`~know_hf.hub.push_checkpoint`].

    Returns:
        [`PredictionResult`]: with the path, `load_model()` and a report for each tensor and role; the same on every
        process.

    Raises:
        `TrajectoryError`: when a file is not the one recorded, states are out of order or differ in their tensors, a
            value is not finite, or weights are quantised; names tensor and state.
        `ValueError`: when the trajectory has fewer states than the predictor needs, an argument is off, `output_dir`
            holds the trajectory, a number is too large for `dtype`, or a gate got losses that can't be compared or a
            trajectory of a plain module.
        `FileExistsError`: when `output_dir` is not empty and `overwrite` is off.
        `OSError`: before the work, when the disk has not the space that the checkpoint needs, or another process
            writes to `output_dir`.
        `HubError`: when the checkpoint can't be pushed; if that shows only after the work, it is in `output_dir`.
        `RuntimeError`: on the other processes, when one failed.
    """
    plan = plan_prediction(
        trajectory,
        known,
        steps,
        predictor=predictor,
        predictor_options=predictor_options,
        norm=norm,
        dtype=dtype,
        kernel=kernel,
        device=None if accelerator is None else accelerator.device,
        estimate_time=False,
    )
    trajectory = plan.trajectory
    if recalibrate_with is not None and trajectory.is_adapter:
        raise ValueError(
            f"{trajectory.path} is one of adapters, which hold no BatchNorm statistics: recalibrate the model they are"
            " loaded on with recalibrate_batch_norm(model, batches)"
        )
    if recalibrate_with is not None and not (trajectory.path / "config.json").exists():
        raise ValueError(
            f"{trajectory.path} is one of a plain module, which can't be loaded here to compute BatchNorm statistics:"
            " load the prediction into it and call recalibrate_batch_norm(model, batches)"
        )
    hub: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
    repo_id = None
    if push_to_hub is not None:
        repo_id = on_main_process(accelerator, lambda: _check_push(trajectory, push_to_hub, hub))
    by_name = predictor if isinstance(predictor, str) and predictor != "known" else None

    def write_card(work: Path, result: PredictionResult, decided: "GateResult | None" = None) -> None:
        recipe = {} if decided is None or decided.recipe is None else decided.recipe
        chosen, options = recipe.get("predictor"), recipe.get("predictor_options")
        picture = forgetting_picture(trajectory)
        if picture is not None:
            save_figure(picture, work / _PICTURE)
        checkpoint_card(
            trajectory,
            result,
            chosen or by_name or plan.predictor,
            recipe.get("steps", plan.steps),
            predictor_options=options if chosen else predictor_options if by_name else None,
            norm=norm,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            recalibrated=recipe.get("recalibrated", recalibrate_with is not None),
            gate=None if decided is None else decided.to_dict(),
            repo_id=repo_id,
            picture=None if picture is None else _PICTURE,
        ).save(work / "README.md")

    if gate is not None:
        from .prediction.gate import predict_through_gate

        result, decided = predict_through_gate(
            gate,
            plan,
            output_dir=output_dir,
            norm=norm,
            recalibrate_with=recalibrate_with,
            model_class=model_class,
            dtype=dtype,
            max_shard_size=max_shard_size,
            accelerator=accelerator,
            overwrite=overwrite,
            finish=write_card if card else None,
        )
        result.gate = decided
        if repo_id is not None:
            result.url = on_main_process(accelerator, lambda: _push(result.path, repo_id, hub))
        return result

    lacking = _code_warnings(trajectory)
    part, parts = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)

    with ExitStack() as stack:

        def begin() -> Path:
            work = stack.enter_context(atomic_folder(Path(output_dir), overwrite, [trajectory.path]))
            for path in trajectory.model_files:
                target = work / path.relative_to(trajectory.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
            if dtype is not None and (config := work / "config.json").exists():
                name = str(dtype).removeprefix("torch.")
                write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "dtype": name})
            make_writer(work).create()
            return work

        def make_writer(work: Path) -> CheckpointWriter:
            return CheckpointWriter(work, plan.specs, max_shard_size, adapter=trajectory.is_adapter)

        def work_on_my_part() -> tuple[dict[str, ResidualReport], int]:
            with _verified(trajectory, part, parts):
                reports = run(plan, writer, plan.pieces(part, parts), progress=part == 0)
            return reports, writer.bytes_written

        def finish() -> str | None:
            writer.close(sum(count for _, count in done))
            if recalibrate_with is not None:
                recalibrate_checkpoint(work, recalibrate_with, trajectory, model_class)
            if card:
                write_card(work, result)
            stack.close()
            return None if repo_id is None else _push(result.path, repo_id, hub)

        work = on_main_process(accelerator, begin)
        writer = make_writer(work)
        done = on_every_process(accelerator, work_on_my_part)
        tensors = _added_up([reports for reports, _ in done])
        warnings = _warnings(plan, tensors) + lacking
        roles = {name: tensor.role for name, tensor in plan.tensors.items()}
        result = PredictionResult(Path(output_dir), tensors, roles, warnings, model_class)
        result.url = on_main_process(accelerator, finish)
    if part == 0:
        for text in warnings:
            logger.warning(text)
    return result


def _check_push(trajectory: WeightTrajectory, repo_id: str, hub: Mapping[str, Any]) -> str:
    from .hub import architecture_of, check_push

    kind: Literal["adapter", "checkpoint"] = "adapter" if trajectory.is_adapter else "checkpoint"
    architecture = None if trajectory.is_adapter else architecture_of(trajectory.path / "config.json")
    return check_push(repo_id, kind=kind, architecture=architecture, **hub)


def _push(folder: Path, repo_id: str, hub: Mapping[str, Any]) -> str:
    from .hub import HubError, push_checkpoint

    try:
        return push_checkpoint(folder, repo_id, **hub)
    except HubError as error:
        raise HubError(
            f"{error}. The checkpoint itself is whole, in {folder}: push it with know-hf push {folder} {repo_id}"
        ) from error


@contextmanager
def _verified(trajectory: WeightTrajectory, part: int, parts: int) -> Iterator[None]:
    """Compares the files with their hashes while the block runs. What is found there explains any other error."""
    with ThreadPoolExecutor(1, thread_name_prefix="know_hf-verifying") as pool:
        checked = pool.submit(trajectory.verify, part, parts)
        try:
            yield
        except Exception as error:
            if (damage := checked.exception()) is not None:
                raise damage from error
            raise
        checked.result()


def _added_up(parts: Sequence[Mapping[str, ResidualReport]]) -> dict[str, ResidualReport]:
    total: dict[str, ResidualReport] = {}
    for reports in parts:
        for name, report in reports.items():
            total[name] = total.get(name, ResidualReport()) + report
    return dict(sorted(total.items()))


def _warnings(plan: PredictionPlan, tensors: Mapping[str, ResidualReport]) -> list[str]:
    found = []
    if isinstance(plan.predictor, KNOWNPredictor):  # others don't say that they run anything backwards
        found += forgetting_warnings([state.metrics.get("eval_loss") for state in plan.trajectory.states])
    for network in sorted({tensor.network for tensor in plan.tensors.values() if tensor.network}):
        trained_on = plan.trained_on(network)
        mine = {name: tensors[name] for name, tensor in plan.tensors.items() if tensor.network == network}
        if trained_on is not None:
            found += range_warnings(network, mine, trained_on)
    total = sum(tensors.values(), ResidualReport())
    if total.lost > total.predicted / 2:
        found.append(
            f"{total.lost / total.predicted:.0%} of the residuals are smaller than the rounding of what is written and"
            " changed nothing; write float32 with dtype=torch.float32, or record with dtype=torch.float32 already"
        )
    return found


def _code_warnings(trajectory: WeightTrajectory) -> list[str]:
    configs = []
    for path in trajectory.model_files:
        if path.name.endswith("config.json"):
            try:
                configs.append(json.loads(path.read_bytes()))
            except (ValueError, RecursionError) as error:
                raise TrajectoryError(f"{path} can't be read ({error}); restore it from a copy") from error
    base = trajectory.base_model
    return code_warnings(configs, base and source(base)["name"])  # the card tells no folders
