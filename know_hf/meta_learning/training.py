"""Meta-training of KNOWN, on as many processes as there are."""

import hashlib
import logging as python_logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, tqdm
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from ..known.configuration_known import KNOWNConfig
from ..known.modeling_known import KNOWNModel
from .batch_sampler import BalancedBatchSampler
from .dataset import TransitionDataset
from .objective import MetaObjective
from .processes import make_accelerator
from .skill import RoleSkill, retrodiction_skill
from .training_arguments import MetaTrainingArguments
from .training_checkpoints import CheckpointFolder, Progress

logger: python_logging.Logger = logging.get_logger(__name__)

# What may differ when a training goes on from a checkpoint: the weights it ends in are the same.
_FREE_ARGUMENTS = {"num_workers", "log_every", "report_to", "logging_dir"}
_FREE_ARGUMENTS |= {"checkpoint_dir", "save_every", "keep_checkpoints"}


@dataclass
class MetaTrainingResult:
    """
    What [`meta_train`] returns.

    Args:
        model ([`KNOWNModel`]):
            The trained model, in evaluation mode on the CPU, the same on every process.
        losses (`list[dict[str, float]]`):
            For every `log_every` steps, and at every checkpoint, `step` and the mean loss of each role since the last
            report, over all processes, regularisers excluded.
        validation (`list[dict[str, float | None]]`):
            For every look at the validation split `step` and the skill of each role; `None` where it is not finite,
            as nothing of the role moves there.
        train_skill (`dict[str, RoleSkill]`):
            Skill by role on the transitions trained on.
        held_out_skill (`dict[str, dict[str, RoleSkill]]`):
            Skill by role on the transitions of every held-out split.
        seconds (`float`):
            Wall-clock time of the training alone, without what was lost when it was ended.
        num_processes (`int`):
            Processes it ran on.
        mixed_precision (`str`):
            Precision it ran in: what `args` says, or else the launcher.
        steps_done (`int`):
            Optimizer steps that were done: fewer than `args.steps` when `args.patience` ended it.
        best_step (`int`, *optional*):
            With `args.patience`, the step whose weights were returned, if a look told which were best; otherwise they
            are those of the last step.
    """

    model: KNOWNModel
    losses: list[dict[str, float]]
    validation: list[dict[str, float | None]]
    train_skill: dict[str, RoleSkill]
    held_out_skill: dict[str, dict[str, RoleSkill]]
    seconds: float
    num_processes: int
    mixed_precision: str
    steps_done: int
    best_step: int | None


