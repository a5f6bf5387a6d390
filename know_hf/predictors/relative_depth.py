"""Relative depth of every tensor, from names alone: 0 at the input, 1 at the output.

The order of a model's modules is written nowhere on disk, and names are sorted there. What names do tell is the index
of a block in its list. The rules, in the order they apply:

1. A name under a head (`lm_head`, `classifier`, `decode_head.layers.0`, …) has depth 1.
2. An index counts where its list is one of blocks: `layer.3`, `layers.3`, `h.3`, `blocks.3`, `stages.3`, `features.3`,
   `layer3`, `denseblock3` (numbers in names count from 1). Inside of a block, further indices count where their list
   is again one of blocks or stands right in the first (`stages.1.layers.0.layer.1`, `block.3.layer.1`, `block.0.1`);
   experts, heads of attention and the parts of a `Sequential` inside of a block don't. The tuples of indices of one
   *tower* (what stands before the list, such as `bert.encoder`) are its blocks, in lexicographic order and evenly
   spaced: the first has depth 0, the last 1. An outermost index that no name has still takes its place, as adapters
   may be in some layers only. A list of another name beside the blocks goes by its index
   (`encoder.patch_embeddings.2` with `encoder.block.2`).
3. Towers stand one after the other by what their names say: first a stem, backbone or feature extractor, then
   encoders and whatever sees or hears, then decoders and the rest. Towers of the same kind are side by side and share
   the span of depth (text and image of CLIP), so that in T5 the encoder goes from 0 to about a half.
4. A name in no block is at depth 0 where it embeds (`embed…`, `patch…`, `stem`, `wte`, `cls_token`, `shared`, `conv1`,
   …), else at the end of the tower that it shares the longest beginning with (`encoder.final_layer_norm`), else at 1.
5. Without any list of blocks every index counts (`0.weight`, `attentions.3`), and without any index modules are taken
   in the order of their names, numbers as numbers: `conv1`, `conv2`, `fc1`, `fc2`. That order is a guess.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

Path = tuple[str, ...]
Block = tuple[Path, tuple[int, ...]]  # tower and indices

_BLOCKS = re.compile(r"^(h|features|(?!.*(down|up)sampl).*(layers?|blocks?|stages?|layer_groups))$")
_NUMBERED_BLOCK = re.compile(r"(\D*(?:layer|block|stage))_?(\d+)$")
_HEAD = re.compile(r"(^|_)(heads?|classifiers?|predict\w*|embed_out|bbox_embed|class_embed|cls|score)($|_(?!token))")
_INPUT = re.compile(
    r"(^|_)(embed\w*|patch|stem|wte|wpe|tokens?|positions?|pre)($|_)|^(input|shared$|(conv|bn|norm)_?[01]$)"
    r"|feature_projection"
)
_FIRST = re.compile(r"backbone|feature_extractor|feature_encoder")
_ENCODER = re.compile(r"encoder|vision|visual|image|audio|speech")


def relative_depths(names: Sequence[str]) -> dict[str, float]:
    """Relative depth of the layer that each tensor belongs to; the rules stand in this module's docstring.

    Args:
        names (`Sequence[str]`): Names of all tensors of a model or of an adapter as they are on disk, in any order.

    Returns:
        `dict[str, float]`: from each name to its depth in [0, 1], in the order given.
    """
    paths = {name: _path(name) for name in names}
    blocks = {name: _block(path, any_list=False) for name, path in paths.items()}
    if not any(blocks.values()):
        blocks = {name: _block(path, any_list=True) for name, path in paths.items()}
    spans = _spans([block for block in blocks.values() if block])
    if not spans:
        return _by_name(paths)
    ends: dict[Path, float] = defaultdict(float)
    for (tower, _), depth in spans.items():
        ends[tower] = max(ends[tower], depth)

    depths = {}
    for name, path in paths.items():
        block = blocks[name] or _beside(path, spans)
        depths[name] = spans[block] if block else _outside(path, ends)
    return depths


def _path(name: str) -> Path:
    """Components of the module's name, without what peft puts before it and behind."""
    path = tuple(name.removeprefix("base_model.model.").split("."))
    return next((path[:i] for i, part in enumerate(path) if part.startswith("lora_")), path[:-1]) or path


