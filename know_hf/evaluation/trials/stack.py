"""[`Stack`]: copies of a model whose parameters share tensors with a first axis, trained by `torch.func.vmap`."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from ..fine_tuning import Examples, Scores, batches, inputs_of, order_by_length, trimmed
from .stacked_adam import StackedAdam


class Stack:
    """T copies of a model that train and evaluate together.

    The T modules of `starts` have the initial values; one may occur several times. `template` is a module of the
    architecture, which is changed; its own values are used for parameters that are not `trained`.
    """

    def __init__(
        self, template: nn.Module, starts: Sequence[nn.Module], trained: Callable[[str], bool] | None = None
    ) -> None:
        self.template = template
        sources = [dict(start.named_parameters()) for start in starts]
        buffers = [dict(start.named_buffers()) for start in starts]
        names = [name for name in sources[0] if trained is None or trained(name)]
        self.parameters = {name: torch.stack([source[name].detach() for source in sources]) for name in names}
        self.buffers = {name: torch.stack([source[name] for source in buffers]) for name in buffers[0]}

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def train(
        self,
        sets: Sequence[Examples],
        of_copy: Sequence[int],
        learning_rates: Mapping[str, Sequence[float]],
        steps: int,
        seeds: Sequence[int],
        batch_size: int | None = None,
    ) -> None:
        """Train as [`fine_tune`] trains each copy.

        `sets` have equal shapes, and `of_copy` is the index of the set of each copy. `learning_rates` has, by name of
        the parameter, the rate of each copy. The seeds, of the order of the examples of each set, must be equal if the
        model draws random numbers.
        """
        device, values = self._device, list(self.parameters.values())
        rates = [torch.tensor(learning_rates[name], device=device) for name in self.parameters]
        adam = StackedAdam(values, rates, steps)
        self.template.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds[0])
            for value in values:
                value.requires_grad_()
            for _, batch in zip(range(steps), self._epochs(sets, of_copy, seeds, batch_size), strict=False):
                losses = self._call(batch, lambda output: output.loss)
                adam.step(torch.autograd.grad(losses.sum(), values))
        for value in values:
            value.requires_grad_(False)
        self.template.eval()

    @torch.no_grad()
    def recalibrate(self, sets: Sequence[Examples], of_copy: Sequence[int], batch_size: int | None = None) -> None:
        """Recompute BatchNorm statistics, as [`recalibrate_batch_norm`] does for each copy."""
        norms = {name: module for name, module in self.template.named_modules() if isinstance(module, _BatchNorm)}
        norms = {name: norm for name, norm in norms.items() if norm.track_running_stats}
        if not norms:
            return
        self.template.eval()
        for name, norm in norms.items():
            norm.train()
            for buffer, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
                self.buffers[f"{name}.{buffer}"].fill_(value)
        momenta = {name: norm.momentum for name, norm in norms.items()}
        inputs = [inputs_of(examples) for examples in sets]
        for index, batch in enumerate(self._once(inputs, of_copy, batch_size or _length(inputs[0]))):
            for norm in norms.values():
                norm.momentum = 1 / (index + 1)  # the average over all batches
            self._call(batch, lambda output: output.logits)
        for name, norm in norms.items():
            norm.momentum = momenta[name]
        self.template.eval()

    @torch.no_grad()
    def evaluate(self, sets: Sequence[Examples], of_copy: Sequence[int]) -> list[Scores]:
        """Compute accuracy and loss of each copy, as [`evaluate_classifier`] does."""
        self.template.eval()
        orders = [order_by_length(examples) for examples in sets]
        count, size = _length(sets[0]), 256 if orders[0] is None else 64
        correct = torch.zeros(len(self), device=self._device)
        loss = torch.zeros(len(self), dtype=torch.float64, device=self._device)
        for batch in self._once(sets, of_copy, size, orders):
            labels = batch["labels"]
            losses, logits = self._call(batch, lambda output: (output.loss, output.logits))
            correct += (logits.argmax(dim=-1) == labels).sum(dim=-1)
            loss += losses.double() * labels.shape[-1]
        return [
            {"accuracy": float(right) / count, "loss": float(total) / count}
            for right, total in zip(correct, loss, strict=True)
        ]

    def copy_to(self, index: int, module: nn.Module) -> None:
        """Copy the values of one copy into a module of the architecture."""
        with torch.no_grad():
            for name, values in self.parameters.items():
                module.get_parameter(name).copy_(values[index])
            for name, values in self.buffers.items():
                module.get_buffer(name).copy_(values[index])

    def state(self, index: int) -> dict[str, Tensor]:
        """Return the trained parameters of one copy."""
        return {name: values[index].clone() for name, values in self.parameters.items()}

    def computes(self, batch: dict[str, Tensor], loss: Tensor) -> bool:
        """Whether all copies have this training loss."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                losses = self._call(batch, lambda output: output.loss)
            except Exception:  # whatever the forward of a foreign model raises on tensors of vmap
                return False
        return torch.allclose(losses, loss, rtol=1e-3, atol=1e-4)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _call(self, batch: dict[str, Tensor], read: Callable[[Any], Any]) -> Any:
        def call(parameters: Any, buffers: Any, inputs: dict[str, Tensor]) -> Any:
            return read(functional_call(self.template, (parameters, buffers), (), inputs))

        shared = next(iter(batch.values())).shape[0] == 1 and len(self) > 1
        inputs = {name: tensor[0] for name, tensor in batch.items()} if shared else batch
        mapped = vmap(call, in_dims=(0, 0, None if shared else 0), randomness="same")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # operators that vmap runs in a loop, such as attention
            return mapped(self.parameters, self.buffers, inputs)

    def _epochs(
        self, sets: Sequence[Examples], of_copy: Sequence[int], seeds: Sequence[int], batch_size: int | None
    ) -> Iterator[dict[str, Tensor]]:
        length = _length(sets[0])
        if batch_size is None or batch_size >= length:
            (batch,) = self._once(sets, of_copy, length)
            while True:
                yield batch
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        while True:
            orders = [torch.randperm(length, generator=generator) for generator in generators]
            yield from self._once(sets, of_copy, batch_size, orders)

    def _once(
        self,
        sets: Sequence[Examples],
        of_copy: Sequence[int],
        batch_size: int,
        orders: Sequence[Tensor | None] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Iterate over the examples once: batches `(T, B, …)`, or `(1, B, …)` of a single set."""
        orders = orders or [None] * len(sets)
        for start in range(0, _length(sets[0]), batch_size):
            piece = slice(start, start + batch_size)
            rows = [piece if order is None else order[piece] for order in orders]
            batch = {
                name: torch.cat([examples[name][of_set] for examples, of_set in zip(sets, rows, strict=True)])
                for name in sets[0]
            }
            batch = trimmed({name: tensor.to(self._device) for name, tensor in batch.items()})
            stacked = {name: tensor.unflatten(0, (len(sets), -1)) for name, tensor in batch.items()}
            yield stacked if len(sets) == 1 else {name: tensor[list(of_copy)] for name, tensor in stacked.items()}


@dataclass(frozen=True)
class Stackable:
    """How a model can be stacked.

    All copies need the same examples and seed (`one_set`) if a training step draws random numbers, such as dropout
    does, or its control flow depends on the examples. A copy takes `nbytes` in a training step: parameters, their
    gradients and moments, and saved activations.
    """

    one_set: bool
    nbytes: int


def stackable(template: nn.Module, examples: Examples, batch_size: int | None = None) -> Stackable | None:
    """Try a model on a batch, which changes its BatchNorm statistics; return `None` if a stack does not compute its
    loss.
    """
    device = next(template.parameters()).device
    batch = next(batches(examples, batch_size or _length(examples), device=device))
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = detached = tensor.detach()  # the tensor holds the graph: neither would be freed
        return detached

    template.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = _random_state(device)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            expected = template(**batch).loss
        is_random = not torch.equal(before, _random_state(device))
    stack = Stack(template, [template, template])
    shared, own = ({name: tensor.expand(sets, *tensor.shape) for name, tensor in batch.items()} for sets in (1, 2))
    if not stack.computes(shared, expected.detach()):
        return None
    weights = sum(parameter.nbytes for parameter in template.parameters())
    one_set = is_random or not stack.computes(own, expected.detach())
    return Stackable(one_set, 4 * weights + sum(tensor.nbytes for tensor in saved.values()))


def _random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def _length(examples: Examples) -> int:
    return len(next(iter(examples.values())))
