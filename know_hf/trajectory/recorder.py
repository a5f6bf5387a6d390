"""Writes the states of a trajectory, one at a time, also in a thread beside the training.

A state is written to a folder of its own, renamed, and only then entered in `trajectory.json`: a crash at any moment
leaves the states before it complete.
"""

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from ..checkpoint import CheckpointReader, atomic_folder
from .manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    StateRecord,
    TrajectoryBusyError,
    TrajectoryError,
    recordable,
)
from .model_files import base_of, library_versions, write_model_files
from .recorded_states import RecordedStates, check_same_tensors
from .snapshot import Snapshot, roles_on_disk

logger = logging.get_logger(__name__)


class Recorder:
    """Adds states to a trajectory in a local folder.

    Args:
        states ([`RecordedStates`]):
            The finished states. Entering a state changes them.
    """

    def __init__(self, states: RecordedStates) -> None:
        self._states = states
        self._path = states.store.path
        self._lock = FileLock(self._path / ".lock", timeout=0, thread_local=False)
        self._writer = _BackgroundWriter()
        self._copies: dict[str, torch.Tensor] = {}

    def check(self, wait: bool = True) -> None:
        """Raise the error of a failed background job, once.

        Args:
            wait (`bool`, *optional*, defaults to `True`):
                Whether to wait for a running job.
        """
        self._writer.check(wait)

    def record(
        self,
        model: nn.Module,
        state: StateRecord,
        *,
        processing_class: Any = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        background: bool = False,
        on_written: Callable[[StateRecord], object] | None = None,
    ) -> None:
        """Write the weights of a model as the next state; see [`WeightTrajectory.record`].

        Args:
            state ([`StateRecord`]):
                The state without its files.
        """
        self.check()
        manifest = self._states.manifest
        replace(manifest, states=(*manifest.states, state)).check(self._path / MANIFEST_NAME)
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
                    f"state {state.index} could not be written to {self._path} ({error}). States before it"
                    " are kept: free the disk and record again, recording resumes there."
                ) from error
            if on_written is not None:
                on_written(written)

        if background:
            self._writer.submit(write)
        else:
            write()

    def update_metrics(self, index: int, metrics: Mapping[str, float]) -> None:
        """Add evaluation results to a finished state."""
        self.check()
        manifest = self._states.manifest
        states = list(manifest.states)
        states[index] = replace(states[index], metrics={**states[index].metrics, **metrics})
        with self.recording():
            self._states.enter(replace(manifest, states=tuple(states)))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep other processes from recording to the folder; wait for the background job at the end.

        Raises:
            `TrajectoryBusyError`:
                When another process records, or recorded since the folder was read.
            `TrajectoryError`:
                When the trajectory is on the Hub.
        """
        if (repo := self._states.store.repo) is not None:
            raise TrajectoryError(
                f"{repo.repo_id} is on the Hub and can't be recorded to; pull it with know_hf.hub.pull, and record"
                " to the folder"
            )
        self._path.mkdir(parents=True, exist_ok=True)
        try:
            with self._lock:
                has_manifest = (self._path / MANIFEST_NAME).exists()
                expected = len(self._states.manifest.states)
                on_disk = len(Manifest.read(self._path).states) if has_manifest else 0
                if expected != on_disk:
                    raise TrajectoryBusyError(
                        f"{self._path} has {on_disk} states, expected {expected}: another process recorded to it;"
                        " record to another folder, or open the trajectory again to resume"
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
        manifest, index = self._states.manifest, state.index
        readers = self._states.readers if index else []
        folder = self._path / f"state-{index}"
        snapshot.check_finite(self._path, index)
        with atomic_folder(folder, overwrite=True) as work:
            left_out = snapshot.save(work, readers[-1] if index else None)
            for record in manifest.files:  # saving adds fields to a config the second time; keep that of state 0
                if (work / record.path).exists():
                    shutil.copy2(self._path / record.path, work / record.path)
            names = recordable(work)
            files = tuple(FileRecord.of(work / name, f"{folder.name}/{name}") for name in names)
            origin = manifest.states[-1].unchanged if index else {}
            unchanged = {name: origin.get(name, index - 1) for name in sorted(left_out)}
            elsewhere = {name: readers[source] for name, source in unchanged.items()}
            reader = CheckpointReader([work / name for name in names if name.endswith(".safetensors")], elsewhere)
            if index:
                check_same_tensors(self._path, index, reader, readers[0])
        if not index:
            roles, tied = roles_on_disk(snapshot, reader)
            base_model, base_revision = base_of(snapshot.model)
            manifest = replace(
                manifest,
                roles=roles,
                tied_weights=tied,
                base_model=base_model,
                base_revision=base_revision,
                files=write_model_files(self._path, folder, processing_class),
                library_versions=library_versions(),
            )
        state = replace(state, files=files, unchanged=unchanged)
        self._states.enter(replace(manifest, states=(*manifest.states, state)))
        return state


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
        """Raise the error of a job that has ended, after waiting for it if asked to."""
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
            logger.error(f"A state was not recorded: {error}")  # now; raised when the training comes back
            raise
        finally:
            self._thread = None
