"""Search for shared coefficients by CMA-ES.

    python recipes/hyper_model/search.py --data omniglot --output-dir outputs/hyper_model --seed 0

Each generation is a line of `searches/NAME/log.jsonl`. Another run repeats the logged generations without evaluating
them, which gives the same state, and goes on.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from record import add_common

if TYPE_CHECKING:
    from objective import RecordedTask, Rule

SHARED = ("start", "states", "tail", "branches", "theta0", "filtered")  # coefficients, with and without a norm after


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search. A search can go on only with the same ones, except for `generations`.

    Args:
        seed (`int`):
            Seed of the search.
        population (`int`):
            Candidates of a generation, an even number.
        sigma (`float`):
            Standard deviation of the first candidates.
        tasks, draws (`int`):
            Tasks, and draws of each, that the candidates of a generation share.
        leave_out (`tuple[str, ...]`, *optional*):
            Elements of the basis without a coefficient.
    """

    seed: int
    population: int
    sigma: float
    tasks: int
    draws: int
    leave_out: tuple[str, ...] = ()


@dataclass
class Search:
    """A search in its folder.

    Args:
        settings ([`SearchSettings`]):
            The settings.
        folder (`Path`):
            Folder of `settings.json` and `log.jsonl`.

    Raises:
        `ValueError`:
            If the folder has a search with other settings.
    """

    settings: SearchSettings
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, content = self.folder / "settings.json", json.dumps(asdict(self.settings), indent=2)
        if path.exists() and path.read_text() != content:
            raise ValueError(f"{path} has other settings; give them again, or another --name")
        path.write_text(content)
        self.log = self.folder / "log.jsonl"
        self._strategy = _strategy(self.settings)
        for entry in self.entries:
            self._tell(self._strategy.ask(), entry["values"])

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The finished generations."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    @property
    def rule(self) -> "Rule":
        """What the search found."""
        return shared_rule(self.coefficients)

    @property
    def coefficients(self) -> list[dict[str, float]]:
        """The mean of the distribution, by element, of layers without and with a norm after them."""
        return self._coefficients(self._strategy.mean)

    def generation(self, tasks: "Sequence[RecordedTask]", baseline: str) -> dict[str, Any]:
        """Evaluate the candidates of the next generation, all on the same tasks and draws.

        Args:
            tasks (sequence of [`RecordedTask`]):
                Tasks to draw from.
            baseline (`str`):
                The control that is subtracted.

        Returns:
            The line of the log.
        """
        from objective import controls

        number, settings = len(self.entries), self.settings
        random = np.random.RandomState([settings.seed, number, 1])
        chosen = random.permutation(len(tasks))[: settings.tasks]
        draws = {int(index): random.permutation(tasks[index].draws)[: settings.draws] for index in chosen}
        candidates = self._strategy.ask()
        rules = [shared_rule(self._coefficients(candidate)) for candidate in candidates]

        def mean_utility(rule_of: "Mapping[int, Rule]") -> float:
            utilities = [tasks[i].utility(tasks[i].weights(rule_of[i](tasks[i]))).per_draw[draws[i]] for i in draws]
            return float(np.mean([of_task.mean() for of_task in utilities]))

        reference = mean_utility({index: controls(tasks[index])[baseline] for index in draws})
        values = [mean_utility(dict.fromkeys(draws, rule)) - reference for rule in rules]
        self._tell(candidates, values)
        entry = {
            "generation": number,
            "tasks": [tasks[index].task.name for index in draws],
            "baseline": baseline,
            "values": values,
            "mean": float(np.mean(values)),
        }
        with self.log.open("a") as log:
            log.write(json.dumps(entry) + "\n")
        return entry

    def _tell(self, candidates: list[np.ndarray], values: Sequence[float]) -> None:
        self._strategy.tell(candidates, [-value for value in values])  # it minimises

    def _coefficients(self, vector: np.ndarray) -> list[dict[str, float]]:
        names = [name for name in SHARED if name not in self.settings.leave_out]
        return [dict(zip(names, map(float, half), strict=True)) for half in np.split(np.asarray(vector), 2)]


