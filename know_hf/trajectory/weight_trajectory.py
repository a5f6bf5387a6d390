"""[`WeightTrajectory`]: the ordered states of one model on disk, written once and read tensor by tensor.

trajectory/
  trajectory.json            what the states are; written last, so that a state counts only when it stands here
  config.json, tokenizer …   once, as `save_pretrained` leaves them
  state-0/ … state-4/        config and safetensors of each state, as `save_pretrained` leaves them
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import WEIGHTS_NAME, CheckpointError, CheckpointReader, atomic_folder, file_sha256, fsync
from ..roles import TensorRole, names_on_disk, role_by_shape, tensor_roles
from ..schedule import ForgettingSchedule
from .manifest import MANIFEST_NAME, FileRecord, Manifest, StateRecord, TrajectoryError

_LIBRARIES = ("know_hf", "torch", "transformers", "datasets", "accelerate", "peft", "safetensors", "numpy")


class WeightTrajectory:
    """Opens a trajectory.

    State 0 is the full-data state Θ0, state k the one after training on the k-th smaller subset. Only [`history`]
    turns this order round.

    Args:
        path (`str` or `Path`): The folder with `trajectory.json`.

    Attributes:
        path (`Path`): The folder.
        states (`tuple[StateRecord]`): The finished states, full data first.
        schedule ([`ForgettingSchedule`], *optional*): The schedule that chose the subsets.
        roles (`dict[str, TensorRole]`): Role of every tensor on disk.
        tied_weights (`dict[str, str]`): Names that are in the model but not on disk, with the name they are tied to.
        base_model, base_revision (`str`, *optional*): Hub id or path of the model the training started from.

    Raises:
        `FileNotFoundError`: when the folder holds no trajectory.
        `TrajectoryError`: when a file is missing or has another size than recorded, or states are out of order.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._manifest = Manifest.read(self.path)
        self._check_files(hashes=False)

    @classmethod
    def create(cls, path: str | Path, schedule: ForgettingSchedule | None = None) -> WeightTrajectory:
        """A new trajectory without states; nothing is written before the first [`record`].

        Args:
            path (`str` or `Path`): Its folder; it must not hold a trajectory yet.
            schedule ([`ForgettingSchedule`], *optional*): The schedule, kept in `trajectory.json`.

        Raises:
            `FileExistsError`: when `path` holds a trajectory.
        """
        path = Path(path)
        if cls.exists(path):
            raise FileExistsError(f"{path} already holds a trajectory; open it with WeightTrajectory({str(path)!r})")
        trajectory = cls.__new__(cls)
        trajectory.path = path
        trajectory._manifest = Manifest(schedule=schedule.to_dict() if schedule else None)
        return trajectory

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether `path` holds a trajectory with at least one finished state."""
        return (Path(path) / MANIFEST_NAME).exists()

    def __repr__(self) -> str:
        sizes = [state.num_examples for state in self.states]
        return f"WeightTrajectory({str(self.path)!r}, num_examples={sizes})"

    @property
    def states(self) -> tuple[StateRecord, ...]:
        return self._manifest.states

    @property
    def num_states(self) -> int:
        return len(self._manifest.states)

    @property
    def schedule(self) -> ForgettingSchedule | None:
        return ForgettingSchedule(**self._manifest.schedule) if self._manifest.schedule else None

    @property
    def roles(self) -> dict[str, TensorRole]:
        return self._manifest.roles

    @property
    def tied_weights(self) -> dict[str, str]:
        return self._manifest.tied_weights

    @property
    def base_model(self) -> str | None:
        return self._manifest.base_model

    @property
    def base_revision(self) -> str | None:
        return self._manifest.base_revision

    @property
    def model_files(self) -> list[Path]:
        """Config, tokenizer and processor files that belong to the model whatever its state."""
        return [self.path / record.path for record in self._manifest.files]

    # Reading

    @property
    def names(self) -> list[str]:
        """Names of all tensors on disk, sorted."""
        return self._readers[0].names

    def shape(self, name: str) -> torch.Size:
        return self._readers[0].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._readers[0].dtype(name)

    def tensor(self, name: str, state: int = 0) -> torch.Tensor:
        """One tensor of one state, `(*shape)`, in the dtype it is stored in."""
        return self._readers[state].tensor(name)

    def history(self, name: str) -> torch.Tensor:
        """All states of one tensor in the order KNOWN reads them.

        Args:
            name (`str`): Name of the tensor on disk.

        Returns:
            `torch.Tensor` of shape `(S, *shape)`, float32: most forgotten state first, full data LAST.
        """
        return torch.stack([reader.tensor(name).to(torch.float32) for reader in reversed(self._readers)])

    def verify(self) -> None:
        """Reads every file once and compares it with what was recorded.

        Raises:
            `TrajectoryError`: when a file is missing or not the one recorded (size, SHA-256), or when the states do
                not have the same tensors; names file or tensor and state.
        """
        self._check_files(hashes=True)
        self.__dict__.pop("_readers", None)
        _ = self._readers

    def load_model(self, state: int = 0, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
        """The model with the weights of one state.

        Args:
            state (`int`, *optional*, defaults to `0`): Index of the state.
            model_class (`type`, *optional*): Its class; by default the one transformers has under the name that
                `config.json` gives.
        """
        return load_pretrained(self.path / _state_folder(state), model_class)

    def load_into(self, model: nn.Module, state: int = 0) -> None:
        """Copies the weights of one state into a model of the recorded architecture, whatever its device and dtype."""
        folder = self.path / _state_folder(state)
        if isinstance(model, PreTrainedModel):
            # from_pretrained knows the way from the names on disk to those in memory
            model.load_state_dict(type(model).from_pretrained(folder).state_dict())
        else:
            load_model(model, folder / WEIGHTS_NAME)

    # Writing

    def record(
        self,
        model: nn.Module,
        *,
        num_examples: int,
        steps: int,
        subset_fingerprint: str | None = None,
        seed: int | None = None,
        metrics: Mapping[str, float] | None = None,
        processing_class: Any = None,
    ) -> StateRecord:
        """Writes the model's weights as the next state.

        The state is written to a folder of its own, renamed, and only then entered in `trajectory.json`: a crash at
        any moment leaves the states before it whole.

        Args:
            model (`nn.Module`): A `PreTrainedModel`, or any module without its wrappers.
            num_examples (`int`): Number of examples its stage trained on; fewer than the state before.
            steps (`int`): Optimizer steps of its stage.
            subset_fingerprint (`str`, *optional*): Hash of the subset.
            seed (`int`, *optional*): Seed of the stage.
            metrics (`Mapping[str, float]`, *optional*): Evaluation of the state.
            processing_class (*optional*): Tokenizer or processor, saved with the first state.

        Returns:
            [`StateRecord`]: what was entered.

        Raises:
            `TrajectoryError`: when the subset does not shrink or the tensors are not those of state 0; the state is
                then not entered.
        """
        index = self.num_states
        state = StateRecord(index, num_examples, steps, (), subset_fingerprint, seed, dict(metrics or {}))
        replace(self._manifest, states=(*self.states, state)).check_order(self.path)
        folder = self.path / _state_folder(index)
        with atomic_folder(folder, overwrite=True) as work:
            _save(model, work)
            names = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
            files = tuple(replace(FileRecord.of(work / n, n), path=f"{folder.name}/{n}") for n in names)
            reader = CheckpointReader([work / name for name in names if name.endswith(".safetensors")])
            if index:
                _check_same_tensors(self.path, index, reader, self._readers[0])
        manifest = self._manifest if index else self._describe(model, reader, folder, processing_class)
        state = replace(state, files=files)
        self._enter(replace(manifest, states=(*self.states, state)))
        return state

    def update_metrics(self, state: int, metrics: Mapping[str, float]) -> None:
        """Adds evaluation results to a finished state."""
        record = self.states[state]
        record = replace(record, metrics={**record.metrics, **metrics})
        self._enter(replace(self._manifest, states=(*self.states[:state], record, *self.states[state + 1 :])))

    def _describe(self, model: nn.Module, reader: CheckpointReader, folder: Path, processing_class: Any) -> Manifest:
        on_disk = names_on_disk(model)
        owned = {on_disk[name]: role for name, role in tensor_roles(model).items() if name in on_disk}
        roles = {
            name: owned.get(name) or role_by_shape(name, reader.shape(name), reader.dtype(name).is_floating_point)
            for name in reader.names
        }
        tied = {
            name: on_disk[role.reason.removeprefix("tied to ")]
            for name, role in owned.items()
            if role.reason.startswith("tied to ") and name not in roles
        }
        config = getattr(model, "config", None)
        return replace(
            self._manifest,
            roles=roles,
            tied_weights=tied,
            base_model=getattr(config, "_name_or_path", None) or None,
            base_revision=getattr(config, "_commit_hash", None),
            files=self._write_model_files(folder, processing_class),
            library_versions=_library_versions(),
        )

    def _write_model_files(self, state_folder: Path, processing_class: Any) -> tuple[FileRecord, ...]:
        work = self.path / ".model-files.partial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for path in state_folder.iterdir():
            if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
                shutil.copy2(path, work)
        if processing_class is not None:
            processing_class.save_pretrained(work)
        names = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
        for name in names:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            fsync(work / name)
            (work / name).replace(self.path / name)
        shutil.rmtree(work)
        return tuple(FileRecord.of(self.path / name, name) for name in names)

    def _enter(self, manifest: Manifest) -> None:
        manifest.write(self.path)
        self._manifest = manifest
        self.__dict__.pop("_readers", None)

    # Checking

    @cached_property
    def _readers(self) -> list[CheckpointReader]:
        if not self.states:
            raise TrajectoryError(f"{self.path} has no finished state yet; record one first")
        readers = []
        for state in self.states:
            files = [self.path / record.path for record in state.files if record.path.endswith(".safetensors")]
            try:
                readers.append(CheckpointReader(files))
            except CheckpointError as error:
                raise TrajectoryError(f"state {state.index} of {self.path}: {error}") from error
            _check_same_tensors(self.path, state.index, readers[-1], readers[0])
        return readers

    def _check_files(self, hashes: bool) -> None:
        root = self.path.resolve()
        records = {r.path: (r, "the model's files") for r in self._manifest.files}
        records |= {r.path: (r, f"state {state.index}") for state in self.states for r in state.files}
        for record, owner in records.values():
            path = self.path / record.path
            if not path.resolve().is_relative_to(root):
                raise TrajectoryError(f"{MANIFEST_NAME} of {self.path} names {record.path!r}, outside of its folder")
            if not path.is_file():
                raise TrajectoryError(f"{path} of {owner} is missing; restore it from a copy or record it again")
            if path.stat().st_size != record.size:
                raise TrajectoryError(
                    f"{path} of {owner} has {path.stat().st_size} bytes, {record.size} were recorded: it is truncated"
                    " or was replaced; restore it from a copy or record it again"
                )
            if hashes and file_sha256(path) != record.sha256:
                raise TrajectoryError(
                    f"{path} of {owner} is not the file that was recorded (its SHA-256 differs): it is damaged or was"
                    " replaced; restore it from a copy or record it again"
                )


def load_pretrained(folder: Path, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Loads a checkpoint with the class its `config.json` names, or with the one given.

    Raises:
        `TrajectoryError`: when the folder has no config, or transformers no class of that name.
    """
    import transformers

    if model_class is None:
        config = folder / "config.json"
        if not config.exists():
            raise TrajectoryError(
                f"{folder} has no config.json: it is of a plain module; load it with load_into(model)"
            )
        architecture = (transformers.PreTrainedConfig.get_config_dict(folder)[0].get("architectures") or ["none"])[0]
        model_class = getattr(transformers, architecture, None)
        if model_class is None:
            raise TrajectoryError(
                f"transformers has no class {architecture!r}, the architecture of {config}; pass model_class="
            )
    return model_class.from_pretrained(folder)


def _state_folder(index: int) -> str:
    return f"state-{index}"


def _save(model: nn.Module, folder: Path) -> None:
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / WEIGHTS_NAME), metadata={"format": "pt"})


def _check_same_tensors(path: Path, state: int, reader: CheckpointReader, first: CheckpointReader) -> None:
    names, expected = set(reader.names), set(first.names)
    hint = "was the head replaced between stages?"
    for name in sorted(expected - names):
        raise TrajectoryError(f"state {state} of {path} has no tensor {name!r} that state 0 has; {hint}")
    for name in sorted(names - expected):
        raise TrajectoryError(f"state {state} of {path} has a tensor {name!r} that state 0 has not; {hint}")
    for name in sorted(names):
        here = (tuple(reader.shape(name)), reader.dtype(name))
        if here != (there := (tuple(first.shape(name)), first.dtype(name))):
            raise TrajectoryError(
                f"tensor {name!r} is {here[0]} {here[1]} in state {state} of {path} and {there[0]} {there[1]} in state"
                f" 0; {hint}"
            )


def _library_versions() -> dict[str, str]:
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions
