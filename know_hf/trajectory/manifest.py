"""`trajectory.json`: the content of a trajectory as dataclasses, validated by pydantic.

The file may come from an untrusted source. Reading gives a valid manifest or raises a `TrajectoryError`, and no path
leads out of the folder. Values are never converted, so writing a manifest again gives the same bytes. Unknown fields
are ignored, so that a newer minor version can add some.
"""

import os
import posixpath
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from reprlib import Repr
from typing import Annotated, Any

from pydantic import BaseModel, FailFast, Field, GetPydanticSchema, Strict, TypeAdapter, ValidationError
from pydantic_core import core_schema
from transformers.utils import logging

from ..checkpoint import read_json, write_json
from ..roles import TensorRole
from ..schedule import ForgettingSchedule
from .records import FILE_KINDS, SHA256, Count, FileRecord, Integer, Limited, Number, StateRecord, Text, Texts

logger = logging.get_logger(__name__)

MANIFEST_NAME = "trajectory.json"
FORMAT_VERSION = "1.1"  # 1.1 added start, tail and branches
MAX_BYTES = 64_000_000  # 5 states of 100,000 tensors, most of them stored once, take 44 MB
_MAX_STATES = 1000

SNAPSHOT_FOLDER = re.compile(r"start|(state|tail|branch)-.*", re.IGNORECASE)

_short = Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring, _short.maxlong = 2, 2, 2, 60, 30
_shorten = _short.repr  # bounded in length and depth, unlike repr


class _RoleContent(BaseModel):
    """[`TensorRole`] on disk. Version 0.1 wrote role and reason only."""

    role: Text
    reason: Text
    tied_to: Text | None = None
    is_batch_norm: Annotated[bool | None, Strict()] = None

    def build(self) -> TensorRole:
        is_batch_norm = "BatchNorm" in self.reason if self.is_batch_norm is None else self.is_batch_norm
        return TensorRole(self.role, self.reason, self.tied_to, is_batch_norm)


class _ScheduleContent(BaseModel):
    """Types of a [`ForgettingSchedule`], which checks the values itself and has the defaults."""

    ratio: Number = 0.0
    num_states: Annotated[int, Strict(), Field(le=_MAX_STATES)] = 0
    epochs_per_stage: Number = 0.0
    stratify_by: Text | None = None
    seed: Integer = 0
    group_by: Text | None = None
    steps_per_stage: Integer | None = None
    key_column: Text | None = None
    tail_states: Count = 0
    kind: Text = "nested"
    branch_from: Text = "state-0"

    def build(self) -> ForgettingSchedule:
        return ForgettingSchedule(**self.model_dump(exclude_unset=True))


def _built_from(content: type[_RoleContent] | type[_ScheduleContent]) -> GetPydanticSchema:
    return GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(lambda c: c.build(), handler(content))
    )


Role = Annotated[TensorRole, _built_from(_RoleContent)]
Schedule = Annotated[ForgettingSchedule, _built_from(_ScheduleContent)]


class TrajectoryError(ValueError):
    """A trajectory is damaged, inconsistent or of a version that cannot be read."""


_States = Annotated[tuple[StateRecord, ...], Field(max_length=_MAX_STATES), FailFast()]


