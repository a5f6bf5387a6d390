"""Recordings of common tasks: [`record_task`] builds model, processor, data and `Trainer` from a few arguments.

output_dir/
  record.json      the arguments; later runs into the folder must have the same
  trajectory/      the states, a [`WeightTrajectory`]
  forgetting.png   the forgetting curve, if matplotlib is installed and the states were evaluated
  trainer/         files of the Trainer, such as its logs
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint import check_output, read_json_object, write_json
from ..local_paths import explicit_path
from ..plotting import forgetting_picture, save_figure
from ..recording import induce_forgetting
from ..trajectory import WeightTrajectory
from .arguments import RecordArguments
from .task_data import VALIDATION_SPLITS, find_split
from .trainer_parts import prepare_task, training_arguments

_TRAJECTORY_NAME = "trajectory"
_ARGUMENTS_NAME = "record.json"
_PICTURE_NAME = "forgetting.png"


def record_task(args: RecordArguments) -> WeightTrajectory:
    """Fine-tune a model on smaller and smaller subsets of a dataset and record every state in
    `args.output_dir/trajectory`.

    A second call with the same arguments resumes at the first missing state.

    Raises:
        `ValueError`: see [`induce_forgetting`]; also when the columns of the dataset do not fit the task, for a key of
            `args.training` that `TrainingArguments` does not have, and when the folder holds a trajectory that was
            recorded with different arguments.
        `FileExistsError`: when the folder has a `record.json` or `forgetting.png` from another program.
    """
    output_dir = Path(args.output_dir)
    training = training_arguments(args)
    with training.main_process_first(desc="arguments"):
        args = _check_or_write_arguments(args, output_dir, write=training.process_index == 0)
    trainer = prepare_task(args).make_trainer()
    trajectory = induce_forgetting(
        trainer,
        args.schedule,
        output_dir / _TRAJECTORY_NAME,
        start=args.start,  # type: ignore[arg-type]
        start_weights=args.start_weights,  # type: ignore[arg-type]
    )
    if trainer.is_world_process_zero() and (picture := forgetting_picture(trajectory)) is not None:
        save_figure(picture, output_dir / _PICTURE_NAME)
    return trajectory


def read_arguments(path: Path) -> RecordArguments:
    """Read `record.json`.

    The `eval_split="auto"` of know_hf 0.2 and older, which took the test split of a dataset without validation split,
    becomes the name of the split that it took.
    """
    content = read_json_object(path)
    args = RecordArguments.from_dict(content, str(path))
    if args.eval_split == "auto" and "kind" not in content:
        args = replace(args, eval_split=find_split(args, (*VALIDATION_SPLITS, "test")))
    return args


def _check_or_write_arguments(args: RecordArguments, output_dir: Path, write: bool) -> RecordArguments:
    """Compare the arguments with those of a trajectory in the folder, on every process; the main one writes them.

    Returns them with `eval_split="auto"` as the recording began.
    """
    path = output_dir / _ARGUMENTS_NAME
    if path.exists() and WeightTrajectory.exists(output_dir / _TRAJECTORY_NAME):
        recorded = read_arguments(path)
        if args.eval_split == "auto":
            args = replace(args, eval_split=recorded.eval_split)
        old = _with_explicit_paths(recorded.to_dict())
        new = json.loads(json.dumps(_with_explicit_paths(args.to_dict())))
        for key in sorted(new.keys() - {"output_dir"}):
            if old[key] != new[key]:
                raise ValueError(
                    f"{output_dir} was recorded with {key}={old[key]!r}, not {new[key]!r}; use the same value to"
                    " resume, or another output_dir"
                )
    elif write:
        check_output(output_dir, [args.model, args.dataset], replaces=False)
        is_own = path.exists() and read_json_object(path).keys() >= {"task", "model", "dataset"}
        for file in (path, output_dir / _PICTURE_NAME) if not is_own else ():
            if file.exists():
                raise FileExistsError(f"{file} is not of a recording and would be replaced; use another output_dir")
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, _with_explicit_paths(args.to_dict()))
    return args


def _with_explicit_paths(content: dict[str, Any]) -> dict[str, Any]:
    return content | {key: explicit_path(content[key]) for key in ("model", "dataset") if key in content}
