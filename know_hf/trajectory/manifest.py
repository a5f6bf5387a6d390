"""`trajectory.json`: what a trajectory holds, as dataclasses that check what they are given."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import file_sha256, write_json
from ..roles import TensorRole
from ..schedule import size_in_words

MANIFEST_NAME = "trajectory.json"
FORMAT_VERSION = "1.0"


class TrajectoryError(ValueError):
    """A trajectory is damaged, inconsistent or not of a version that can be read."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a trajectory: its path relative to the trajectory's folder, its size in bytes and its SHA-256."""

    path: str
    size: int
    sha256: str

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
        unchanged (`dict[str, int]`): Tensors that are stored once: from the name to the earlier state whose files hold
            it, bit for bit the same.
    """

    index: int
    num_examples: int | None
    steps: int
    files: tuple[FileRecord, ...]
    fraction: float | None = None
    subset_fingerprint: str | None = None
    seed: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    unchanged: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """Size of the subset in words."""
        return size_in_words(self.num_examples, self.fraction)

    def smaller_than(self, other: "StateRecord") -> bool:
        """Whether this state's subset is smaller than another's, by what is known of both."""
        if self.num_examples is not None and other.num_examples is not None:
            return self.num_examples < other.num_examples
        return self.fraction is not None and other.fraction is not None and self.fraction < other.fraction


@dataclass(frozen=True)
class Manifest:
    """The content of `trajectory.json`; see the attributes of [`WeightTrajectory`] for their meaning."""

    states: tuple[StateRecord, ...] = ()
    schedule: dict[str, Any] | None = None
    base_model: str | None = None
    base_revision: str | None = None
    roles: dict[str, TensorRole] = field(default_factory=dict)
    tied_weights: dict[str, str] = field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
    library_versions: dict[str, str] = field(default_factory=dict)
    format_version: str = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks `trajectory.json` of a trajectory's folder.

        Raises:
            `FileNotFoundError`: when there is none.
            `TrajectoryError`: when it is no JSON of this schema, of a newer major version, or when its states are not
                in the order of falling size with the full-data state first.
        """
        path = folder / MANIFEST_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} holds no {MANIFEST_NAME}; it is no trajectory, or no state was finished"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TrajectoryError(f"{path} is not JSON ({error}); restore it from a copy") from error
        version = str(content.get("format_version") if isinstance(content, dict) else None)
        if not version.split(".")[0].isdigit():
            raise TrajectoryError(f"{path} has the format version {version!r}; expected one like {FORMAT_VERSION!r}")
        if int(version.split(".")[0]) > int(FORMAT_VERSION.split(".")[0]):
            raise TrajectoryError(
                f"{path} has format version {version}, this know_hf reads up to {FORMAT_VERSION}; install a newer one"
            )
        try:
            manifest = cls._from_json(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise TrajectoryError(f"{path} does not have the fields of format {FORMAT_VERSION}: {error!r}") from error
        manifest.check_order(path)
        return manifest

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST_NAME, {"format_version": self.format_version, **asdict(self)})

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

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> "Manifest":
        def files(entries: list[dict[str, Any]]) -> tuple[FileRecord, ...]:
            return tuple(FileRecord(str(e["path"]), int(e["size"]), str(e["sha256"])) for e in entries)

        states = tuple(
            StateRecord(
                index=int(state["index"]),
                num_examples=None if state["num_examples"] is None else int(state["num_examples"]),
                fraction=state.get("fraction"),
                steps=int(state["steps"]),
                files=files(state["files"]),
                subset_fingerprint=state.get("subset_fingerprint"),
                seed=state.get("seed"),
                metrics={str(name): float(value) for name, value in state.get("metrics", {}).items()},
                unchanged={str(name): int(origin) for name, origin in state.get("unchanged", {}).items()},
            )
            for state in content["states"]
        )
        return cls(
            states=states,
            schedule=content.get("schedule"),
            base_model=content.get("base_model"),
            base_revision=content.get("base_revision"),
            roles={name: TensorRole(**role) for name, role in content.get("roles", {}).items()},
            tied_weights=dict(content.get("tied_weights", {})),
            files=files(content.get("files", [])),
            library_versions=dict(content.get("library_versions", {})),
            format_version=str(content["format_version"]),
        )
