r"""Meta-train KNOWN on collections of trajectories and report its skill on held-out ones.

python recipes/meta_train/meta_train.py --config recipes/meta_train/known_base.yaml \
    --trajectories known_data --output-dir known-base
ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 recipes/meta_train/meta_train.py --config … (as above)

Flags override the YAML. Writes the model in the format of `save_pretrained`, and results.json with the skill of KNOWN
and of predictors without learning, by held-out split and role. An interrupted run resumes from its last checkpoint.
"""

import argparse
import math
import random
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from know_hf import KNOWNConfig, KNOWNModel
    from know_hf.meta_learning import CollectedTrajectory, MetaTrainingArguments, MetaTrainingResult, RoleSkill
    from know_hf.predictors import Predictor

MAIN_SPLIT = "held_out_trajectory"
LOCAL_ARGUMENTS = ("checkpoint_dir", "logging_dir", "report_to")  # specific to a machine, not written to results.json


@dataclass
class ScriptArguments:
    """Arguments for data, output and comparison."""

    trajectories: list[str] = field(metadata={"help": "Collections, folders of trajectories, or .h5 files."})
    output_dir: str = field(metadata={"help": "Folder for the model, results.json and checkpoints."})
    held_out: list[str] = field(
        default_factory=list,
        metadata={"help": "Names or patterns of held-out trajectories; default: the splits of the collection."},
    )
    validation_share: float = field(
        default=0.0, metadata={"help": "Share of the training trajectories that is used for validation instead."}
    )
    num_states: int = field(default=5, metadata={"help": "Length S of a history."})
    max_per_tensor: int = field(default=4096, metadata={"help": "Scalars drawn from each training tensor."})
    evaluated_per_tensor: int = field(default=65536, metadata={"help": "Scalars drawn from each held-out tensor."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder in which drawn scalars are cached; default: memory."}
    )
    predictors: list[str] = field(
        default_factory=lambda: ["linear", "log", "average", "shrink", "ema", "task_vector"],
        metadata={"help": "Names of predictors without learning to compare with."},
    )
    published_weights: str | None = field(
        default=None, metadata={"help": "Folder with the published KNOWN_Conv.h5, KNOWN_FC.h5 and KNOWN_Bias.h5."}
    )


def main(args: ScriptArguments, training_args: "MetaTrainingArguments") -> dict[str, Any]:
    from know_hf import KNOWNConfig, TransitionDataset, meta_train
    from know_hf.checkpoint import apply_umask, check_output, write_json
    from know_hf.meta_learning import read_collection, retrodiction_skill, split_collection, start_processes

    processes = start_processes()
    is_main = processes.is_main_process
    output_dir = Path(args.output_dir)
    check_output(output_dir, filter(None, [*args.trajectories, args.published_weights]), replaces=False)
    splits = split_collection(read_collection(args.trajectories, args.num_states), args.held_out)
    splits["train"], validation_trajectories = split_share(splits["train"], args.validation_share, training_args.seed)
    config = KNOWNConfig(num_states=args.num_states)
    baselines = load_baselines(args, config)

    def load(trajectories: "list[CollectedTrajectory]", max_per_tensor: int) -> TransitionDataset:
        paths = [trajectory.path for trajectory in trajectories]
        return TransitionDataset(
            paths, args.num_states, max_per_tensor, training_args.seed, args.cache_dir, progress=is_main
        )

    train = load(splits["train"], args.max_per_tensor)
    validation = load(validation_trajectories, args.max_per_tensor) if validation_trajectories else None
    held_out = {name: load(part, args.evaluated_per_tensor) for name, part in splits.items() if name != "train"}
    if training_args.checkpoint_dir is None:
        training_args = replace(training_args, checkpoint_dir=str(output_dir / "checkpoints"))
    result = meta_train(config, train, held_out, validation=validation, args=training_args, progress=is_main)
    skill = {
        name: {"known": result.held_out_skill[name]}
        | {baseline: retrodiction_skill(predictor, split, processes) for baseline, predictor in baselines.items()}
        for name, split in held_out.items()
    }
    results = {
        **summarize(result, skill, splits),
        "validation": [trajectory.name for trajectory in validation_trajectories],
        "num_states": args.num_states,
        "max_per_tensor": args.max_per_tensor,
        "evaluated_per_tensor": args.evaluated_per_tensor,
        "training_arguments": {k: v for k, v in asdict(training_args).items() if k not in LOCAL_ARGUMENTS},
    }
    if is_main:
        result.model.save_pretrained(output_dir)
        apply_umask(output_dir / "model.safetensors")
        write_json(output_dir / "results.json", results)
        for name, report in results["splits"].items():
            print(format_table(name, report["skill"], len(splits["train"]), len(report["trajectories"])))
    processes.destroy_process_group()
    return results


def split_share(
    trajectories: "list[CollectedTrajectory]", share: float, seed: int
) -> "tuple[list[CollectedTrajectory], list[CollectedTrajectory]]":
    """Split off a random share of the trajectories; returns the remaining ones and the share."""
    if not 0 <= share < 1:
        raise ValueError(f"validation_share must be in [0, 1), got {share}")
    drawn = {t.path for t in random.Random(seed).sample(trajectories, math.ceil(share * len(trajectories)))}
    return [t for t in trajectories if t.path not in drawn], [t for t in trajectories if t.path in drawn]


def load_baselines(args: ScriptArguments, config: "KNOWNConfig") -> "dict[str, KNOWNModel | Predictor]":
    """Load the published weights, if given, and the predictors without learning.

    Raises:
        `ValueError` or `TypeError`: If a predictor cannot be created, or takes another number of states.
    """
    from know_hf import KNOWNModel
    from know_hf.predictors import DepthPredictor, SnapshotPredictor, get_predictor

    baselines: dict[str, KNOWNModel | Predictor] = {}
    if args.published_weights is not None:
        baselines["published"] = KNOWNModel.from_keras(args.published_weights, config)
    for name in args.predictors:
        predictor = get_predictor(name)
        if isinstance(predictor, DepthPredictor | SnapshotPredictor):
            needs = "the depth of each layer" if isinstance(predictor, DepthPredictor) else "complete tensors"
            raise ValueError(f"predictor {name!r} needs {needs}, which transitions lack; remove it")
        if predictor.num_states not in (None, config.num_states):
            raise ValueError(
                f"predictor {name!r} takes {predictor.num_states} states, but num_states={config.num_states}; remove "
                f"it, or train with num_states={predictor.num_states}"
            )
        baselines[name] = predictor
    return baselines


def summarize(
    result: "MetaTrainingResult",
    skill: "dict[str, dict[str, dict[str, RoleSkill]]]",
    splits: "dict[str, list[CollectedTrajectory]]",
) -> dict[str, Any]:
    """Summarize a training and the skill by split, predictor and role as JSON values."""
    reports = {
        name: {
            "trajectories": [trajectory.name for trajectory in splits[name]],
            "skill": {
                predictor: {role: of_role.to_dict() for role, of_role in by_role.items()}
                for predictor, by_role in by_predictor.items()
            },
            "skill_by_trajectory": {
                role: {
                    Path(path).name: value if math.isfinite(value) else None
                    for path, value in of_role.by_trajectory.items()
                }
                for role, of_role in by_predictor["known"].items()
            },
        }
        for name, by_predictor in skill.items()
    }
    main_report = reports[MAIN_SPLIT if MAIN_SPLIT in skill else next(iter(skill))]
    return {
        "held_out_skill": main_report["skill"],
        "held_out_skill_by_trajectory": main_report["skill_by_trajectory"],
        "held_out": main_report["trajectories"],
        "splits": reports,
        "train_skill": {role: of_role.to_dict() for role, of_role in result.train_skill.items()},
        "trained_on": [trajectory.name for trajectory in splits["train"]],
        "validation_skill": result.validation,
        "losses": result.losses,
        "seconds": result.seconds,
        "steps_done": result.steps_done,
        "best_step": result.best_step,
        "num_processes": result.num_processes,
        "mixed_precision": result.mixed_precision,
    }


def format_table(split: str, skill: dict[str, dict[str, dict[str, Any]]], num_train: int, num_held_out: int) -> str:
    lines = [
        f"{split}: skill against 'nothing changes' on {num_held_out} trajectories, after training on {num_train}"
        " (in brackets: trajectories with a skill above 0)",
        f"{'':12}" + "".join(f"{role:>20}" for role in skill["known"]),
    ]
    for name, by_role in skill.items():
        cells = []
        for of_role in by_role.values():
            value = "-inf" if of_role["skill"] is None else f"{of_role['skill']:+.4f}"
            cells.append(f"{value} ({of_role['trajectories_above_zero']}/{of_role['trajectories']})")
        lines.append(f"{name:12}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def make_parser() -> "HfArgumentParser":
    from transformers import HfArgumentParser

    from know_hf.meta_learning import MetaTrainingArguments

    return HfArgumentParser(
        [ScriptArguments, MetaTrainingArguments],
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config FILE reads arguments from a YAML file.",
    )


def parse_arguments(argv: list[str] | None = None) -> "tuple[ScriptArguments, MetaTrainingArguments]":
    """Parse the flags; they override the YAML file of `--config`."""
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=Path)
    config, flags = config_parser.parse_known_args(argv)
    if config.config is not None:
        from know_hf.config_files import read_yaml

        content = read_yaml(config.config, "recipes/meta_train/known_base.yaml is an example")
        values = {key: value if isinstance(value, list) else [value] for key, value in content.items()}
        flags = [
            flag for key, value in values.items() if value != [None] for flag in (f"--{key}", *map(str, value))
        ] + flags
    return make_parser().parse_args_into_dataclasses(args=flags)


if __name__ == "__main__":
    from know_hf.terminal import run_program

    sys.exit(run_program("meta_train.py", lambda: main(*parse_arguments())))
