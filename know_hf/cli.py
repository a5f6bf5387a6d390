"""`know-hf`: each command covers one public function. Heavy imports wait until a command runs."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .config_files import add_flags, read_flags
from .tasks import RecordArguments
from .terminal import run_program

_DTYPES = ("float32", "bfloat16", "float16")
_TRAJECTORY: dict[str, Any] = {"metavar": "TRAJECTORY", "help": "folder with trajectory.json"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments after the program name; defaults to those of the process. `--output_dir` is `--output-dir`.

    Returns:
        `int`: 0; 1 after an error, which is printed to standard error with its notes; 130 after Ctrl-C.
    """
    args = make_parser().parse_args([_dashed(arg) for arg in (sys.argv[1:] if argv is None else argv)])
    if code := run_program(f"know-hf {args.command}", lambda: args.run(args)):
        return code
    _destroy_process_group()
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    description = "Record how a model forgets, predict weights from the recording, and test whether they are better."
    parser = argparse.ArgumentParser(prog="know-hf", description=description)
    parser.add_argument("--version", action="version", version=f"know_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_quickstart,
        _add_record,
        _add_import,
        _add_inspect,
        _add_merge,
        _add_predict,
        _add_compare,
        _add_push_pull,
    ):
        add(commands)
    return parser


def _add_quickstart(commands: Any) -> None:
    add = _add_command(commands, _quickstart, "record, predict and compare on small images, offline").add_argument
    add("--output-dir", required=True, metavar="DIR", help="folder for all files")
    add("--seed", type=int, default=0, metavar="N", help="first seed of the comparison (default: 0)")


def _quickstart(args: argparse.Namespace) -> None:
    from .evaluation.suites import run_quickstart

    _print(str(run_quickstart(args.output_dir, seed=args.seed)))


def _add_record(commands: Any) -> None:
    parser = _add_command(
        commands,
        _record,
        "fine-tune a model on smaller and smaller subsets of a dataset and record every state",
        "Flags override the YAML file. A second run with the same arguments resumes at the first missing state.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; its keys are the flags below with _ for -")
    parser.add_argument("--plan", action="store_true", help="print steps, cost and disk without training")
    add_flags(parser, RecordArguments)


def _record(args: argparse.Namespace) -> None:
    flags = read_flags(args, RecordArguments)  # before the heavy imports: a typo is reported at once
    read = RecordArguments.from_yaml
    arguments = read(args.config, flags) if args.config else RecordArguments.from_dict(flags, "the flags")

    from accelerate import PartialState

    from .prediction.selection import MINIMUM_VALUES
    from .tasks.record import record_and_count
    from .tasks.recording_plan import plan_task

    if args.plan:
        plan = plan_task(arguments)
        if PartialState().is_main_process:
            _print(str(plan))
        return
    trajectory, num_validation = record_and_count(arguments)
    if PartialState().is_main_process:
        enhanced = trajectory.path.with_name("enhanced")
        gate = ["--validation", "recorded"] if num_validation >= MINIMUM_VALUES else []
        command = shlex.join(["know-hf", "predict", str(trajectory.path), *gate, "--output-dir", str(enhanced)])
        _print(f"Recorded in {trajectory.path}; next:\n\n{command}")  # the command on a line of its own, to copy


def _add_inspect(commands: Any) -> None:
    add = _add_command(commands, _inspect, "print states, sizes, roles and displacement of a trajectory").add_argument
    add("trajectory", **_TRAJECTORY)
    add("--roles", action="store_true", help="print the role of every tensor and why it has it")


def _inspect(args: argparse.Namespace) -> None:
    from .trajectory import WeightTrajectory
    from .trajectory.summary import inspect_trajectory

    trajectory = WeightTrajectory(args.trajectory)
    _print(str(inspect_trajectory(trajectory)))
    if args.roles:
        _print("")
        for name, role in trajectory.roles.items():
            _print(f"{role.role:7} {'×'.join(map(str, trajectory.shape(name))):>16}  {name}: {role.reason}")