def meta_train(
    known: KNOWNModel | KNOWNConfig | None,
    train: TransitionDataset,
    held_out: TransitionDataset | Mapping[str, TransitionDataset] | None = None,
    *,
    validation: TransitionDataset | None = None,
    args: MetaTrainingArguments | None = None,
    progress: bool = True,
) -> MetaTrainingResult:
    """
    Trains KNOWN to predict the next less forgotten state: the l1 objective `mean |Θ0 + KNOWN(W, dW) - Θ(-1)|` and the
    published regularisers (arXiv 2508.05059), with Adam and a cosine schedule, on batches balanced over roles,
    trajectories and tensors.

    It runs on all processes that `torchrun` or `accelerate launch` started. They share every batch: a step sees the
    same transitions on any number of them. With `args.checkpoint_dir` a training that was ended goes on, and ends
    in the same weights, bit for bit on as many processes as before.

    Nothing is chosen on the held-out splits, so their skill is an honest estimate for new trajectories like these. The
    weights of the last step are returned, or, with `args.patience`, those that were best on the validation split.

    Args:
        known ([`KNOWNModel`] or [`KNOWNConfig`], *optional*):
            A model to train on, in place, or the sizes of a new one; `None` for the published sizes.
        train ([`TransitionDataset`]):
            Transitions to learn.
        held_out ([`TransitionDataset`] or `Mapping[str, TransitionDataset]`, *optional*):
            Transitions of other trajectories, only evaluated: one split, called `"held_out"`, or several by their
            names (other trajectories, architectures, datasets).
        validation ([`TransitionDataset`], *optional*):
            Transitions of yet other trajectories, to be looked at on the way.
        args ([`MetaTrainingArguments`], *optional*):
            Steps, batch size, learning rate and so on.
        progress (`bool`, *optional*, defaults to `True`):
            Whether a bar shows the training.

    Returns:
        [`MetaTrainingResult`]; the model's `config.trained_on` says what it was trained on.

    Raises:
        `ValueError`: when a trajectory is in two splits, their histories do not have the model's length, a checkpoint
            is of another training, or the batch size is no multiple of the number of processes.
        `RuntimeError`: when fewer processes train together than were asked for.
        `FloatingPointError`: when the loss is no longer finite.
    """
    args = args or MetaTrainingArguments()
    splits = {"held_out": held_out} if isinstance(held_out, TransitionDataset) else dict(held_out or {})
    model = known if isinstance(known, KNOWNModel) else _new_model(known or KNOWNConfig(), args.seed)
    _check_datasets(model, train, validation, splits, args)
    accelerator = make_accelerator(args)
    try:
        _start_trackers(accelerator, args)
        state = _train(accelerator, model, train, validation, args, progress)
        returns_best = bool(args.patience and state.best_weights)
        if returns_best:
            model.load_state_dict(state.best_weights)
        model.requires_grad_(True)
        model.eval().config.trained_on = {"trajectories": len(train.trajectories), "roles": train.describe()}
        result = MetaTrainingResult(
            model=model,
            losses=state.losses,
            validation=state.validation,
            train_skill=retrodiction_skill(model, train, accelerator),
            held_out_skill={name: retrodiction_skill(model, split, accelerator) for name, split in splits.items()},
            seconds=state.seconds,
            num_processes=accelerator.num_processes,
            mixed_precision=accelerator.mixed_precision,
            steps_done=state.step,
            best_step=state.best_step if returns_best else None,
        )
        for name, by_role in result.held_out_skill.items():
            accelerator.log({f"{name}/{role}": skill.skill for role, skill in by_role.items()}, step=state.step)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
    model.cpu()
    return result


