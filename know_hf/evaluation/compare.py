"""[`compare_arms`]: arms against each other on a task of one's own, cell by cell, resumable, in parallel processes."""

import json
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..checkpoint import file_sha256
from ..prediction import SHIPPED_KNOWN
from ..trajectory import WeightTrajectory
from .arms import Arm, make_arm
from .cell_store import CellStore
from .comparison import ACCURACY, LOSS
from .landscape import Landscape, measure_landscape
from .linear_probe import LinearProbe
from .measure import ComparisonTask, Recorded, device, hash_data, measure_arm, measure_trajectory, trajectory_folder
from .protocols import FineTuning, MeasuringProtocol, first_of_each_class, refined
from .report.comparison_report import REPORT_NAME, ComparisonReport
from .runner import run_cells
from .statistics import scipy_stats

_USUAL_STATES = 5  # those of a schedule, and what the shipped KNOWN needs

logger = logging.get_logger(__name__)


def compare_arms(
    task: ComparisonTask,
    output_dir: str | Path,
    *,
    protocols: Sequence[MeasuringProtocol],
    arms: Sequence[Arm | str | Mapping[str, Any]] | None = None,
    seeds: Sequence[int] | None = None,
    draws: int = 1,
    trials_per_rate: int = 4,
    landscape: Landscape | None = None,
    num_processes: int = 1,
    name: str = "comparison",
    description: str = "",
    command: str | None = None,
    pages: bool = True,
) -> ComparisonReport:
    """Compares ways to initialise a downstream task, with controls, tuning each of them alike.

    ```python
    def target(seed, draw):  # other examples for every draw
        return Split(train=…, validation=…, test=…, num_labels=5)

    task = ComparisonTask([f"trajectory-{seed}" for seed in range(10)], target, source)
    protocols = [FineTuning((1e-4, 3e-4, 1e-3), steps=50, head_steps=0), AsTheyAre()]
    print(compare_arms(task, "comparison/", protocols=protocols, num_processes=4))
    ```

    What is finished is not run again: called again with the same folder, it goes on where it was stopped, and more
    arms or seeds can be added. Whether a seed's data and weights are the same is told by their hashes, for which
    `source` and `target` are called once for every seed and draw. Cells are written whole or not at all. `output_dir`
    then has `report.json`, the same to be read as `report.html` and `report.md`,
    one file for each cell, and the trajectories.

    Args:
        task ([`ComparisonTask`]): Trajectories and data.
        output_dir (`str` or `Path`): Where everything is written.
        protocols (sequence of protocols): What is measured, the most important first: [`FineTuning`],
            [`LinearProbe`], [`AsTheyAre`], or any [`MeasuringProtocol`].
        arms (sequence of [`Arm`], names or mappings, *optional*): What is compared, see [`make_arm`]; naive among
            them. By default all that the task has what they are made from.
        seeds (sequence of `int`, *optional*): Trajectory seeds; by default all that are recorded, or 0 to 9.
        draws (`int`, *optional*, defaults to `1`): Downstream draws of each trajectory. They make the value of a
            trajectory less noisy; they are not counted as independent.
        trials_per_rate (`int`, *optional*, defaults to `4`): Trials of every arm at each learning rate; a multiple of
            the number of settings of every arm. See [`know_hf.evaluation.protocols`].
        landscape ([`Landscape`], *optional*): Picture of the loss around the states of the first seed.
        num_processes (`int`, *optional*, defaults to `1`): Processes that share the cells. It changes no result; with
            more than one, task, arms and protocols must be picklable.
        name, description, command (`str`, *optional*): For the report; the command is what makes it again.
        pages (`bool`, *optional*, defaults to `True`): Whether `report.html`, `report.md` and pictures are written;
            they need matplotlib.

    Returns:
        [`ComparisonReport`]: printable.

    Raises:
        `ValueError`: when naive is not among the arms, the task lacks what an arm or protocol needs, its data can't be
            used, an argument is off, or the folder holds results of something else, such as other data.
        `FileExistsError`: when it holds something that is no comparison.
        `RuntimeError`, `ChildProcessError`: when a cell fails in its process, or the process ends.
        `ImportError`: when scipy is missing; told before anything is run.
    """
    output_dir = Path(output_dir)
    recorded = task.recorded
    scipy_stats()  # missing, it is not to be told after hours
    if seeds is None:
        seeds = range(10 if recorded is None else len(recorded))
    seeds = [int(seed) for seed in seeds]
    chosen = [arm if isinstance(arm, Arm) else make_arm(arm) for arm in arms or _default_arms(task)]
    _check(task, chosen, protocols, seeds, draws, trials_per_rate)
    if num_processes > 1:
        _check_picklable(task, chosen, protocols)
    if not (output_dir / CellStore.IDENTITY_NAME).exists():
        _check_protocols(task, chosen, protocols, seeds[0], trials_per_rate)
    hashing = partial(hash_data, task=task, draws=draws)
    data = {seeds[index]: found for index, found in run_cells(hashing, seeds, description=f"{name}: data")}
    store = CellStore(output_dir, _identity(task, protocols, draws, trials_per_rate))
    found = {seed: {arm.name: _read(store, seed, arm, task) for arm in chosen} for seed in seeds}
    missing = [(seed, arm) for seed in seeds for arm in chosen if found[seed][arm.name] is None]

    trajectories = {seed: store.read(f"seed-{seed}.trajectory") for seed in seeds}
    for seed, kept in trajectories.items():
        if kept is not None:
            _check_data(store, seed, kept["identity"], data[seed])
    unfinished = {seed for seed, _ in missing}
    unrecorded = [
        seed
        for seed, kept in trajectories.items()
        if kept is None or (seed in unfinished and not _is_there(task, seed, output_dir, len(kept["steps"])))
    ]
    recording = partial(measure_trajectory, task=task, output_dir=output_dir)
    if unrecorded:
        bar = f"{name}: record"
        for index, result in run_cells(recording, unrecorded, num_processes=num_processes, description=bar):
            seed = unrecorded[index]
            weights = _weights(task.open_trajectory(seed, output_dir))
            if trajectories[seed] is None:
                trajectories[seed] = kept = {**result, "identity": {"weights": weights, "data": data[seed]}}
                store.write(f"seed-{seed}.trajectory", kept)
    for seed in seeds if recorded is not None else sorted(unfinished, key=seeds.index):
        opened, kept = task.open_trajectory(seed, output_dir), trajectories[seed]
        if kept is not None and kept["identity"]["weights"] != _weights(opened):
            raise ValueError(
                f"{opened.path} is not the trajectory that the cells of seed {seed} in {output_dir} were measured on:"
                " its weights are others; give another output folder, or the trajectory as it was"
            )
    picture = None if landscape is None else _landscape(landscape, task, seeds[0], chosen, store)
    measuring = partial(
        measure_arm,
        task=task,
        protocols=tuple(protocols),
        draws=draws,
        trials_per_rate=trials_per_rate,
        output_dir=output_dir,
    )
    if missing:
        bar = f"{name}: compare"
        for index, result in run_cells(measuring, missing, num_processes=num_processes, description=bar):
            seed, arm = missing[index]
            found[seed][arm.name] = result
            store.write(f"seed-{seed}.{arm.name}", {**result, "identity": _arm_identity(arm, task)})
    shutil.rmtree(output_dir / "work", ignore_errors=True)

    report = ComparisonReport(
        name=name,
        description=description,
        task=task.facts,
        seeds=tuple(seeds),
        draws=draws,
        trials_per_rate=trials_per_rate,
        arms={arm.name: _arm_facts(arm) for arm in chosen},
        protocols={
            p.name: {**p.to_dict(), "what": p.what, "measures": [m.name for m in task.measures]} for p in protocols
        },
        measures=task.measures,
        cells=tuple(cell for seed in seeds for arm in chosen if (cell := found[seed][arm.name])),
        trajectories=tuple(
            {key: value for key, value in kept.items() if key != "identity"} for kept in trajectories.values() if kept
        ),
        landscape=picture,
        command=command,
    )
    report.write(output_dir)
    if pages:
        _write_pages(report, output_dir)
    return report