def _add_import(commands: Any) -> None:
    parser = _add_command(
        commands,
        _import,
        "make a trajectory of existing checkpoints",
        "Weights are hard links where the file system can, and are never unpickled.",
    )
    add = parser.add_argument
    sources = "folders with safetensors weights, Hub ids such as me/model@revision, or the output folder of a Trainer"
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help=sources)
    add("--output-dir", required=True, metavar="DIR", help="folder for the new trajectory")
    kinds = "tail: of one training, the last is Θ0; branches: other seeds or folds; ordered: states, full data first"
    add("--kind", choices=("tail", "branches", "ordered"), default="tail", help=f"{kinds} (default: tail)")
    sizes = "for --kind ordered, the size of the training set of each checkpoint"
    add("--num-examples", type=int, nargs="+", metavar="N", help=sizes)
    add("--copy", action="store_true", help="copy the weights instead of linking them")
    add("--overwrite", action="store_true", help="replace DIR if it exists")


def _import(args: argparse.Namespace) -> None:
    _check_output_dir(args)
    from .trajectory import WeightTrajectory

    options: dict[str, Any] = {name: getattr(args, name) for name in ("kind", "num_examples", "copy", "overwrite")}
    trajectory = WeightTrajectory.from_checkpoints(args.checkpoints, args.output_dir, **options)
    records = [*trajectory.states, *trajectory.tail, *trajectory.branches]
    _print(f"{', '.join(record.name for record in records)} written to {trajectory.path}")


def _add_merge(commands: Any) -> None:
    add = _add_command(commands, _merge, "merge a trajectory of adapters into one of full models").add_argument
    add("trajectory", **_TRAJECTORY)
    add("--base-model", metavar="ID", help="Hub id or folder (default: the base model that was recorded)")
    add("--output-dir", required=True, metavar="DIR", help="folder for the new trajectory")
    add("--dtype", choices=_DTYPES, default="float32", help="dtype of the merged weights (default: float32)")
    add("--overwrite", action="store_true", help="replace DIR if it exists")


def _merge(args: argparse.Namespace) -> None:
    _check_output_dir(args)
    import torch

    from .trajectory.merging import merge_adapters

    options = {"output_dir": args.output_dir, "dtype": getattr(torch, args.dtype), "overwrite": args.overwrite}
    merged = merge_adapters(args.trajectory, args.base_model, **options)
    _print(f"{merged.num_states} states merged, written to {merged.path}")


def _add_predict(commands: Any) -> None:
    parser = _add_command(
        commands,
        _predict,
        "predict weights from a trajectory and write the enhanced checkpoint",
        "from_pretrained loads the checkpoint. --dry-run shows what the command will predict, and the memory, disk and"
        " time that it needs.",
    )
    add = parser.add_argument
    add("trajectory", **_TRAJECTORY)
    steps = "number of steps, each standing for 1/ratio times more data (default: 1)"
    add("--steps", type=int, default=1, metavar="N", help=steps)
    add("--output-dir", required=True, metavar="DIR", help="folder for the enhanced checkpoint")
    add("--known", metavar="ID", help="folder or Hub id of KNOWN weights (default: the ones shipped with know_hf)")
    add("--predictor", metavar="NAME", help="use a predictor other than KNOWN, for example average")
    options = "options of the predictor, for example '{\"factor\": 0.9}'"
    add("--predictor-options", type=_json_object, metavar="JSON", help=options)
    data = "choose the best of many candidates, or the recorded weights, on this dataset: a Hub id or folder, or"
    add("--validation", metavar="DATASET", help=f"{data} 'recorded', the validation split of know-hf record")
    split = "split of DATASET (default: its validation split, or its only one)"
    add("--validation-split", metavar="NAME", help=split)
    add("--max-validation", type=int, metavar="N", help="evaluate on this many rows, drawn at random")
    cross_fit = (
        "choose a move from the start without other data, for know-hf record --kind complementary --branch-from"
    )
    add("--cross-fit", action="store_true", help=f"{cross_fit} start")
    add("--metric", choices=("loss", "accuracy"), help="what --validation compares (default: loss)")
    add("--norm", choices=("keep", "predict"), default="keep", help="norm layers (default: keep those of state 0)")
    add("--dtype", choices=_DTYPES, help="dtype of the written weights (default: the recorded dtype)")
    add("--kernel", default="auto", metavar="NAME", help="implementation of KNOWN (default: auto, the fastest)")
    add("--dry-run", action="store_true", help="print roles, memory, disk and time without writing")
    add("--report", metavar="FILE", help="write the statistics of every tensor to this JSON file")
    add("--overwrite", action="store_true", help="replace DIR if it exists")
    add("--push-to-hub", metavar="ID", help="push the checkpoint to this Hub repo")
    _add_push_flags(parser)