def _train(
    accelerator: Accelerator,
    model: KNOWNModel,
    train: TransitionDataset,
    validation: TransitionDataset | None,
    args: MetaTrainingArguments,
    progress: bool,
) -> Progress:
    """Trains the model in place and returns what was seen on the way."""
    run = _run(model, train, validation, args, accelerator)
    objective = MetaObjective(model, train, args)
    optimizer = torch.optim.Adam(objective.trained_parameters(), lr=args.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.steps)
    prepared, optimizer, schedule = accelerator.prepare(objective.train(), optimizer, schedule)
    checkpoints = None
    state = Progress()
    if args.checkpoint_dir is not None:
        checkpoints = CheckpointFolder(Path(args.checkpoint_dir), args.keep_checkpoints, accelerator, run)
        state = checkpoints.resume()
    sampler = BalancedBatchSampler(
        train,
        args.batch_size,
        args.steps,
        seed=args.seed,
        start=state.step,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    # Not prepared: accelerate would share out whole batches, here the processes share every one.
    loader = DataLoader(
        train,
        batch_sampler=cast("Sampler[list[int]]", sampler),
        collate_fn=_as_is,
        num_workers=args.num_workers,
    )
    sums: dict[str, torch.Tensor] = {}
    since = 0
    start = time.perf_counter() - state.seconds
    with tqdm(
        main_process_only=True, desc="meta-training", initial=state.step, total=args.steps, disable=not progress
    ) as bar:
        for batch in () if _is_stopped(state, args) else loader:
            losses = prepared(send_to_device(batch, accelerator.device))
            accelerator.backward(losses.pop("objective"))
            accelerator.unscale_gradients()
            # Each on its own: the networks have nothing in common, and one must not slow the others down.
            for role in losses:
                nn.utils.clip_grad_norm_(model.networks[role].parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            sums = {role: sums.get(role, 0) + loss.detach() for role, loss in losses.items()}
            since += 1
            state.step += 1
            bar.update()
            is_last = state.step == args.steps
            is_look = validation is not None and (is_last or state.step % args.eval_every == 0)
            if is_look and validation is not None:
                _look(state, model, validation, accelerator)
                is_last = is_last or _is_stopped(state, args)
            is_checkpoint = checkpoints is not None and (is_last or state.step % args.save_every == 0)
            if is_last or is_checkpoint or since == args.log_every:
                means = _means(accelerator, sums, since, state.step)
                state.losses.append({"step": state.step, **means})
                rate = {"learning_rate": schedule.get_last_lr()[0]}
                accelerator.log({f"loss/{role}": mean for role, mean in means.items()} | rate, step=state.step)
                bar.set_postfix({role: f"{mean:.2e}" for role, mean in means.items()})
                sums, since = {}, 0
            state.seconds = time.perf_counter() - start
            if is_checkpoint and checkpoints is not None:
                checkpoints.save(state)
            if is_last:
                break
    return state


def _look(state: Progress, model: KNOWNModel, validation: TransitionDataset, accelerator: Accelerator) -> None:
    """Measures the validation skill and keeps the weights when it is the best so far.

    A skill that is not finite, of a role of which nothing moves, says nothing of the weights and is not counted; a
    look at which there is no other is none.
    """
    model.eval()
    by_role = {role: found.skill for role, found in retrodiction_skill(model, validation, accelerator).items()}
    model.train()
    finite = {role: skill for role, skill in by_role.items() if math.isfinite(skill)}
    state.validation.append({"step": state.step, **{role: finite.get(role) for role in by_role}})
    accelerator.log({f"validation/{role}": skill for role, skill in finite.items()}, step=state.step)
    if not finite:
        return
    mean = sum(finite.values()) / len(finite)
    state.looks_since_best += 1
    if state.best is None or mean > state.best:
        state.best, state.best_step, state.looks_since_best = mean, state.step, 0
        state.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _is_stopped(state: Progress, args: MetaTrainingArguments) -> bool:
    return state.step >= args.steps or 0 < args.patience <= state.looks_since_best


def _means(accelerator: Accelerator, sums: dict[str, torch.Tensor], count: int, step: int) -> dict[str, float]:
    totals = accelerator.reduce(torch.stack(list(sums.values())), "mean")
    means = dict(zip(sums, (totals / count).tolist(), strict=True))
    for role, mean in means.items():
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss of role {role!r} is {mean} before step {step}; choose a smaller learning_rate, or look for "
                "very large weights with TransitionDataset.describe()"
            )
    return means


def _start_trackers(accelerator: Accelerator, args: MetaTrainingArguments) -> None:
    if accelerator.log_with:
        config = {name: value for name, value in asdict(args).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("know_hf-meta_train", config=config)


def _run(
    model: KNOWNModel,
    train: TransitionDataset,
    validation: TransitionDataset | None,
    args: MetaTrainingArguments,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What has to be the same for a training to go on from a checkpoint."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.cpu().contiguous().numpy().data)
    return {
        **{f.name: getattr(args, f.name) for f in fields(args) if f.name not in _FREE_ARGUMENTS},
        "precision": accelerator.mixed_precision,  # of the launcher, where the arguments leave it to it
        "num_processes": accelerator.num_processes,
        "initial_weights": weights.hexdigest(),
        "train": train.fingerprint,
        "validation": None if validation is None else validation.fingerprint,
    }


def _new_model(config: KNOWNConfig, seed: int) -> KNOWNModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KNOWNModel(config)


def _check_datasets(
    model: KNOWNModel,
    train: TransitionDataset,
    validation: TransitionDataset | None,
    held_out: dict[str, TransitionDataset],
    args: MetaTrainingArguments,
) -> None:
    if args.patience and validation is None:
        raise ValueError(f"patience={args.patience} needs a validation split to look at; give one, or patience=0")
    datasets = {"trained on": train, "used for validation": validation}
    datasets |= {f"held out ({name})": dataset for name, dataset in held_out.items()}
    used: dict[str, str] = {}
    for use, dataset in datasets.items():
        if dataset is None:
            continue
        if dataset.num_states != model.config.num_states:
            raise ValueError(
                f"the model takes {model.config.num_states} states, a dataset has num_states={dataset.num_states}; "
                "make both with the same number"
            )
        for path in sorted({str(Path(path).resolve()) for path in dataset.trajectories}):
            if path in used:
                raise ValueError(f"{path} is {used[path]} and {use}; leave it out of one of the two")
            used[path] = use
    if missing := [role for role in model.config.roles if role not in train.roles]:
        logger.warning(
            f"No transition of the role {', '.join(missing)} to train on: its network stays as it is. "
            "Predict only models without such tensors, or train on trajectories that have them."
        )


def _as_is(batch: Any) -> Any:
    return batch
