"""What meta-training KNOWN depends on, each choice changed alone: one table.

    python recipes/ablations/ablations.py --trajectories known_data --output_dir ablations --cache_dir known_samples

Number of states S, one network for all roles or three, ratio of the schedule, number of trajectories, weighting of the
loss. Every setting is trained with each of the seeds on the same steps, and measured on the same held-out transitions.
Prints Markdown and writes it, with every number as JSON, to the output folder. Safe to run again: finished cells are
not trained again.
"""

import argparse
import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from know_hf import KNOWNModel, TransitionDataset
    from know_hf.meta_learning import CollectedTrajectory, RoleSkill

ROLES = ("conv", "fc", "bias")
RATIO_BOUNDS = {"0.33": (0.3, 0.42), "0.5": (0.42, 0.6), "0.7": (0.6, 0.9)}
FEWEST = 4  # trajectories near a ratio, below which it has no row


@dataclass(frozen=True)
class Setting:
    """One row of the table: what is changed against the first row.

    Args:
        group (`str`): What is changed.
        value (`str`): To what.
        trajectories (`tuple[CollectedTrajectory]`): What is trained on.
        num_states (`int`): S.
        one_network (`bool`): Whether one network, trained on all roles, predicts every tensor.
        loss_weighting (`str`): As in `MetaTrainingArguments`.
    """

    group: str
    value: str
    trajectories: "tuple[CollectedTrajectory, ...]" = field(repr=False)
    num_states: int = 5
    one_network: bool = False
    loss_weighting: str = "none"


@dataclass(frozen=True)
class LastStates:
    """A predictor that sees the last S states of a longer history, so that every S is measured on the same ones."""

    model: "KNOWNModel"

    @property
    def num_states(self) -> None:
        return None

    def residual(self, history: "torch.Tensor", role: str) -> "torch.Tensor":
        from know_hf.predictors import KNOWNPredictor

        return KNOWNPredictor(self.model).residual(history[:, -self.model.config.num_states :], role)


