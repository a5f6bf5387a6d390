"""Writes the states of a trajectory, one at a time, also in a thread beside the training.

A state is written to a folder of its own, renamed, and only then entered in `trajectory.json`: a crash at any moment
leaves the states before it complete.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NotRequired, TypedDict, get_args

import torch
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import CheckpointReader, atomic_folder, fsync
from ..local_paths import hide_paths, name_beside
from ..model_tensors import unwrapped
from .adapters import base_fingerprint
from .manifest import MANIFEST_NAME, Manifest, TrajectoryError, recordable
from .records import FileRecord, StateRecord
from .snapshot import Snapshot, roles_on_disk
from .start import StartWeights, store_early
from .store import StateName, Store, check_same_tensors

logger = logging.get_logger(__name__)

_LIBRARIES = ("know_hf", "torch", "transformers", "datasets", "accelerate", "peft", "safetensors", "numpy")


class TrajectoryBusyError(RuntimeError, BlockingIOError):
    """Another process records to the folder, or recorded to it since it was read."""


class Stage(TypedDict):
    """The stage that ends in a state; see [`StateRecord`]."""

    num_examples: int | None
    steps: int
    fraction: NotRequired[float | None]
    subset_fingerprint: NotRequired[str | None]
    seed: NotRequired[int | None]
    metrics: NotRequired[Mapping[str, float] | None]
    training: NotRequired[Mapping[str, str] | None]
    kind: NotRequired[Literal["state", "branch"]]


class Recorder:
    """Adds states to a trajectory in a local folder, and enters them in its [`Store`]."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = store.path
        self._lock = FileLock(self._path / ".lock", timeout=0, thread_local=False)
        self._writer = _BackgroundWriter()
        self._copies: dict[str, torch.Tensor] = {}
        self._start: StartWeights = "none"
        self._base_fingerprint: str | None = None  # known before the weights are sharded
        self._early: list[StateRecord] = []  # written, but counted with state 0 only

    def check(self, wait: bool = True) -> None:
        """Raise the error of a failed background job, once, after waiting for a running job if asked to."""
        self._writer.check(wait)

    def record(
        self,
        model: nn.Module,
        state: StateRecord,
        processing_class: Any,
        state_dict: Mapping[str, torch.Tensor] | None,
        dtype: torch.dtype | None,
        background: bool,
        on_written: Callable[[StateRecord], object] | None,
    ) -> None:
        """Write the weights of a model as the next state, given without its files; see [`WeightTrajectory.record`]."""
        self.check()
        manifest = self._store.manifest
        manifest.with_snapshot(state).check(self._path / MANIFEST_NAME)
        self.check_base(model)
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
                    f"{state.label} could not be written to {self._path} ({error}). Free disk space and record"
                    " again: recording resumes after the last finished state."
                ) from error
            if on_written is not None:
                on_written(written)

        if background:
            self._writer.submit(write)
        else:
            write()

    def record_start(
        self,
        model: nn.Module,
        state_dict: Mapping[str, torch.Tensor] | None,
        dtype: torch.dtype | None,
        weights: StartWeights,
    ) -> None:
        """Write the weights of a model before the training; see [`WeightTrajectory.record_start`]."""
        self.check()
        if weights not in get_args(StartWeights):
            raise ValueError(f"start_weights must be one of {', '.join(get_args(StartWeights))}, got {weights!r}")
        if self._store.manifest.states:
            raise TrajectoryError(f"{self._path} has states already; the start is recorded before the first one")
        self._start = weights
        if weights != "none":
            self.record_early(model, StateRecord(0, None, 0, (), kind="start"), state_dict, dtype)

    def record_early(
        self,
        model: nn.Module,
        record: StateRecord,
        state_dict: Mapping[str, torch.Tensor] | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Write the start or a tail state, which is listed together with state 0."""
        snapshot = Snapshot.of(model, state_dict, dtype)
        with self.recording(), atomic_folder(self._path / record.name, overwrite=True) as work:
            snapshot.save(work)
            hide_paths(work)
        self._early = [early for early in self._early if early.name != record.name]
        if record.kind == "tail" and record.index == 0:
            # a training that starts again, with a smaller batch, replaces the tail states of the first attempt
            self._early = [early for early in self._early if early.kind != "tail"]
        self._early.append(record)

    def check_base(self, model: nn.Module) -> None:
        """Raise a `TrajectoryError` when an adapter is on another base model than in the recorded states."""
        recorded, given = self._store.manifest.base_fingerprint, base_fingerprint(model)
        self._base_fingerprint = given or self._base_fingerprint
        if recorded is not None and given not in (None, recorded):
            raise TrajectoryError(
                f"the weights below the adapter are not those of the states in {self._path}; resume with the base"
                " model of the recording, or record to another folder"
            )

    def update_metrics(self, state: StateName, metrics: Mapping[str, float]) -> None:
        """Add evaluation results to a finished state, tail state or branch."""
        self.check()
        manifest, old = self._store.manifest, self._store.record(state)
        new = replace(old, metrics={**old.metrics, **metrics})
        states, tail, branches = (
            tuple(new if record is old else record for record in records)
            for records in (manifest.states, manifest.tail, manifest.branches)
        )
        with self.recording():
            self._store.enter(replace(manifest, states=states, tail=tail, branches=branches))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep other processes from recording to the folder; wait for the background job at the end.

        Raises:
            `TrajectoryBusyError`:
                When another process records, or recorded since the folder was read.
            `TrajectoryError`:
                When the trajectory is on the Hub.
        """
        if (repo := self._store.repo) is not None:
            raise TrajectoryError(f"{repo.repo_id} is on the Hub; pull it with know_hf.hub.pull, then record")
        self._path.mkdir(parents=True, exist_ok=True)
        try:
            with self._lock:
                expected = self._store.manifest.num_trained
                on_disk = Manifest.read(self._path).num_trained if (self._path / MANIFEST_NAME).exists() else 0
                if expected != on_disk:
                    raise TrajectoryBusyError(
                        f"{self._path} has {on_disk} states, expected {expected}: another process recorded to it. Open"
                        " the trajectory again to resume, or record to another folder."
                    )
                try:
                    yield
                finally:
                    self._writer.join()
        except Timeout as error:
            raise TrajectoryBusyError(
                f"another process is recording to {self._path}; wait for it to end, or record to another folder"
            ) from error

    def _write(self, snapshot: Snapshot, state: StateRecord, processing_class: Any) -> StateRecord:
        manifest, is_first = self._store.manifest, state.name == "state-0"
        readers = [] if is_first else self._store.readers
        previous = None if is_first else len(readers) - 1 if state.kind == "state" else 0
        folder = self._path / state.name
        snapshot.check_finite(state.label, None if is_first else self._path)
        with atomic_folder(folder, overwrite=True) as work:
            left_out = snapshot.save(work, None if previous is None else readers[previous])
            hide_paths(work)
            for record in manifest.files:  # saving adds fields to a config the second time; keep that of state 0
                if (work / record.path).exists():
                    shutil.copy2(self._path / record.path, work / record.path)
            names = recordable(work)
            files = tuple(FileRecord.of(work / name, f"{folder.name}/{name}") for name in names)
            origin = {} if previous is None else manifest.states[previous].unchanged
            unchanged = {name: origin.get(name, previous or 0) for name in sorted(left_out)}
            elsewhere = {name: readers[k].locate(name) for name, k in unchanged.items()}
            reader = CheckpointReader([work / name for name in names if name.endswith(".safetensors")], elsewhere)
            if not is_first:
                check_same_tensors(self._path, state.label, reader, readers[0])
        state = replace(state, files=files, unchanged=unchanged)
        if is_first:
            manifest = self._first_manifest(snapshot, state, reader, processing_class)
        self._store.enter(manifest.with_snapshot(state))
        return state

    def _first_manifest(
        self, snapshot: Snapshot, state: StateRecord, reader: CheckpointReader, processing_class: Any
    ) -> Manifest:
        """Return the manifest that gets state 0: what all states share, the start and the tail states."""
        roles, tied_weights = roles_on_disk(snapshot, reader)
        base_model, base_revision = _base_of(snapshot.model, self._path)
        model_files = _write_model_files(self._path, self._path / state.name, processing_class)
        base = None
        if self._start == "reference" and base_model and base_revision:
            base = (base_model, base_revision, getattr(snapshot.model, "base_model_prefix", ""))
        early = [self._finish(record, state, base if record.kind == "start" else None) for record in self._early]
        finished = [record for record in early if record is not None]
        return Manifest(
            (),
            schedule=self._store.manifest.schedule,
            base_model=base_model,
            base_revision=base_revision,
            base_fingerprint=self._base_fingerprint,
            roles=roles,
            tied_weights=tied_weights,
            files=model_files,
            library_versions=library_versions(),
            start=next((record for record in finished if record.kind == "start"), None),
            tail=tuple(record for record in finished if record.kind == "tail"),
        )

    def _finish(
        self, record: StateRecord, state: StateRecord, base: tuple[str, str, str] | None
    ) -> StateRecord | None:
        """Store the start or a tail state without what state 0 and the Hub hold; `None` if tensors were replaced."""
        folder = self._path / record.name
        first = CheckpointReader(
            [self._path / file.path for file in state.files if file.path.endswith(".safetensors")]
        )
        try:
            check_same_tensors(self._path, record.name, CheckpointReader(sorted(folder.glob("*.safetensors"))), first)
        except TrajectoryError as error:
            logger.warning(f"{record.name} is not recorded: {error}")
            shutil.rmtree(folder)
            return None
        return store_early(folder, first, state, record, base)


def check_savable(path: Path, model: nn.Module, processing_class: Any) -> None:
    """Raise the error that saving everything but the weights as state 0 would raise, before a training.

    The generation config must be valid, the name of the base model plain text, and the processing class savable.
    """
    model = unwrapped(model)
    base_model, base_revision = _base_of(model, path)
    Manifest((), base_model=base_model, base_revision=base_revision).content(path / MANIFEST_NAME)
    generates = isinstance(model, PreTrainedModel) and model.can_generate()
    with TemporaryDirectory() as folder:
        for part in (getattr(model, "generation_config", None) if generates else None, processing_class):
            if part is not None:
                part.save_pretrained(folder)


class _BackgroundWriter:
    """Runs one job at a time in a thread. Its error is raised by the next call, once.

    The thread is not a daemon: the interpreter ends after the job. Waiting can be interrupted by Ctrl-C and repeated.
    """

    def __init__(self) -> None:
        self._job: Future[None] | None = None
        self._thread: int | None = None  # of the running job, which must not wait for itself

    def submit(self, job: Callable[[], object]) -> None:
        """Start a job as soon as the one before has ended."""
        self.check(wait=True)
        pool = ThreadPoolExecutor(1, "know_hf-writer")
        self._job = pool.submit(self._run, job)
        pool.shutdown(wait=False)  # the thread ends with the job

    def join(self) -> None:
        """Wait for the job; keep its error."""
        if self._job is not None and self._thread != threading.get_ident():
            wait([self._job])

    def check(self, wait: bool) -> None:
        if wait:
            self.join()
        if self._job is not None and self._job.done():
            job, self._job = self._job, None
            job.result()

    def _run(self, job: Callable[[], object]) -> None:
        self._thread = threading.get_ident()
        try:
            job()
        except BaseException as error:
            # now; the error with its text is raised when the training comes back
            logger.error(f"A state was not recorded ({type(error).__name__}); the recording ends with the error.")
            raise
        finally:
            self._thread = None


def _write_model_files(folder: Path, state_folder: Path, processing_class: Any) -> tuple[FileRecord, ...]:
    """Write the config of a state and its tokenizer or processor to the folder of the trajectory."""
    work = folder / ".model-files.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for path in state_folder.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
            shutil.copy2(path, work)
    if processing_class is not None:
        processing_class.save_pretrained(work)
    hide_paths(work)
    names = recordable(work)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fsync(work / name)
        (work / name).replace(folder / name)
    shutil.rmtree(work)
    return tuple(FileRecord.of(folder / name, name) for name in names)


def _base_of(model: nn.Module, folder: Path) -> tuple[str | None, str | None]:
    """Hub id or name of the model that the training started from, see [`name_beside`], and its commit, if known."""
    config = getattr(model, "config", None)
    loaded_from = getattr(config, "_name_or_path", None) or ""
    name = name_beside(folder, loaded_from) if loaded_from else ""
    if commit := getattr(config, "_commit_hash", None):
        return name or None, commit
    # configs do not always name their commit; the cache does if it has a single one
    snapshots = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    commits = os.listdir(snapshots) if os.path.isdir(snapshots) else []
    return name or None, commits[0] if len(commits) == 1 else None


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that a recording depends on."""
    versions = {}
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[library] = version(library)
    return versions
