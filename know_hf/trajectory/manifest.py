"""`trajectory.json`: the content of a trajectory as dataclasses, validated by pydantic.

The file may come from a stranger. Reading ends in a valid manifest or in a `TrajectoryError`, and no path in it leads
out of the folder. Values are never converted, so a manifest that is read is written again byte for byte. Unknown
fields are ignored, so a newer minor version can add some.
"""

import os
import posixpath
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import FailFast, Field, TypeAdapter, ValidationError
from transformers.utils import logging

from ..checkpoint import file_sha256, read_json, write_json
from ..schedule import size_in_words
from .manifest_fields import (
    FILE_KINDS,
    MAX_STATES,
    Count,
    Integer,
    Limited,
    Number,
    RelativePath,
    Role,
    Schedule,
    Sha256,
    Text,
    Texts,
    describe,
    shorten,
)

logger = logging.get_logger(__name__)

MANIFEST_NAME = "trajectory.json"
FORMAT_VERSION = "1.0"
MAX_BYTES = 64_000_000  # 5 states of 100,000 tensors, most of them stored once, take 44 MB


class TrajectoryError(ValueError):
    """A trajectory is damaged, inconsistent or of a version that cannot be read."""


class TrajectoryBusyError(RuntimeError, BlockingIOError):
    """Another process records to the folder, or recorded to it since it was read."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a trajectory.

    Attributes:
        path (`str`):
            Path relative to the trajectory's folder.
        size (`int`):
            Size in bytes.
        sha256 (`str`):
            SHA-256 of its content, in hexadecimal.
    """

    path: RelativePath
    size: Count
    sha256: Sha256

    @classmethod
    def of(cls, path: Path, name: str) -> "FileRecord":
        return cls(path=name, size=path.stat().st_size, sha256=file_sha256(path))


@dataclass(frozen=True)
class StateRecord:
    """One state Θk.

    Attributes:
        index (`int`):
            k; 0 is the state trained on all data.
        num_examples (`int`, *optional*):
            |Dk|, the size of the subset its stage trained on; `None` for streams.
        steps (`int`):
            Optimizer steps of its stage, 0 without training.
        files (`tuple[FileRecord]`):
            All files of the state. Its tensors are in the safetensors files among them, or in `unchanged`.
        fraction (`float`, *optional*):
            Share of the data its stage trained on.
        subset_fingerprint (`str`, *optional*):
            Hash of the subset's data and members.
        seed (`int`, *optional*):
            Seed of the stage's training.
        metrics (`dict[str, float]`):
            Evaluation results of the state.
        training (`dict[str, str]`):
            Training arguments that influence the weights, as text.
        unchanged (`dict[str, int]`):
            Tensors that are stored once: from the name to the earlier state whose files hold the same bits.
    """

    index: Count
    num_examples: Count | None
    steps: Count
    files: Annotated[tuple[FileRecord, ...], FailFast()]
    fraction: Annotated[Number | None, Field(ge=0, le=1)] = None
    subset_fingerprint: Text | None = None
    seed: Integer | None = None
    metrics: Annotated[dict[Text, Number], Limited] = field(default_factory=dict)
    training: Texts = field(default_factory=dict)
    unchanged: Annotated[dict[Text, Count], Limited] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """Size of the subset in words."""
        return size_in_words(self.num_examples, self.fraction)

    def smaller_than(self, other: "StateRecord") -> bool:
        """Whether the subset of this state is known to be smaller than that of another."""
        if self.num_examples is not None and other.num_examples is not None:
            return self.num_examples < other.num_examples
        return self.fraction is not None and other.fraction is not None and self.fraction < other.fraction


