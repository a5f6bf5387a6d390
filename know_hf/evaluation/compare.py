"""[`compare_arms`]: a resumable comparison of arms on a task, cell by cell, in parallel processes."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from json import dumps, loads
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..checkpoint import check_output, file_sha256, read_json_object
from ..local_paths import public_command, public_name, public_values
from ..prediction import SHIPPED_KNOWN
from ..trajectory import WeightTrajectory
from .arms import NAMED_ARMS, Arm, known_step_arms, make_arm
from .cells import Cell, CellStore, Result, run_cells
from .comparison_checks import (
    Design,
    check_design,
    check_landscape,
    check_picklable,
    check_protocols,
    check_stored_arm,
    check_stored_trajectory,
)
from .comparison_task import ComparisonTask, trajectory_folder
from .landscape import Landscape, measure_landscape
from .measure import device, measure_arm, measure_trajectory
from .protocols import MeasuringProtocol
from .report.comparison_report import REPORT_NAME, ComparisonReport
from .statistics import scipy_stats

RESULTS_VERSION = "0.3.0"  # version of know_hf since which results have not changed; raise it when a number changes
_USUAL_STATES = 5  # of a schedule by default; the shipped KNOWN needs as many

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
    name: str = "comparison",
    description: str = "",
    command: str | None = None,
    pages: bool = True,
) -> ComparisonReport:
    """Compare ways to initialise a downstream task, with controls, giving every arm the same tuning budget.

    ```python
    from know_hf.evaluation import Arm, ComparisonTask, FineTuning, LinearProbe, Split, ZeroShot, compare_arms

    def target(seed, draw):  # other examples for each draw
        return Split(train=…, validation=…, test=…, num_labels=5)

    task = ComparisonTask([f"trajectory-{seed}" for seed in range(10)], target, source)
    protocols = [FineTuning((1e-4, 3e-4, 1e-3), steps=50, head_steps=0), ZeroShot()]
    print(compare_arms(task, "comparison/", protocols=protocols, num_processes=4))
    ```

    A comparison resumes: with the same folder, finished cells are not run again, and arms or seeds can be added. Data
    and weights of a seed are identified by their hashes, so `source` and `target` are called once per seed and draw.
    `output_dir` gets `report.json` (also rendered as HTML and Markdown), one file per cell, and the trajectories.

    Args:
        task ([`ComparisonTask`]):
            Trajectories and data.
        output_dir (`str` or `Path`):
            Output folder.
        protocols (sequence of protocols):
            What is measured, the most important first: [`FineTuning`], [`LinearProbe`], [`ZeroShot`] or any
            [`MeasuringProtocol`].
        arms (sequence of [`Arm`], names or mappings, *optional*):
            Arms as [`make_arm`] takes them, naive included; by default all for which the task has what they need.
        seeds (sequence of `int`, *optional*):
            Trajectory seeds; by default all recorded ones, or 0 to 9.
        draws (`int`, *optional*, defaults to `1`):
            Downstream draws per trajectory. They reduce the noise of its value, and do not count as independent.
        trials_per_rate (`int`, *optional*, defaults to `4`):
            Trials of every arm at each learning rate, a multiple of the number of settings of every arm; see
            [`know_hf.evaluation.protocols`].
        landscape ([`Landscape`], *optional*):
            Options of a loss landscape around the states of the first seed; none by default.
        stacked (`bool`, *optional*):
            Whether the trials of an arm are trained together, as stacks of models; this changes results by rounding
            only. By default on an accelerator, and on a CPU for heads and tiny models. `True` is an error for a model
            that `torch.func.vmap` cannot run.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes. It changes no result; with more than one, task, arms and protocols must be picklable.
        name, description, command (`str`, *optional*):
            For the report; the command is the one that reproduces it.
        pages (`bool`, *optional*, defaults to `True`):
            Whether to write `report.html`, `report.md` and figures, which need matplotlib.

    Raises:
        `ValueError`: If naive is missing, the task lacks what an arm or protocol needs, its data cannot be used, an
            argument is invalid, the folder has results of another comparison, such as on other data, or it is inside a
            trajectory or the folder of KNOWN weights.
        `FileExistsError`: If the folder has other content.
        `BlockingIOError`: If another comparison writes to the folder.
        `RuntimeError`, `ChildProcessError`: If a cell fails in its process, or the process dies.
        `ImportError`: If scipy is missing; raised before the work.
    """
    scipy_stats()
    if seeds is None:
        seeds = range(10 if task.recorded is None else len(task.recorded))
    compared = tuple(arm if isinstance(arm, Arm) else make_arm(arm) for arm in arms or default_arms(task))
    numbers = tuple(int(seed) for seed in seeds)
    design = Design(task, tuple(protocols), compared, numbers, draws, trials_per_rate, stacked)
    run = _Run(design, Path(output_dir), num_processes, name)
    run.check()
    if landscape is not None:
        check_landscape(task)
    data = run.hash_data()
    store = run.open_store()
    with store.locked():
        cells = run.finished_cells(store)
        trajectories = run.record(store, cells, data)
        picture = None if landscape is None else run.measure_landscape(store, landscape)
        run.measure_missing(store, cells)
        shutil.rmtree(run.output_dir / "work", ignore_errors=True)
        report = ComparisonReport(
            name=name,
            description=description,
            task=public_values(task.facts),
            seeds=design.seeds,
            draws=draws,
            trials_per_rate=trials_per_rate,
            arms={arm.name: _arm_entry(arm) for arm in compared},
            protocols={protocol.name: _protocol_entry(protocol, task) for protocol in protocols},
            measures=task.measures,
            cells=tuple(cells[seed, arm.name] for seed, arm in run.cells),
            trajectories=tuple(trajectories[seed] for seed in design.seeds),
            landscape=picture,
            command=None if command is None else public_command(command),
        )
        report.write(output_dir)
        if pages:
            _write_pages(report, run.output_dir)
    return report


def default_arms(task: ComparisonTask) -> list[str]:
    """Return the names of all arms for which the task has what they need."""
    trajectories = [task.open_trajectory(seed, Path()) for seed in range(len(task.recorded or []))]
    num_states = min((trajectory.num_states for trajectory in trajectories), default=_USUAL_STATES)
    arms = [arm for arm in NAMED_ARMS if all(getattr(task, needed) is not None for needed in arm.needs)]
    names = [arm.name for arm in (*arms, *known_step_arms()) if num_states >= _USUAL_STATES or not arm.uses_known]
    return names + [f"state-{index}" for index in range(1, num_states)]


@dataclass(frozen=True)
class _Run:
    """The steps of [`compare_arms`], with its arguments."""

    design: Design
    output_dir: Path
    num_processes: int
    name: str

    @property
    def task(self) -> ComparisonTask:
        return self.design.task

    @property
    def cells(self) -> list[tuple[int, Arm]]:
        return [(seed, arm) for seed in self.design.seeds for arm in self.design.arms]

    def check(self) -> None:
        check_design(self.design)
        known = [self.task.known, *(arm.known for arm in self.design.arms)]
        check_output(self.output_dir, filter(None, known), replaces=False)
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
        of_seed = ("trajectory", *(arm.name for arm in self.design.arms))
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

    def record(
        self, store: CellStore, finished: Mapping[tuple[int, str], Any], data: Mapping[int, Mapping[str, str]]
    ) -> dict[int, dict[str, Any]]:
        """Record missing trajectories and return the entry of each seed in `report.json`.

        Raises:
            `ValueError`: If data or weights of a seed are not those of its stored results.
        """
        seeds = self.design.seeds
        entries: dict[int, dict[str, Any]] = {}
        for seed in seeds:
            if (entry := store.read(f"seed-{seed}.trajectory")) is not None:
                check_stored_trajectory(entry, str(store.file(f"seed-{seed}.trajectory")), self.design, seed)
                store.check_same(entry["identity"]["data"], data[seed])
                entries[seed] = entry
        unfinished = list(dict.fromkeys(seed for seed, arm in self.cells if (seed, arm.name) not in finished))
        missing = [
            seed
            for seed in seeds
            if seed not in entries or (seed in unfinished and not self._is_recorded(seed, len(entries[seed]["steps"])))
        ]
        recording = partial(measure_trajectory, task=self.task, output_dir=self.output_dir)
        for seed, result in self._run_cells(recording, missing, "record"):
            if seed not in entries:
                entries[seed] = {**result, "identity": {"weights": self._weights(seed), "data": data[seed]}}
                store.write(f"seed-{seed}.trajectory", entries[seed])
        for seed in unfinished if self.task.recorded is None else seeds:
            if entries[seed]["identity"]["weights"] != self._weights(seed):
                path = self.task.open_trajectory(seed, self.output_dir).path
                hint = f"seed {seed} measured in {self.output_dir}; restore it, or use another output folder"
                raise ValueError(f"{path} has other weights than the trajectory of {hint}")
        return {seed: {key: value for key, value in entries[seed].items() if key != "identity"} for seed in seeds}

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

    def measure_missing(self, store: CellStore, finished: dict[tuple[int, str], dict[str, Any]]) -> None:
        """Run the cells that are not finished, store them and add them to `finished`."""
        missing = [(seed, arm) for seed, arm in self.cells if (seed, arm.name) not in finished]
        measuring = partial(measure_arm, design=self.design, output_dir=self.output_dir)
        for (seed, arm), result in self._run_cells(measuring, missing, "compare"):
            finished[seed, arm.name] = result
            store.write(f"seed-{seed}.{arm.name}", {**result, "identity": _arm_identity(arm, self.task)})

    def _run_cells(
        self, function: Callable[[Cell], Result], cells: Sequence[Cell], step: str, num_processes: int | None = None
    ) -> Iterator[tuple[Cell, Result]]:
        if cells:
            workers, bar = num_processes or self.num_processes, f"{self.name}: {step}"
            results = run_cells(function, cells, num_processes=workers, description=bar, label=_label)
            yield from ((cells[index], result) for index, result in results)

    def _is_recorded(self, seed: int, num_states: int) -> bool:
        """Whether the trajectory of a seed is complete on disk; it may have been deleted since it was measured."""
        folder = trajectory_folder(self.output_dir, seed)
        is_complete = WeightTrajectory.exists(folder) and WeightTrajectory(folder).num_states >= num_states
        return self.task.recorded is not None or is_complete

    def _weights(self, seed: int) -> list[str]:
        """Hashes of the recorded weights of a seed."""
        trajectory = self.task.open_trajectory(seed, self.output_dir)
        files = [file for state in trajectory.states for file in state.files]
        return [file.sha256 for file in files if file.path.endswith(".safetensors")]


def _label(cell: Any) -> str:
    return f"seed {cell[0]}: {cell[1].name}" if isinstance(cell, tuple) else f"seed {cell}"


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
