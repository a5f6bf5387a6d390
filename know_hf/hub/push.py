"""Push checkpoints and KNOWN weights in one commit, and trajectories state by state with the manifest last."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from ..cards import known_card, trajectory_card
from ..cards.suite_tables import COMPARISONS_NAME
from ..checkpoint import CheckpointReader, locked_folder, write_json
from ..hub_client import HubError, RemoteRepo
from ..known import combination_network, configuration_known, modeling_known
from ..known.configuration_known import KNOWNConfig
from ..known.modeling_known import KNOWNModel
from ..local_paths import public_name, public_values
from ..trajectory import TrajectoryError, WeightTrajectory
from ..trajectory.manifest import MANIFEST_NAME, Manifest
from ..trajectory.records import FileRecord, StateRecord
from .push_target import PushKeywords, PushOptions, PushTarget
from .repo_contents import (
    CARD,
    architecture_of,
    checkpoint_files,
    is_card_file,
    is_of_snapshot,
    is_weights,
    kind_of,
    public_files,
    read_config,
)

_RESULTS = "results.json"
_AUTO_MAP = {"AutoConfig": "configuration_known.KNOWNConfig", "AutoModel": "modeling_known.KNOWNModel"}


def push(path: str | Path, repo_id: str, **options: Unpack[PushKeywords]) -> str:
    """Push the checkpoint, the trajectory or the KNOWN weights in a folder.

    Calls [`push_checkpoint`], [`push_trajectory`] or [`push_known`] with the same arguments.

    Raises:
        `FileNotFoundError`: If the folder does not exist or holds none of the three.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    if WeightTrajectory.exists(path):
        return push_trajectory(path, repo_id, **options)
    return (push_known if _is_known(Path(path)) else push_checkpoint)(path, repo_id, **options)


def push_checkpoint(folder: str | Path, repo_id: str, **options: Unpack[PushKeywords]) -> str:
    """Push a checkpoint with its card in one commit.

    The same commit deletes weights under other names, such as old shards. Files already on the Hub are not sent again.
    Configs are pushed without the paths of local folders.

    Args:
        folder (`str` or `Path`):
            Folder of the checkpoint; its `README.md` is the card.
        repo_id (`str`):
            Id of the repo, created if it does not exist.
        options (*optional*):
            `private`, `revision`, `create_pr`, `commit_message` and `token`, the fields of [`PushOptions`].

    Returns:
        `str`: Address of the commit, or of the pull request.

    Raises:
        `FileNotFoundError`, `CheckpointError` or `ValueError`: If the folder holds an incomplete checkpoint or
            something else.
        `BlockingIOError`: If another process writes the folder.
        `HubError` or `HfHubHTTPError`: If the push is refused or fails; nothing was committed. See [`check_push`].
    """
    folder = Path(folder)
    files = checkpoint_files(folder)
    kind = kind_of(files) or "checkpoint"
    architecture = architecture_of(folder / "config.json") if kind == "checkpoint" else None
    target = PushTarget(repo_id, kind, architecture, PushOptions(**options))
    message = options.get("commit_message") or f"Upload {kind} with know_hf"
    with locked_folder(folder, shared=True), tempfile.TemporaryDirectory(prefix="know_hf-") as temporary:
        files = public_files(checkpoint_files(folder), Path(temporary))
        target.create(message)
        target.commit(files, message, is_weights)
    return target.url


def push_trajectory(trajectory: WeightTrajectory | str | Path, repo_id: str, **options: Unpack[PushKeywords]) -> str:
    """Push a trajectory with one commit per state and `trajectory.json` in the last one.

    A repo without `trajectory.json` cannot be read as a trajectory, so a partial push is never read. After an
    interruption, push again: states on the Hub are skipped. If the repo holds another trajectory, the first commit
    deletes its `trajectory.json`, and the last commit deletes its other states. If another commit changes a state
    meanwhile, the last commit is refused.

    `from_pretrained(repo_id, subfolder="state-k")` does not read other subfolders, so it cannot load states that share
    tensors with earlier ones. Use `WeightTrajectory.from_hub(repo_id).load_model(k)`, or pull the repo first.

    Args:
        trajectory ([`WeightTrajectory`], `str` or `Path`):
            A local trajectory; every file is compared with its hash. `README.md` in its folder is the card; without
            one, a card is generated.
        repo_id, options:
            See [`push_checkpoint`].

    Raises:
        `TrajectoryError`: If the trajectory is on the Hub, has no complete state, or has a file that differs from the
            recorded one.
        `HubError`: If another commit changes a state during the push; also as [`push_checkpoint`].
    """
    if not isinstance(trajectory, WeightTrajectory):
        trajectory = WeightTrajectory(trajectory)
    folder, num_states = trajectory.path, trajectory.num_states
    if trajectory.repo is not None:
        raise TrajectoryError(f"{trajectory!r} is on the Hub; pull it first with know_hf.hub.pull")
    if not num_states:
        raise TrajectoryError(f"{folder} has no complete state; record one first")
    architecture = architecture_of(folder / "config.json")
    target = PushTarget(repo_id, "trajectory", architecture, PushOptions(**options))  # before all files are read
    message = options.get("commit_message") or f"Upload trajectory of {num_states} states with know_hf"
    with locked_folder(folder, shared=True), tempfile.TemporaryDirectory(prefix="know_hf-") as temporary:
        trajectory.verify()
        manifest, files = _public_trajectory(folder, Path(temporary))
        cards = {path.name: path for path in sorted(folder.iterdir()) if is_card_file(path.name)}
        if CARD not in cards:
            cards[CARD] = Path(temporary) / CARD
            cards[CARD].write_text(str(trajectory_card(trajectory, repo_id=target.repo_id)), encoding="utf-8")
        repo = target.create(message)
        for state in manifest.snapshots:
            if not _has_state(repo, files, state):
                of_state = {record.path: files[record.path] for record in state.files}
                target.commit(of_state, f"{message}: {state.label}", lambda name: name == MANIFEST_NAME)
        state_files = {record.path for state in manifest.snapshots for record in state.files}
        last = {name: path for name, path in files.items() if name not in state_files} | cards

        def check(repo: RemoteRepo) -> None:
            for state in manifest.snapshots:
                if not _has_state(repo, files, state):
                    changed = f"{state.label} of {repo.repo_id} was changed by another commit during the push"
                    raise HubError(f"{changed}; push again, or to another repo")

        target.commit(last, message, lambda name: name not in state_files and is_of_snapshot(name), check)
    return target.url


