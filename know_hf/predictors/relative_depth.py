"""Relative depth of every tensor, from names alone: 0 at the input, 1 at the output.

A checkpoint does not store the order of its modules, but names contain block indices. The rules, in order:

1. A tensor under a head (`lm_head`, `classifier`, `decode_head.layers.0`, …) has depth 1.
2. An index counts if its list holds blocks: `layer.3`, `layers.3`, `h.3`, `blocks.3`, `stages.3`, `features.3`,
   `layer3`, `denseblock3` (numbers within names count from 1). Inside a block, further indices count if their list
   holds blocks too or directly follows the first index (`stages.1.layers.0.layer.1`, `block.3.layer.1`,
   `block.0.1`); experts, attention heads and parts of a `Sequential` do not. The index tuples of one *tower* (the
   name before the list, such as `bert.encoder`) are its blocks, evenly spaced in lexicographic order from 0 to 1. A
   missing outermost index keeps its slot, since adapters may cover some layers only. A list of another name beside
   the blocks uses its index (`encoder.patch_embeddings.2` with `encoder.block.2`).
3. Towers follow each other by kind: stems, backbones and feature extractors, then encoders and anything that sees or
   hears, then decoders and the rest. Towers of one kind share the same span (text and image of CLIP), so the encoder
   of T5 ends at about one half.
4. A tensor in no block has depth 0 if its name is that of an input (`embed…`, `patch…`, `stem`, `wte`, `cls_token`,
   `shared`, `conv1`, …). Otherwise it has the depth at the end of the tower with the longest common prefix
   (`encoder.final_layer_norm`), or 1.
5. Without lists of blocks every index counts (`0.weight`, `attentions.3`). Without any index, modules are sorted by
   name, numbers as numbers: `conv1`, `conv2`, `fc1`, `fc2`. That order is a guess.
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
    """Return the depth in [0, 1] of the layer of each tensor, by names on disk; see the docstring of this module."""
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

    near = {name: blocks[name] or _beside(path, spans) for name, path in paths.items()}
    return {name: spans[block] if block else _outside(paths[name], ends) for name, block in near.items()}


def _path(name: str) -> Path:
    """Components of the module's name without the prefix and suffix of peft."""
    path = tuple(name.removeprefix("base_model.model.").split("."))
    return next((path[:i] for i, part in enumerate(path) if part.startswith("lora_")), path[:-1]) or path


def _is_head(path: Path) -> bool:
    return any(_HEAD.search(part) for part in path)


def _is_input(path: Path) -> bool:
    return any(_INPUT.search(part) for part in path)


def _block(path: Path, any_list: bool) -> Block | None:
    """Tower and indices of a block, or `None` outside of blocks and in heads."""
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
    """Depth of every block: towers of one kind share a span, kinds follow each other."""
    towers: dict[Path, set[tuple[int, ...]]] = defaultdict(set)
    for tower, indices in blocks:
        towers[tower].add(indices)
    for members in towers.values():
        outermost = {indices[0] for indices in members}
        members |= {(index,) for index in range(max(outermost)) if index not in outermost}
    lengths: dict[int, int] = defaultdict(int)
    for tower, members in towers.items():
        lengths[_kind(tower)] = max(lengths[_kind(tower)], len(members))
    last = sum(lengths.values()) - 1

    depths = {}
    for tower, members in towers.items():
        start = sum(length for kind, length in lengths.items() if kind < _kind(tower))
        length = lengths[_kind(tower)] - 1
        for rank, indices in enumerate(sorted(members)):
            share = rank / (len(members) - 1) if len(members) > 1 else 0.5
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
    """The block with the index of a list of another name beside the blocks."""
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
    longest, depth = max((_shared_length(path, tower), depth) for tower, depth in ends.items())
    return depth if longest else 1.0


def _shared_length(path: Path, tower: Path) -> int:
    return next((i for i, (a, b) in enumerate(zip(path, tower, strict=False)) if a != b), min(len(path), len(tower)))


def _by_name(paths: dict[str, Path]) -> dict[str, float]:
    depths = {path: 1.0 if _is_head(path) else 0.0 for path in paths.values() if _is_head(path) or _is_input(path)}
    others = sorted({path for path in paths.values() if path not in depths}, key=_natural)
    last = len(others) - 1
    depths |= {path: rank / last if last else 0.5 for rank, path in enumerate(others)}
    return {name: depths[path] for name, path in paths.items()}


def _natural(path: Path) -> list[list[tuple[str, int]]]:
    """Sorting key that compares numbers as numbers: `conv2` before `conv10`."""
    return [[(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", part)] for part in path]
