"""Scale symmetries that give layers, or the channels between two layers, weights of equal size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from ..tensor_factor import TensorFactor
from .scale_symmetries import ScaleSymmetry

Factors = dict[str, TensorFactor]
_SWEEPS, _CONVERGED = 50, 1e-4


@dataclass(frozen=True)
class ChannelPair:
    """Two matrices with a homogeneous function in between, of which channels scale one by one.

    Channel c of the first one's output has any factor, undone in the second.
    """

    first: str  # name of the matrix
    second: str
    axes: tuple[int, int]  # of the channels in each
    vectors: Mapping[str, int]  # biases: 1 if they scale with the first matrix, -1 with the second
    channel_of: torch.Tensor  # (D,): channel of each position along the second matrix's axis

    def factors(self, values: torch.Tensor) -> Factors:
        """Return the factors of all tensors, from those of the channels `(C,)`."""
        undone = (1 / values)[self.channel_of]
        factors = {self.first: TensorFactor(channels={self.axes[0]: values})}
        factors[self.second] = TensorFactor(channels={self.axes[1]: undone})
        for name, sign in self.vectors.items():
            factors[name] = TensorFactor(channels={0: values if sign > 0 else undone})
        return factors


def equal_layers(symmetries: Sequence[ScaleSymmetry], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logarithms `(K,)` of the factors of K symmetries that bring the root mean squares of all matrices together.

    With r the root mean squares of Θ0's matrices, m the mean of all log r and E the exponents of those that scale,
    `min_z |log r + E z - m|²`. The tensors are Θ0 by name on disk.
    """
    split = {name: part for symmetry in symmetries for name, part in symmetry.parts.items()}
    exponents, logarithms = [], []
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        part = split.get(name)
        blocks = [tensor]
        if part is not None:
            channels = [(part.part_of == i).nonzero()[:, 0] for i in range(len(part.exponents))]
            blocks = [tensor.index_select(part.axis, of_part) for of_part in channels]
        for i, block in enumerate(blocks):
            if block.any():
                logarithms.append(float(block.double().square().mean().sqrt().log()))
                exponents.append([_exponent(symmetry, name, i) for symmetry in symmetries])
    if not exponents or not symmetries:
        return torch.zeros(len(symmetries), dtype=torch.float64)
    matrix = torch.tensor(exponents, dtype=torch.float64)
    target = torch.tensor(logarithms, dtype=torch.float64)
    target = (target.mean() - target)[:, None]
    return torch.linalg.lstsq(matrix, target, driver="gelsd").solution[:, 0]


def equal_channels(pairs: Sequence[ChannelPair], tensors: Mapping[str, torch.Tensor]) -> list[Factors]:
    """Return factors by name, for each pair, that give each channel the same range in both matrices of its pair.

    Cross-layer equalisation (Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*,
    arXiv 1906.04721, equations 9 to 11): with the largest |weight| r1 and r2 of a channel in the two layers, the first
    is multiplied by `sqrt(r2 / r1)` and the second divided by it, in turns over all pairs until nothing moves.
    Channels of zeros are left alone.
    """
    current = {name: tensors[name].float() for pair in pairs for name in (pair.first, pair.second)}
    totals = [torch.ones(current[pair.first].shape[pair.axes[0]]) for pair in pairs]
    for _ in range(_SWEEPS):
        largest = 0.0
        for total, pair in zip(totals, pairs, strict=True):
            first = _range(current[pair.first], pair.axes[0])
            second = torch.zeros_like(first)
            second.scatter_reduce_(0, pair.channel_of, _range(current[pair.second], pair.axes[1]), "amax")
            values = torch.where((first > 0) & (second > 0), (second / first).sqrt(), 1.0)
            total *= values
            for name, factor in pair.factors(values).items():
                if name in current:
                    current[name] = factor.scale(current[name])
            largest = max(largest, float(values.log().abs().max()))
        if largest < _CONVERGED:
            break
    return [pair.factors(total) for pair, total in zip(pairs, totals, strict=True)]