def _predict(args: argparse.Namespace) -> None:
    push_options = _push_options(args)
    _check_needs(args, "push_to_hub", push_options)
    if args.cross_fit and args.validation is not None:
        raise ValueError("--cross-fit chooses without --validation; remove one of them")
    _check_needs(args, "validation", ("validation_split", "max_validation", "metric"))
    if not args.dry_run:
        _check_output_dir(args)
        _check_report(args)

    import torch
    from accelerate import Accelerator

    from .checkpoint import write_json
    from .predict import predict_overflowed_weights, requested_predictor
    from .prediction import plan_prediction

    options = {name: getattr(args, name) for name in ("known", "steps", "predictor", "predictor_options", "norm")}
    options |= {"kernel": args.kernel, "dtype": getattr(torch, args.dtype) if args.dtype else None}
    accelerator = Accelerator()
    gate = _make_gate(args)
    if args.dry_run:
        options["predictor"] = requested_predictor(gate, args.trajectory, args.known, args.steps, args.predictor)
        plan = plan_prediction(args.trajectory, **options, device=accelerator.device)
        if accelerator.is_main_process:
            _print(str(plan))
        return
    written = push_options | {name: getattr(args, name) for name in ("output_dir", "overwrite", "push_to_hub")}
    result = predict_overflowed_weights(args.trajectory, **options, **written, gate=gate, accelerator=accelerator)
    if accelerator.is_main_process:
        if args.report:
            write_json(Path(args.report), result.to_dict())
        _print(str(result))


def _make_gate(args: argparse.Namespace) -> Any:
    """Return what chooses the weights to write, or `None`."""
    if args.validation is None and not args.cross_fit:
        return None
    from .tasks.validation_data import load_cross_fit, load_validation_data

    if args.cross_fit:
        return load_cross_fit(args.trajectory)
    options = {"split": args.validation_split, "max_examples": args.max_validation}
    data = load_validation_data(args.trajectory, args.validation, **options)
    return data.make_gate(**{"metric": "accuracy"} if args.metric == "accuracy" else {})


def _add_compare(commands: Any) -> None:
    summary = "compare predicted weights with controls on a suite, or two checkpoints on a dataset"
    forms = (
        "know-hf compare SUITE --output-dir DIR compares arms over many trajectories; the same command resumes."
        " know-hf compare A B --dataset DATASET says which of two checkpoints (folders, Hub ids, or a"
        " trajectory for its state 0) is better on the dataset, as they are and after fine-tuning on a few examples."
    )
    add = _add_command(commands, _compare, summary, forms).add_argument
    compared = "a suite (a name, for example digits, or a YAML file), or two checkpoints"
    add("compared", nargs="*", metavar="SUITE | A B", help=compared)
    add("--template", action="store_true", help="print a commented suite to edit, which runs as it is, and exit")
    add("--output-dir", metavar="DIR", help="folder for the results of a suite; with two checkpoints, comparison.json")
    add("--dataset", metavar="ID", help="with two checkpoints: Hub id or folder of a dataset")
    add("--train-split", metavar="NAME", help="its split to fine-tune on; none: no fine-tuning (default: train)")
    add("--test-split", metavar="NAME", help="its split to test on (default: test or else validation)")
    add("--draws", type=int, metavar="N", help="number of fine-tunings of each checkpoint (default: 10)")
    add("--arms", nargs="+", metavar="ARM", help="arms to compare instead of the suite's, for example naive random")
    add("--seeds", type=int, nargs="+", metavar="N", help="trajectory seeds instead of the suite's")
    add("--processes", type=int, default=1, metavar="N", help="number of worker processes (default: 1)")
    add("--plan", action="store_true", default=None, help="print cells, minutes and memory without running them")
    limit = "start no cell that would end later, and report the complete seeds; another run continues"
    add("--max-minutes", type=float, metavar="M", help=limit)
    add("--data", type=_pair, action="append", metavar="ID=PATH", help="read this dataset from a local folder")
    model = "read this model from a local folder"
    add("--model", dest="models", type=_pair, action="append", metavar="ID=PATH", help=model)
    add("--known", type=_pair, action="append", metavar="NAME=ID", help="also compare these KNOWN weights")