def _write_pages(report: ComparisonReport, output_dir: Path) -> None:
    from .report.pages import write_report

    try:
        write_report(report.to_dict(), output_dir)
    except ImportError as error:
        logger.warning(f"{output_dir} has {REPORT_NAME} only, no page and no pictures: {error}")


def _default_arms(task: ComparisonTask) -> list[str]:
    """All of them that the task has what they are made from."""
    recorded = [_opened(trajectory).num_states for trajectory in task.recorded or []]
    num_states = min(recorded, default=_USUAL_STATES)
    names = ["naive"]
    names += ["random"] if task.fresh_model else []
    names += ["pretrained"] if task.pretrained_model else []
    if num_states >= _USUAL_STATES:
        names += [f"{stem}-{count}" for count in (1, 2, 3) for stem in ("known-step", "matched-shrink-step")]
    names += ["shrink", "average", "ema", "task-vector", "linear", "log", "lines", "task-singular-vectors"]
    names += [f"state-{index}" for index in range(1, num_states)]
    names += ["compute-matched"] if task.train_further else []
    names += ["oracle"] if task.oracle_model else []
    return [*names, "shuffled"]


_NEEDED: dict[str, str] = {
    "fresh": "fresh_model",
    "pretrained": "pretrained_model",
    "oracle": "oracle_model",
    "trained_on": "train_further",
}


