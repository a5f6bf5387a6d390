r"""Meta-trains KNOWN on collections of trajectories and reports its skill on held-out ones.

python recipes/meta_train/meta_train.py --config recipes/meta_train/known_base.yaml \
    --trajectories known_data --output_dir known-base
ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 recipes/meta_train/meta_train.py --config … (as above)

Flags override the YAML. Writes the model as `save_pretrained` does, and results.json with the skill of every held-out
split by role, beside that of predictors that need no learning. A run that was ended goes on from its last checkpoint.
"""

import argparse
import math
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from know_hf import KNOWNConfig, KNOWNModel
    from know_hf.meta_learning import CollectedTrajectory, MetaTrainingArguments, RoleSkill
    from know_hf.predictors import Predictor

MAIN_SPLIT = "held_out_trajectory"
PLACES = ("checkpoint_dir", "logging_dir", "report_to")  # of one machine; results.json goes to others


@dataclass
class ScriptArguments:
    """Where the trajectories are, which of them are held out, and where the model goes."""

    trajectories: list[str] = field(metadata={"help": "Collections, folders of trajectories, or .h5 files."})
    output_dir: str = field(metadata={"help": "Folder for the model, results.json and checkpoints."})
    held_out: list[str] = field(
        default_factory=list,
        metadata={"help": "Names or patterns of held-out trajectories; default: the splits the collection names."},
    )
    validation_share: float = field(
        default=0.0, metadata={"help": "Share of the trajectories to train on that is only looked at on the way."}
    )
    num_states: int = field(default=5, metadata={"help": "Length S of a history."})
    max_per_tensor: int = field(default=4096, metadata={"help": "Scalars drawn from a tensor to train on."})
    evaluated_per_tensor: int = field(default=65536, metadata={"help": "Scalars drawn from a tensor held out."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps what was drawn; default: it stays in memory."}
    )
    predictors: list[str] = field(
        default_factory=lambda: ["linear", "log", "average", "shrink", "ema", "task_vector"],
        metadata={"help": "Predictors without learning to compare with, by their names."},
    )
    published_weights: str | None = field(
        default=None, metadata={"help": "Folder with the published KNOWN_Conv.h5, KNOWN_FC.h5 and KNOWN_Bias.h5."}
    )


def main(script_arguments: ScriptArguments, training_arguments: "MetaTrainingArguments") -> dict[str, Any]:
    from know_hf import KNOWNConfig, TransitionDataset, meta_train
    from know_hf.checkpoint import write_json
    from know_hf.meta_learning import read_collection, retrodiction_skill, split_collection, start_processes

    processes = start_processes()
    is_main = processes.is_main_process
    output_dir = Path(script_arguments.output_dir)
    num_states, seed = script_arguments.num_states, training_arguments.seed
    found = read_collection(script_arguments.trajectories, num_states)
    splits = split_collection(found, script_arguments.held_out)
    splits["train"], validation_paths = take_share(splits["train"], script_arguments.validation_share, seed)
    config = KNOWNConfig(num_states=num_states)
    rivals = comparisons(script_arguments, config)

    def dataset(trajectories: "list[CollectedTrajectory]", max_per_tensor: int) -> TransitionDataset:
        paths = [trajectory.path for trajectory in trajectories]
        cache_dir = script_arguments.cache_dir
        return TransitionDataset(paths, num_states, max_per_tensor, seed, cache_dir, progress=is_main)

    train = dataset(splits["train"], script_arguments.max_per_tensor)
    validation = dataset(validation_paths, script_arguments.max_per_tensor) if validation_paths else None
    held_out = {
        name: dataset(trajectories, script_arguments.evaluated_per_tensor)
        for name, trajectories in splits.items()
        if name != "train"
    }
    if training_arguments.checkpoint_dir is None:
        training_arguments = replace(training_arguments, checkpoint_dir=str(output_dir / "checkpoints"))
    result = meta_train(config, train, held_out, validation=validation, args=training_arguments, progress=is_main)
    skill = {
        name: {"known": result.held_out_skill[name]}
        | {rival: retrodiction_skill(predictor, split, processes) for rival, predictor in rivals.items()}
        for name, split in held_out.items()
    }
    main_split = MAIN_SPLIT if MAIN_SPLIT in skill else next(iter(skill))
    reports = {
        name: {
            "trajectories": [trajectory.name for trajectory in splits[name]],
            "skill": {predictor: summary(by_role) for predictor, by_role in skill[name].items()},
            "skill_by_trajectory": {
                role: {Path(path).name: number(value) for path, value in of_role.by_trajectory.items()}
                for role, of_role in result.held_out_skill[name].items()
            },
        }
        for name in skill
    }
    results = {
        "held_out_skill": reports[main_split]["skill"],
        "held_out_skill_by_trajectory": reports[main_split]["skill_by_trajectory"],
        "held_out": reports[main_split]["trajectories"],
        "splits": reports,
        "train_skill": summary(result.train_skill),
        "trained_on": [trajectory.name for trajectory in splits["train"]],
        "validation": [trajectory.name for trajectory in validation_paths],
        "validation_skill": result.validation,
        "losses": result.losses,
        "seconds": result.seconds,
        "steps_done": result.steps_done,
        "best_step": result.best_step,
        "num_processes": result.num_processes,
        "mixed_precision": result.mixed_precision,
        "num_states": num_states,
        "max_per_tensor": script_arguments.max_per_tensor,
        "evaluated_per_tensor": script_arguments.evaluated_per_tensor,
        "training_arguments": {k: v for k, v in asdict(training_arguments).items() if k not in PLACES},
    }
    if is_main:
        result.model.save_pretrained(output_dir)
        write_json(output_dir / "results.json", results)
        for name, report in reports.items():
            print(table(name, report["skill"], len(splits["train"]), len(report["trajectories"])))
    processes.destroy_process_group()
    return results


def take_share(
    trajectories: "list[CollectedTrajectory]", share: float, seed: int
) -> "tuple[list[CollectedTrajectory], list[CollectedTrajectory]]":
    """The trajectories to train on and, drawn from them, those to look at on the way."""
    if not 0 <= share < 1:
        raise ValueError(f"validation_share={share}: choose a share from 0 to below 1")
    count = math.ceil(share * len(trajectories))
    chosen = {t.path for t in random.Random(seed).sample(trajectories, count)}
    return [t for t in trajectories if t.path not in chosen], [t for t in trajectories if t.path in chosen]


def comparisons(script_arguments: ScriptArguments, config: "KNOWNConfig") -> "dict[str, KNOWNModel | Predictor]":
    """What the trained model is compared with: the published weights where given, and simple predictors.

    Raises:
        `ValueError` or `TypeError`: when one can't be made, or takes histories of another length than the model.
    """
    from know_hf import KNOWNModel
    from know_hf.predictors import DepthPredictor, get_predictor

    rivals: dict[str, KNOWNModel | Predictor] = {}
    if script_arguments.published_weights is not None:
        rivals["published"] = KNOWNModel.from_keras(script_arguments.published_weights, config)
    for name in script_arguments.predictors:
        predictor = get_predictor(name)
        if isinstance(predictor, DepthPredictor):
            raise ValueError(f"{name!r} has to know how deep a layer lies, which is not told here; leave it out")
        if predictor.num_states not in (None, config.num_states):
            raise ValueError(
                f"{name!r} takes {predictor.num_states} states, num_states={config.num_states}; leave it out, or train"
                f" with num_states={predictor.num_states}"
            )
        rivals[name] = predictor
    return rivals


def summary(by_role: "dict[str, RoleSkill]") -> dict[str, dict[str, float | None]]:
    return {
        role: {
            "skill": number(found.skill),
            "median": number(found.median),
            "error": found.error,
            "no_change": found.no_change,
            "transitions": found.transitions,
            "trajectories": len(found.by_trajectory),
            "trajectories_above_zero": sum(value > 0 for value in found.by_trajectory.values()),
        }
        for role, found in by_role.items()
    }


def number(value: float) -> float | None:
    """A skill as JSON has it: minus infinity, where nothing moved and something was predicted, is no number there."""
    return value if math.isfinite(value) else None


def table(split: str, skill: dict[str, dict[str, dict[str, Any]]], num_train: int, num_held_out: int) -> str:
    lines = [
        f"{split}: skill against 'nothing changed' on {num_held_out} trajectories, {num_train} trained on"
        " (in brackets: trajectories above 0)",
        f"{'':12}" + "".join(f"{role:>20}" for role in skill["known"]),
    ]
    for name, by_role in skill.items():
        cells = []
        for found in by_role.values():
            value = "-inf" if found["skill"] is None else f"{found['skill']:+.4f}"
            cells.append(f"{value} ({found['trajectories_above_zero']}/{found['trajectories']})")
        lines.append(f"{name:12}" + "".join(f"{cell:>20}" for cell in cells))
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
        told = {key: value for key, value in content.items() if value is not None}
        lists = {key: value if isinstance(value, list) else [value] for key, value in told.items()}
        flags = [flag for key, values in lists.items() for flag in (f"--{key}", *map(str, values))] + flags
    return make_parser().parse_args_into_dataclasses(args=flags)


if __name__ == "__main__":
    main(*parse_arguments())
