"""Meta-training of KNOWN, on one or more processes."""

import hashlib
import logging as python_logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from ..checkpoint import check_output, locked_folder
from ..distributed import on_main_process
from ..known.configuration_known import KNOWNConfig
from ..known.modeling_known import KNOWNModel
from ..terminal import aligned
from .dataset import BalancedBatchSampler, TransitionDataset
from .objective import MetaObjective
from .processes import make_accelerator
from .skill import RoleSkill, retrodiction_skill
from .training_arguments import MetaTrainingArguments
from .training_checkpoints import CheckpointFolder, Progress

logger: python_logging.Logger = logging.get_logger(__name__)

# Arguments that may change when a training resumes: they do not affect the final weights.
_FREE_ARGUMENTS = {"num_workers", "log_every", "report_to", "logging_dir"}
_FREE_ARGUMENTS |= {"checkpoint_dir", "save_every", "keep_checkpoints"}


@dataclass
class MetaTrainingResult:
    """Result of [`meta_train`]; `str(result)` is a table of losses and skills by role.

    Attributes:
        model ([`KNOWNModel`]):
            Trained model, in evaluation mode on the CPU, the same on every process.
        losses (`list[dict[str, float]]`):
            For every `log_every` steps and every checkpoint, `step` and the mean loss of each role since the last
            report, over all processes and without regularizers.
        validation (`list[dict[str, float | None]]`):
            For each evaluation on the validation split, `step` and the skill of each role. The skill is `None` if it
            is not finite because nothing of the role moves.
        train_skill (`dict[str, RoleSkill]`):
            Skill by role on the training transitions.
        held_out_skill (`dict[str, dict[str, RoleSkill]]`):
            Skill by role on the transitions of each held-out split.
        seconds (`float`):
            Wall-clock time of the training, without steps lost to an interruption.
        num_processes (`int`):
            Number of processes.
        mixed_precision (`str`):
            Precision of the training, from the arguments or the launcher.
        steps_done (`int`):
            Completed optimizer steps; fewer than `args.steps` after early stopping.
        best_step (`int`, *optional*):
            Step of the returned weights if `args.patience` selected them; otherwise they are from the last step.
    """

    model: KNOWNModel = field(repr=False)
    losses: list[dict[str, float]]
    validation: list[dict[str, float | None]]
    train_skill: dict[str, RoleSkill]
    held_out_skill: dict[str, dict[str, RoleSkill]]
    seconds: float
    num_processes: int
    mixed_precision: str
    steps_done: int
    best_step: int | None

    def __str__(self) -> str:
        first, last = self.losses[0], self.losses[-1]
        skills = {"train": self.train_skill, **self.held_out_skill}
        rows = [["role", f"loss at step {first['step']}", f"at {last['step']}", *(f"{name} skill" for name in skills)]]
        for role in self.train_skill:
            of_role = [f"{skill[role].skill:+.3f}" if role in skill else "–" for skill in skills.values()]
            rows.append([role, f"{first[role]:.2e}", f"{last[role]:.2e}", *of_role])
        returned = "" if self.best_step is None else f", weights of step {self.best_step}"
        summary = f"{self.steps_done} steps in {self.seconds:.1f} s{returned}; skill: 1 is perfect, 0 is no change"
        return f"{aligned(rows)}\n{summary}"