def _check(
    task: ComparisonTask,
    arms: Sequence[Arm],
    protocols: Sequence[MeasuringProtocol],
    seeds: Sequence[int],
    draws: int,
    trials_per_rate: int,
) -> None:
    for what, names in (("arm", [arm.name for arm in arms]), ("protocol", [protocol.name for protocol in protocols])):
        for name in names:
            if names.count(name) > 1 or not re.fullmatch(r"[\w+-]+", name):
                raise ValueError(f"{what} {name!r} must have a name of its own, of letters, digits, + and -")
    if "trajectory" in [arm.name for arm in arms]:
        raise ValueError("no arm can be named 'trajectory', as the record of a seed's trajectory is; rename it")
    if "naive" not in [arm.name for arm in arms]:
        raise ValueError(f"the naive arm must be among the arms, got {[arm.name for arm in arms]}")
    for arm in arms:
        if trials_per_rate % len(arm.settings):
            raise ValueError(
                f"arm {arm.name!r} tries {len(arm.settings)} settings, which do not divide trials_per_rate="
                f"{trials_per_rate}: every arm has the same number of trials; change one of the two"
            )
        if arm.kind in _NEEDED and getattr(task, _NEEDED[arm.kind]) is None:
            raise ValueError(f"arm {arm.name!r} needs {_NEEDED[arm.kind]} of the task; give it, or leave the arm out")
    for protocol in protocols:
        needed = "source" if protocol.on_source else "target"
        if getattr(task, needed) is None:
            raise ValueError(f"protocol {protocol.name!r} needs {needed} of the task; give it, or leave it out")
    if not protocols or not seeds or draws < 1 or len(set(seeds)) < len(seeds) or trials_per_rate < 1:
        raise ValueError(
            f"a comparison needs protocols, different seeds, draws and trials, got {len(protocols)} protocols,"
            f" seeds={list(seeds)}, draws={draws} and trials_per_rate={trials_per_rate}"
        )
    if len(seeds) == 1 and draws == 1:
        raise ValueError("one draw of one trajectory has no interval; give more seeds, or at least more draws")
    if (recorded := task.recorded) is not None and max(seeds) >= len(recorded):
        raise ValueError(f"seed {max(seeds)} has no trajectory: {len(recorded)} are given")


def _check_protocols(
    task: ComparisonTask,
    arms: Sequence[Arm],
    protocols: Sequence[MeasuringProtocol],
    seed: int,
    trials_per_rate: int,
) -> None:
    """Tells before anything is run what the first cell would stumble over: the folder is of these protocols then."""
    of_probe = {measure.name for measure in (ACCURACY, LOSS)}
    for protocol in protocols:
        if not isinstance(protocol, FineTuning | LinearProbe):
            continue
        for arm in arms:
            refined(protocol.learning_rates, trials_per_rate // len(arm.settings))
        if isinstance(protocol, LinearProbe) and (other := [m.name for m in task.measures if m.name not in of_probe]):
            raise ValueError(f"protocol {protocol.name!r} measures accuracy and loss, not {other[0]!r}; leave it out")
        if protocol.labels_per_class is not None and task.target is not None:
            _, (split,) = task.splits(seed, draws=1)
            first_of_each_class(split.train, protocol.labels_per_class)


def _check_picklable(task: ComparisonTask, arms: Sequence[Arm], protocols: Sequence[MeasuringProtocol]) -> None:
    sent: dict[str, Any] = {f"{f.name} of the task": getattr(task, f.name) for f in fields(task)}
    sent |= {f"arm {arm.name!r}": arm for arm in arms}
    sent |= {f"protocol {protocol.name!r}": protocol for protocol in protocols}
    for what, value in sent.items():
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{what} can't be sent to another process ({error}); give functions and classes of a module, or"
                " functools.partial of them, or num_processes=1"
            ) from error