def _strategy(settings: SearchSettings) -> Any:
    try:
        from cma import CMAEvolutionStrategy
    except ImportError as error:
        raise ImportError("the search needs cma; run: pip install cma") from error
    size = 2 * (len(SHARED) - len(settings.leave_out))
    options = {"seed": settings.seed + 1, "popsize": settings.population, "verbose": -9, "CMA_mirrors": 0.5}
    return CMAEvolutionStrategy(np.zeros(size), settings.sigma, options)


def shared_rule(shared: Sequence[Mapping[str, float]]) -> "Rule":
    """Return the rule of shared coefficients; `"states"` is one of the mean of all states, and norm weights do not
    shrink."""

    def rule(task: "RecordedTask") -> dict[str, dict[str, float]]:
        later = task.num_states - 1
        coefficients = {}
        for name, context in task.contexts.items():
            of_tensor = dict(shared[context.is_normalised])
            of_state = of_tensor.pop("states", 0.0) / later
            of_tensor |= {f"state-{index}": of_state for index in range(1, later + 1)}
            if context.role == "norm":
                of_tensor.pop("theta0", None)
            coefficients[name] = of_tensor
        return coefficients

    return rule


def model_rule(model: Any, leave_out: Sequence[str] = ()) -> "Rule":
    """Return the rule of a [`KNOWNModel`] of the variant `"combination"` without some elements of the basis.

    The statistics that the network reads do not see snapshots that are left out either.
    """

    def rule(task: "RecordedTask") -> dict[str, dict[str, float]]:
        coefficients = {}
        for name, basis in task.bases_without(leave_out).items():
            of_tensor = model.coefficients(basis.tensor_features, basis.state_features)
            coefficients[name] = {n: c for n, c in of_tensor.items() if n in basis.elements and n not in leave_out}
        return coefficients

    return rule


def new_network(seed: int) -> Any:
    """Return a [`KNOWNModel`] of the variant `"combination"` whose residual is zero."""
    import torch

    from know_hf import KNOWNConfig, KNOWNModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KNOWNModel(KNOWNConfig(variant="combination")).eval()


def main(arguments: argparse.Namespace) -> int:
    from objective import best_fixed, cached_controls, load_tasks
    from tqdm import tqdm

    name = arguments.name or f"cma-{arguments.seed}"
    settings = SearchSettings(**{key: getattr(arguments, key) for key in SearchSettings.__dataclass_fields__})
    search = Search(settings, arguments.output_dir / "searches" / name)
    tasks = load_tasks(arguments.split, "train", arguments.data, arguments.output_dir)
    baseline = best_fixed([{n: u["utility"] for n, u in cached_controls(task).items()} for task in tasks])
    done = len(search.entries)
    with tqdm(range(done, arguments.generations), name, initial=done, total=arguments.generations) as bar:
        for _ in bar:
            bar.set_postfix(minus_best_control=f"{100 * search.generation(tasks, baseline)['mean']:+z.2f} points")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_search(parser, "cma")
    add = parser.add_argument
    add("--generations", type=int, default=40, help="generations, those of earlier runs included (default: 40)")
    add("--population", type=int, default=12, help="candidates of a generation (default: 12)")
    add("--sigma", type=float, default=0.15, help="standard deviation of the first candidates (default: 0.15)")
    add("--tasks", type=int, default=8, help="tasks of a generation (default: 8)")
    add("--draws", type=int, default=4, help="draws of each task in a generation (default: 4)")
    return parser


def add_search(parser: argparse.ArgumentParser, prefix: str) -> None:
    add_common(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument(
        "--leave-out", nargs="*", default=(), choices=SHARED, help="elements of the basis to leave out"
    )
    parser.add_argument("--name", help=f"folder in searches/ (default: {prefix}-SEED)")


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("search.py", lambda: main(arguments)))
