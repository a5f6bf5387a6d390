"""Cut the tensors of a checkpoint into pieces of bounded size."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..checkpoint import TensorSpec

PIECE_SIZE = 2**19  # elements: reading and writing a piece then cost little next to predicting it
_GROUP_LENGTH = 64  # pieces


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop - 1` of a tensor in row-major order."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def is_first(self) -> bool:
        """Whether the piece starts the tensor. Counts per tensor belong to its first piece."""
        return self.start == 0


def pieces_of(name: str, spec: TensorSpec) -> Iterator[Piece]:
    """Yield the pieces of one tensor in order; an empty tensor has one empty piece."""
    size = spec.shape.numel()
    for start in range(0, max(size, 1), PIECE_SIZE):
        yield Piece(name, start, min(start + PIECE_SIZE, size))


def grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield consecutive pieces in groups that are at most as large as one piece.

    What goes from thread to thread is a group: handing over each small tensor would take longer than predicting it.
    """
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and (size + piece.size > PIECE_SIZE or len(group) == _GROUP_LENGTH):
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.size
    if group:
        yield group


def split_pieces(
    specs: Mapping[str, TensorSpec], cost: Callable[[str], float], part: int = 0, parts: int = 1
) -> list[Piece]:
    """Return the pieces that one of several processes handles: consecutive ones of about the same total cost.

    `cost` is that of an element of a tensor, in any unit. How tensors are cut does not depend on the number of
    processes, so neither do the bytes that are written.
    """
    pieces = [piece for name, spec in specs.items() for piece in pieces_of(name, spec)]
    costs = [piece.size * cost(piece.name) for piece in pieces]
    total, before, mine = sum(costs) or 1, 0.0, []
    for piece, piece_cost in zip(pieces, costs, strict=True):
        if part == min(int((before + piece_cost / 2) / total * parts), parts - 1):
            mine.append(piece)
        before += piece_cost
    return mine