def _identity(
    task: ComparisonTask, protocols: Sequence[MeasuringProtocol], draws: int, trials_per_rate: int
) -> dict[str, Any]:
    """What every cell depends on; seeds and arms can be added."""
    return {
        "task": dict(task.facts),
        "device": device().type,
        "protocols": [protocol.to_dict() for protocol in protocols],
        "measures": [measure.name for measure in task.measures],
        "draws": draws,
        "trials_per_rate": trials_per_rate,
        "versions": {library: version(library) for library in ("know_hf", "torch", "transformers")},
    }


def _weights(trajectory: WeightTrajectory) -> list[str]:
    """What tells one trajectory from another: the hashes of its weights as they were recorded."""
    files = [file for state in trajectory.states for file in state.files]
    return [file.sha256 for file in files if file.path.endswith(".safetensors")]


def _check_data(store: CellStore, seed: int, identity: Any, now: Mapping[str, str]) -> None:
    if not isinstance(identity, dict):
        raise ValueError(
            f"{store.path} holds results of seed {seed} without the hash of their data, as earlier versions wrote"
            " them: whether the data is the same can't be told; give another output folder, or delete this one"
        )
    before = identity["data"]
    for call in sorted(before.keys() | now.keys()):
        if before.get(call) != now.get(call):
            raise ValueError(
                f"{store.path} holds results on other data of {call}: {json.dumps(before.get(call))} there,"
                f" {json.dumps(now.get(call))} now; give another output folder, or delete this one, and the same"
                " examples at every call"
            )


def _is_there(task: ComparisonTask, seed: int, output_dir: Path, num_states: int) -> bool:
    """Whether the trajectory of a seed is on disk, whole; it may have been deleted, and half of it recorded anew."""
    if task.recorded is not None:
        return True
    folder = trajectory_folder(output_dir, seed)
    return WeightTrajectory.exists(folder) and WeightTrajectory(folder).num_states >= num_states


def _opened(recorded: Recorded) -> WeightTrajectory:
    return recorded if isinstance(recorded, WeightTrajectory) else WeightTrajectory(recorded)


def _arm_identity(arm: Arm, task: ComparisonTask) -> dict[str, Any]:
    uses_known = arm.kind in ("predicted", "matched_shrink") and arm.predictor == "known"
    known = str(arm.known or task.known or SHIPPED_KNOWN)
    weights = Path(known) / "model.safetensors"
    described = {key: value for key, value in arm.to_dict().items() if key not in ("description", "known")}
    return {"arm": described, "known": (file_sha256(weights) if weights.exists() else known) if uses_known else None}


def _read(store: CellStore, seed: int, arm: Arm, task: ComparisonTask) -> dict[str, Any] | None:
    cell = store.read(f"seed-{seed}.{arm.name}")
    if cell is None:
        return None
    before, now = cell.pop("identity"), json.loads(json.dumps(_arm_identity(arm, task)))
    if before != now:
        raise ValueError(
            f"{store.path} holds results of another arm {arm.name!r}: {json.dumps(before)} there, {json.dumps(now)}"
            " now; give the arm another name, or another output folder"
        )
    return cell


def _arm_facts(arm: Arm) -> dict[str, Any]:
    settings = [dict(setting) for setting in arm.settings]
    facts = {"role": arm.role, "description": arm.description, "kind": arm.kind, "settings": settings}
    return {**facts, "spec": arm.to_dict()}


def _landscape(
    landscape: Landscape, task: ComparisonTask, seed: int, arms: Sequence[Arm], store: CellStore
) -> dict[str, Any]:
    shown = [arm for arm in arms if arm.kind == "predicted" and not arm.tuned]
    identity = json.loads(json.dumps([landscape.to_dict(), seed, [_arm_identity(arm, task) for arm in shown]]))
    kept = store.read("landscape")
    if kept is not None and kept.pop("identity") == identity:
        return kept
    picture = measure_landscape(landscape, task, seed, shown, store.path)
    store.write("landscape", {**picture, "identity": identity})
    return picture