@dataclass(frozen=True)
class Manifest:
    """The content of `trajectory.json`; see the attributes of [`WeightTrajectory`]."""

    states: Annotated[tuple[StateRecord, ...], Field(max_length=MAX_STATES), FailFast()]
    schedule: Schedule | None = None
    base_model: Text | None = None
    base_revision: Text | None = None
    roles: Annotated[dict[Text, Role], Limited] = field(default_factory=dict)
    tied_weights: Texts = field(default_factory=dict)
    files: Annotated[tuple[FileRecord, ...], FailFast()] = ()
    library_versions: Texts = field(default_factory=dict)
    format_version: Text = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check the `trajectory.json` of a folder.

        Raises:
            `FileNotFoundError`:
                When the folder has none.
            `TrajectoryError`:
                When the file exceeds 64 MB, is not JSON of this schema or has another major version; when the states
                are not in the order of falling size, full data first; when a file is listed twice, in the wrong
                folder, or is neither weights nor text.
        """
        path = folder / MANIFEST_NAME
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no {MANIFEST_NAME}: not a trajectory, or no state is finished")
        if not path.is_file() or leads_outside(folder, path):
            raise TrajectoryError(f"{path} is not a file of this folder; replace it by the file itself")
        content = _read(path)
        _check_version(path, content)
        try:
            manifest: Manifest = _ADAPTER.validate_python(content)
        except ValidationError as error:
            raise TrajectoryError(
                f"{path} does not match format {FORMAT_VERSION}: {describe(error)}; restore it from a copy"
            ) from None
        manifest.check(path)
        return manifest

    def write(self, folder: Path) -> None:
        """Write `trajectory.json` in one step.

        Raises:
            `TrajectoryError`:
                When [`read`] would refuse it; nothing is written.
        """
        path = folder / MANIFEST_NAME
        content = {"format_version": self.format_version, **asdict(self)}
        try:
            _ADAPTER.validate_python(content)
        except ValidationError as error:
            raise TrajectoryError(f"{path} cannot be written, it would be invalid: {describe(error)}") from None
        self.check(path)
        write_json(path, content)

    def check(self, path: Path) -> None:
        """Check what the schema cannot: the order of the states and the folder of every file.

        Raises:
            `TrajectoryError`:
                When a check fails; the message starts with `path`.
        """
        for position, state in enumerate(self.states):
            _check_state(path, position, state, self.states[position - 1])
        seen: set[str] = set()
        for owner, records in (("", self.files), *((f"state-{state.index}", state.files) for state in self.states)):
            for record in records:
                # names that differ in case only are one file on some systems
                if record.path.casefold() in seen or _is_misplaced(record.path, owner):
                    raise TrajectoryError(
                        f"{path} lists {record.path!r} under {owner or 'the files of the model'}; each file is listed"
                        " once, and the weights of state k are in the folder state-k: restore it from a copy"
                    )
                seen.add(record.path.casefold())

    def check_what_is_loaded(self, folder: Path) -> None:
        """Check that `from_pretrained` can only read recorded files from the folders of the states.

        Raises:
            `TrajectoryError`:
                When the folder of a state has weights or JSON that `trajectory.json` does not list, or an index that
                leads to such a file.
        """
        listed = {record.path for state in self.states for record in state.files}
        for state in self.states:
            for path in sorted((folder / f"state-{state.index}").rglob("*")):
                name = path.relative_to(folder).as_posix()
                if path.name.endswith((".safetensors", ".json", ".bin")) and name not in listed:
                    raise TrajectoryError(
                        f"{path} was not recorded, but loading state {state.index} may read it; delete or move it"
                    )
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
    """Return the sorted relative paths of the files that a trajectory can list, and warn about the others.

    Models and processors with custom code save it with themselves; a trajectory leaves it out.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        if not FILE_KINDS.fullmatch(name):
            logger.warning_once(
                f"{name} is not safetensors, JSON or text and is left out of the trajectory, so that trajectories are"
                " safe to load. Checkpoints written from the trajectory lack it: copy it to them."
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
    if match is None or int(match[1]) < major:
        raise TrajectoryError(
            f"{path} has format version {shorten(version)}, expected {FORMAT_VERSION!r}; restore it from a copy"
        )
    if int(match[1]) > major:
        raise TrajectoryError(
            f"{path} has format version {version}, this know_hf reads up to {FORMAT_VERSION}; install a newer know_hf"
        )


def _check_state(path: Path, position: int, state: StateRecord, before: StateRecord) -> None:
    if state.index != position:
        raise TrajectoryError(
            f"{path}: the state at position {position} has index {state.index}; order the states by index, the"
            " full-data state (index 0) first"
        )
    for name, origin in state.unchanged.items():
        if origin >= position:
            raise TrajectoryError(f"{path}: state {position} takes {name!r} from state {origin}, not an earlier one")
    if position and not state.smaller_than(before):
        raise TrajectoryError(
            f"{path}: state {position} was trained on {state.size}, state {position - 1} on {before.size}; each state"
            " must see fewer examples than the one before. Are the states in reversed order? Index 0 is the full-data"
            " state."
        )


def _is_misplaced(path: str, owner: str) -> bool:
    top = PurePosixPath(path).parts[0]
    if owner:
        return top != owner
    is_weights = path.endswith((".safetensors", ".index.json"))
    return top.lower().startswith("state-") or is_weights or path == MANIFEST_NAME


def _check_index(path: Path, name: str, listed: set[str]) -> None:
    content = _read(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    for target in weight_map.values() if isinstance(weight_map, dict) else [None]:
        if not isinstance(target, str) or posixpath.normpath(f"{posixpath.dirname(name)}/{target}") not in listed:
            raise TrajectoryError(
                f"{path} leads to {shorten(target)}, which is not a recorded file; restore it from a copy"
            )
