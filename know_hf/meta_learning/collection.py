"""Collections: folders of many trajectories, with an index of their splits and properties."""

import fnmatch
import logging as python_logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..checkpoint import parse_json, read_json_object
from ..terminal import first_names
from .state_readers import PUBLISHED_SUFFIXES, open_states

logger: python_logging.Logger = logging.get_logger(__name__)

INDEX_NAME = "index.jsonl"
RECIPE_NAME = "recipe.json"
TRAIN = "train"
HELD_OUT = "held_out"


@dataclass(frozen=True)
class CollectedTrajectory:
    """Trajectory of a collection."""

    path: Path  # its folder, or its file of the published meta-dataset
    split: str | None = None  # "train", or the name of a held-out split, which begins with "held_out"
    about: dict[str, Any] = field(default_factory=dict)  # properties in the index or recipe.json

    @property
    def name(self) -> str:
        return self.path.name

    def of_schedule(self, key: str) -> Any:
        """Return a field of the schedule, such as `ratio`, from the index or `recipe.json`; `None` if unknown."""
        schedule = self.about.get("schedule")
        return self.about.get(key, schedule.get(key) if isinstance(schedule, dict) else None)


def read_collection(folders: str | Path | Sequence[str | Path], num_states: int = 5) -> list[CollectedTrajectory]:
    """List the finished trajectories of one or more folders.

    A folder can be a collection of `recipes/collect`, whose `index.jsonl` has one row per trajectory with its `path`
    (or `name`) and `split`; a folder of trajectories, with or without a `recipe.json` each; a single trajectory; or an
    HDF5 file of the published meta-dataset. Unfinished trajectories are skipped with a warning.

    Args:
        folders (`str`, `Path` or a sequence of them):
            Folders or files.
        num_states (`int`, *optional*, defaults to `5`):
            Length S of a history; trajectories with fewer than S + 1 states are skipped.

    Returns:
        `list[CollectedTrajectory]`: Each trajectory once, sorted by name within each folder. If a trajectory is listed
        several times, the entry with a split and the most properties is returned.

    Raises:
        `FileNotFoundError`: If a folder is missing.
        `ValueError`: If there is no finished trajectory, a trajectory is damaged, or a row of an index is not valid or
        points outside its folder.
    """
    trajectories: dict[Path, CollectedTrajectory] = {}
    unfinished: dict[str, str] = {}
    for folder in [folders] if isinstance(folders, str | Path) else folders:
        for trajectory in sorted(_list(Path(folder)), key=lambda trajectory: trajectory.name):
            if reason := _why_unfinished(trajectory, num_states):
                unfinished[trajectory.name] = reason
                continue
            path = trajectory.path.resolve()
            candidates = (trajectories.get(path, trajectory), trajectory)
            trajectories[path] = max(candidates, key=lambda candidate: (bool(candidate.split), len(candidate.about)))
    if unfinished:
        reasons = first_names([f"{name} ({reason})" for name, reason in unfinished.items()], 5)
        logger.warning(f"Skipped unfinished or short trajectories: {reasons}")
    if not trajectories:
        raise ValueError(f"no finished trajectory with at least {num_states + 1} states in {folders}")
    return list(trajectories.values())


def split_collection(
    trajectories: Sequence[CollectedTrajectory], held_out: Sequence[str] = ()
) -> dict[str, list[CollectedTrajectory]]:
    """Group trajectories by split: `"train"` first, then the held-out splits by name.

    `held_out` has names or patterns of trajectories to hold out as the split `"held_out"`; it overrides the splits of
    the collection.

    Raises:
        `ValueError`: if a trajectory has no split, a pattern matches nothing, or all or none are held out.
    """
    if held_out:
        names = [trajectory.name for trajectory in trajectories]
        matches = {pattern: fnmatch.filter(names, pattern) for pattern in held_out}
        if unmatched := [pattern for pattern, matched in matches.items() if not matched]:
            raise ValueError(
                f"held_out {', '.join(unmatched)} matches no trajectory; names are {', '.join(names[:5])}"
            )
        held_out_names = set().union(*matches.values())
        trajectories = [replace(t, split=HELD_OUT if t.name in held_out_names else TRAIN) for t in trajectories]
    splits: dict[str, list[CollectedTrajectory]] = {}
    for trajectory in trajectories:
        if trajectory.split is None:
            raise ValueError(
                f"{trajectory.path} has no split in {INDEX_NAME} or {RECIPE_NAME}; name the held-out trajectories"
            )
        splits.setdefault(trajectory.split, []).append(trajectory)
    if TRAIN not in splits or len(splits) == 1:
        num_held_out = len(trajectories) - len(splits.get(TRAIN, ()))
        raise ValueError(
            f"{num_held_out} of {len(trajectories)} trajectories are held out; hold out some, but not all"
        )
    return {name: splits[name] for name in sorted(splits, key=lambda name: (name != TRAIN, name))}


def _list(folder: Path) -> list[CollectedTrajectory]:
    if not folder.exists():
        raise FileNotFoundError(f"{folder} not found; pull the collection first, or check the path")
    if folder.suffix in PUBLISHED_SUFFIXES or (folder / "trajectory.json").exists():
        return [_from_recipe(folder)]
    index = folder / INDEX_NAME
    if index.exists():
        return [_from_row(index, number, line) for number, line in enumerate(index.read_bytes().splitlines(), 1)]
    files = [CollectedTrajectory(path) for suffix in PUBLISHED_SUFFIXES for path in folder.glob(f"*{suffix}")]
    subfolders = {path.parent for name in ("trajectory.json", RECIPE_NAME) for path in folder.glob(f"*/{name}")}
    return files + [_from_recipe(path) for path in subfolders]


def _from_row(index: Path, number: int, line: bytes) -> CollectedTrajectory:
    try:
        row = parse_json(line)
        name = row.get("path") or row["name"]
        path = index.parent / name
        is_inside = path.resolve().is_relative_to(index.parent.resolve())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"line {number} of {index} must be a JSON object with path and split ({error}); rebuild the index"
        ) from error
    if not is_inside:
        raise ValueError(f"line {number} of {index} names {name!r}, which is outside the folder; rebuild the index")
    return _collected(path, row, f"line {number} of {index}")


def _from_recipe(path: Path) -> CollectedTrajectory:
    recipe = path / RECIPE_NAME
    about = read_json_object(recipe) if recipe.is_file() else {}
    return _collected(path, about, str(recipe))


def _collected(path: Path, about: dict[str, Any], source: str) -> CollectedTrajectory:
    trajectory = CollectedTrajectory(path, about.get("split"), about)
    for name, value, kind in (
        ("split", trajectory.split, str),
        ("num_states", trajectory.of_schedule("num_states"), int),
    ):
        if not isinstance(value, kind | None):
            raise ValueError(f"{source} has {name}={value!r:.60}, expected {kind.__name__}; restore it from a copy")
    return trajectory


def _why_unfinished(trajectory: CollectedTrajectory, num_states: int) -> str | None:
    try:
        reader = open_states(trajectory.path)
    except FileNotFoundError:
        return "no finished state"
    reader.close()
    needed = max(num_states + 1, trajectory.of_schedule("num_states") or 0, reader.planned_states or 0)
    return f"{reader.num_states} of {needed} states" if reader.num_states < needed else None
