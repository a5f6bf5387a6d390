"""Meta-training of KNOWN, and how well a predictor runs recorded forgetting backwards."""

import logging as python_logging
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from ..configuration_known import KNOWNConfig
from ..modeling_known import KNOWNModel
from ..predictors import KNOWNPredictor, Predictor, get_predictor
from .arguments import MetaTrainingArguments
from .transitions import BalancedBatchSampler, TransitionDataset

logger: python_logging.Logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class RoleSkill:
    """
    How well one role's transitions were predicted.

    Args:
        skill (`float`):
            `1 - Σ|Θ̂ - Θ(-1)| / Σ|Θ0 - Θ(-1)|` over all transitions: 1 is perfect, 0 is as good as predicting that
            nothing changes, below 0 is worse than that.
        error (`float`):
            Mean `|Θ̂ - Θ(-1)|`, in units of the weights.
        no_change (`float`):
            Mean `|Θ0 - Θ(-1)|`, the error of predicting that nothing changes.
        transitions (`int`):
            Number of transitions.
        by_trajectory (`dict[str, float]`):
            The skill in each trajectory alone, by its path.
    """

    skill: float
    error: float
    no_change: float
    transitions: int
    by_trajectory: dict[str, float] = field(default_factory=dict)


@dataclass
class MetaTrainingResult:
    """
    What [`meta_train`] returns.

    Args:
        model ([`KNOWNModel`]):
            The trained model, in evaluation mode on the CPU.
        losses (`list[dict[str, float]]`):
            For every `log_every` steps `step` and the mean l1 loss of each role over them, regularisers excluded.
        train_skill (`dict[str, RoleSkill]`):
            Skill by role on the transitions trained on.
        held_out_skill (`dict[str, RoleSkill]`):
            Skill by role on the held-out transitions; empty without any.
        seconds (`float`):
            Wall-clock time of the training alone.
    """

    model: KNOWNModel
    losses: list[dict[str, float]]
    train_skill: dict[str, RoleSkill]
    held_out_skill: dict[str, RoleSkill]
    seconds: float


