"""Collections: folders with many trajectories, and an index that says what each of them is."""

import fnmatch
import json
import logging as python_logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .transition_sources import PUBLISHED_SUFFIXES, open_source

logger: python_logging.Logger = logging.get_logger(__name__)

INDEX_NAME = "index.jsonl"
RECIPE_NAME = "recipe.json"
TRAIN = "train"
HELD_OUT = "held_out"


@dataclass(frozen=True)
class CollectedTrajectory:
    """
    One trajectory of a collection.

    Args:
        path (`Path`): Its folder, or its file of the published meta-dataset.
        split (`str`, *optional*): What it is for: `"train"`, or the name of a held-out split, which begins with
            `"held_out"`.
        about (`dict[str, Any]`): What the collection says of it: architecture, dataset, schedule and so on.
    """

    path: Path
    split: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.name

    def of_schedule(self, key: str) -> Any:
        """A value of its schedule, `ratio` or `num_states` for instance; `None` where the collection does not say.

        An index has it as a column, a `recipe.json` within `schedule`.
        """
        schedule = self.about.get("schedule")
        return self.about.get(key, schedule.get(key) if isinstance(schedule, dict) else None)


def read_collection(folders: str | Path | Sequence[str | Path], num_states: int = 5) -> list[CollectedTrajectory]:
    """
    Lists the finished trajectories of one or more folders.

    A folder may be a collection of `recipes/collect`, whose `index.jsonl` has one row a trajectory with its `path` (or
    `name`) and `split`; any folder of trajectories, each with a `recipe.json` or without; a trajectory itself; or an
    HDF5 file of the published meta-dataset. Trajectories that are not finished are left out, with a warning.

    Args:
        folders (`str`, `Path` or a sequence of them):
            Where to look.
        num_states (`int`, *optional*, defaults to `5`):
            Length S of a history: trajectories with fewer than S + 1 states are left out, too.

    Returns:
        `list[CollectedTrajectory]`, sorted by name within each folder, each once; of one that is found several times,
        by itself and in an index for instance, what says most.

    Raises:
        `FileNotFoundError`: when a folder is not there.
        `ValueError`: when no finished trajectory is found, a row of an index is no JSON or leads out of its folder, or
            a trajectory is damaged.
    """
    found: dict[Path, CollectedTrajectory] = {}
    skipped: dict[str, str] = {}
    for folder in [folders] if isinstance(folders, str | Path) else folders:
        for trajectory in sorted(_list(Path(folder)), key=lambda entry: entry.name):
            reason = _why_unfinished(trajectory, num_states)
            if reason is None:
                place = trajectory.path.resolve()
                found[place] = max(found.get(place, trajectory), trajectory, key=_knowledge)
            else:
                skipped[trajectory.name] = reason
    if skipped:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:5])
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        logger.warning(f"left out, as they are not finished or too short: {reasons}{more}")
    if not found:
        raise ValueError(f"no finished trajectory of at least {num_states + 1} states in {folders}")
    return list(found.values())


def split_collection(
    trajectories: Sequence[CollectedTrajectory], held_out: Sequence[str] = ()
) -> dict[str, list[CollectedTrajectory]]:
    """
    Sorts trajectories by their split.

    Args:
        trajectories (sequence of [`CollectedTrajectory`]):
            What [`read_collection`] found.
        held_out (sequence of `str`, *optional*):
            Names or patterns of trajectories to hold out, as the split `"held_out"`; the splits that the collection
            names are not looked at then.

    Returns:
        `dict[str, list[CollectedTrajectory]]`: `"train"` first, then the held-out splits by name.

    Raises:
        `ValueError`: when a trajectory has no split, a pattern matches none, or all or none are held out.
    """
    if held_out:
        names = [trajectory.name for trajectory in trajectories]
        if unused := [pattern for pattern in held_out if not fnmatch.filter(names, pattern)]:
            raise ValueError(f"no trajectory matches held_out {', '.join(unused)}; name one of {', '.join(names[:5])}")
        chosen = {name for pattern in held_out for name in fnmatch.filter(names, pattern)}
        trajectories = [replace(t, split=HELD_OUT if t.name in chosen else TRAIN) for t in trajectories]
    splits: dict[str, list[CollectedTrajectory]] = {}
    for trajectory in trajectories:
        if trajectory.split is None:
            raise ValueError(
                f"{trajectory.path} has no split: neither {INDEX_NAME} nor {RECIPE_NAME} says whether it is held out;"
                " hold out some by their names"
            )
        splits.setdefault(trajectory.split, []).append(trajectory)
    if TRAIN not in splits or len(splits) == 1:
        raise ValueError(
            f"{sum(len(part) for name, part in splits.items() if name != TRAIN)} of {len(trajectories)} trajectories"
            " are held out; some must be, and some must not"
        )
    return {name: splits[name] for name in sorted(splits, key=lambda name: (name != TRAIN, name))}


def _list(folder: Path) -> list[CollectedTrajectory]:
    if not folder.exists():
        raise FileNotFoundError(f"{folder} not found; give a folder of trajectories, or pull the collection first")
    if folder.suffix in PUBLISHED_SUFFIXES or (folder / "trajectory.json").exists():
        return [_from_recipe(folder)]
    index = folder / INDEX_NAME
    if index.exists():
        return [_from_row(index, number, line) for number, line in enumerate(index.read_text("utf-8").splitlines(), 1)]
    files = [CollectedTrajectory(path) for suffix in PUBLISHED_SUFFIXES for path in folder.glob(f"*{suffix}")]
    recorded = [path.parent for path in folder.glob("*/trajectory.json")]
    begun = [path.parent for path in folder.glob(f"*/{RECIPE_NAME}")]
    return files + [_from_recipe(path) for path in {*recorded, *begun}]


def _from_row(index: Path, number: int, line: str) -> CollectedTrajectory:
    try:
        row = json.loads(line)
        name = row.get("path") or row["name"]
        path = index.parent / name
        inside = path.resolve().is_relative_to(index.parent.resolve())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"line {number} of {index} is no row with path and split ({error}); write it again"
        ) from error
    if not inside:
        raise ValueError(f"line {number} of {index} names {name!r}, which is not in its folder")
    return CollectedTrajectory(path, row.get("split"), row)


def _from_recipe(path: Path) -> CollectedTrajectory:
    recipe = path / RECIPE_NAME
    about = json.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    return CollectedTrajectory(path, about.get("split"), about)


def _knowledge(trajectory: CollectedTrajectory) -> tuple[bool, int]:
    return trajectory.split is not None, len(trajectory.about)


def _why_unfinished(trajectory: CollectedTrajectory, num_states: int) -> str | None:
    try:
        source = open_source(trajectory.path)
    except FileNotFoundError:
        return "no finished state"
    source.close()
    needed = max(num_states + 1, trajectory.of_schedule("num_states") or 0, source.planned_states or 0)
    return f"{source.num_states} of {needed} states" if source.num_states < needed else None