def push_known(model: KNOWNModel | str | Path, repo_id: str, **options: Unpack[PushKeywords]) -> str:
    """Push KNOWN weights with their card and the code that loads them, in one commit.

    `KNOWNModel.from_pretrained(repo_id)` loads them, and so does `AutoModel.from_pretrained(repo_id)` once
    `know_hf.KNOWNModel` is imported. Without know_hf, `AutoModel.from_pretrained(repo_id, trust_remote_code=True)`
    loads them with the code in the repo.

    Args:
        model ([`KNOWNModel`], `str` or `Path`):
            The weights or their folder. `README.md` in the folder is the card; without one, a card is generated from
            `config.json`, `results.json` and `comparisons.json`.
        repo_id, options:
            See [`push_checkpoint`].

    Raises:
        `ValueError`: If the folder does not hold KNOWN weights.
    """
    with tempfile.TemporaryDirectory(prefix="know_hf-") as temporary:
        folder = Path(temporary)
        if isinstance(model, KNOWNModel):
            model.save_pretrained(folder)
        else:
            _copy_known(Path(model), folder)
        config = folder / "config.json"
        write_json(config, {**read_config(config), "auto_map": _AUTO_MAP})
        for module in (combination_network, configuration_known, modeling_known):
            shutil.copy2(str(module.__file__), folder)
        if not (folder / CARD).exists():
            repo_id = PushTarget(repo_id, "checkpoint", architecture_of(config), PushOptions(**options)).repo_id
            _write_known_card(folder, repo_id)
        options["commit_message"] = options.get("commit_message") or "Upload KNOWN weights with know_hf"
        return push_checkpoint(folder, repo_id, **options)


def _has_state(repo: RemoteRepo, files: Mapping[str, Path], state: StateRecord) -> bool:
    return all(repo.has(record.path, files[record.path], record.sha256) for record in state.files)


def _public_trajectory(folder: Path, temporary: Path) -> tuple[Manifest, dict[str, Path]]:
    """Return the manifest to push and its files by path in the repo, without local paths, which 0.2 recorded."""
    shutil.copyfile(folder / MANIFEST_NAME, temporary / MANIFEST_NAME)  # a recording may go on meanwhile
    manifest = Manifest.read(temporary)
    files = public_files({record.path: folder / record.path for record in manifest.all_files}, temporary)

    def public(records: tuple[FileRecord, ...]) -> tuple[FileRecord, ...]:
        return tuple(
            record if files[record.path] == folder / record.path else FileRecord.of(files[record.path], record.path)
            for record in records
        )

    def public_states(states: Iterable[StateRecord]) -> tuple[StateRecord, ...]:
        return tuple(replace(s, files=public(s.files), training=public_values(s.training)) for s in states)

    base_model = None if manifest.base_model is None else public_name(manifest.base_model)
    changed = replace(
        manifest,
        base_model=base_model,
        files=public(manifest.files),
        states=public_states(manifest.states),
        start=None if manifest.start is None else public_states([manifest.start])[0],
        tail=public_states(manifest.tail),
        branches=public_states(manifest.branches),
    )
    if changed != manifest:
        changed.write(temporary)
    return changed, files | {MANIFEST_NAME: temporary / MANIFEST_NAME}


def _is_known(folder: Path) -> bool:
    return read_config(folder / "config.json").get("model_type") == KNOWNConfig.model_type


def _copy_known(source: Path, folder: Path) -> None:
    """Copy the weights and the files that describe them, without the checkpoints of the training."""
    if not _is_known(source):
        raise ValueError(f"{source} does not contain KNOWN weights; push other checkpoints with push_checkpoint")
    CheckpointReader.from_folder(source)  # detects missing or damaged weights
    for path in source.iterdir():
        is_described = path.name in ("config.json", _RESULTS, COMPARISONS_NAME) or is_card_file(path.name)
        if path.is_file() and (is_described or is_weights(path.name)):
            shutil.copy2(path, folder)


def _write_known_card(folder: Path, repo_id: str) -> None:
    paths = (folder / _RESULTS, folder / COMPARISONS_NAME)
    results, comparisons = (json.loads(path.read_bytes()) if path.exists() else None for path in paths)
    options: dict[str, Any] = {"title": repo_id.split("/")[-1], "path": repo_id, "comparisons": comparisons or ()}
    card = known_card(KNOWNConfig.from_pretrained(folder), results, **options)
    (folder / CARD).write_text(str(card), encoding="utf-8")