def meta_train(
    known: KNOWNModel | KNOWNConfig | None,
    train: TransitionDataset,
    held_out: TransitionDataset | None = None,
    *,
    args: MetaTrainingArguments | None = None,
    progress: bool = True,
) -> MetaTrainingResult:
    """
    Trains KNOWN to predict the next less forgotten state: the l1 objective `mean |Θ0 + KNOWN(W, dW) - Θ(-1)|` and the
    published regularisers (arXiv 2508.05059), with Adam and a cosine schedule, on batches balanced over roles,
    trajectories and tensors. One process of Accelerate, on its device.

    The weights of the last step are returned: nothing is chosen on the held-out transitions, so their skill is an
    honest estimate for new trajectories like these.

    Args:
        known ([`KNOWNModel`] or [`KNOWNConfig`], *optional*):
            A model to train on, in place, or the sizes of a new one; `None` for the published sizes.
        train ([`TransitionDataset`]):
            Transitions to learn.
        held_out ([`TransitionDataset`], *optional*):
            Transitions of other trajectories, only evaluated.
        args ([`MetaTrainingArguments`], *optional*):
            Steps, batch size, learning rate and so on.
        progress (`bool`, *optional*, defaults to `True`):
            Whether a bar shows the training.

    Returns:
        [`MetaTrainingResult`]; the model's `config.trained_on` says what it was trained on.

    Raises:
        `ValueError`: when a trajectory is in both datasets, or their histories do not have the model's length.
        `FloatingPointError`: when the loss is no longer finite.
    """
    args = args or MetaTrainingArguments()
    model = known if isinstance(known, KNOWNModel) else _new_model(known or KNOWNConfig(), args.seed)
    _check_datasets(model, train, held_out)
    accelerator = Accelerator()
    loader = DataLoader(
        train,
        batch_sampler=BalancedBatchSampler(train, args.batch_size, args.steps, seed=args.seed),
        collate_fn=_as_is,
    )
    optimizer = torch.optim.Adam(model.train().parameters(), lr=args.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.steps)
    prepared, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    losses: list[dict[str, float]] = []
    sums: dict[str, torch.Tensor] = {}
    since = 0
    start = time.perf_counter()
    bar = tqdm(loader, main_process_only=True, desc="meta-training", total=args.steps, disable=not progress)
    for step, batch in enumerate(bar, start=1):
        loss_of = {role: prepared(role=role, **transitions).loss for role, transitions in batch.items()}
        regularization = sum(model.regularization(role, args.kernel_l1, args.bias_l1) for role in loss_of)
        accelerator.backward(sum(loss_of.values()) + regularization)
        # Each on its own: the networks have nothing in common, and one must not slow the others down.
        for role in loss_of:
            accelerator.clip_grad_norm_(model.networks[role].parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        sums = {role: sums.get(role, 0) + loss.detach() for role, loss in loss_of.items()}
        since += 1
        if since == args.log_every or step == args.steps:
            losses.append({"step": step, **_means(sums, since, step)})
            bar.set_postfix({role: f"{value:.2e}" for role, value in losses[-1].items() if role != "step"})
            sums, since = {}, 0
    seconds = time.perf_counter() - start

    model = accelerator.unwrap_model(prepared).cpu().eval()
    model.config.trained_on = {"trajectories": len(train.trajectories), "roles": train.describe()}
    return MetaTrainingResult(
        model=model,
        losses=losses,
        train_skill=retrodiction_skill(model, train),
        held_out_skill=retrodiction_skill(model, held_out) if held_out is not None else {},
        seconds=seconds,
    )


def retrodiction_skill(predictor: Predictor | KNOWNModel | str, dataset: TransitionDataset) -> dict[str, RoleSkill]:
    """
    Skill of a predictor against "nothing changed", by role, over all transitions of a dataset, each weighing the same.

    Args:
        predictor ([`Predictor`], [`KNOWNModel`] or `str`):
            A predictor, the model, or the name of a registered predictor that needs no fields.
        dataset ([`TransitionDataset`]):
            The transitions; made with `max_per_tensor=None` it holds every scalar of its trajectories.

    Returns:
        `dict[str, RoleSkill]`, one entry for each role of the dataset.

    Raises:
        `ValueError`: when the predictor takes histories of another length than the dataset's.
    """
    if isinstance(predictor, KNOWNModel):
        predictor = KNOWNPredictor(predictor)
    elif isinstance(predictor, str):
        predictor = get_predictor(predictor)
    if predictor.num_states not in (None, dataset.num_states):
        raise ValueError(
            f"{type(predictor).__name__} takes {predictor.num_states} states, the dataset has num_states="
            f"{dataset.num_states}; make it with num_states={predictor.num_states}"
        )
    sums: dict[str, dict[str, _Sums]] = defaultdict(lambda: defaultdict(_Sums))
    for block in dataset.blocks:
        history, labels = dataset.block(block)
        residual = predictor.residual(history, block.role)
        sums[block.role][block.trajectory].add(history[:, -1] + residual - labels, history[:, -1] - labels)
    return {role: _role_skill(by_trajectory) for role, by_trajectory in sums.items()}


@dataclass
class _Sums:
    error: float = 0.0
    no_change: float = 0.0
    transitions: int = 0

    def add(self, error: torch.Tensor, no_change: torch.Tensor) -> None:
        self.error += error.abs().sum(dtype=torch.float64).item()
        self.no_change += no_change.abs().sum(dtype=torch.float64).item()
        self.transitions += len(error)

    @property
    def skill(self) -> float:
        # Where nothing moved, only predicting exactly that is no loss.
        if self.no_change == 0:
            return 0.0 if self.error == 0 else -math.inf
        return 1 - self.error / self.no_change


def _role_skill(by_trajectory: dict[str, _Sums]) -> RoleSkill:
    total = _Sums(
        error=sum(sums.error for sums in by_trajectory.values()),
        no_change=sum(sums.no_change for sums in by_trajectory.values()),
        transitions=sum(sums.transitions for sums in by_trajectory.values()),
    )
    return RoleSkill(
        skill=total.skill,
        error=total.error / total.transitions,
        no_change=total.no_change / total.transitions,
        transitions=total.transitions,
        by_trajectory={path: sums.skill for path, sums in by_trajectory.items()},
    )


def _new_model(config: KNOWNConfig, seed: int) -> KNOWNModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KNOWNModel(config)


def _check_datasets(model: KNOWNModel, train: TransitionDataset, held_out: TransitionDataset | None) -> None:
    for dataset in (train, held_out):
        if dataset is not None and dataset.num_states != model.config.num_states:
            raise ValueError(
                f"the model takes {model.config.num_states} states, a dataset has num_states={dataset.num_states}; "
                "make both with the same number"
            )
    if held_out is not None and (shared := set(train.trajectories) & set(held_out.trajectories)):
        raise ValueError(f"{', '.join(sorted(shared))} is trained on and held out; leave it out of one of the two")
    if missing := [role for role in model.config.roles if role not in train.roles]:
        logger.warning(
            f"No transition of the role {', '.join(missing)} to train on: its network stays as it is. "
            "Predict only models without such tensors, or train on trajectories that have them."
        )


def _means(sums: dict[str, torch.Tensor], count: int, step: int) -> dict[str, float]:
    means = {role: (total / count).item() for role, total in sums.items()}
    for role, mean in means.items():
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss of role {role!r} is {mean} before step {step}; choose a smaller learning_rate, or look for "
                "very large weights with TransitionDataset.describe()"
            )
    return means


def _as_is(batch: Any) -> Any:
    return batch
