"""[`WeightTrajectory`]: the ordered states of one model on disk, written once and read tensor by tensor.

trajectory/
  trajectory.json            what the states are; written last, so that a state counts only when it stands here
  config.json, tokenizer …   once, as `save_pretrained` leaves them
  state-0/ … state-4/        config and safetensors of each state, as `save_pretrained` leaves them
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import ByteSource, CheckpointError, CheckpointReader, atomic_folder
from ..roles import TensorRole
from ..schedule import ForgettingSchedule
from .background_writer import BackgroundWriter
from .integrity import check_local_files
from .loading import check_same_tensors, load_into, load_pretrained
from .manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    StateRecord,
    TrajectoryBusyError,
    TrajectoryError,
    recordable,
)
from .snapshot import Snapshot, cached_revision, library_versions, roles_on_disk, with_place, write_model_files


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
        base_model, base_revision (`str`, *optional*): Hub id or path of the model the training started from; a
            relative path starts with `./`.

    Raises:
        `FileNotFoundError`: when the folder holds no trajectory.
        `TrajectoryError`: when a file is missing or has another size than recorded, or states are out of order.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._manifest = Manifest.read(self.path)
        self._prepare()
        self._check_files(hashes=False)

    @classmethod
    def create(cls, path: str | Path, schedule: ForgettingSchedule | None = None) -> WeightTrajectory:
        """A new trajectory without states; nothing is written before the first [`record`].

        Args:
            path (`str` or `Path`): Its folder; it must not hold a trajectory yet.
            schedule ([`ForgettingSchedule`], *optional*): The schedule, kept in `trajectory.json`.

        Raises:
            `FileExistsError`: when `path` holds a trajectory, or a model whose files the trajectory's would replace.
        """
        path = Path(path)
        if cls.exists(path):
            raise FileExistsError(f"{path} already holds a trajectory; open it with WeightTrajectory({str(path)!r})")
        # the files of a recording that was stopped in its first state have the state's folder beside them
        held = [name for name in ("config.json", "adapter_config.json") if (path / name).exists()]
        if held and not (path / _state_folder(0)).exists():
            raise FileExistsError(
                f"{path} holds a model, whose {held[0]} recording would replace; record to a folder of its own"
            )
        trajectory = cls.__new__(cls)
        trajectory.path = path
        trajectory._manifest = Manifest(states=(), schedule=schedule)
        trajectory._prepare()
        return trajectory

    @classmethod
    def from_hub(
        cls, repo_id: str, *, revision: str | None = None, token: str | bool | None = None
    ) -> WeightTrajectory:
        """Opens a trajectory on the Hub without downloading its weights.

        Tensors, or pieces of them, are read as ranges of bytes when they are asked for; what [`load_model`] and
        `model_files` need is downloaded to the Hub cache. All is of one commit, the last one now. Whoever reads most
        of a trajectory is faster with `know_hf.hub.pull`.

        Args:
            repo_id (`str`): Id of the model repo.
            revision (`str`, *optional*): Branch, tag or commit; by default `main`.
            token (`str` or `bool`, *optional*): Of an account that may read it; by default the one logged in.

        Raises:
            `TrajectoryError`: when the repo holds no trajectory, half of one, or another file than was recorded.
            `HubError`: when it can't be read; says what to do.
        """
        from .remote import RemoteTrajectory

        return RemoteTrajectory(repo_id, revision, token)

    def _prepare(self) -> None:
        self._writer = BackgroundWriter()
        self._copies: dict[str, torch.Tensor] = {}
        self._lock = FileLock(self.path / ".lock", timeout=0, thread_local=False)

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether `path` holds a trajectory with at least one finished state."""
        return (Path(path) / MANIFEST_NAME).exists()

    def __repr__(self) -> str:
        sizes = [state.num_examples for state in self.states]
        return f"WeightTrajectory({str(self.path)!r}, num_examples={sizes})"

    @property
    def states(self) -> tuple[StateRecord, ...]:
        self._writer.wait()
        return self._manifest.states

    @property
    def num_states(self) -> int:
        return len(self.states)

    @property
    def schedule(self) -> ForgettingSchedule | None:
        return self._manifest.schedule

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
        """Shape of a tensor, the same in all states."""
        return self._readers[0].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a tensor is stored in, the same in all states."""
        return self._readers[0].dtype(name)

    def tensor(self, name: str, state: int = 0) -> torch.Tensor:
        """One tensor of one state, `(*shape)`, in the dtype it is stored in."""
        return self._readers[state].tensor(name)

    @property
    def is_adapter(self) -> bool:
        """Whether the states are adapters (peft) instead of models."""
        return any(path.name == "adapter_config.json" for path in self.model_files)

    def is_unchanged(self, name: str) -> bool:
        """Whether the recording found a tensor to be the same in all states; what it says needs no reading."""
        return all(name in state.unchanged for state in self.states[1:])

    def history(self, name: str) -> torch.Tensor:
        """All states of one tensor in the order KNOWN reads them.

        Args:
            name (`str`): Name of the tensor on disk.

        Returns:
            `torch.Tensor` of shape `(S, *shape)`, float32: most forgotten state first, full data LAST.
        """
        return self.read_history(name).reshape(self.num_states, *self.shape(name))

    def read_history(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A piece of a tensor's [`history`], of which nothing else is read.

        Args:
            name (`str`): Name of the tensor on disk.
            start (`int`, *optional*, defaults to `0`): First element, counted through the tensor row by row.
            stop (`int`, *optional*): One after the last element; by default the tensor's end.

        Returns:
            `torch.Tensor` of shape `(S, stop - start)`, float32: most forgotten state first, full data LAST.
        """
        stop = self.shape(name).numel() if stop is None else stop
        history = torch.empty(self.num_states, stop - start, dtype=torch.float32)
        for row, reader in zip(history, reversed(self._readers), strict=True):
            row.copy_(reader.read(name, start, stop))
        return history

    def read(self, name: str, start: int, stop: int, state: int = 0) -> torch.Tensor:
        """Elements `start` to `stop - 1` of one tensor of one state, in the dtype it is stored in."""
        return self._readers[state].read(name, start, stop)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Reads every file once and compares it with what was recorded.

        Args:
            part, parts (`int`, *optional*): Only every `parts`-th file from number `part` on, where several processes
                share the reading.

        Raises:
            `TrajectoryError`: when a file is missing or not the one recorded (size, SHA-256), or when the states do
                not have the same tensors; names file or tensor and state.
        """
        self._check_files(hashes=True, part=part, parts=parts)
        self.__dict__.pop("_readers", None)
        _ = self._readers

    def load_model(
        self,
        state: int = 0,
        model_class: type[PreTrainedModel] | None = None,
        base_model: PreTrainedModel | None = None,
    ) -> nn.Module:
        """The model with the weights of one state.

        Args:
            state (`int`, *optional*, defaults to `0`): Index of the state.
            model_class (`type`, *optional*): Its class; by default the one transformers has under the name that
                `config.json` gives. A class given may leave weights out, as one without the head does,
                but have no others.
            base_model (`PreTrainedModel`, *optional*): For a trajectory of adapters, the model they belong to.

        Raises:
            `TrajectoryError`: when a model made from the config has other tensors than the state, such as with another
                head; [`load_into`] takes a model that was made the same way.
        """
        self._writer.wait()
        return load_pretrained(self.path / _state_folder(state), model_class, base_model)

    def load_into(self, model: nn.Module, state: int = 0) -> None:
        """Copies the weights of one state into a model of the recorded architecture, whatever its device and dtype.

        Args:
            model (`nn.Module`): The model, without its wrappers.
            state (`int`, *optional*, defaults to `0`): Index of the state.

        Raises:
            `TrajectoryError`: when state and model don't have the same tensors, of the same shapes; when the model's
                weights are in parts (ZeRO-3).
        """
        self._writer.wait()
        load_into(model, self.path / _state_folder(state), dict.fromkeys(self.names, self._readers[state].tensor))

    # Writing

    def record(
        self,
        model: nn.Module,
        *,
        num_examples: int | None,
        steps: int,
        fraction: float | None = None,
        subset_fingerprint: str | None = None,
        seed: int | None = None,
        metrics: Mapping[str, float] | None = None,
        training: Mapping[str, str] | None = None,
        processing_class: Any = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        background: bool = False,
        on_written: Callable[[StateRecord], object] | None = None,
    ) -> None:
        """Writes the model's weights as the next state.

        The state is written to a folder of its own, renamed, and only then entered in `trajectory.json`: a crash at
        any moment leaves the states before it whole. Of a `PeftModel` the adapter alone is recorded. Tensors that are
        bit for bit those of the state before are stored once, where they are more than 1 % of a model.

        Args:
            model (`nn.Module`): A `PreTrainedModel`, a `PeftModel` or any module, without its wrappers.
            num_examples (`int`, *optional*): Number of examples its stage trained on, fewer than the state before;
                `None` where a stream doesn't tell.
            steps (`int`): Optimizer steps of its stage.
            fraction (`float`, *optional*): Share of the data its stage trained on.
            subset_fingerprint (`str`, *optional*): Hash of the subset.
            seed (`int`, *optional*): Seed of the stage.
            metrics (`Mapping[str, float]`, *optional*): Evaluation of the state.
            training (`Mapping[str, str]`, *optional*): Arguments of its training, as text.
            processing_class (*optional*): Tokenizer or processor, saved with the first state.
            state_dict (`Mapping[str, torch.Tensor]`, *optional*): The whole weights, by their names in memory, where
                the model holds only a part of them (FSDP, ZeRO-3).
            dtype (`torch.dtype`, *optional*): Floating-point dtype to store; by default that of each tensor.
            background (`bool`, *optional*, defaults to `False`): Whether to return as soon as the weights are copied
                and to write in a thread. Its error is raised by whatever is called next on this trajectory.
            on_written (`Callable[[StateRecord], object]`, *optional*): Called when the state has been entered.

        Raises:
            `TrajectoryError`: when the subset does not shrink or the tensors are not those of state 0; the state is
                then not entered.
            `OSError`: when a file can't be written; the states before are kept.
            `TrajectoryBusyError`: when another process records to this folder.
        """
        state = StateRecord(
            index=self.num_states,
            num_examples=num_examples,
            steps=steps,
            files=(),
            fraction=fraction,
            subset_fingerprint=subset_fingerprint,
            seed=seed,
            metrics=dict(metrics or {}),
            training=dict(training or {}),
        )
        replace(self._manifest, states=(*self.states, state)).check(self.path)
        snapshot = Snapshot.of(model, state_dict, dtype, self._copies)
        self._copies = snapshot.state_dict if background else {}

        def write() -> None:
            try:
                with self.recording():
                    written = self._write(snapshot, state, processing_class)
            except TrajectoryBusyError:
                raise
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"state {state.index} could not be written to {self.path} ({error}); the {state.index} states"
                    " before it are kept: free the disk and record again, it goes on from there"
                ) from error
            if on_written is not None:
                on_written(written)

        if background:
            self._writer.submit(write)
        else:
            write()

    def check(self, wait: bool = False) -> None:
        """Raises the error of a background writing that has failed; waits for one that goes on only when told so."""
        if wait:
            self._writer.wait()
        else:
            self._writer.check()

    def update_metrics(self, state: int, metrics: Mapping[str, float]) -> None:
        """Adds evaluation results to a finished state."""
        record = self.states[state]
        record = replace(record, metrics={**record.metrics, **metrics})
        with self.recording():
            self._enter(replace(self._manifest, states=(*self.states[:state], record, *self.states[state + 1 :])))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps other processes from recording to this folder while the block runs; waits for the writing at its end.

        Raises:
            `TrajectoryBusyError`: when another one does so now, or did so since this object read the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with self._lock:
                known, found = self._manifest.states, Manifest.read(self.path).states if self.exists(self.path) else ()
                if len(known) != len(found):
                    raise TrajectoryBusyError(
                        f"{self.path} holds {len(found)} states, {len(known)} were expected: another process records"
                        " to it, or has; record to another folder, or open the trajectory again to go on from there"
                    )
                try:
                    yield
                finally:
                    self._writer.join()
        except Timeout as error:
            raise TrajectoryBusyError(
                f"another process is recording to {self.path}; wait for it to end, or record to another folder"
            ) from error

    def _write(self, snapshot: Snapshot, state: StateRecord, processing_class: Any) -> StateRecord:
        index, entered = state.index, self._manifest.states
        folder = self.path / _state_folder(index)
        previous = self._readers[-1] if index else None
        snapshot.check_finite(self.path, index)
        with atomic_folder(folder, overwrite=True) as work:
            left_out = snapshot.save(work, previous)
            for record in self._manifest.files:  # one model, one config: saving notes more the second time
                if (work / record.path).exists():
                    shutil.copy2(self.path / record.path, work / record.path)
            names = recordable(work)
            files = tuple(replace(FileRecord.of(work / n, n), path=f"{folder.name}/{n}") for n in names)
            origin = entered[-1].unchanged if index else {}
            unchanged = {name: origin.get(name, index - 1) for name in sorted(left_out)}
            elsewhere = {name: self._readers[source] for name, source in unchanged.items()}
            reader = CheckpointReader([work / name for name in names if name.endswith(".safetensors")], elsewhere)
            if index:
                check_same_tensors(self.path, index, reader, self._readers[0])
        manifest = self._manifest
        if not index:
            roles, tied = roles_on_disk(snapshot, reader)
            config = getattr(snapshot.model, "config", None)
            manifest = replace(
                manifest,
                roles=roles,
                tied_weights=tied,
                base_model=(base_model := with_place(getattr(config, "_name_or_path", None) or "") or None),
                base_revision=getattr(config, "_commit_hash", None) or cached_revision(base_model),
                files=write_model_files(self.path, folder, processing_class),
                library_versions=library_versions(),
            )
        state = replace(state, files=files, unchanged=unchanged)
        self._enter(replace(manifest, states=(*entered, state)))
        return state

    def _enter(self, manifest: Manifest) -> None:
        manifest.write(self.path)
        self._manifest = manifest
        self.__dict__.pop("_readers", None)

    # Checking

    @cached_property
    def _readers(self) -> list[CheckpointReader]:
        if not self.states:
            raise TrajectoryError(f"{self.path} has no finished state yet; record one first")
        readers: list[CheckpointReader] = []
        for state in self.states:
            files = [self._source(record) for record in state.files if record.path.endswith(".safetensors")]
            elsewhere = {name: readers[origin] for name, origin in state.unchanged.items()}
            try:
                readers.append(CheckpointReader(files, elsewhere))
            except (CheckpointError, KeyError) as error:
                raise TrajectoryError(f"state {state.index} of {self.path}: {error}") from error
            check_same_tensors(self.path, state.index, readers[-1], readers[0])
        if unknown := sorted(set(readers[0].names) - set(self.roles)):
            raise TrajectoryError(
                f"{MANIFEST_NAME} of {self.path} names no role for tensor {unknown[0]!r}; restore it from a copy"
            )
        return readers

    def _source(self, record: FileRecord) -> Path | ByteSource:
        return self.path / record.path

    def _check_files(self, hashes: bool, part: int = 0, parts: int = 1) -> None:
        self._writer.wait()
        check_local_files(self._manifest, self.path, hashes, part, parts)


def _state_folder(index: int) -> str:
    return f"state-{index}"