@dataclass(frozen=True)
class Manifest:
    """The content of `trajectory.json`; see the attributes of [`WeightTrajectory`]."""

    states: _States
    schedule: Schedule | None = None
    base_model: Text | None = None
    base_revision: Text | None = None
    base_fingerprint: Text | None = None
    roles: Annotated[dict[Text, Role], Limited] = field(default_factory=dict)
    tied_weights: Texts = field(default_factory=dict)
    files: Annotated[tuple[FileRecord, ...], FailFast()] = ()
    library_versions: Texts = field(default_factory=dict)
    start: StateRecord | None = None
    tail: _States = ()
    branches: _States = ()
    format_version: Text = FORMAT_VERSION

    @property
    def snapshots(self) -> list[StateRecord]:
        """The states, the start, the tail states and the branches."""
        return [*self.states, *(() if self.start is None else (self.start,)), *self.tail, *self.branches]

    def with_snapshot(self, snapshot: StateRecord) -> "Manifest":
        """Return the manifest with one more state or branch."""
        name = "states" if snapshot.kind == "state" else "branches"
        fields: dict[str, Any] = {name: (*getattr(self, name), snapshot)}
        return replace(self, **fields)

    @property
    def num_trained(self) -> int:
        """Number of finished trainings: states and branches."""
        return len(self.states) + len(self.branches)

    @property
    def all_files(self) -> list[FileRecord]:
        """The files of the model and of all snapshots."""
        return [*self.files, *(record for state in self.snapshots for record in state.files)]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check the `trajectory.json` of a folder.

        Raises:
            `FileNotFoundError`: when the folder has none.
            `TrajectoryError`: when the file exceeds 64 MB, does not match the schema or has another major version, or
                when [`check`] fails.
        """
        path = folder / MANIFEST_NAME
        if not path.exists():
            if not folder.exists():
                raise FileNotFoundError(f"{folder} does not exist")
            raise FileNotFoundError(
                f"{folder} has no {MANIFEST_NAME}: it is not a trajectory, or its first state has not finished"
            )
        if not path.is_file() or leads_outside(folder, path):
            raise TrajectoryError(f"{path} is not a file in this folder; put a copy there")
        content = _read(path)
        _check_version(path, content)
        manifest = _validate(path, content)
        manifest.check(path)
        return manifest

    def write(self, folder: Path) -> None:
        """Write `trajectory.json` in one step, unless [`read`] would refuse it."""
        path = folder / MANIFEST_NAME
        write_json(path, self.content(path))

    def content(self, path: Path) -> dict[str, Any]:
        """Return the content of the file `path`; raise a `TrajectoryError` when [`read`] would refuse it."""
        content = {"format_version": self.format_version, **asdict(self)}
        _validate(path, content)
        self.check(path)
        return content

    def check(self, path: Path) -> None:
        """Check what the schema cannot: the order of the states and the folder of every file."""
        for position, state in enumerate(self.states):
            _check_state(path, position, state, self.states[position - 1])
        starts = () if self.start is None else (self.start,)
        for kind, snapshots in (("start", starts), ("tail", self.tail), ("branch", self.branches)):
            for position, snapshot in enumerate(snapshots):
                _check_snapshot(path, kind, position, snapshot)
        seen: set[str] = set()
        for owner, records in (("", self.files), *((state.name, state.files) for state in self.snapshots)):
            for record in records:
                # names that differ in case only are one file on some systems
                if record.path.casefold() in seen or _is_misplaced(record.path, owner):
                    raise TrajectoryError(f"{path} lists {record.path!r} twice or in the wrong folder; restore a copy")
                seen.add(record.path.casefold())

    def check_what_is_loaded(self, folder: Path) -> None:
        """Check that `from_pretrained` reads only recorded files from the folders of the states."""
        listed = {record.path for state in self.snapshots for record in state.files}
        for state in self.snapshots:
            for path in sorted((folder / state.name).rglob("*")):
                name = path.relative_to(folder).as_posix()
                if path.name.endswith((".safetensors", ".json", ".bin")) and name not in listed:
                    raise TrajectoryError(f"{path} was not recorded, but loading this state may read it; delete it")
                if name.endswith(".index.json"):
                    _check_index(path, name, listed)


_ADAPTER = TypeAdapter(Manifest)


def leads_outside(folder: Path, path: Path) -> bool:
    """Whether a path, links resolved, is outside of the folder and of the blobs of its Hub cache."""
    # unlike Path.resolve, realpath never raises on circular links
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    in_cache = root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")
    return not (target.is_relative_to(root) or in_cache)


def recordable(folder: Path) -> list[str]:
    """Return the sorted relative paths of the files that a trajectory can list; warn about others, such as code."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        if not FILE_KINDS.fullmatch(name):
            logger.warning_once(
                f"{name} is not safetensors, JSON or text and is not recorded, so that trajectories are safe to load;"
                " copy it to checkpoints that need it."
            )
    return [name for name in names if FILE_KINDS.fullmatch(name)]