def meta_train(
    known: KNOWNModel | KNOWNConfig | None,
    train: TransitionDataset,
    held_out: TransitionDataset | Mapping[str, TransitionDataset] | None = None,
    *,
    validation: TransitionDataset | None = None,
    args: MetaTrainingArguments | None = None,
    progress: bool = True,
) -> MetaTrainingResult:
    """Train KNOWN to predict the next less forgotten state.

    The loss is the L1 error `mean |Θ0 + KNOWN(W, dW) - Θ(-1)|` plus the published regularizers (arXiv 2508.05059). The
    optimizer is Adam with a cosine schedule, on batches balanced over roles, trajectories and tensors.

    All processes started by `torchrun` or `accelerate launch` share every batch, so a step sees the same transitions
    on any number of processes. With `args.checkpoint_dir`, an interrupted training resumes and ends with the same
    weights, bit for bit on the same number of processes.

    Nothing is selected on the held-out splits, so their skill is an unbiased estimate for similar new trajectories.
    The returned weights are from the last step or, with `args.patience`, the best ones on the validation split.

    Args:
        known ([`KNOWNModel`] or [`KNOWNConfig`], *optional*):
            Model to train in place, or the sizes of a new one; `None` for the published sizes.
        train ([`TransitionDataset`]):
            Training transitions.
        held_out ([`TransitionDataset`] or `Mapping[str, TransitionDataset]`, *optional*):
            Transitions of other trajectories, used only for evaluation: one split, named `"held_out"`, or several by
            name (other trajectories, architectures, datasets).
        validation ([`TransitionDataset`], *optional*):
            Transitions of yet other trajectories, evaluated during training.
        args ([`MetaTrainingArguments`], *optional*):
            Steps, batch size, learning rate and so on.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`MetaTrainingResult`]; `config.trained_on` of its model describes the training data.

    Raises:
        `ValueError`: If the model has `variant="combination"`, a trajectory is in two splits, the histories do not
        have the length that the model expects, a checkpoint belongs to another training, or the batch size is not a
        multiple of the number of processes.
        `BlockingIOError`: If another training writes to `args.checkpoint_dir`.
        `RuntimeError`: If fewer processes train together than were launched.
        `FloatingPointError`: If the loss is not finite.
    """
    args = args or MetaTrainingArguments()
    splits = {"held_out": held_out} if isinstance(held_out, TransitionDataset) else dict(held_out or {})
    model = known if isinstance(known, KNOWNModel) else _new_model(known or KNOWNConfig(), args.seed)
    if model.config.variant != "reference":
        raise ValueError(
            f"meta_train fits histories of single weights, which KNOWN of variant={model.config.variant!r} does not"
            " read; train one of variant='reference'"
        )
    _check_datasets(model, train, validation, splits, args)
    accelerator = make_accelerator(args)
    try:
        if accelerator.log_with:
            config = {name: value for name, value in asdict(args).items() if isinstance(value, int | float | str)}
            accelerator.init_trackers("know_hf-meta_train", config=config)
        with _locked_checkpoints(accelerator, train, args):
            state = _Training(accelerator, model, train, validation, args).run(progress)
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


@dataclass(frozen=True)
class _Batches(Dataset):
    """Dataset of the batches by role; an index is an array of items."""

    transitions: TransitionDataset

    def __getitem__(self, items: np.ndarray) -> dict[str, dict[str, torch.Tensor]]:
        return self.transitions.by_role(items)