def _is_head(path: Path) -> bool:
    return any(_HEAD.search(part) for part in path)


def _is_input(path: Path) -> bool:
    return any(_INPUT.search(part) for part in path)


def _block(path: Path, any_list: bool) -> Block | None:
    """Tower and indices of a block, `None` where there is none or a head holds it."""
    tower: Path | None = None
    indices: list[int] = []
    last = -1
    for position, part in enumerate(path):
        numbered = _NUMBERED_BLOCK.match(part)
        if numbered:
            start, index = position, max(int(numbered[2]) - 1, 0)
        elif part.isdigit() and (
            (indices and last == position - 1)
            or (position and _BLOCKS.search(path[position - 1]))
            or (any_list and tower is None)
        ):
            start, index = max(position - 1, 0), int(part)
        else:
            continue
        if tower is None:
            tower = path[:start]
            if _is_head(path[: start + 1]):
                return None
        indices.append(index)
        last = position
    return None if tower is None else (tower, tuple(indices))


def _spans(blocks: Sequence[Block]) -> dict[Block, float]:
    """Depth of every block: towers of one kind side by side, kinds one after the other."""
    towers: dict[Path, set[tuple[int, ...]]] = defaultdict(set)
    for tower, indices in blocks:
        towers[tower].add(indices)
    for of_tower in towers.values():
        outermost = {indices[0] for indices in of_tower}
        of_tower |= {(index,) for index in range(max(outermost)) if index not in outermost}
    lengths: dict[int, int] = defaultdict(int)
    for tower, of_tower in towers.items():
        lengths[_kind(tower)] = max(lengths[_kind(tower)], len(of_tower))
    last = sum(lengths.values()) - 1

    depths = {}
    for tower, of_tower in towers.items():
        start = sum(length for kind, length in lengths.items() if kind < _kind(tower))
        length = lengths[_kind(tower)] - 1
        for rank, indices in enumerate(sorted(of_tower)):
            share = rank / (len(of_tower) - 1) if len(of_tower) > 1 else 0.5
            depths[tower, indices] = (start + share * length) / last if last else 0.5
    return depths


def _kind(tower: Path) -> int:
    for part in tower:
        if "decoder" in part:
            return 2
        if _FIRST.search(part) or _INPUT.search(part):
            return 0
        if _ENCODER.search(part):
            return 1
    return 2


def _beside(path: Path, spans: dict[Block, float]) -> Block | None:
    """The block of the same index as that of another list beside the blocks."""
    if _is_head(path):
        return None
    for position, part in enumerate(path[1:], 1):
        if part.isdigit():
            tower, index = path[: position - 1], int(part)
            return next((block for block in spans if block[0] == tower and block[1][0] == index), None)
    return None


def _outside(path: Path, ends: dict[Path, float]) -> float:
    if _is_head(path):
        return 1.0
    if _is_input(path):
        return 0.0
    shared = {tower: _shared_length(path, tower) for tower in ends}
    longest = max(shared.values())
    return max(ends[tower] for tower in ends if shared[tower] == longest) if longest else 1.0


def _shared_length(path: Path, tower: Path) -> int:
    return next((i for i, (a, b) in enumerate(zip(path, tower, strict=False)) if a != b), min(len(path), len(tower)))


def _by_name(paths: dict[str, Path]) -> dict[str, float]:
    depths = {path: 1.0 if _is_head(path) else 0.0 for path in paths.values() if _is_head(path) or _is_input(path)}
    others = sorted({path for path in paths.values() if path not in depths}, key=_natural)
    last = len(others) - 1
    depths |= {path: rank / last if last else 0.5 for rank, path in enumerate(others)}
    return {name: depths[path] for name, path in paths.items()}


def _natural(path: Path) -> list[list[tuple[str, int]]]:
    """Sorting key in which numbers count as numbers: `conv2` before `conv10`."""
    return [[(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", part)] for part in path]
