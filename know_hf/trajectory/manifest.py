"""`trajectory.json`: what a trajectory holds, as dataclasses whose annotations say what may stand in it.

Whoever pulls a trajectory reads what a stranger wrote: whatever its bytes are, reading ends in a valid manifest or in
a `TrajectoryError`, and no path in it leads out of the folder.
"""

import os
import posixpath
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from transformers.utils import logging

from ..checkpoint import file_sha256, write_json
from ..roles import TensorRole
from ..schedule import ForgettingSchedule, size_in_words
from .schema import Rule, SchemaError, build, read_json, shorten

logger = logging.get_logger(__name__)

MANIFEST_NAME = "trajectory.json"
FORMAT_VERSION = "1.0"
MAX_BYTES = 64_000_000  # that of 5 states with 100,000 tensors, most of them stored once, has 39 MB
MAX_STATES = 1000

# What save_pretrained of models, adapters, tokenizers and processors writes. All else is refused, above all what can
# run: pickles, which do when they are loaded, and Python, which trust_remote_code runs.
_FILE_KINDS = re.compile(r".+\.(safetensors|json|jinja|txt|md|model(\.v\w+)?|spm|codes|vocab|tokenizer|tiktoken)")
# A plain name on every system: not hidden, nothing that Windows takes for a drive, a stream, a device or a separator.
_FILE_NAME = re.compile(r"(?!\.|(con|prn|aux|nul|com\d|lpt\d)(\.|$))[^\\/:*?\"<>|]*[^\\/:*?\"<>|. ]", re.IGNORECASE)


class TrajectoryError(ValueError):
    """A trajectory is damaged, inconsistent or not of a version that can be read."""


class TrajectoryBusyError(RuntimeError, BlockingIOError):
    """Another process records to the folder, or has since it was read."""


def _stays_inside(path: str) -> bool:
    return not path.startswith("/") and not re.match(r"\w:", path) and ".." not in re.split(r"[/\\]", path)


def _is_plain(path: str) -> bool:
    return all(_FILE_NAME.fullmatch(name) and len(name.encode()) <= 255 for name in path.split("/"))


_Count = Annotated[int, Rule(lambda value: 0 <= value < 2**63, "a whole number of at least 0")]
_Share = Annotated[float, Rule(lambda value: 0 <= value <= 1, "a share from 0 to 1")]
_Sha256 = Annotated[str, Rule(re.compile("[0-9a-f]{64}").fullmatch, "64 hexadecimal digits in lower case")]
_RelativePath = Annotated[
    str,
    Rule(_stays_inside, "a path that does not lead outside of its folder"),
    Rule(_is_plain, "a relative path of plain names with / between them"),
    Rule(_FILE_KINDS.fullmatch, "weights as safetensors, JSON or text: pickles and code are never read"),
]
_Schedule = Annotated[ForgettingSchedule, Rule(lambda s: s.num_states <= MAX_STATES, f"at most {MAX_STATES} states")]


@dataclass(frozen=True)
class FileRecord:
    """One file of a trajectory: its path relative to the trajectory's folder, its size in bytes and its SHA-256."""

    path: _RelativePath
    size: _Count
    sha256: _Sha256

    @classmethod
    def of(cls, path: Path, name: str) -> "FileRecord":
        return cls(path=name, size=path.stat().st_size, sha256=file_sha256(path))


@dataclass(frozen=True)
class StateRecord:
    """One state Θk.

    Attributes:
        index (`int`): k; 0 is the state trained on all data.
        num_examples (`int`, *optional*): |Dk|, the size of the subset its stage trained on, where it is known.
        steps (`int`): Optimizer steps of its stage, 0 where the weights were taken as they were.
        files (`tuple[FileRecord]`): All files of the state. Its tensors are those of the safetensors files among them
            and those of `unchanged`.
        fraction (`float`, *optional*): Share of the data its stage trained on, where the schedule said it.
        subset_fingerprint (`str`, *optional*): Hash of the subset's data and members.
        seed (`int`, *optional*): Seed of the stage's training.
        metrics (`dict[str, float]`): What the state's evaluation gave.
        training (`dict[str, str]`): The arguments of its training that decide where it ends, as text.
        unchanged (`dict[str, int]`): Tensors that are stored once: from the name to the earlier state whose files hold
            it, bit for bit the same.
    """

    index: _Count
    num_examples: _Count | None
    steps: _Count
    files: tuple[FileRecord, ...]
    fraction: _Share | None = None
    subset_fingerprint: str | None = None
    seed: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, str] = field(default_factory=dict)
    unchanged: dict[str, _Count] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """Size of the subset in words."""
        return size_in_words(self.num_examples, self.fraction)

    def smaller_than(self, other: "StateRecord") -> bool:
        """Whether this state's subset is smaller than another's, by what is known of both."""
        if self.num_examples is not None and other.num_examples is not None:
            return self.num_examples < other.num_examples
        return self.fraction is not None and other.fraction is not None and self.fraction < other.fraction


_States = Annotated[tuple[StateRecord, ...], Rule(lambda s: len(s) <= MAX_STATES, f"at most {MAX_STATES} states")]


