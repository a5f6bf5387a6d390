"""[`WeightTrajectory`]: the ordered states of one model on disk, read tensor by tensor.

trajectory/
  trajectory.json            the manifest; written last, so that a state counts only once it is listed
  config.json, tokenizer …   once, as `save_pretrained` writes them
  state-0/ … state-4/        config and safetensors of each state, as `save_pretrained` writes them
  start/, tail-0/, branch-0/ of the weights before the training and of other snapshots
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import check_output
from ..hub_client import RemoteRepo, Token
from ..model_tensors import unwrapped
from ..schedule import ForgettingSchedule
from .importing import Checkpoints, ImportKind, import_checkpoints
from .loading import load_into, load_pretrained
from .manifest import MANIFEST_NAME, Manifest
from .recorder import Recorder, Stage
from .records import StateRecord
from .snapshot_tensors import SnapshotTensors
from .start import StartWeights
from .store import HubStore, StateName, Store

_READ_EARLY = ("config.json", "adapter_config.json")  # read through `path`, without a question for `model_files`


class WeightTrajectory(SnapshotTensors):
    """A recorded trajectory.

    State 0 is the full-data state Θ0; state k is the one after training on the k-th smaller subset. Only [`history`]
    and [`read_history`] reverse this order. An argument `state` is the index of a state, or the name of another
    snapshot: `"start"`, `"tail-0"` or `"branch-0"`.

    Args:
        path (`str` or `Path`):
            The folder with `trajectory.json`. For a trajectory on the Hub, see [`from_hub`].
        store ([`Store`], *optional*):
            The store of `path`, if it is already open.

    Attributes:
        path (`Path`):
            The folder; for a trajectory on the Hub, its folder in the Hub cache.
        repo ([`RemoteRepo`], *optional*):
            The repo and commit of a trajectory on the Hub, which cannot be recorded to.
        states (`tuple[StateRecord]`):
            The finished states, full data first.
        start ([`StateRecord`], *optional*):
            The weights before the training.
        tail, branches (`tuple[StateRecord]`):
            Weights late in the training of state 0, first to last, and weights of other trainings.
        schedule ([`ForgettingSchedule`], *optional*):
            The schedule of the subsets.
        roles (`dict[str, TensorRole]`):
            Role of every tensor on disk.
        tied_weights (`dict[str, str]`):
            Names that are in the model but not on disk, with the name that each is tied to.
        base_model, base_revision (`str`, *optional*):
            Hub id and commit of the model that the training started from. A folder is recorded as `../base` if it is
            beside `path`, as `./base` if it is below the working directory, and otherwise as `.../base` without its
            path.

    Raises:
        `FileNotFoundError`: when the folder has no trajectory.
        `TrajectoryError`: when a file is missing or does not have the recorded size, or states are out of order.
    """

    def __init__(self, path: str | Path, store: Store | None = None) -> None:
        store = Store(Path(path)) if store is None else store
        super().__init__(store, Recorder(store))

    @classmethod
    def create(cls, path: str | Path, schedule: ForgettingSchedule | None = None) -> WeightTrajectory:
        """Create a trajectory without states. Nothing is written before the first [`record`].

        Raises:
            `FileExistsError`: when `path` has a trajectory, or a model whose files would be replaced.
            `ValueError`: when `path` is inside another trajectory.
        """
        path = Path(path)
        check_output(path, replaces=False)
        if cls.exists(path):
            raise FileExistsError(f"{path} already has a trajectory; open it with WeightTrajectory({str(path)!r})")
        # a recording that stopped in its first state leaves model files and the folder of the state
        for name in _READ_EARLY if not (path / "state-0").exists() else ():
            if (path / name).exists():
                raise FileExistsError(f"recording would replace {path / name}; record to another folder")
        return cls(path, Store(path, Manifest((), schedule)))

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: Token = None) -> WeightTrajectory:
        """Open a trajectory on the Hub without downloading its weights.

        Tensors are read on demand as byte ranges, all of one commit. Files for [`load_model`] and `model_files` are
        downloaded to the Hub cache. To read most of a trajectory, `know_hf.hub.pull` is faster.

        Args:
            repo_id (`str`):
                Id of the model repo.
            revision (`str`, *optional*):
                Branch, tag or commit; by default `main`.
            token (`str` or `bool`, *optional*):
                Access token; defaults to the token of `hf auth login`.

        Raises:
            `TrajectoryError`: when the repo has no trajectory, or a file is missing or is not the recorded one.
            `HfHubHTTPError`: when the repo cannot be read.
        """
        store = HubStore(RemoteRepo.open(repo_id, revision, token), token)
        store.fetch(record for record in store.manifest.files if record.path in _READ_EARLY)
        return cls(store.path, store)

    @classmethod
    def from_checkpoints(
        cls,
        checkpoints: Checkpoints,
        output_dir: str | Path,
        kind: ImportKind = "tail",
        *,
        num_examples: Sequence[int] | None = None,
        start: str | Path | None = None,
        copy: bool = False,
        overwrite: bool = False,
    ) -> WeightTrajectory:
        """Make a trajectory out of existing checkpoints of models, or of adapters with the same configuration.

        Configs and tokenizer files come from state 0, and steps and metrics from `trainer_state.json`.

        Args:
            checkpoints (sequence of `str` or `Path`):
                Folders with safetensors weights, or Hub ids such as `"me/model@revision"`. The output folder of a
                `Trainer` stands for its `checkpoint-*` folders.
            output_dir (`str` or `Path`):
                Folder of the new trajectory, which appears only when it is complete.
            kind (`"tail"`, `"branches"` or `"ordered"`, *optional*, defaults to `"tail"`):
                `"tail"`: checkpoints of one training; the last is Θ0, the others are tail states. `"branches"`:
                trainings with different seeds or folds; all are branches, and the first is also Θ0. `"ordered"`:
                states, full data first.
            num_examples (sequence of `int`, *optional*):
                For `"ordered"`, the size of the training set of each checkpoint.
            start (`str` or `Path`, *optional*):
                Checkpoint with the weights before the training, for predictors and gates that read the start. It must
                include the head, so save the model before you train it instead of using the pretrained model.
            copy (`bool`, *optional*, defaults to `False`):
                Whether to copy the weights. By default, they are hard-linked if the file system supports it, so do not
                change the originals.
            overwrite (`bool`, *optional*, defaults to `False`):
                Whether an existing `output_dir` may be replaced.

        Raises:
            `TrajectoryError`: when tensors, shapes, dtypes, adapter configs or vocabularies differ; names the
                difference and both checkpoints.
            `ValueError`: when there are fewer than two checkpoints, sizes are missing, or weights are pickles.
            `FileNotFoundError`: when a checkpoint does not exist or has no weights.
            `FileExistsError`: when `output_dir` is not empty and `overwrite` is off.
        """
        import_checkpoints(
            checkpoints, output_dir, kind, num_examples=num_examples, start=start, copy=copy, overwrite=overwrite
        )
        return cls(output_dir)

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether `path` has a trajectory with at least one finished state."""
        return (Path(path) / MANIFEST_NAME).exists()

    def __repr__(self) -> str:
        source = f"({str(self.path)!r}"
        if self.repo is not None:
            source = f".from_hub({self.repo.repo_id!r}, revision={self.repo.commit!r}"
        return f"WeightTrajectory{source}, num_examples={[state.num_examples for state in self.states]})"

    @property
    def path(self) -> Path:
        return self._store.path

    @property
    def repo(self) -> RemoteRepo | None:
        return self._store.repo

    @property
    def model_files(self) -> list[Path]:
        """Config, tokenizer and processor files, which all states share."""
        records = self._store.manifest.files
        self._store.fetch(records)
        return [self.path / record.path for record in records]

    @property
    def is_adapter(self) -> bool:
        """Whether the states are adapters (peft) instead of models."""
        return any(record.path == "adapter_config.json" for record in self._store.manifest.files)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every file once and compare it with the manifest; on the Hub, compare only sizes and hashes.

        To share the reading among processes, each reads every `parts`-th file, starting with number `part`.

        Raises:
            `TrajectoryError`: when a file is missing or is not the recorded one (size, SHA-256), or when the states do
                not have the same tensors; names file, or tensor and state.
        """
        self._recorder.check()
        self._store.verify(part, parts)

    def load_model(
        self,
        state: StateName = 0,
        model_class: type[PreTrainedModel] | None = None,
        base_model: PreTrainedModel | None = None,
    ) -> nn.Module:
        """Load the model with the weights of one state.

        Args:
            state (`int` or `str`, *optional*, defaults to `0`):
                Index of the state, or name of another snapshot.
            model_class (`type`, *optional*):
                Class of the model; by default the architecture in `config.json`. The class may lack weights of the
                state, such as the head, but may not have additional ones.
            base_model (`PreTrainedModel`, *optional*):
                For a trajectory of adapters, the model they belong to. The adapter is put into it: the next state
                that is loaded with the same object replaces it.

        Raises:
            `TrajectoryError`: when the state does not exist, or when a model built from the config differs from the
                state in tensors or shapes, for example in its head. In that case, build the model as for the training
                and use [`load_into`].
        """
        self._recorder.check()
        with self._store.folder(state) as folder:
            return load_pretrained(folder, model_class, base_model)

    def load_into(self, model: nn.Module, state: StateName = 0) -> None:
        """Copy the weights of one state into a model of the recorded architecture, on any device and in any dtype.

        The model may be compiled or wrapped. If its weights are sharded (FSDP2, ZeRO-3), every process must call this.

        Raises:
            `TrajectoryError`: when the state does not exist, or its tensors and shapes differ.
        """
        self._recorder.check()
        reader = self._store.reader(state)
        # other models need no files but the weights
        needs_files = isinstance(unwrapped(model), PreTrainedModel)
        folder = self._store.folder(state) if needs_files else nullcontext(self.path / self._store.record(state).name)
        with folder as path:
            load_into(model, path, reader)

    def record(
        self,
        model: nn.Module,
        *,
        processing_class: Any = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        background: bool = False,
        on_written: Callable[[StateRecord], object] | None = None,
        **stage: Unpack[Stage],
    ) -> None:
        """Write the weights of a model as the next state.

        A crash at any moment leaves all earlier states complete. For a `PeftModel`, only the adapter is recorded.
        Tensors that equal those of the previous state bit for bit are stored once if they exceed 1% of the model.

        Args:
            model (`nn.Module`):
                A `PreTrainedModel`, a `PeftModel` or any module, which may be compiled or wrapped.
            processing_class (*optional*):
                Tokenizer or processor, saved with the first state.
            state_dict (`Mapping[str, torch.Tensor]`, *optional*):
                All weights by their names in memory, if the model has only a part of them (FSDP2, ZeRO-3).
            dtype (`torch.dtype`, *optional*):
                Floating-point dtype to store; by default that of each tensor.
            background (`bool`, *optional*, defaults to `False`):
                Whether to write in a thread. The next call raises its error.
            on_written (`Callable[[StateRecord], object]`, *optional*):
                Called after the state is entered in `trajectory.json`.
            stage (*optional*):
                Fields of [`StateRecord`]: `num_examples`, which must shrink (`None` for a stream of unknown length),
                `steps`, and optionally `fraction`, `subset_fingerprint`, `seed`, `metrics`, `training` and `kind`,
                which is `"branch"` for weights of a separate training.

        Raises:
            `ValueError`: when a state could not hold the weights that train, see `check_recordable`.
            `TrajectoryError`: when the subset does not shrink, or the tensors are not those of state 0.
            `OSError`: when a file cannot be written.
            `TrajectoryBusyError`: when another process records to the folder.
        """
        values: dict[str, Any] = dict(stage)
        values |= {name: dict(values.get(name) or {}) for name in ("metrics", "training")}
        index = len(self.branches) if values.get("kind") == "branch" else self.num_states
        state = StateRecord(index=index, files=(), **values)
        self._recorder.record(model, state, processing_class, state_dict, dtype, background, on_written)

    def record_start(
        self,
        model: nn.Module,
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        weights: StartWeights = "reference",
    ) -> None:
        """Write the weights of a model before its training. They count once state 0 is recorded with this object.

        Tensors that equal those of state 0 are stored once. Tensors that equal those of the base model in the Hub
        cache are stored as a reference to its id and commit.

        Args:
            model, state_dict, dtype:
                See [`record`].
            weights (`"reference"`, `"full"` or `"none"`, *optional*, defaults to `"reference"`):
                Whether tensors of the base model are stored by reference or as a copy; `"none"` records no start.

        Raises:
            As [`record`], and a `TrajectoryError` when a state is already recorded.
        """
        self._recorder.record_start(model, state_dict, dtype, weights)

    def record_tail(
        self,
        model: nn.Module,
        index: int,
        steps: int,
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write tail state `index`, the weights after `steps` optimizer steps of state 0; see [`record_start`]."""
        self._recorder.record_early(model, StateRecord(index, None, steps, (), kind="tail"), state_dict, dtype)

    def update_metrics(self, state: StateName, metrics: Mapping[str, float]) -> None:
        """Add evaluation results to a finished state, tail state or branch."""
        self._recorder.update_metrics(state, metrics)

    def recording(self) -> AbstractContextManager[None]:
        """Keep other processes from recording to the folder inside a `with` block.

        Raises:
            `TrajectoryBusyError`: when another process records, or recorded since this object read the folder.
        """
        return self._recorder.recording()

    def check_base(self, model: nn.Module) -> None:
        """Raise a `TrajectoryError` when the base model of an adapter is not that of the recorded states."""
        self._recorder.check_base(model)

    def check(self, wait: bool = False) -> None:
        """Raise the error of a failed background recording; `wait` waits for a running one."""
        self._recorder.check(wait)
