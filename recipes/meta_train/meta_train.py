r"""Meta-trains KNOWN on a folder of trajectories and reports its skill on held-out ones.

python recipes/meta_train/meta_train.py --config recipes/meta_train/known_base.yaml \
    --trajectories known_data --output_dir known-base

Flags override the YAML. Writes the model as `save_pretrained` does, and results.json with the skill by role beside
that of the predictors that need no learning.
"""

import argparse
import fnmatch
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from know_hf.meta_learning import MetaTrainingArguments, RoleSkill

RECIPE_NAME = "recipe.json"
BASELINES = ("shrink", "average", "linear")


@dataclass
class ScriptArguments:
    """Where the trajectories are, which of them are held out, and where the model goes."""

    trajectories: str = field(metadata={"help": "Folder with one folder a trajectory."})
    output_dir: str = field(metadata={"help": "Folder for the model and results.json."})
    held_out: list[str] | None = field(
        default=None,
        metadata={"help": "Names or patterns of held-out trajectories; default: the split each recipe.json names."},
    )
    num_states: int = field(default=5, metadata={"help": "Length S of a history."})
    max_per_tensor: int = field(default=4096, metadata={"help": "Scalars drawn from a tensor to train on."})


def main(script_arguments: ScriptArguments, training_arguments: "MetaTrainingArguments") -> dict[str, Any]:
    from know_hf import KNOWNConfig, TransitionDataset, meta_train
    from know_hf.checkpoint import write_json
    from know_hf.meta_learning import retrodiction_skill

    train_paths, held_out_paths = split(Path(script_arguments.trajectories), script_arguments.held_out)
    num_states, seed = script_arguments.num_states, training_arguments.seed
    train = TransitionDataset(train_paths, num_states, script_arguments.max_per_tensor, seed)
    held_out = TransitionDataset(held_out_paths, num_states, max_per_tensor=None)
    result = meta_train(KNOWNConfig(num_states=num_states), train, held_out, args=training_arguments)
    skill = {"known": result.held_out_skill} | {name: retrodiction_skill(name, held_out) for name in BASELINES}
    results = {
        "held_out_skill": {name: summary(by_role) for name, by_role in skill.items()},
        "train_skill": summary(result.train_skill),
        "held_out_skill_by_trajectory": {
            role: {Path(path).name: value for path, value in found.by_trajectory.items()}
            for role, found in result.held_out_skill.items()
        },
        "trained_on": [path.name for path in train_paths],
        "held_out": [path.name for path in held_out_paths],
        "losses": result.losses,
        "seconds": result.seconds,
        "num_states": num_states,
        "max_per_tensor": script_arguments.max_per_tensor,
        "training_arguments": asdict(training_arguments),
    }
    output_dir = Path(script_arguments.output_dir)
    result.model.save_pretrained(output_dir)
    write_json(output_dir / "results.json", results)
    print(table(results["held_out_skill"], len(train_paths), len(held_out_paths)))
    return results


def split(folder: Path, held_out: list[str] | None) -> tuple[list[Path], list[Path]]:
    """The trajectories of a folder to train on and those held out, sorted by name."""
    paths = sorted(path.parent for path in folder.glob("*/trajectory.json"))
    if held_out is None:
        chosen = [path for path in paths if recorded_split(path) == "held_out"]
    else:
        if unused := [pattern for pattern in held_out if not any(fnmatch.fnmatch(p.name, pattern) for p in paths)]:
            raise ValueError(f"no trajectory in {folder} matches held_out {', '.join(unused)}; name one that is there")
        chosen = [path for path in paths if any(fnmatch.fnmatch(path.name, pattern) for pattern in held_out)]
    if not chosen or len(chosen) == len(paths):
        raise ValueError(
            f"{len(chosen)} of {len(paths)} trajectories in {folder} are held out; some must be, and some must not"
        )
    return [path for path in paths if path not in chosen], chosen


def recorded_split(path: Path) -> str:
    """What recipes/collect wrote down before it recorded the trajectory."""
    recipe = path / RECIPE_NAME
    if not recipe.is_file():
        raise ValueError(f"{path} has no {RECIPE_NAME} that says whether it is held out; give --held_out with names")
    return json.loads(recipe.read_text(encoding="utf-8"))["split"]


def summary(by_role: "dict[str, RoleSkill]") -> dict[str, dict[str, float]]:
    return {
        role: {
            "skill": found.skill,
            "error": found.error,
            "no_change": found.no_change,
            "transitions": found.transitions,
            "trajectories": len(found.by_trajectory),
            "trajectories_above_zero": sum(value > 0 for value in found.by_trajectory.values()),
        }
        for role, found in by_role.items()
    }


def table(skill: dict[str, dict[str, dict[str, float]]], num_train: int, num_held_out: int) -> str:
    roles = list(skill["known"])
    lines = [
        f"skill against 'nothing changed' on {num_held_out} held-out trajectories, {num_train} trained on"
        " (in brackets: trajectories above 0)",
        f"{'':10}" + "".join(f"{role:>20}" for role in roles),
    ]
    for name, by_role in skill.items():
        cells = [
            f"{by_role[r]['skill']:+.4f} ({by_role[r]['trajectories_above_zero']}/{by_role[r]['trajectories']})"
            for r in roles
        ]
        lines.append(f"{name:10}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def make_parser() -> "HfArgumentParser":
    from transformers import HfArgumentParser

    from know_hf.meta_learning import MetaTrainingArguments

    return HfArgumentParser(
        [ScriptArguments, MetaTrainingArguments],
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config FILE reads any of these from a YAML file, without their dashes.",
    )


def parse_arguments(argv: list[str] | None = None) -> "tuple[ScriptArguments, MetaTrainingArguments]":
    """Reads the flags; what `--config` names comes first, so that a flag overrides it."""
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=Path)
    found, flags = config_parser.parse_known_args(argv)
    if found.config is not None:
        import yaml

        content = yaml.safe_load(found.config.read_text(encoding="utf-8"))
        lists = {key: value if isinstance(value, list) else [value] for key, value in content.items()}
        flags = [flag for key, values in lists.items() for flag in (f"--{key}", *map(str, values))] + flags
    return make_parser().parse_args_into_dataclasses(args=flags)


if __name__ == "__main__":
    main(*parse_arguments())
