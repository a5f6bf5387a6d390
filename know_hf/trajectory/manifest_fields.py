"""Types of the fields of `trajectory.json`, which may come from a stranger: strict, and never converted."""

import re
import sys
from reprlib import Repr
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    GetPydanticSchema,
    PlainValidator,
    Strict,
    ValidationError,
)
from pydantic_core import core_schema

from ..roles import TensorRole
from ..schedule import ForgettingSchedule

MAX_STATES = 1000
_MAX_ENTRIES = 250_000  # of a mapping: pydantic collects the errors of all entries before it raises

# Files that save_pretrained of models, adapters, tokenizers and processors writes. Loading a pickle or a model with
# trust_remote_code runs code: pickles and Python are refused.
FILE_KINDS = re.compile(r".+\.(safetensors|json|jinja|txt|md|model(\.v\w+)?|spm|codes|vocab|tokenizer|tiktoken)")
# A plain name on every system: not hidden, no drive, stream, device or separator of Windows.
_FILE_NAME = re.compile(r"(?!\.|(con|prn|aux|nul|com\d|lpt\d)(\.|$))[^\\/:*?\"<>|]*[^\\/:*?\"<>|. ]", re.IGNORECASE)
# Control characters and line separators could forge lines of a card or steer a terminal.
_PLAIN_TEXT = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
_SHA256 = "^[0-9a-f]{64}$"

_short = Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring, _short.maxlong = 2, 2, 2, 60, 30
shorten = _short.repr  # bounded in length and depth, unlike repr


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
Sha256 = Annotated[str, Strict(), Field(pattern=_SHA256)]
Integer = Annotated[int, Strict(), Field(gt=-(2**64), lt=2**64)]
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Number = Annotated[float, PlainValidator(_number)]
RelativePath = Annotated[Text, AfterValidator(_relative_path)]
Limited = BeforeValidator(_limited)
Texts = Annotated[dict[Text, Text], Limited]


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
    num_states: Annotated[int, Strict(), Field(le=MAX_STATES)] = 0
    epochs_per_stage: Number = 0.0
    stratify_by: Text | None = None
    seed: Integer = 0
    group_by: Text | None = None
    steps_per_stage: Integer | None = None
    key_column: Text | None = None

    def build(self) -> ForgettingSchedule:
        return ForgettingSchedule(**self.model_dump(exclude_unset=True))


def _built_from(content: type[_RoleContent] | type[_ScheduleContent]) -> GetPydanticSchema:
    return GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(lambda c: c.build(), handler(content))
    )


Role = Annotated[TensorRole, _built_from(_RoleContent)]
Schedule = Annotated[ForgettingSchedule, _built_from(_ScheduleContent)]


def describe(error: ValidationError) -> str:
    """Return the first error in one line: `states[1].steps is '3' (Input should be a valid integer)`."""
    first = error.errors(include_url=False)[0]
    name = ""
    for part in first["loc"]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part != "[key]":  # pydantic's mark of an invalid key, which is the part before
            name += f".{part}" if part.isidentifier() and len(part) < 60 else f"[{shorten(part)}]"
    name = name.removeprefix(".") or "the content"
    if first["type"] == "missing":
        return f"{name} is missing"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("string_pattern_mismatch", "string_unicode"):
        is_hash = first.get("ctx", {}).get("pattern") == _SHA256
        reason = f"expected {'64 hexadecimal digits in lower case' if is_hash else 'text without control characters'}"
    return f"{name} is {shorten(first['input'])} ({reason})"
