"""[`compare_arms`]: a resumable comparison of arms on a task, cell by cell, in parallel processes."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from json import dumps, loads
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..checkpoint import check_output, file_sha256, read_json_object
from ..known import KNOWNModel
from ..local_paths import public_command, public_name, public_values
from ..prediction import SHIPPED_KNOWN
from ..trajectory import WeightTrajectory
from .arms import Arm
from .cells import TRAJECTORY, Cell, CellStore, CellTimes, Order, Result, run_cells
from .comparison_checks import (
    Design,
    check_design,
    check_landscape,
    check_picklable,
    check_protocols,
    check_stored_arm,
    check_stored_trajectory,
    make_design,
)
from .comparison_task import ComparisonTask, trajectory_folder
from .landscape import Landscape, measure_landscape
from .measure import device, measure_arm, measure_trajectory
from .protocols import MeasuringProtocol
from .report.comparison_report import REPORT_NAME, ComparisonReport
from .statistics import scipy_stats

RESULTS_VERSION = "0.3.0"  # version of know_hf since which results have not changed; raise it when a number changes
_FIRST_ARMS = ("naive", "random", "oracle")  # of a seed; they tell whether the comparison can show a gain
_LEAST_SEEDS = 2  # of a report

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
    stacked: bool | None = None,
    num_processes: int = 1,
    max_minutes: float | None = None,
    name: str = "comparison",
    description: str = "",
    command: str | None = None,
    pages: bool = True,
) -> ComparisonReport:
    """Compare arms, the ways to initialise a model for a downstream task, with the same tuning budget.

    ```python
    from know_hf.evaluation import Arm, ComparisonTask, FineTuning, LinearProbe, Split, ZeroShot, compare_arms

    def target(seed, draw):  # different examples for each draw
        return Split(train=…, validation=…, test=…, num_labels=5)

    task = ComparisonTask([f"trajectory-{seed}" for seed in range(10)], target, source)
    protocols = [FineTuning((1e-4, 3e-4, 1e-3), steps=50, head_steps=0), ZeroShot()]
    print(compare_arms(task, "comparison/", protocols=protocols, num_processes=4))
    ```

    A comparison resumes: with the same folder, finished cells are not run again, and you can add arms or seeds. Data
    and weights of a seed are identified by their hashes, so `source` and `target` are called once per seed and draw.
    `output_dir` receives `report.json` (also as HTML and Markdown), one file per cell, and the trajectories.

    Args:
        task ([`ComparisonTask`]):
            Trajectories and data.
        output_dir (`str` or `Path`):
            Output folder.
        protocols (sequence of protocols):
            What is measured, the most important first: [`FineTuning`], [`LinearProbe`], [`ZeroShot`] or any
            [`MeasuringProtocol`].
        arms (sequence of [`Arm`], names or mappings, *optional*):
            Arms in a form that [`make_arm`] accepts, including naive; by default all that the task supports.
        seeds (sequence of `int`, *optional*):
            Trajectory seeds; by default all recorded ones, or 0 to 9.
        draws (`int`, *optional*, defaults to `1`):
            Downstream draws per trajectory. They reduce the noise of its value, but do not count as independent.
        trials_per_rate (`int`, *optional*, defaults to `4`):
            Trials of every arm at each learning rate, a multiple of the number of settings of every arm; see
            [`know_hf.evaluation.protocols`].
        landscape ([`Landscape`], *optional*):
            Options of a loss landscape around the states of the first seed; none by default.
        stacked (`bool`, *optional*):
            Whether to train the trials of an arm together, as stacks of models, which changes results only by
            rounding. Stacks are the default on an accelerator, and on a CPU for heads and tiny models. `True` raises
            an error if `torch.func.vmap` cannot run the model.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes, which does not change results. With more than one, task, arms and protocols must be
            picklable.
        max_minutes (`float`, *optional*):
            Time limit: no cell starts that is expected to end later, judging by the finished ones. All arms of a seed
            run before those of the next seed: naive, random and oracle first. The report has the complete seeds and
            says how many were planned. Another run continues.
        name, description, command (`str`, *optional*):
            Name, description and command for the report; the command should reproduce it.
        pages (`bool`, *optional*, defaults to `True`):
            Whether to write `report.html`, `report.md` and figures, which need matplotlib.

    Raises:
        `ValueError`: If naive is missing, the task lacks what an arm or protocol needs, its data cannot be used, an
            argument is invalid, the folder has results of another comparison (for example on other data), or the
            folder is inside a trajectory or the folder of KNOWN weights.
        `TimeoutError`: If fewer than two seeds are complete at the time limit; finished cells are kept.
        `FileExistsError`: If the folder has other content.
        `BlockingIOError`: If another comparison writes to the folder.
        `RuntimeError`, `ChildProcessError`: If a cell fails in its process, or the process dies.
        `ImportError`: If scipy is missing; raised before any work.
    """
    scipy_stats()
    if max_minutes is not None and not max_minutes > 0:
        raise ValueError(f"max_minutes must be positive, got {max_minutes}")
    deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    design = make_design(task, protocols, arms, seeds, draws, trials_per_rate, stacked)
    run = ComparisonRun(design, Path(output_dir), num_processes, name)
    run.check()
    if landscape is not None:
        check_landscape(task)
    data = run.hash_data()
    store = run.open_store()
    with store.locked():
        cells = run.finished_cells(store)
        trajectories = run.stored_trajectories(store, data)
        run.measure_missing(store, cells, trajectories, data, deadline)
        complete = run.complete_seeds(cells)
        picture = None
        if landscape is not None and complete == design.seeds:
            picture = run.measure_landscape(store, landscape)
        shutil.rmtree(run.output_dir / "work", ignore_errors=True)
        report = ComparisonReport(
            name=name,
            description=description,
            task=public_values(task.facts),
            seeds=complete,
            planned_seeds=design.seeds,
            draws=draws,
            trials_per_rate=trials_per_rate,
            arms={arm.name: _arm_entry(arm) for arm in design.arms},
            protocols={protocol.name: _protocol_entry(protocol, task) for protocol in protocols},
            measures=task.measures,
            cells=tuple(cells[seed, arm.name] for seed in complete for arm in design.arms),
            trajectories=tuple(_without_identity(trajectories[seed]) for seed in complete),
            landscape=picture,
            command=None if command is None else public_command(command),
        )
        report.write(output_dir)
        if pages:
            _write_pages(report, run.output_dir)
    return report


@dataclass(frozen=True)
class ComparisonRun:
    """The steps of [`compare_arms`], with its arguments."""

    design: Design
    output_dir: Path
    num_processes: int = 1
    name: str = "comparison"

    @property
    def task(self) -> ComparisonTask:
        return self.design.task

    @property
    def cells(self) -> list[tuple[int, Arm]]:
        """Seeds and arms, the most informative first."""
        first = sorted(self.design.arms, key=lambda arm: (*_FIRST_ARMS, arm.name).index(arm.name))
        return [(seed, arm) for seed in self.design.seeds for arm in first]

    def check(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes}: must be at least 1")
        check_design(self.design)
        given: list[str | Path | None] = [self.task.known, *(arm.known for arm in self.design.arms)]
        known = {source for source in given if source is not None}
        check_output(self.output_dir, known, replaces=False)
        for source in known:
            try:
                KNOWNModel.from_pretrained(source)
            except OSError as error:
                error.add_note(f"These are the KNOWN weights {source}.")
                raise
        if self.num_processes > 1:
            check_picklable(self.design)
        if not (self.output_dir / CellStore.IDENTITY_NAME).exists():
            check_protocols(self.design)

    def hash_data(self) -> dict[int, dict[str, str]]:
        hashing = partial(self.task.data_hashes, draws=self.design.draws)
        return dict(self._run_cells(hashing, self.design.seeds, "data", num_processes=1))

    def identity(self) -> dict[str, Any]:
        """Return what every cell depends on, without seeds and arms, which can be added."""
        return {
            "task": dict(self.task.facts),
            "device": device().type,
            "protocols": [protocol.to_dict() for protocol in self.design.protocols],
            "measures": [measure.name for measure in self.task.measures],
            "draws": self.design.draws,
            "trials_per_rate": self.design.trials_per_rate,
            "versions": {"know_hf": RESULTS_VERSION, **{name: version(name) for name in ("torch", "transformers")}},
        }

    def open_store(self) -> CellStore:
        """Open the folder. Results of an older version can be read, but not added to."""
        identity, path = self.identity(), self.output_dir / CellStore.IDENTITY_NAME
        of_seed = (TRAJECTORY, *(arm.name for arm in self.design.arms))
        names = [f"seed-{seed}.{name}.json" for seed in self.design.seeds for name in of_seed]
        if path.exists() and all((self.output_dir / "cells" / name).exists() for name in names):
            stored = read_json_object(path, "use a new output folder").get("versions", {})
            identity["versions"]["know_hf"] = stored.get("know_hf", RESULTS_VERSION)
        return CellStore(self.output_dir, identity)

    def finished_cells(self, store: CellStore) -> dict[tuple[int, str], dict[str, Any]]:
        """Return the stored results of each seed and arm."""
        finished = {}
        for seed, arm in self.cells:
            cell, what = f"seed-{seed}.{arm.name}", f"arm {arm.name!r}"
            if (result := store.read(cell)) is not None:
                store.check_same({what: result.pop("identity", None)}, {what: _arm_identity(arm, self.task)})
                check_stored_arm(result, str(store.file(cell)), self.design, seed, arm.name)
                finished[seed, arm.name] = result
        return finished

    def stored_trajectories(
        self, store: CellStore, data: Mapping[int, Mapping[str, str]]
    ) -> dict[int, dict[str, Any]]:
        """Return the stored entry of each seed in `report.json`.

        Raises:
            `ValueError`: If the data of a seed are not those of its stored results.
        """
        entries = {}
        for seed in self.design.seeds:
            if (entry := store.read(f"seed-{seed}.{TRAJECTORY}")) is not None:
                check_stored_trajectory(entry, str(store.file(f"seed-{seed}.{TRAJECTORY}")), self.design, seed)
                store.check_same(entry["identity"]["data"], data[seed])
                entries[seed] = entry
        return entries

    def measure_landscape(self, store: CellStore, landscape: Landscape) -> dict[str, Any]:
        seed = self.design.seeds[0]
        shown = [arm for arm in self.design.arms if arm.kind == "predicted" and not arm.tuned]
        identity = loads(dumps([asdict(landscape), seed, [_arm_identity(arm, self.task) for arm in shown]]))
        stored = store.read("landscape")
        if stored is not None and stored.pop("identity", None) == identity:
            return stored
        picture = measure_landscape(landscape, self.task, seed, shown, store.path)
        store.write("landscape", {**picture, "identity": identity})
        return picture

    def measure_missing(
        self,
        store: CellStore,
        finished: dict[tuple[int, str], dict[str, Any]],
        entries: dict[int, dict[str, Any]],
        data: Mapping[int, Mapping[str, str]],
        deadline: float,
    ) -> None:
        """Record missing trajectories and run missing cells until the deadline; store them and add them to the others.

        Raises:
            `ValueError`: If the weights of a seed are not those of its stored results.
        """
        unfinished = {seed for seed, arm in self.cells if (seed, arm.name) not in finished}
        missing = {
            seed
            for seed in self.design.seeds
            if seed not in entries or (seed in unfinished and not self._is_recorded(seed, len(entries[seed]["steps"])))
        }
        for seed in self.design.seeds:
            if seed not in missing and (seed in unfinished or self.task.recorded is not None):
                self._check_weights(seed, entries[seed])
        cells: list[tuple[int, Arm | None]] = []
        for seed in self.design.seeds:
            cells += [(seed, None)] * (seed in missing)
            cells += [cell for cell in self.cells if cell[0] == seed and (seed, cell[1].name) not in finished]
        times = cell_times(finished, entries)
        order = Order(
            is_ready=lambda cell: cell[1] is None or cell[0] not in missing,
            expected=lambda cell: times.expected(_name(cell)),
            deadline=deadline,
        )
        measuring = partial(_measure, design=self.design, output_dir=self.output_dir)
        for cell, result in self._run_cells(measuring, cells, "compare", order=order):
            seed, measured = cell
            times.add(_name(cell), result["seconds"])
            if measured is not None:
                finished[seed, measured.name] = result
                identity = _arm_identity(measured, self.task)
                store.write(f"seed-{seed}.{measured.name}", {**result, "identity": identity})
                continue
            if seed not in entries:
                entries[seed] = {**result, "identity": {"weights": self._weights(seed), "data": data[seed]}}
                store.write(f"seed-{seed}.{TRAJECTORY}", entries[seed])
            self._check_weights(seed, entries[seed])
            missing.remove(seed)

    def complete_seeds(self, finished: Mapping[tuple[int, str], Any]) -> tuple[int, ...]:
        """Return the seeds of which all arms are finished.

        Raises:
            `TimeoutError`: If they are too few for a report.
        """
        seeds, arms = self.design.seeds, self.design.arms
        complete = tuple(seed for seed in seeds if all((seed, arm.name) in finished for arm in arms))
        if len(complete) < min(_LEAST_SEEDS, len(seeds)):
            raise TimeoutError(
                f"the time limit ended the comparison with {len(complete)} of {len(seeds)} seeds complete; a report"
                f" needs {_LEAST_SEEDS}. {len(finished)} of {len(self.cells)} cells are in {self.output_dir}; run it"
                " again to continue, with a larger max_minutes= if this run finished no cell"
            )
        return complete

    def _run_cells(
        self, function: Callable[[Cell], Result], cells: Sequence[Cell], step: str, **options: Any
    ) -> Iterator[tuple[Cell, Result]]:
        if cells:
            bar = {"description": f"{self.name}: {step}", "label": _label}
            results = run_cells(function, cells, **{"num_processes": self.num_processes, **bar, **options})
            yield from ((cells[index], result) for index, result in results)

    def _is_recorded(self, seed: int, num_states: int) -> bool:
        """Whether the trajectory of a seed is complete on disk; it may have been deleted since it was measured."""
        folder = trajectory_folder(self.output_dir, seed)
        is_complete = WeightTrajectory.exists(folder) and WeightTrajectory(folder).num_states >= num_states
        return self.task.recorded is not None or is_complete

    def _check_weights(self, seed: int, entry: Mapping[str, Any]) -> None:
        if entry["identity"]["weights"] != self._weights(seed):
            path = self.task.open_trajectory(seed, self.output_dir).path
            hint = f"seed {seed} measured in {self.output_dir}; restore it, or use another output folder"
            raise ValueError(f"{path} has other weights than the trajectory of {hint}")

    def _weights(self, seed: int) -> list[str]:
        """Hashes of the recorded weights of a seed."""
        trajectory = self.task.open_trajectory(seed, self.output_dir)
        files = [file for state in trajectory.states for file in state.files]
        return [file.sha256 for file in files if file.path.endswith(".safetensors")]


def cell_times(finished: Mapping[tuple[int, str], Mapping[str, Any]], entries: Mapping[int, Any]) -> CellTimes:
    """Return the seconds of stored cells and trajectories."""
    times = CellTimes()
    for (_, name), cell in finished.items():
        times.add(name, cell["seconds"])
    for entry in entries.values():
        times.add(TRAJECTORY, entry["seconds"])
    return times


def _measure(cell: tuple[int, Arm | None], *, design: Design, output_dir: Path) -> dict[str, Any]:
    seed, arm = cell
    if arm is None:
        return measure_trajectory(seed, task=design.task, output_dir=output_dir)
    return measure_arm((seed, arm), design=design, output_dir=output_dir)


def _name(cell: tuple[int, Arm | None]) -> str:
    return TRAJECTORY if cell[1] is None else cell[1].name


def _label(cell: Any) -> str:
    return f"seed {cell[0]}: {_name(cell)}" if isinstance(cell, tuple) else f"seed {cell}"


def _without_identity(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "identity"}


def _arm_identity(arm: Arm, task: ComparisonTask) -> dict[str, Any]:
    """Return what the weights of an arm depend on besides the trajectory."""
    known = None
    if arm.uses_known:
        known = str(arm.known or task.known or SHIPPED_KNOWN)
        weights = Path(known) / "model.safetensors"
        known = file_sha256(weights) if weights.exists() else public_name(known)
    settings = {key: value for key, value in arm.to_dict().items() if key not in ("description", "known")}
    return {"arm": settings, "known": known}


def _arm_entry(arm: Arm) -> dict[str, Any]:
    entry = {key: getattr(arm, key) for key in ("role", "description", "kind")}
    spec = public_values(arm.to_dict())
    return {**entry, "settings": [dict(setting) for setting in arm.settings], "spec": spec}


def _protocol_entry(protocol: MeasuringProtocol, task: ComparisonTask) -> dict[str, Any]:
    return {**protocol.to_dict(), "what": protocol.what, "measures": [measure.name for measure in task.measures]}


def _write_pages(report: ComparisonReport, output_dir: Path) -> None:
    from .report.pages import write_report

    try:
        write_report(report.to_dict(), output_dir)
    except ImportError as error:
        logger.warning(f"{output_dir} has only {REPORT_NAME}, without pages and figures: {error}")
