"""Tables of the meta-tasks and of searches, in points of accuracy.

    python recipes/hyper_model/report.py controls --data omniglot --output-dir outputs/hyper_model

| table | rows |
| --- | --- |
| `controls` | every control, and every search of `--searches`: utility minus naive and minus the best fixed control |
| `elements` | one element of the basis with one coefficient for all tensors |
| `noise` | the James–Stein factor λ of the jackknife, by regime |
| `coefficients` | what CMA-ES found, over its restarts |
| `statistics` | a trained network, each group of statistics shuffled among tensors |
| `ceiling` | what the best coefficients of each task gain, chosen with labels of the target |
| `characters` | what they gain on other characters than those that chose them |
| `fitted` | what they gain chosen with data of the source task |
| `confirm` | fine-tuning with tuned rates of head and body instead of the probe |
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from record import PARTS, add_common
from search import SHARED, Search, SearchSettings, model_rule

from know_hf import KNOWNModel

if TYPE_CHECKING:
    from objective import RecordedTask, Rule

COEFFICIENTS = (-0.5, -0.25, 0.25, 0.5, 0.75, 1.0)
GROUPS = {
    "role and depth": ("role_conv", "role_fc", "role_bias", "role_norm", "depth", "is_matrix"),
    "norm follows": ("is_normalised",),
    "length of training": ("steps", "ratio", "num_states"),
    "losses": ("train_loss", "has_train_loss", "eval_loss", "has_eval_loss", "loss_gap"),
    "movement": ("moved", "start_cosine", "norm_growth"),
    "states": ("states_moved", "states_cosine"),
    "tail": ("tail_moved", "tail_cosine", "tail_noise"),
    "branches": (
        *("branches_moved", "branches_cosine", "branches_agreement", "branches_noise", "branches_shrinkage"),
    ),
    "spectrum": ("stable_rank", "filtered_share"),
}
RATES, HEAD_RATES, FIRST_RATES = (0.001, 0.004, 0.016), (0.0005, 0.005, 0.05), (0.01, 0.1)


def main(arguments: argparse.Namespace) -> int:
    from objective import load_tasks

    tasks = {part: load_tasks(arguments.split, part, arguments.data, arguments.output_dir) for part in arguments.parts}
    for name in ("regime", "stages"):
        if (value := getattr(arguments, name)) is not None:
            tasks = {part: [task for task in tasks[part] if getattr(task.task, name) == value] for part in tasks}
    searches = {name: load_search(arguments.output_dir / "searches", name) for name in arguments.searches}
    for row in TABLES[arguments.table](tasks, searches, arguments):
        print(f"| {' | '.join(row)} |")
    return 0


def load_search(folder: Path, name: str) -> Any:
    """Open a search, or the model that gradient.py trained, as it is.

    Args:
        folder (`Path`):
            Folder of all searches.
        name (`str`):
            Name of a search; of a network, `"NAME-without-tail-branches"` leaves out elements of the basis.

    Raises:
        `FileNotFoundError`:
            If there is none.
    """
    name, _, left_out = name.partition("-without-")
    settings = json.loads((folder / name / "settings.json").read_text())
    if (model := folder / name / "model").exists():
        leave_out = (*settings["leave_out"], *left_out.split("-"))
        return SimpleNamespace(rule=model_rule(KNOWNModel.from_pretrained(model).eval(), leave_out))
    return Search(SearchSettings(**settings), folder / name)


def controls_table(tasks: Any, searches: Mapping[str, Any], arguments: argparse.Namespace) -> Iterable[list[str]]:
    from objective import best_fixed, cached_controls

    for part, of_part in tasks.items():
        utilities = [cached_controls(task) for task in of_part]
        for name, search in searches.items():
            for task, of_task in zip(of_part, utilities, strict=True):
                of_task[name] = task.utility(task.weights(search.rule(task))).to_dict()
        fixed = best_fixed([{n: u["utility"] for n, u in cached_controls(task).items()} for task in of_part])
        best = [max(u["utility"] for n, u in of.items() if n not in searches) for of in utilities]
        yield [f"{part}, {len(of_part)} tasks", "minus naive", f"minus {fixed}", "accuracy", "source loss"]
        yield ["---"] * 5
        for name in utilities[0]:
            value, naive, control = ([of[other]["utility"] for of in utilities] for other in (name, "naive", fixed))
            accuracy, loss = (
                [of[name][key] - of["naive"][key] for of in utilities] for key in ("accuracy", "source_loss")
            )
            row = [name, points(value, naive), points(value, control)]
            yield [*row, f"{100 * np.mean(accuracy):+z.2f}", f"{np.mean(loss):+z.3f}"]
        yield ["best control of each task", points(best, naive), points(best, control), "", ""]


def elements_table(tasks: Any, _: Any, __: Any) -> Iterable[list[str]]:
    from search import shared_rule

    for part, of_part in tasks.items():
        yield [f"{part}, {len(of_part)} tasks", *map(str, COEFFICIENTS)]
        yield ["---"] * (1 + len(COEFFICIENTS))
        naive = [task.utility(task.theta0).per_draw.mean() for task in of_part]
        for element in SHARED:
            row = [element]
            for coefficient in COEFFICIENTS:
                rule = shared_rule([{element: coefficient}] * 2)
                row.append(points([utility(task, rule) for task in of_part], naive))
            yield row


def noise_table(tasks: Any, _: Any, __: Any) -> Iterable[list[str]]:
    from objective import shrinkage

    yield ["regime", "tensors", "λ = 0", "λ < 0.1", "median λ", "largest λ"]
    yield ["---"] * 6
    every = [task for of_part in tasks.values() for task in of_part]
    for regime in dict.fromkeys(task.task.regime for task in every):
        values = np.array(
            [shrinkage(basis) for task in every if task.task.regime == regime for basis in task.bases.values()]
        )
        shares = [f"{100 * np.mean(values == 0):.0f}%", f"{100 * np.mean(values < 0.1):.0f}%"]
        yield [regime, str(len(values)), *shares, f"{np.median(values):.2f}", f"{values.max():.2f}"]


def coefficients_table(_: Any, searches: Mapping[str, Any], __: Any) -> Iterable[list[str]]:
    found = [search.coefficients for search in searches.values()]
    yield ["element", "no norm follows", "a norm follows"]
    yield ["---"] * 3
    for element in found[0][0]:
        rows = [[shared[half][element] for shared in found] for half in (0, 1)]
        yield [element, *(interval(row, 1, 2) for row in rows)]


def statistics_table(tasks: Any, searches: Mapping[str, Any], _: Any) -> Iterable[list[str]]:
    yield ["shuffled", *(f"{part} {name}" for part in tasks for name in searches)]
    yield ["---"] * (1 + len(tasks) * len(searches))
    for group in ("nothing", *GROUPS, "statistics of states"):
        row = [group]
        for of_part in tasks.values():
            for search in searches.values():
                before = [utility(task, search.rule) for task in of_part]
                after = before if group == "nothing" else shuffled_utilities(of_part, search, group)
                reference = [task.utility(task.theta0).per_draw.mean() for task in of_part]
                row.append(points(after, reference if group == "nothing" else before))
        yield row


def shuffled_utilities(tasks: "Sequence[RecordedTask]", search: Any, group: str) -> list[float]:
    """Return the utility with a group of statistics exchanged among all tensors of all tasks."""
    from dataclasses import replace

    from know_hf.known.combination_network import TENSOR_FEATURES

    every = [task.bases_without(()) for task in tasks]  # what rules read; changed in place and back
    places = [(of_task, name) for of_task in every for name in of_task]
    order = np.random.RandomState(0).permutation(len(places))
    bases = [of_task[name] for of_task, name in places]
    columns = [TENSOR_FEATURES.index(name) for name in GROUPS.get(group, ())]
    for (of_task, name), own, index in zip(places, bases, order, strict=True):
        other, mixed = bases[index], own.tensor_features.clone()
        mixed[columns] = other.tensor_features[columns]
        of_states = own.state_features if columns else other.state_features
        of_task[name] = replace(own, tensor_features=mixed, state_features=of_states)
    values = [utility(task, search.rule) for task in tasks]
    for (of_task, name), own in zip(places, bases, strict=True):
        of_task[name] = own
    return values


def ceiling_table(tasks: Any, _: Any, __: Any) -> Iterable[list[str]]:
    from functools import partial

    from gradient import DifferentiableTask, fit_coefficients
    from objective import best_fixed, controls

    for part, of_part in tasks.items():
        chosen: list[dict[str, float]] = []  # of each task, on the drawings that choose
        others: list[dict[str, float]] = []  # on the other drawings
        for task in map(DifferentiableTask, of_part):
            weights = {name: task.task.weights(rule(task.task)) for name, rule in controls(task.task).items()}
            for name, per_tensor in (("coefficients of a task", False), ("coefficients of a tensor", True)):
                weights[name] = task.weights(fit_coefficients(task, partial(task.loss, half=0), per_tensor))
            for values, half in ((chosen, 0), (others, 1)):
                values.append({n: float(task.task.utility(w, half).per_draw.mean()) for n, w in weights.items()})
        names = controls(of_part[0])
        fixed = best_fixed([{name: values[name] for name in names} for values in others])
        for values, other in zip(chosen, others, strict=True):
            best = max(names, key=lambda name: values[name])
            values["best control of a task"], other["best control of a task"] = values[best], other[best]
        yield [f"{part}, {len(chosen)} tasks", "chosen on: minus naive", "minus naive", f"minus {fixed}"]
        yield ["---"] * 4
        for name in (fixed, "best control of a task", "coefficients of a task", "coefficients of a tensor"):
            own, held = [values[name] for values in chosen], [values[name] for values in others]
            naive = [[values["naive"] for values in every] for every in (chosen, others)]
            reference = [values[fixed] for values in others]
            yield [name, points(own, naive[0]), points(held, naive[1]), points(held, reference)]


def characters_table(tasks: Any, _: Any, __: Any) -> Iterable[list[str]]:
    from gradient import DifferentiableTask, fit_coefficients
    from objective import best_fixed, controls

    for part, of_part in tasks.items():
        chosen: list[dict[str, float]] = []  # on the characters that choose
        others: list[dict[str, float]] = []  # on the others
        for task in of_part:
            half = task.num_labels // 2
            sides = [task.of_characters(range(half)), task.of_characters(range(half, task.num_labels))]
            rules = controls(task)
            weights = {name: task.weights(rule(task)) for name, rule in rules.items()}
            of_sides = [{n: float(side.utility(w).per_draw.mean()) for n, w in weights.items()} for side in sides]
            for own in (0, 1):
                differentiable = DifferentiableTask(sides[own])
                fitted = differentiable.weights(fit_coefficients(differentiable, differentiable.loss))
                for values, side in ((chosen, own), (others, 1 - own)):
                    gained = float(sides[side].utility(fitted).per_draw.mean())
                    values.append({**of_sides[side], "coefficients": gained})
        fixed = best_fixed([{name: values[name] for name in rules} for values in others])
        for values, other in zip(chosen, others, strict=True):
            best = max(rules, key=lambda name: values[name])
            values["best control"], other["best control"] = values[best], other[best]

        def difference(values: list[dict[str, float]], name: str, reference: str) -> str:
            changes = np.array([of[name] - of[reference] for of in values]).reshape(-1, 2).mean(axis=1)
            return interval(changes, 100, 2)

        yield [f"{part}, {len(of_part)} tasks", "these characters", "other characters", f"others minus {fixed}"]
        yield ["---"] * 4
        for name in (fixed, "best control", "coefficients"):
            own_gain, gain = difference(chosen, name, "naive"), difference(others, name, "naive")
            yield [name, own_gain, gain, difference(others, name, fixed)]


def fitted_table(tasks: Any, _: Any, __: Any) -> Iterable[list[str]]:
    from gradient import HIDDEN, DifferentiableTask, fit_coefficients
    from objective import controls

    from know_hf.evaluation.fine_tuning import evaluate_classifier

    for part, of_part in tasks.items():
        rows: dict[str, list[tuple[float, float]]] = {}
        for task in of_part:
            weights = {name: task.weights(rule(task)) for name, rule in controls(task).items()}
            losses = {n: evaluate_classifier(task.load(w), task.source.validation)["loss"] for n, w in weights.items()}
            fitted = DifferentiableTask(task, HIDDEN[-1])
            compared = {
                "naive": weights["naive"],
                "compute-matched": weights.pop("compute-matched"),
                "best control": weights[min(weights, key=lambda name: losses[name])],
                "fitted to validation data": fitted.weights(fit_coefficients(fitted, fitted.validation_loss)),
                "fitted to few-shot tasks": fitted.weights(fit_coefficients(fitted, fitted.episode_loss)),
            }
            for name, of_row in compared.items():
                of_source = evaluate_classifier(task.load(of_row), task.source.test)["accuracy"]
                rows.setdefault(name, []).append((of_source, task.utility(of_row).accuracy))
        yield [f"{part}, {len(of_part)} tasks", "source accuracy", "target accuracy"]
        yield ["---"] * 3
        naive = np.array(rows.pop("naive"))
        for name, values in rows.items():
            yield [name, *(points(np.array(values)[:, side], naive[:, side]) for side in (0, 1))]


def confirm_table(tasks: Any, searches: Mapping[str, Any], arguments: argparse.Namespace) -> Iterable[list[str]]:
    from objective import controls

    for part, of_part in tasks.items():
        names = [*arguments.controls, *searches]
        values: dict[str, list[float]] = {name: [] for name in names}
        for task in of_part:
            rules = {**controls(task), **{name: search.rule for name, search in searches.items()}}
            for name in names:
                values[name].append(fine_tuned_utility(task, rules[name], arguments.draws, arguments.output_dir, name))
        yield [
            f"{part}, {len(of_part)} tasks",
            "soft maximum of accuracy",
            *(f"minus {n}" for n in arguments.controls),
        ]
        yield ["---"] * (2 + len(arguments.controls))
        for name in names:
            yield [
                name,
                f"{100 * np.mean(values[name]):.1f}",
                *(points(values[name], values[n]) for n in arguments.controls),
            ]


def fine_tuned_utility(task: "RecordedTask", rule: "Rule", draws: int, output_dir: Path, name: str) -> float:
    """Return the soft maximum of the test accuracy over pairs of rates, the mean over draws; cached in a file."""
    import torch
    from objective import soft_maximum

    from know_hf.evaluation import FineTuning
    from know_hf.evaluation.fine_tuning import evaluate_classifier

    path = output_dir / "confirmed" / name / f"{task.task.name}-{draws}.json"
    if not path.exists():
        protocol = FineTuning(RATES, steps=30, head_steps=100, head_learning_rate=FIRST_RATES, head_rates=HEAD_RATES)
        model = task.copy_of(task.weights(rule(task)))
        runs = [(model, task.target_split(draw), task.task.seed + draw) for draw in range(draws)]
        trials = protocol.trials_of(runs, evaluate_classifier)
        accuracies = [[trial.test["accuracy"] for trial in of_draw] for of_draw in trials]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(soft_maximum(torch.tensor(accuracies)).tolist()))
    return float(np.mean(json.loads(path.read_text())))


def utility(task: "RecordedTask", rule: "Rule") -> float:
    return float(task.utility(task.weights(rule(task))).per_draw.mean())


def points(values: Sequence[float], reference: Sequence[float]) -> str:
    """Format a mean difference with its 95% interval over tasks."""
    return interval(np.subtract(values, reference), 100, 2)


def interval(values: Sequence[float], scale: float, digits: int) -> str:
    from know_hf.evaluation.statistics import mean_and_interval

    if len(values) < 2:
        return f"{scale * values[0]:+z.{digits}f}"
    estimate = mean_and_interval([scale * value for value in values])
    return f"{estimate.mean:+z.{digits}f} ± {estimate.half_width:.{digits}f}"


TABLES = {
    "controls": controls_table,
    "elements": elements_table,
    "noise": noise_table,
    "coefficients": coefficients_table,
    "statistics": statistics_table,
    "ceiling": ceiling_table,
    "characters": characters_table,
    "fitted": fitted_table,
    "confirm": confirm_table,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    add = parser.add_argument
    add("table", choices=TABLES, help="table to print")
    add("--parts", nargs="*", choices=PARTS, default=["validation"], help="parts of the split (default: validation)")
    add("--regime", help="only tasks of this regime (default: all)")
    add("--stages", type=float, help="only tasks with stages of this length (default: all)")
    add("--searches", nargs="*", default=[], help="names of searches; NAME-without-tail hides snapshots")
    add("--controls", nargs="*", default=["naive"], help="controls to confirm (default: naive)")
    add("--draws", type=int, default=2, help="draws of each task to confirm on (default: 2)")
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("report.py", lambda: main(arguments)))
