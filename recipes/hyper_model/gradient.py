"""Train the network of KNOWN's variant "combination" by the gradient of how well the combined weights transfer.

    python recipes/hyper_model/gradient.py --data omniglot --output-dir outputs/hyper_model --seed 0

The utility of a task is that of `objective.py`, with a softmax in place of the argmax of the ridge regressions; its
gradient goes through their closed form. Each time a task is drawn, tail, branches and losses may be hidden, so the
model also serves recordings without them. `searches/NAME/model` is the trained model.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from itertools import compress, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

if TYPE_CHECKING:
    from objective import RecordedTask

HIDDEN = tuple(tuple(compress(("tail", "branches", "losses"), which)) for which in product((False, True), repeat=3))
FIT_RATE = 0.02  # of the coefficients of one task
OPTIONS = ("steps", "rate", "batch", "seed", "leave_out", "penalties", "loss_weight")
SHARPNESS = 15.0  # of the softmax of the outputs of a ridge regression, which are near 0 and 1


class DifferentiableTask:
    """The loss of a meta-task as a function of the coefficients of all tensors.

    Args:
        task ([`RecordedTask`]):
            A task.
        leave_out (sequence of `str`, *optional*):
            Elements of the basis without a coefficient.
        penalties, loss_weight (*optional*):
            Penalties of the ridge regressions, and what source loss costs; those of the utility by default.
    """

    def __init__(
        self,
        task: "RecordedTask",
        leave_out: Sequence[str] = (),
        penalties: Sequence[float] | None = None,
        loss_weight: float | None = None,
    ) -> None:
        from objective import LOSS_WEIGHT, PENALTIES

        from know_hf.known.combination_network import ELEMENTS

        self.task = task
        self.penalties = PENALTIES if penalties is None else penalties
        self.loss_weight = LOSS_WEIGHT if loss_weight is None else loss_weight
        num_states = 1 if "states" in leave_out else task.num_states
        self.elements = (*ELEMENTS, *(f"state-{index}" for index in range(1, num_states)))
        of_task = task.bases_without(leave_out)
        self.stacks = {}
        for name, basis in of_task.items():
            elements = {n: tensor for n, tensor in basis.elements.items() if n not in leave_out}
            absent = torch.zeros_like(task.theta0[name])
            self.stacks[name] = torch.stack([elements.get(element, absent) for element in self.elements])
        bases = of_task.values()
        self.tensor_features = torch.stack([basis.tensor_features for basis in bases]).float()
        self.state_features = torch.stack([basis.state_features for basis in bases]).float()
        self.source_loss = task.source_loss

    def weights(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Return the weights of coefficients `(tensors, elements)`."""
        moved = {}
        for (name, stack), of_tensor in zip(self.stacks.items(), coefficients, strict=True):
            moved[name] = self.task.theta0[name] + torch.tensordot(of_tensor, stack, dims=1)
        return {**self.task.theta0, **moved}

    def loss(self, coefficients: Tensor, half: int | None = None) -> Tensor:
        """Return minus the smooth utility of coefficients, tested on the drawings of one half or on all."""
        from objective import LARGEST_COST, soft_maximum

        task, source = self.task, self.task.source.test
        images, labels = task.images["pixel_values"], task.images["labels"]
        with _inputs_of(task.model.classifier) as inputs:
            outputs = self._logits(coefficients, torch.cat([source["pixel_values"], images]))
        source_loss = cross_entropy(outputs[: len(source["labels"])], source["labels"])
        cost = (self.loss_weight * (source_loss - self.source_loss)).clamp(0.0, LARGEST_COST)
        right = self._softly_right(inputs[0][-len(images) :], labels, task.train, task.test, task.num_labels)
        is_tested = task.is_tested(half)[:, None]
        return cost - soft_maximum((right * is_tested).sum(-1) / is_tested.sum(-1)).mean()

    def episode_loss(self, coefficients: Tensor) -> Tensor:
        """Return minus the smooth accuracy on few-shot tasks of the training data of the source task: half of the
        drawings of each character train a ridge regression that is tested on the other half.
        """
        from objective import soft_maximum

        images, labels = (self.task.source.train[name] for name in ("pixel_values", "labels"))
        with _inputs_of(self.task.model.classifier) as inputs:
            self._logits(coefficients, images)
        right = self._softly_right(inputs[0][-len(images) :], labels, *self._episodes, int(labels.max()) + 1)
        return -soft_maximum(right.mean(-1)).mean()

    @cached_property
    def _episodes(self) -> tuple[Tensor, Tensor]:
        """Rows `(D, N)` of the training data that train, and that test."""
        labels = self.task.source.train["labels"]
        generator, halves = torch.Generator().manual_seed(0), []
        by_class = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
        for _ in range(self.task.draws):
            drawn = [rows[torch.randperm(len(rows), generator=generator)].tensor_split(2) for rows in by_class]
            halves.append([torch.cat(rows) for rows in zip(*drawn, strict=True)])
        train, test = zip(*halves, strict=True)
        return torch.stack(train), torch.stack(test)

    def _softly_right(self, inputs: Tensor, labels: Tensor, train: Tensor, test: Tensor, num_labels: int) -> Tensor:
        """Return the probability `(D, penalties, N)` of the right class, by ridge regressions on features."""
        from know_hf.evaluation.trials import logits, ridge_heads

        features = inputs.flatten(1)
        features = features - features.mean(0)
        features = features / features.square().mean().sqrt()  # ridge_heads takes the scale as a constant
        heads = ridge_heads(features[train], labels[train], num_labels, self.penalties)
        predicted = (SHARPNESS * logits(features[test], heads)).softmax(-1)
        return predicted.gather(-1, labels[test][:, None, :, None].expand(*predicted.shape[:-1], 1))[..., 0]

    def validation_loss(self, coefficients: Tensor) -> Tensor:
        """Return the loss of coefficients on the validation data of the source task."""
        validation = self.task.source.validation
        return cross_entropy(self._logits(coefficients, validation["pixel_values"]), validation["labels"])

    def _logits(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """Return the outputs for images, with BatchNorm statistics of the training data of the source task."""
        known = self.task.source.train["pixel_values"]
        inputs = {"pixel_values": torch.cat([known, images])}
        with _batch_norm_of_first(self.task.model, len(known)):
            output = torch.func.functional_call(self.task.model, self.weights(coefficients), kwargs=inputs)
        return output.logits[len(known) :]


@contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first argument of each call of a layer."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        handle.remove()


@contextmanager
def _batch_norm_of_first(model: nn.Module, count: int) -> Iterator[None]:
    """Let BatchNorm layers normalise by the statistics of the first examples of a batch, with their gradient."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def forward(norm: nn.BatchNorm2d, inputs: Tensor) -> Tensor:
        variance, mean = torch.var_mean(inputs[:count], dim=(0, 2, 3), keepdim=True)
        return (inputs - mean) * (variance + norm.eps).rsqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]

    try:
        for norm in norms:
            norm.forward = partial(forward, norm)
        yield
    finally:
        for norm in norms:
            del norm.forward


def train_network(
    tasks: "Sequence[RecordedTask]",
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    leave_out: Sequence[str] = (),
    **objective: Any,
) -> Any:
    """Train a network from coefficients of zero by Adam with a cosine schedule.

    Args:
        tasks (sequence of [`RecordedTask`]):
            Tasks to draw from.
        steps, batch (`int`):
            Optimizer steps, and tasks of each.
        rate (`float`):
            First learning rate.
        seed (`int`):
            Seed of the network and the order of tasks.
        leave_out (sequence of `str`, *optional*):
            Elements of the basis without a coefficient.
        objective (*optional*):
            Penalties and loss weight of [`DifferentiableTask`].

    Returns:
        [`KNOWNModel`].
    """
    from search import new_network

    model = new_network(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    task_of = cache(lambda index, hidden: DifferentiableTask(tasks[index], (*leave_out, *HIDDEN[hidden]), **objective))
    with tqdm(range(steps), "training", unit="step") as bar:
        for _ in bar:
            drawn = torch.randperm(len(tasks), generator=generator)[:batch].tolist()
            hidden = torch.randint(len(HIDDEN), (len(drawn),), generator=generator).tolist()
            chosen = list(map(task_of, drawn, hidden))
            total = 0.0
            for task in chosen:
                coefficients = torch.cat(model.combination(task.tensor_features, task.state_features), dim=-1)
                loss = task.loss(coefficients) / len(chosen)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(utility=f"{-100 * total:.2f} points")
    return model


def fit_coefficients(
    task: DifferentiableTask, loss: Callable[[Tensor], Tensor], per_tensor: bool = False, steps: int = 100
) -> Tensor:
    """Return the coefficients of one task that Adam finds for a loss of them, from zero.

    Args:
        task ([`DifferentiableTask`]):
            The task.
        loss (`Callable[[Tensor], Tensor]`):
            The loss of coefficients `(tensors, elements)`.
        per_tensor (`bool`, *optional*, defaults to `False`):
            Whether each tensor has its own, instead of one for layers with and one for layers without a norm after
            them.
        steps (`int`, *optional*, defaults to `100`):
            Steps.
    """
    contexts = task.task.contexts.values()
    rows = torch.tensor([index if per_tensor else int(c.is_normalised) for index, c in enumerate(contexts)])
    values = torch.zeros(int(rows.max()) + 1, len(task.elements), requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=FIT_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(values[rows]).backward()
        optimizer.step()
    return values.detach()[rows]


def main(arguments: argparse.Namespace) -> int:
    from objective import load_tasks

    folder = arguments.output_dir / "searches" / (arguments.name or f"gradient-{arguments.seed}")
    tasks = load_tasks(arguments.split, "train", arguments.data, arguments.output_dir)
    options = {name: getattr(arguments, name) for name in OPTIONS}
    model = train_network(tasks, **options)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "model")
    (folder / "settings.json").write_text(json.dumps(options, indent=2))
    print(f"wrote {folder / 'model'}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    from search import add_search

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_search(parser, "gradient")
    add = parser.add_argument
    add("--steps", type=int, default=900, help="optimizer steps (default: 900)")
    add("--rate", type=float, default=0.005, help="first learning rate (default: 0.005)")
    add("--batch", type=int, default=8, help="tasks of a step (default: 8)")
    add("--penalties", type=float, nargs="+", help="penalties of the ridge regressions (default: 0.01 0.1 1)")
    add("--loss-weight", type=float, help="accuracy that a source loss of 1 above Θ0's costs (default: 0.1)")
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("gradient.py", lambda: main(arguments)))
