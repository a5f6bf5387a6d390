"""Ablations of meta-training KNOWN: a table with a row for each change to the default settings.

    python recipes/ablations/ablations.py --trajectories known_data --output-dir ablations --cache-dir known_samples

The rows vary the number of states S, the number of networks (one for all roles or three), the ratio of the schedule,
the number of trajectories, and the weighting of the loss. Every setting is trained with each seed for the same number
of steps, and evaluated on the same held-out transitions. Prints Markdown tables and writes them to the output folder,
with all numbers as JSON. A second run reuses finished cells.
"""

import argparse
import hashlib
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import HfArgumentParser

    from know_hf import KNOWNModel, TransitionDataset
    from know_hf.meta_learning import CollectedTrajectory

ROLES = ("conv", "fc", "bias")
GROUPS = ("states", "networks", "ratio", "trajectories", "loss")
RATIO_BOUNDS = {"0.33": (0.3, 0.42), "0.5": (0.42, 0.6), "0.7": (0.6, 0.9)}
MIN_TRAJECTORIES = 4  # per ratio; ratios with fewer have no row


@dataclass
class AblationArguments:
    """Arguments of the ablations."""

    trajectories: list[str] = field(metadata={"help": "Collections of recipes/collect."})
    output_dir: str = field(metadata={"help": "Folder for the tables and the finished cells."})
    held_out: list[str] = field(
        default_factory=list,
        metadata={"help": "Names or patterns of held-out trajectories; default: the splits of the collection."},
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder in which drawn scalars are cached; default: draw again for each row."}
    )
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "Groups of rows besides the defaults.", "choices": GROUPS},
    )
    counts: list[int] = field(default_factory=lambda: [12, 25, 50], metadata={"help": "Numbers of trajectories."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Seeds of every row."})
    steps: int = field(default=1000, metadata={"help": "Optimizer steps of every row."})
    batch_size: int = field(default=1024, metadata={"help": "Transitions of each role per step."})
    max_per_tensor: int = field(default=4096, metadata={"help": "Scalars drawn from each training tensor."})
    evaluated_per_tensor: int = field(default=4096, metadata={"help": "Scalars drawn from each held-out tensor."})


@dataclass(frozen=True)
class Setting:
    """Row of the table: a change to the first row, the defaults."""

    group: str  # changed setting
    value: str
    trajectories: "tuple[CollectedTrajectory, ...]" = field(repr=False)
    num_states: int = 5
    one_network: bool = False  # one network, trained on all roles, predicts every tensor
    loss_weighting: str = "none"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "trajectories": [trajectory.name for trajectory in self.trajectories]}


@dataclass(frozen=True)
class LastStates:
    """Predictor that uses the last S states of a longer history, so that every S is evaluated on the same ones."""

    model: "KNOWNModel"

    @property
    def num_states(self) -> None:
        return None

    def residual(self, history: "torch.Tensor", role: str) -> "torch.Tensor":
        from know_hf.predictors import KNOWNPredictor

        return KNOWNPredictor(self.model).residual(history[:, -self.model.config.num_states :], role)


def main(args: AblationArguments) -> None:
    from tqdm.auto import tqdm

    from know_hf.checkpoint import write_json
    from know_hf.evaluation import CellStore
    from know_hf.meta_learning import read_collection, split_collection

    output_dir = Path(args.output_dir)
    splits = split_collection(read_collection(args.trajectories), args.held_out)
    train_split = splits.pop("train")
    settings = make_settings(train_split, args)
    by_near_ratio = by_ratio([trajectory for part in splits.values() for trajectory in part])
    evaluated = {**splits, **{f"r near {value}": part for value, part in by_near_ratio.items() if part}}
    identity = {
        **{name: getattr(args, name) for name in ("steps", "batch_size", "max_per_tensor", "evaluated_per_tensor")},
        "splits": {name: [trajectory.name for trajectory in part] for name, part in evaluated.items()},
        "settings": [setting.to_dict() for setting in settings],
        "weights": {name: fingerprint(part) for name, part in {"train": train_split, **splits}.items()},
        "versions": {library: version(library) for library in ("know_hf", "torch", "transformers")},
    }
    cells = CellStore(output_dir, identity)
    held_out = {name: load(part, 5, args.evaluated_per_tensor, args) for name, part in evaluated.items()}
    linear = evaluate("linear", held_out)
    rows = []
    with tqdm(total=len(settings) * len(args.seeds), desc="ablations") as bar:
        for setting in settings:
            results = []
            for seed in args.seeds:
                bar.set_postfix_str(f"{setting.group} {setting.value}, seed {seed}")
                name = f"{setting.group}-{setting.value}-{seed}".replace(" ", "_")
                if (result := cells.read(name)) is None:
                    result = train(setting, seed, held_out, args)
                    cells.write(name, result)
                results.append(result)
                bar.update()
            rows.append({**setting.to_dict(), "seeds": args.seeds, "results": results})
    text = "\n\n".join([*split_tables(rows, linear, list(splits)), *ratio_tables(rows)])
    report = {"arguments": asdict(args), "trained_on": len(train_split), "linear": linear, "rows": rows}
    write_json(output_dir / "ablations.json", report)
    (output_dir / "ablations.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def make_settings(train: "list[CollectedTrajectory]", args: AblationArguments) -> list[Setting]:
    """Create all rows: the defaults, then one change each. Subsets of trajectories are nested, with a fixed seed."""
    shuffled = random.Random(0).sample(train, len(train))
    every = tuple(train)
    settings = [Setting("defaults", "S = 5, three networks, all trajectories", every)]
    settings += [Setting("states", f"S = {number}", every, num_states=number) for number in (2, 3, 4)]
    settings += [Setting("networks", "one for all roles", every, one_network=True)]
    ratios = {value: part for value, part in by_ratio(shuffled).items() if len(part) >= MIN_TRAJECTORIES}
    if len(ratios) > 1:
        count = min(len(part) for part in ratios.values())
        settings += [Setting("ratio", value, tuple(part[:count])) for value, part in ratios.items()]
        settings += [Setting("ratio", "any", tuple(shuffled[:count]))]
    settings += [Setting("trajectories", str(n), tuple(shuffled[:n])) for n in args.counts if n < len(train)]
    settings += [Setting("loss", "relative", every, loss_weighting="relative")]
    return [setting for setting in settings if not args.only or setting.group in {"defaults", *args.only}]


def by_ratio(trajectories: "Sequence[CollectedTrajectory]") -> "dict[str, list[CollectedTrajectory]]":
    """Group trajectories by the nearest ratio, in their order."""
    parts: dict[str, list[CollectedTrajectory]] = {value: [] for value in RATIO_BOUNDS}
    for trajectory in trajectories:
        ratio = trajectory.of_schedule("ratio")
        for value, (low, high) in RATIO_BOUNDS.items():
            if ratio is not None and low <= ratio < high:
                parts[value].append(trajectory)
    return parts


def fingerprint(trajectories: "Sequence[CollectedTrajectory]") -> str:
    """Hash the weights of all trajectories, since other trajectories may have the same names."""
    from know_hf.meta_learning.state_readers import open_states

    digest = hashlib.sha256()
    for trajectory in trajectories:
        reader = open_states(trajectory.path)
        digest.update(reader.fingerprint.encode())
        reader.close()
    return digest.hexdigest()


def load(
    trajectories: "Sequence[CollectedTrajectory]", num_states: int, max_per_tensor: int | None, args: AblationArguments
) -> "TransitionDataset":
    from know_hf import TransitionDataset

    paths = [trajectory.path for trajectory in trajectories]
    return TransitionDataset(paths, num_states, max_per_tensor, cache_dir=args.cache_dir, progress=False)


def train(
    setting: Setting, seed: int, held_out: "dict[str, TransitionDataset]", args: AblationArguments
) -> dict[str, Any]:
    from know_hf import KNOWNConfig, meta_train
    from know_hf.meta_learning import MetaTrainingArguments

    transitions = load(setting.trajectories, setting.num_states, args.max_per_tensor, args)
    batch_size = args.batch_size
    if setting.one_network:
        transitions = transitions.with_one_role("fc")
        batch_size *= len(ROLES)  # as many transitions per step as for three networks
    training = MetaTrainingArguments(
        steps=args.steps, batch_size=batch_size, seed=seed, loss_weighting=setting.loss_weighting
    )
    result = meta_train(KNOWNConfig(num_states=setting.num_states), transitions, args=training, progress=False)
    networks = result.model.networks
    if setting.one_network:
        for role in ROLES:
            networks[role].load_state_dict(networks["fc"].state_dict())
    skill = evaluate(LastStates(result.model), held_out)
    return {"skill": skill, "seconds": result.seconds, "transitions": len(transitions)}


def evaluate(predictor: LastStates | str, held_out: "dict[str, TransitionDataset]") -> dict[str, dict[str, Any]]:
    """Compute the skill by split and role."""
    from know_hf.meta_learning import retrodiction_skill

    return {
        name: {role: skill.to_dict() for role, skill in retrodiction_skill(predictor, part).items()}
        for name, part in held_out.items()
    }


def split_tables(rows: list[dict[str, Any]], linear: dict[str, Any], splits: list[str]) -> list[str]:
    """Format a table per held-out split: skill by role, the mean over the seeds and half of their range."""
    from know_hf.markdown import table

    tables = []
    for split in splits:
        roles = list(linear[split])
        counts = ", ".join(f"{role}: {linear[split][role]['trajectories']} trajectories" for role in roles)
        header = ["", "trained on", *roles, *(f"{role}, median" for role in roles), "seconds"]
        body = []
        for row in rows:
            name = row["value"] if row["group"] == "defaults" else f"{row['group']}: {row['value']}"
            values = [mean_and_range(row, split, role, key) for key in ("skill", "median") for role in roles]
            seconds = sum(result["seconds"] for result in row["results"]) / len(row["results"])
            body.append([name, str(len(row["trajectories"])), *values, f"{seconds:.0f}"])
        baseline = [f"{linear[split][role][key]:+.3f}" for key in ("skill", "median") for role in roles]
        body.append(["linear fit, no learning", "0", *baseline, ""])
        tables.append(f"**{split}** ({counts})\n\n{table([header, *body])}")
    return tables


def ratio_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Format the table of training near one ratio and evaluation near another, over all held-out splits."""
    from know_hf.markdown import table

    ratio_rows = [row for row in rows if row["group"] == "ratio"]
    if not ratio_rows:
        return []
    first = ratio_rows[0]["results"][0]["skill"]
    columns = [name for name in first if name.startswith("r near")]
    roles = list(first[columns[0]])
    header = ["trained on", *(f"{role}, {name}" for role in roles for name in columns)]
    body = []
    for row in ratio_rows:
        values = [mean_and_range(row, name, role, "skill") for role in roles for name in columns]
        body.append(["any r" if row["value"] == "any" else f"r near {row['value']}", *values])
    title = "**Trained near one ratio (rows), evaluated near another (columns), all held-out splits**"
    return [f"{title}\n\n{table([header, *body])}"]


def mean_and_range(row: dict[str, Any], split: str, role: str, key: str) -> str:
    values = [result["skill"][split].get(role, {}).get(key) for result in row["results"]]
    if None in values:
        return ""
    return f"{sum(values) / len(values):+.3f} ({(max(values) - min(values)) / 2:.3f})"


def make_parser() -> "HfArgumentParser":
    from transformers import HfArgumentParser

    return HfArgumentParser(
        AblationArguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )


if __name__ == "__main__":
    from know_hf.terminal import run_program

    sys.exit(run_program("ablations.py", lambda: main(make_parser().parse_args_into_dataclasses()[0])))