@dataclass(frozen=True)
class Manifest:
    """The content of `trajectory.json`; see the attributes of [`WeightTrajectory`] for their meaning."""

    states: _States
    schedule: _Schedule | None = None
    base_model: str | None = None
    base_revision: str | None = None
    roles: dict[str, TensorRole] = field(default_factory=dict)
    tied_weights: dict[str, str] = field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
    library_versions: dict[str, str] = field(default_factory=dict)
    format_version: str = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks `trajectory.json` of a trajectory's folder; it may come from a stranger.

        Fields that this version does not know are passed over.

        Raises:
            `FileNotFoundError`: when there is none.
            `TrajectoryError`: when it is larger than 64 MB, no JSON of this schema, or of another major version; when
                its states are not in the order of falling size with the full-data state first; and when it names a
                file twice, in a wrong place, or of a kind that trajectories don't have.
        """
        path = folder / MANIFEST_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} holds no {MANIFEST_NAME}; it is no trajectory, or no state was finished"
            )
        if not path.is_file() or leads_outside(folder, path):
            raise TrajectoryError(f"{path} is not a file of this folder; put the file itself there")
        try:
            content = read_json(path, MAX_BYTES)
        except SchemaError as error:
            raise TrajectoryError(f"{path} can't be read: {error}; restore it from a copy") from error
        _check_version(path, content)
        try:
            manifest = build(cls, content)
        except SchemaError as error:
            raise TrajectoryError(
                f"{path} does not have the fields of format {FORMAT_VERSION}: {error}; restore it from a copy"
            ) from error
        manifest.check_order(path)
        manifest._check_places(path)
        return manifest

    def write(self, folder: Path) -> None:
        """Writes `trajectory.json`, in one step, if [`read`] will take it.

        Raises:
            `TrajectoryError`: when it would not; nothing is written then.
        """
        path = folder / MANIFEST_NAME
        content = {"format_version": self.format_version, **asdict(self)}
        try:
            build(Manifest, content)
        except SchemaError as error:
            raise TrajectoryError(f"{path} can't be written, as it could not be read again: {error}") from error
        self.check_order(path)
        self._check_places(path)
        write_json(path, content)

    def check_order(self, path: Path) -> None:
        for position, state in enumerate(self.states):
            if state.index != position:
                raise TrajectoryError(
                    f"{path}: the state at position {position} has index {state.index}; states stand in the order of"
                    " their index, the full-data state (index 0) first"
                )
            for name, origin in state.unchanged.items():
                if not 0 <= origin < position:
                    raise TrajectoryError(
                        f"{path}: state {position} takes {name!r} from state {origin}, none before it"
                    )
            before = self.states[position - 1]
            if position and not state.smaller_than(before):
                raise TrajectoryError(
                    f"{path}: state {position} was trained on {state.size}, state {position - 1} on {before.size};"
                    " every state must have seen fewer than the one before. Are the states in reversed order? Index 0"
                    " is the full-data state."
                )

    def check_what_is_loaded(self, folder: Path) -> None:
        """Checks that what `from_pretrained` finds in the folders of the states by its name is what was recorded.

        Raises:
            `TrajectoryError`: when a state's folder holds weights or JSON that `trajectory.json` does not name, or an
                index that leads to such.
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

    def _check_places(self, path: Path) -> None:
        """Each path stands once, also where capitals don't count; what loading a state reads is in its folder."""
        seen: set[str] = set()
        owners = [("", self.files), *((f"state-{state.index}", state.files) for state in self.states)]
        for folder, records in owners:
            for record in records:
                top = PurePosixPath(record.path).parts[0]
                is_weights = record.path.endswith((".safetensors", ".index.json"))
                misplaced = top != folder if folder else top.lower().startswith("state-") or is_weights
                if misplaced or record.path.casefold() in seen or record.path == MANIFEST_NAME:
                    owner = folder.replace("-", " ") or "the model's files"
                    raise TrajectoryError(
                        f"{path} names {record.path!r} among the files of {owner}; each file stands once, weights in"
                        " the folder state-k of their state k, nothing else in it: restore it from a copy"
                    )
                seen.add(record.path.casefold())


def leads_outside(folder: Path, path: Path) -> bool:
    """Whether a path, its links followed, is of neither the folder nor the store of the Hub cache it belongs to."""
    # unlike Path.resolve, realpath never raises on links in a circle
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    in_cache = root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")
    return not (target.is_relative_to(root) or in_cache)


def recordable(folder: Path) -> list[str]:
    """Relative paths of the files in a folder that a trajectory can name, sorted; warns of the others.

    A model or a processor with code of its own saves it with itself; who needs it has to take it from there.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        if not _FILE_KINDS.fullmatch(name):
            logger.warning_once(
                f"{name} is neither safetensors nor JSON nor text and is left out of the trajectory, so that pulling"
                " one is safe; checkpoints made from the trajectory lack it: copy it to them yourself"
            )
    return [name for name in names if _FILE_KINDS.fullmatch(name)]


def _check_version(path: Path, content: Any) -> None:
    version = content.get("format_version") if isinstance(content, dict) else None
    match = re.fullmatch("([0-9]{1,9})[.][0-9]{1,9}", version) if isinstance(version, str) else None
    ours = int(FORMAT_VERSION.split(".")[0])
    if match is None or int(match[1]) < ours:
        raise TrajectoryError(
            f"{path} has the format version {shorten(version)}; expected one like {FORMAT_VERSION!r}: restore it from"
            " a copy"
        )
    if int(match[1]) > ours:
        raise TrajectoryError(
            f"{path} has format version {version}, this know_hf reads up to {FORMAT_VERSION}; install a newer one"
        )


def _check_index(path: Path, name: str, listed: set[str]) -> None:
    try:
        content = read_json(path, MAX_BYTES)
    except SchemaError as error:
        raise TrajectoryError(f"{path} can't be read: {error}; restore it from a copy") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    for target in weight_map.values() if isinstance(weight_map, dict) else [None]:
        if not isinstance(target, str) or posixpath.normpath(f"{posixpath.dirname(name)}/{target}") not in listed:
            raise TrajectoryError(
                f"{path} leads to {shorten(target)}, which is no recorded file; restore it from a copy"
            )