def channel_pairs(
    model: nn.Module,
    symmetries: Sequence[ScaleSymmetry],
    in_memory: Mapping[str, str],
    keeps_function: Callable[[Factors], bool],
) -> list[ChannelPair]:
    """Find the pairs of matrices of which single channels scale.

    The scale symmetries say which pairs there are, the modules which axes; how channels pass from one to the other
    (flattened, or repeated for groups of heads) is tried out. `in_memory` has names in memory by names on disk.
    """
    axes: dict[str, tuple[int, int]] = {}
    owners, state = dict(model.named_modules(remove_duplicate=False)), model.state_dict()
    for name, path in in_memory.items():
        if (of_owner := _axes(owners.get(path.rpartition(".")[0]))) is not None:
            axes[name] = of_owner
    tensors = {name: state[path] for name, path in in_memory.items()}
    exact = [symmetry for symmetry in symmetries if symmetry.is_exact and not symmetry.parts]
    pairs: list[ChannelPair] = []
    for i in range(len(exact)):
        candidates = _of_symmetry(i, exact, axes, tensors)
        pairs += islice((pair for pair in candidates if keeps_function(pair.factors(_trial(pair)))), 1)
    return pairs


def _trial(pair: ChannelPair) -> torch.Tensor:
    """Random powers of two, which round nothing."""
    count = int(pair.channel_of.max()) + 1
    return 2.0 ** torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(0))


def _of_symmetry(
    i: int,
    symmetries: Sequence[ScaleSymmetry],
    axes: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, torch.Tensor],
) -> Iterator[ChannelPair]:
    """Yield what the i-th symmetry, alone or less a later one, may be by channels.

    It must change one matrix by f, another one by 1/f, and else vectors only.
    """
    exponents = symmetries[i].exponents
    for other in [{}, *(symmetry.exponents for symmetry in symmetries[i + 1 :])]:
        total = {name: exponents.get(name, 0.0) - other.get(name, 0.0) for name in {**exponents, **other}}
        total = {name: exponent for name, exponent in total.items() if exponent}
        matrices = sorted(exponent for name, exponent in total.items() if tensors[name].ndim > 1)
        if matrices == [-1, 1] and all(abs(exponent) == 1 for exponent in total.values()):
            yield from _candidates(total, axes, tensors)


def _candidates(
    exponents: Mapping[str, float], axes: Mapping[str, tuple[int, int]], tensors: Mapping[str, torch.Tensor]
) -> Iterator[ChannelPair]:
    first, second = sorted((n for n in exponents if tensors[n].ndim > 1), key=lambda name: -exponents[name])
    vectors = {name: int(sign) for name, sign in exponents.items() if tensors[name].ndim == 1}
    if first not in axes or second not in axes:
        return
    count = tensors[first].shape[axes[first][0]]
    for axis in (axes[second][1], axes[second][0]):
        size = tensors[second].shape[axis]
        repeats, rest = divmod(size, count)
        if rest or any(tensors[name].shape[0] != (count if sign > 0 else size) for name, sign in vectors.items()):
            continue
        # flattened images first, then heads that share keys and values, from one head to heads of one channel
        maps = [torch.arange(count).repeat_interleave(repeats)]
        heads = [head for head in range(count, 1, -1) if count % head == 0] if repeats > 1 else []
        maps += [torch.arange(count).view(-1, 1, head).expand(-1, repeats, head).flatten() for head in heads]
        for channel_of in maps:
            yield ChannelPair(first, second, (axes[first][0], axis), vectors, channel_of)


def _exponent(symmetry: ScaleSymmetry, name: str, part: int) -> float:
    if name in symmetry.parts:
        return symmetry.parts[name].exponents[part]
    return symmetry.exponents.get(name, 0.0)


def _axes(owner: Any) -> tuple[int, int] | None:
    """Axes of a weight's output and input channels."""
    if isinstance(owner, Conv1D | _ConvTransposeNd):
        return 1, 0
    return (0, 1) if isinstance(owner, nn.Linear | _ConvNd) else None


def _range(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    return tensor.abs().movedim(axis, 0).flatten(1).amax(dim=1)