def _compare(args: argparse.Namespace) -> None:
    if args.template:
        from .evaluation.suites import suite_template

        return _print(suite_template().rstrip())
    if len(args.compared) == 2:
        return _compare_two(args)
    if len(args.compared) != 1 or args.output_dir is None:
        raise ValueError("give SUITE and --output-dir, or A B and --dataset; see know-hf compare --help")
    for name in ("dataset", "train_split", "test_split", "draws"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs two checkpoints; a suite has its own data and draws")
    from .evaluation import plan_suite, run_suite

    options: dict[str, Any] = {name: dict(getattr(args, name) or ()) for name in ("data", "models", "known")}
    options |= {"arms": args.arms, "seeds": args.seeds, "num_processes": args.processes}
    if args.plan:
        _print(str(plan_suite(args.compared[0], args.output_dir, **options)))
        return
    command = shlex.join(["know-hf", *sys.argv[1:]])
    _print(str(run_suite(args.compared[0], args.output_dir, **options, max_minutes=args.max_minutes, command=command)))


def _compare_two(args: argparse.Namespace) -> None:
    if args.dataset is None:
        raise ValueError("two checkpoints need --dataset, a Hub id or a folder")
    for name in ("arms", "seeds", "plan", "max_minutes", "data", "models", "known"):
        if getattr(args, name) is not None:
            flag = "model" if name == "models" else name.replace("_", "-")
            raise ValueError(f"--{flag} needs a suite")
    from .checkpoint import write_json
    from .evaluation.checkpoints import compare_on_dataset

    options: dict[str, Any] = {} if args.draws is None else {"draws": args.draws}
    options |= {"train_split": None if args.train_split == "none" else args.train_split or "train"}
    a, b = args.compared
    result = compare_on_dataset(a, b, args.dataset, test_split=args.test_split, **options)
    if args.output_dir is not None:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output_dir) / "comparison.json", result.to_dict())
    _print(str(result))


def _add_push_pull(commands: Any) -> None:
    parser = _add_command(commands, _push, "push a checkpoint, a trajectory or KNOWN weights to the Hub")
    add = parser.add_argument
    add("path", metavar="PATH", help="folder to push")
    add("repo_id", metavar="ID", help="Hub repo; created if it does not exist")
    add("--message", metavar="TEXT", help="first line of the commit message")
    _add_push_flags(parser)
    add = _add_command(commands, _pull, "pull a checkpoint, a trajectory or KNOWN weights from the Hub").add_argument
    add("repo_id", metavar="ID", help="Hub repo")
    add("--output-dir", required=True, metavar="DIR", help="folder to create; it appears once all files are complete")
    add("--revision", metavar="NAME", help="branch, tag or commit (default: main)")


def _push(args: argparse.Namespace) -> None:
    from .hub import push

    _print(f"pushed to {push(args.path, args.repo_id, commit_message=args.message, **_push_options(args))}")


def _pull(args: argparse.Namespace) -> None:
    from .hub import pull

    _print(f"pulled to {pull(args.repo_id, args.output_dir, revision=args.revision)}")


def _add_command(
    commands: Any, run: Callable[[argparse.Namespace], None], summary: str, details: str = ""
) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}. {details}"
    parser = commands.add_parser(run.__name__.lstrip("_"), help=summary, description=description)
    parser.set_defaults(run=run)
    return parser


def _add_push_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--private", action="store_true", default=None, help="create the repo as private")
    add("--revision", metavar="NAME", help="branch to push to (default: main)")
    add("--create-pr", action="store_true", help="open a pull request instead of pushing to the branch")


def _push_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"private": args.private, "revision": args.revision, "create_pr": args.create_pr}


def _check_output_dir(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    if not args.overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder or pass --overwrite")


def _check_needs(args: argparse.Namespace, needed: str, names: Iterable[str]) -> None:
    """Raise a `ValueError` for a flag that has no effect without another one."""
    for name in names:
        if getattr(args, name) not in (None, False) and not getattr(args, needed):
            raise ValueError(f"--{name.replace('_', '-')} needs --{needed.replace('_', '-')}")


def _check_report(args: argparse.Namespace) -> None:
    """Check the file of `--report` before the prediction, which may take hours."""
    from .checkpoint import check_output

    if not args.report:
        return
    report = Path(args.report)
    if not report.absolute().parent.is_dir():
        raise FileNotFoundError(f"--report {report}: the folder of the file does not exist; create it")
    if report.is_dir() or (report.exists() and not args.overwrite):
        raise FileExistsError(f"--report {report} exists; choose another file or pass --overwrite")
    check_output(report, [args.trajectory, *filter(None, [args.known])])


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as '{{\"factor\": 0.9}}', got {text!r:.200}")
    return content


def _dashed(arg: str) -> str:
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else arg


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _destroy_process_group() -> None:
    """End the process group of a launched command, because the interpreter may abort at exit if it is open."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
