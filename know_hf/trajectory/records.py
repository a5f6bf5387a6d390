"""The records of `trajectory.json`: files and states, and the types of their values, which pydantic validates."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, Strict
from pydantic.functional_validators import AfterValidator, BeforeValidator, PlainValidator

from ..checkpoint import file_sha256
from ..schedule import size_in_words

_MAX_ENTRIES = 250_000  # of a mapping: pydantic collects the errors of all entries before it raises

# Files that save_pretrained of models, adapters, tokenizers and processors writes. Loading a pickle or a model with
# trust_remote_code runs code: pickles and Python are refused.
FILE_KINDS = re.compile(r".+\.(safetensors|json|jinja|txt|md|model(\.v\w+)?|spm|codes|vocab|tokenizer|tiktoken)")
# A plain name on every system: not hidden, no drive, stream, device or separator of Windows.
_FILE_NAME = re.compile(r"(?!\.|(con|prn|aux|nul|com\d|lpt\d)(\.|$))[^\\/:*?\"<>|]*[^\\/:*?\"<>|. ]", re.IGNORECASE)
# Control characters and line separators could forge lines of a card or steer a terminal.
_PLAIN_TEXT = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
SHA256 = "^[0-9a-f]{64}$"


def _number(value: Any) -> int | float:
    # an int of a thousand digits compares with a float but does not convert to one
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return value
    raise ValueError("expected a finite number")


def _limited(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MAX_ENTRIES:
        raise ValueError(f"expected at most {_MAX_ENTRIES} entries, got {len(value)}")
    return value


def _relative_path(path: str) -> str:
    if path.startswith("/") or re.match(r"\w:", path) or ".." in re.split(r"[/\\]", path):
        raise ValueError("expected a path inside the folder of the trajectory")
    if not all(_FILE_NAME.fullmatch(name) and len(name.encode()) <= 255 for name in path.split("/")):
        raise ValueError("expected a relative path of plain names with / between them")
    if not FILE_KINDS.fullmatch(path):
        raise ValueError("expected safetensors, JSON or text; pickles and code are never read")
    return path


Text = Annotated[str, Strict(), Field(max_length=4096, pattern=_PLAIN_TEXT)]
Sha256 = Annotated[str, Strict(), Field(pattern=SHA256)]
Integer = Annotated[int, Strict(), Field(gt=-(2**64), lt=2**64)]
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Number = Annotated[float, PlainValidator(_number)]
RelativePath = Annotated[Text, AfterValidator(_relative_path)]
Limited = BeforeValidator(_limited)
Texts = Annotated[dict[Text, Text], Limited]


@dataclass(frozen=True)
class FileRecord:
    """One file of a trajectory."""

    path: RelativePath  # relative to the trajectory's folder
    size: Count  # in bytes
    sha256: Sha256  # of its content, in hexadecimal

    @classmethod
    def of(cls, path: Path, name: str) -> "FileRecord":
        return cls(path=name, size=path.stat().st_size, sha256=file_sha256(path))


@dataclass(frozen=True)
class HubTensors:
    """Tensors that are stored in a model repo on the Hub."""

    repo_id: Text
    commit: Annotated[str, Strict(), Field(pattern="^[0-9a-f]{40}$")]
    files: Annotated[tuple[FileRecord, ...], FailFast()]  # the safetensors files of the repo that hold the tensors
    names: Texts  # from the name of a tensor to its name in the repo


@dataclass(frozen=True)
class StateRecord:
    """One state Θk, the start, or another snapshot of the weights.

    Attributes:
        index (`int`):
            k; 0 is the state trained on all data. Tail states and branches are counted on their own, from 0.
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
            Training arguments that influence the weights, as text. If `class` is among them, which is the class of the
            arguments, all others had the defaults of that class; know_hf 0.2.0 and older wrote only a part.
        unchanged (`dict[str, int]`):
            Tensors that are stored once: from the name to the earlier state whose files hold the same bits; to state 0
            for what is not a state of the order.
        kind (`str`, *optional*, defaults to `"state"`):
            `"state"`; `"start"`, the weights before the training; `"tail"`, weights late in the training of state 0;
            or `"branch"`, weights of another training than those of the states.
        hub ([`HubTensors`], *optional*):
            Tensors of the start that the base model on the Hub holds.
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
    kind: Literal["state", "start", "tail", "branch"] = "state"
    hub: HubTensors | None = None

    @property
    def name(self) -> str:
        """Name of its folder: `state-1`, `start`, `tail-0` or `branch-0`."""
        return self.kind if self.kind == "start" else f"{self.kind}-{self.index}"

    @property
    def label(self) -> str:
        """Name in messages: `state 1`, `start`, `tail 0` or `branch 0`."""
        return self.name.replace("-", " ")

    @property
    def symbol(self) -> str:
        """Name in tables: `Θ1`, `start`, `tail 0` or `branch 0`."""
        return f"Θ{self.index}" if self.kind == "state" else self.label

    @property
    def examples(self) -> str:
        """Size of the subset in tables; a dash for the start and tail states, which have none of their own."""
        if self.num_examples is None and self.kind in ("start", "tail"):
            return "–"
        return self.size if self.num_examples is None else f"{self.num_examples:,}"

    @property
    def size(self) -> str:
        """Size of the subset in words."""
        return size_in_words(self.num_examples, self.fraction)

    def smaller_than(self, other: "StateRecord") -> bool:
        """Whether the subset of this state is known to be smaller than that of another."""
        if self.num_examples is not None and other.num_examples is not None:
            return self.num_examples < other.num_examples
        return self.fraction is not None and other.fraction is not None and self.fraction < other.fraction