def main(args: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from know_hf.checkpoint import write_json
    from know_hf.evaluation import CellStore
    from know_hf.meta_learning import read_collection, retrodiction_skill, split_collection

    splits = split_collection(read_collection(args.trajectories), args.held_out)
    train_split = splits.pop("train")
    settings = make_settings(train_split, args)
    everything = [t for part in splits.values() for t in part]
    measured = {**splits, **{f"r near {value}": part for value, part in by_ratio(everything).items() if part}}
    identity = {
        **{name: getattr(args, name) for name in ("steps", "batch_size", "max_per_tensor", "evaluated_per_tensor")},
        "splits": {name: [t.name for t in part] for name, part in measured.items()},
        "settings": [describe(setting) for setting in settings],
        "weights": {name: fingerprint(part) for name, part in {"train": train_split, **splits}.items()},
        "versions": {library: version(library) for library in ("know_hf", "torch", "transformers")},
    }
    cells = CellStore(args.output_dir, identity)
    held_out = {name: dataset(part, 5, args.evaluated_per_tensor, args) for name, part in measured.items()}
    linear = {name: report(retrodiction_skill("linear", part)) for name, part in held_out.items()}
    rows = []
    with tqdm(total=len(settings) * len(args.seeds), desc="ablations") as bar:
        for setting in settings:
            found = []
            for seed in args.seeds:
                bar.set_postfix_str(f"{setting.group} {setting.value}, seed {seed}")
                name = f"{setting.group}-{setting.value}-{seed}".replace(" ", "_")
                if (result := cells.read(name)) is None:
                    result = train(setting, seed, held_out, args)
                    cells.write(name, result)
                found.append(result)
                bar.update()
            rows.append({**describe(setting), "seeds": args.seeds, "results": found})
    command = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    results = {"arguments": command, "trained_on": len(settings[0].trajectories), "linear": linear, "rows": rows}
    text = "\n\n".join([*tables(rows, linear, list(splits)), *ratio_tables(rows)])
    write_json(args.output_dir / "ablations.json", results)
    (args.output_dir / "ablations.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def make_settings(train: "list[CollectedTrajectory]", args: argparse.Namespace) -> list[Setting]:
    """All rows: the defaults first, then one change each. Subsets are nested and drawn with a seed of their own."""
    shuffled = random.Random(0).sample(train, len(train))
    every = tuple(train)
    settings = [Setting("defaults", "S = 5, three networks, all trajectories", every)]
    settings += [Setting("states", f"S = {number}", every, num_states=number) for number in (2, 3, 4)]
    settings += [Setting("networks", "one for all roles", every, one_network=True)]
    ratios = {value: part for value, part in by_ratio(shuffled).items() if len(part) >= FEWEST}
    if len(ratios) > 1:
        count = min(len(part) for part in ratios.values())
        settings += [Setting("ratio", value, tuple(part[:count])) for value, part in ratios.items()]
        settings += [Setting("ratio", "any", tuple(shuffled[:count]))]
    settings += [Setting("trajectories", str(n), tuple(shuffled[:n])) for n in args.counts if n < len(train)]
    settings += [Setting("loss", "relative", every, loss_weighting="relative")]
    return [setting for setting in settings if not args.only or setting.group in {"defaults", *args.only}]


def by_ratio(trajectories: "Sequence[CollectedTrajectory]") -> "dict[str, list[CollectedTrajectory]]":
    """The trajectories whose drawn ratio lies near each of the three, in their order."""
    parts: dict[str, list[CollectedTrajectory]] = {value: [] for value in RATIO_BOUNDS}
    for trajectory in trajectories:
        ratio = trajectory.of_schedule("ratio")
        for value, (low, high) in RATIO_BOUNDS.items():
            if ratio is not None and low <= ratio < high:
                parts[value].append(trajectory)
    return parts


def fingerprint(trajectories: "Sequence[CollectedTrajectory]") -> str:
    """Hash of the weights of all of them, in their order; other trajectories may have the same names."""
    from know_hf.meta_learning.state_readers import open_states

    digest = hashlib.sha256()
    for trajectory in trajectories:
        source = open_states(trajectory.path)
        digest.update(source.fingerprint.encode())
        source.close()
    return digest.hexdigest()


def dataset(
    trajectories: "Sequence[CollectedTrajectory]", num_states: int, max_per_tensor: int, args: argparse.Namespace
) -> "TransitionDataset":
    from know_hf import TransitionDataset

    paths = [trajectory.path for trajectory in trajectories]
    return TransitionDataset(paths, num_states, max_per_tensor, cache_dir=args.cache_dir, progress=False)


def train(
    setting: Setting, seed: int, held_out: "dict[str, TransitionDataset]", args: argparse.Namespace
) -> dict[str, Any]:
    from know_hf import KNOWNConfig, meta_train
    from know_hf.meta_learning import MetaTrainingArguments, retrodiction_skill

    transitions = dataset(setting.trajectories, setting.num_states, args.max_per_tensor, args)
    batch_size = args.batch_size
    if setting.one_network:
        transitions = transitions.with_one_role("fc")
        batch_size *= len(ROLES)  # as many transitions a step as the three networks see together
    training = MetaTrainingArguments(
        steps=args.steps, batch_size=batch_size, seed=seed, loss_weighting=setting.loss_weighting
    )
    result = meta_train(KNOWNConfig(num_states=setting.num_states), transitions, args=training, progress=False)
    networks = result.model.networks
    if setting.one_network:
        for role in ROLES:
            networks[role].load_state_dict(networks["fc"].state_dict())
    predictor = LastStates(result.model)
    skill = {name: report(retrodiction_skill(predictor, part)) for name, part in held_out.items()}
    return {"skill": skill, "seconds": result.seconds, "transitions": len(transitions)}


def report(by_role: "dict[str, RoleSkill]") -> dict[str, dict[str, Any]]:
    import math

    return {
        role: {
            "skill": skill.skill if math.isfinite(skill.skill) else None,
            "median": skill.median if math.isfinite(skill.median) else None,
            "above_zero": sum(value > 0 for value in skill.by_trajectory.values()),
            "trajectories": len(skill.by_trajectory),
        }
        for role, skill in by_role.items()
    }


def describe(setting: Setting) -> dict[str, Any]:
    return {**asdict(setting), "trajectories": [trajectory.name for trajectory in setting.trajectories]}


def tables(rows: list[dict[str, Any]], linear: dict[str, Any], splits: list[str]) -> list[str]:
    """A table a held-out split: skill by role, mean over the seeds, and in brackets half of their range."""
    texts = []
    for split in splits:
        counts = {role: found["trajectories"] for role, found in linear[split].items()}
        lines = [f"**{split}** ({', '.join(f'{role}: {count} trajectories' for role, count in counts.items())})", ""]
        roles = list(linear[split])
        lines += [table_line(["", "trained on", *roles, *(f"{role}, median" for role in roles), "seconds"])]
        lines += [table_line(["---"] * (3 + 2 * len(roles)))]
        for row in rows:
            name = row["value"] if row["group"] == "defaults" else f"{row['group']}: {row['value']}"
            values = [mean_and_range(row, split, role, key) for key in ("skill", "median") for role in roles]
            seconds = sum(result["seconds"] for result in row["results"]) / len(row["results"])
            lines += [table_line([name, str(len(row["trajectories"])), *values, f"{seconds:.0f}"])]
        rival = [f"{linear[split][role][key]:+.3f}" for key in ("skill", "median") for role in roles]
        lines += [table_line(["linear fit, no learning", "0", *rival, ""])]
        texts.append("\n".join(lines))
    return texts


def ratio_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Trained near one ratio, measured near another; by role, over all held-out splits."""
    chosen = [row for row in rows if row["group"] == "ratio"]
    if not chosen:
        return []
    measured = [name for name in chosen[0]["results"][0]["skill"] if name.startswith("r near")]
    lines = ["**Trained near one ratio (rows), measured near another (columns), all held-out splits**", ""]
    roles = list(chosen[0]["results"][0]["skill"][measured[0]])
    lines += [table_line(["trained on", *(f"{role}, {name}" for role in roles for name in measured)])]
    lines += [table_line(["---"] * (1 + len(roles) * len(measured)))]
    for row in chosen:
        values = [mean_and_range(row, name, role, "skill") for role in roles for name in measured]
        lines += [table_line([f"r near {row['value']}" if row["value"] != "any" else "any r", *values])]
    return ["\n".join(lines)]


def mean_and_range(row: dict[str, Any], split: str, role: str, key: str) -> str:
    values = [result["skill"][split].get(role, {}).get(key) for result in row["results"]]
    if None in values:
        return ""
    return f"{sum(values) / len(values):+.3f} ({(max(values) - min(values)) / 2:.3f})"


def table_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trajectories", nargs="+", required=True, help="collections of recipes/collect")
    add("--output_dir", type=Path, required=True, help="folder for the table and the finished cells")
    add("--held_out", nargs="*", default=[], help="names or patterns; default: the splits the collection names")
    add("--cache_dir", default=None, help="folder that keeps what was drawn; default: memory, drawn for each row")
    add("--only", nargs="*", default=[], help="groups of rows besides the defaults: states networks ratio …")
    add("--counts", nargs="*", type=int, default=[12, 25, 50], help="numbers of trajectories (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="(default: %(default)s)")
    add("--steps", type=int, default=1000, help="optimizer steps of every row (default: %(default)s)")
    add("--batch_size", type=int, default=1024, help="transitions of each role a step (default: %(default)s)")
    add("--max_per_tensor", type=int, default=4096, help="scalars drawn from a tensor (default: %(default)s)")
    add("--evaluated_per_tensor", type=int, default=4096, help="the same where it is held out (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