def _read(path: Path) -> Any:
    try:
        return read_json(path, MAX_BYTES)
    except ValueError as error:
        raise TrajectoryError(f"{path} cannot be read: {error}; restore it from a copy") from error


def _check_version(path: Path, content: Any) -> None:
    version = content.get("format_version") if isinstance(content, dict) else None
    match = re.fullmatch("([0-9]{1,9})[.][0-9]{1,9}", version) if isinstance(version, str) else None
    major = int(FORMAT_VERSION.split(".")[0])
    if match is None or int(match[1]) != major:
        hint = "install a newer know_hf" if match and int(match[1]) > major else "restore it from a copy"
        raise TrajectoryError(f"{path} has format version {_shorten(version)}, expected {FORMAT_VERSION!r}; {hint}")


def _validate(path: Path, content: Any) -> Manifest:
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise TrajectoryError(f"{path}: {_describe(error)}") from None


def _check_state(path: Path, position: int, state: StateRecord, before: StateRecord) -> None:
    if state.index != position or state.kind != "state" or state.hub is not None:
        raise TrajectoryError(
            f"{path}: the state at position {position} has index {state.index}, kind {state.kind!r}; sort the states"
        )
    for name, origin in state.unchanged.items():
        if origin >= position:
            raise TrajectoryError(f"{path}: state {position} takes {name!r} from state {origin}, not an earlier one")
    if position and not state.smaller_than(before):
        raise TrajectoryError(
            f"{path}: state {position} was trained on {state.size}, state {position - 1} on {before.size}; subsets"
            " must shrink. Are the states in reverse order? State 0 is the full-data state."
        )


def _check_snapshot(path: Path, kind: str, position: int, snapshot: StateRecord) -> None:
    if (snapshot.kind, snapshot.index) != (kind, position):
        raise TrajectoryError(f"{path} lists {snapshot.name!r} as {kind} {position}; restore it from a copy")
    for name, origin in snapshot.unchanged.items():
        if origin:
            raise TrajectoryError(f"{path}: {snapshot.name} takes {name!r} from state {origin}, not from state 0")


def _is_misplaced(path: str, owner: str) -> bool:
    top = PurePosixPath(path).parts[0]
    if owner:
        return top != owner
    is_weights = path.endswith((".safetensors", ".index.json"))
    return SNAPSHOT_FOLDER.fullmatch(top) is not None or is_weights or path == MANIFEST_NAME


def _check_index(path: Path, name: str, listed: set[str]) -> None:
    content = _read(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    for target in weight_map.values() if isinstance(weight_map, dict) else [None]:
        if not isinstance(target, str) or posixpath.normpath(f"{posixpath.dirname(name)}/{target}") not in listed:
            raise TrajectoryError(f"{path} refers to the unrecorded {_shorten(target)}; restore it from a copy")


def _describe(error: ValidationError) -> str:
    """Return the first error in one line: `states[1].steps is '3' (Input should be a valid integer)`."""
    first = error.errors(include_url=False)[0]
    name = ""
    for part in first["loc"]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part != "[key]":  # pydantic's mark of an invalid key, which is the part before
            name += f".{part}" if part.isidentifier() and len(part) < 60 else f"[{_shorten(part)}]"
    name = name.removeprefix(".") or "the content"
    if first["type"] == "missing":
        return f"{name} is missing"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("string_pattern_mismatch", "string_unicode"):
        is_hash = first.get("ctx", {}).get("pattern") == SHA256
        reason = f"expected {'64 hexadecimal digits in lower case' if is_hash else 'text without control characters'}"
    return f"{name} is {_shorten(first['input'])} ({reason})"