class _Training:
    """Training loop: prepares the objective, resumes from the last checkpoint, and trains the model in place."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: KNOWNModel,
        train: TransitionDataset,
        validation: TransitionDataset | None,
        args: MetaTrainingArguments,
    ) -> None:
        self.accelerator, self.model, self.validation, self.args = accelerator, model, validation, args
        identity = _identity(accelerator, model, train, validation, args)
        objective = MetaObjective(model, train, args)
        optimizer = torch.optim.Adam(objective.trained_parameters(), lr=args.learning_rate)
        schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.steps)
        self.objective, self.optimizer, self.schedule = accelerator.prepare(objective.train(), optimizer, schedule)
        self.checkpoints = None
        self.state = Progress()
        if args.checkpoint_dir is not None:
            folder = Path(args.checkpoint_dir)
            self.checkpoints = CheckpointFolder(folder, args.keep_checkpoints, accelerator, identity)
            self.state = self.checkpoints.resume()
        sampler = BalancedBatchSampler(
            train,
            args.batch_size,
            args.steps,
            seed=args.seed,
            start=self.state.step,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        # Not prepared: accelerate distributes complete batches, here the processes share each of them.
        self.loader = DataLoader(
            _Batches(train),
            batch_size=None,  # an item is a batch
            sampler=sampler,
            num_workers=args.num_workers,
        )
        self.loss_sums: dict[str, torch.Tensor] = {}
        self.steps_since_report = 0

    @property
    def is_finished(self) -> bool:
        state, args = self.state, self.args
        return state.step >= args.steps or 0 < args.patience <= state.looks_since_best

    def run(self, progress: bool) -> Progress:
        state, args = self.state, self.args
        start = time.perf_counter() - state.seconds
        disable = not (progress and self.accelerator.is_main_process)  # accelerate's tqdm shows a bar on every node
        with tqdm(desc="meta-training", initial=state.step, total=args.steps, disable=disable) as bar:
            for batch in takewhile(lambda _: not self.is_finished, self.loader):
                self._step(send_to_device(batch, self.accelerator.device))
                bar.update()
                if self.validation is not None and (state.step == args.steps or state.step % args.eval_every == 0):
                    self._evaluate(self.validation)
                saves = self.checkpoints is not None and (self.is_finished or state.step % args.save_every == 0)
                if self.is_finished or saves or self.steps_since_report == args.log_every:
                    bar.set_postfix({role: f"{mean:.2e}" for role, mean in self._report_losses().items()})
                state.seconds = time.perf_counter() - start
                if saves and self.checkpoints is not None:
                    self.checkpoints.save(state)
        return state

    def _step(self, batch: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        losses = self.objective(batch)
        self.accelerator.backward(losses.pop("objective"))
        self.accelerator.unscale_gradients()
        # Clipped separately: the networks are independent, and one must not slow down the others.
        for role in losses:
            nn.utils.clip_grad_norm_(self.model.networks[role].parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.loss_sums = {role: self.loss_sums.get(role, 0) + loss.detach() for role, loss in losses.items()}
        self.steps_since_report += 1
        self.state.step += 1

    def _evaluate(self, validation: TransitionDataset) -> None:
        """Measure the validation skill, and keep the weights if it is the best so far.

        A skill that is not finite (nothing of the role moves) does not depend on the weights and is ignored, and so is
        an evaluation without a finite skill.
        """
        state = self.state
        self.model.eval()
        skills = retrodiction_skill(self.model, validation, self.accelerator)
        self.model.train()
        finite = {role: skill.skill for role, skill in skills.items() if math.isfinite(skill.skill)}
        state.validation.append({"step": state.step, **{role: finite.get(role) for role in skills}})
        self.accelerator.log({f"validation/{role}": skill for role, skill in finite.items()}, step=state.step)
        if not finite:
            return
        mean = sum(finite.values()) / len(finite)
        state.looks_since_best += 1
        if state.best is None or mean > state.best:
            state.best, state.best_step, state.looks_since_best = mean, state.step, 0
            weights = self.model.state_dict().items()
            state.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in weights}

    def _report_losses(self) -> dict[str, float]:
        """Report the mean loss of each role since the last report, over all processes."""
        totals = self.accelerator.reduce(torch.stack(list(self.loss_sums.values())), "mean")
        means = dict(zip(self.loss_sums, (totals / self.steps_since_report).tolist(), strict=True))
        step = self.state.step
        for role, mean in means.items():
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss of role {role!r} is {mean} at or before step {step}; lower learning_rate, or check "
                    "TransitionDataset.describe() for very large weights"
                )
        self.state.losses.append({"step": step, **means})
        rate = {"learning_rate": self.schedule.get_last_lr()[0]}
        self.accelerator.log({f"loss/{role}": mean for role, mean in means.items()} | rate, step=step)
        self.loss_sums, self.steps_since_report = {}, 0
        return means


@contextmanager
def _locked_checkpoints(
    accelerator: Accelerator, train: TransitionDataset, args: MetaTrainingArguments
) -> Iterator[None]:
    """Keep other trainings from writing to the folder of the checkpoints."""
    with ExitStack() as stack:

        def lock(folder: Path) -> None:
            check_output(folder, train.trajectories, replaces=False)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_folder(folder))

        if args.checkpoint_dir is not None:
            on_main_process(accelerator, partial(lock, Path(args.checkpoint_dir)))
        yield


def _identity(
    accelerator: Accelerator,
    model: KNOWNModel,
    train: TransitionDataset,
    validation: TransitionDataset | None,
    args: MetaTrainingArguments,
) -> dict[str, Any]:
    """Return the settings that must match for a training to resume from a checkpoint."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.cpu().contiguous().numpy().data)
    return {
        **{name: value for name, value in asdict(args).items() if name not in _FREE_ARGUMENTS},
        "precision": accelerator.mixed_precision,  # from the launcher if args leave it open
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
        raise ValueError(f"patience={args.patience} needs a validation split; pass validation, or patience=0")
    split_of: dict[Path, str] = {}
    for split, dataset in [("train", train), ("validation", validation), *held_out.items()]:
        if dataset is None:
            continue
        if dataset.num_states != model.config.num_states:
            raise ValueError(
                f"the {split} split has num_states={dataset.num_states}, but the model takes "
                f"{model.config.num_states} states; create both with the same number"
            )
        for path in sorted({Path(path).resolve() for path in dataset.trajectories}):
            if path in split_of:
                raise ValueError(f"{path} is in the splits {split_of[path]} and {split}; remove it from one of them")
            split_of[path] = split
    if missing := [role for role in model.config.roles if role not in train.roles]:
        logger.warning(
            f"No training transitions for role {', '.join(missing)}: its network stays unchanged. "
            "Predict only models without such tensors, or train on trajectories that have them."
        )
