"""`know-hf`: every command is a thin cover of a public function. Heavy imports wait until a command runs."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .tasks.arguments import add_flags

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments after the program's name; those of the process by default.

    Returns:
        `int`: 0, or 1 when the command ended with an error, which is then told on standard error.
    """
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"know-hf {args.command}: {error}\n")
        return 1
    _leave_processes()
    return 0


def _leave_processes() -> None:
    """Ends the process group of a launched command: left to the end of the interpreter, it may abort there."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="know-hf", description="Record forgetting, run it backwards, see whether it helped."
    )
    parser.add_argument("--version", action="version", version=f"know_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quickstart = commands.add_parser(
        "quickstart", help="the whole way on real images, in minutes, without network: record, predict, compare"
    )
    quickstart.add_argument("--output-dir", required=True, metavar="DIR", help="where everything is written")
    quickstart.add_argument("--seed", type=int, default=0, help="first seed of the comparison (default: 0)")
    quickstart.set_defaults(run=_quickstart)

    record = commands.add_parser(
        "record",
        help="fine-tune any model on any dataset for a common task, make it forget, keep every state",
        description="Fine-tunes a model on ever smaller subsets of a dataset and records every state. A flag"
        " overrides the YAML file. Run again, it goes on with the first state that is missing.",
    )
    record.add_argument("--config", metavar="FILE", help="YAML file; its keys are the flags below, with _ for -")
    record.add_argument("--plan", action="store_true", help="load everything, print steps, cost and disk, and stop")
    add_flags(record)
    record.set_defaults(run=_record)

    inspect = commands.add_parser("inspect", help="states, sizes, roles and displacement of a trajectory")
    inspect.add_argument("trajectory", metavar="TRAJECTORY", help="folder with trajectory.json")
    inspect.add_argument("--roles", action="store_true", help="list every tensor with its role and the reason")
    inspect.set_defaults(run=_inspect)

    merge = commands.add_parser("merge", help="make a trajectory of whole models from one of adapters")
    merge.add_argument("trajectory", metavar="TRAJECTORY", help="folder with trajectory.json")
    merge.add_argument("--base-model", metavar="ID", help="Hub id or folder (default: the one that was recorded)")
    merge.add_argument("--output-dir", required=True, metavar="DIR", help="folder of the new trajectory")
    merge.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights (default: float32)")
    merge.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    merge.set_defaults(run=_merge)

    predict = commands.add_parser("predict", help="write the retrodicted checkpoint of a trajectory")
    predict.add_argument("trajectory", metavar="TRAJECTORY", help="folder with trajectory.json")
    predict.add_argument("--steps", type=int, default=1, help="steps back, each standing for 1/ratio times the data")
    predict.add_argument("--output-dir", required=True, metavar="DIR", help="folder of the enhanced checkpoint")
    predict.add_argument("--known", metavar="ID", help="KNOWN weights, folder or Hub id (default: the shipped ones)")
    predict.add_argument("--predictor", metavar="NAME", help="another predictor instead of KNOWN, such as average")
    predict.add_argument(
        "--predictor-options", type=_json_object, metavar="JSON", help="its fields, such as '{\"factor\": 0.9}'"
    )
    predict.add_argument("--norm", choices=("keep", "predict"), default="keep", help="normalisation layers")
    predict.add_argument("--dtype", choices=_DTYPES, help="write weights in this dtype")
    predict.add_argument("--kernel", default="auto", metavar="NAME", help="form of KNOWN that computes")
    predict.add_argument("--dry-run", action="store_true", help="print roles, memory, disk and time, and stop")
    predict.add_argument("--report", metavar="FILE", help="write the report on every tensor to this JSON file")
    predict.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    predict.add_argument("--push-to-hub", metavar="ID", help="push the checkpoint to this Hub repo")
    _add_push_flags(predict)
    predict.set_defaults(run=_predict)

    compare = commands.add_parser(
        "compare", help="ask of a suite whether predicted weights are better than what they came from"
    )
    compare.add_argument("suite", metavar="SUITE", help="name of a suite of recipes/compare, or a YAML file")
    compare.add_argument("--output-dir", required=True, metavar="DIR", help="cells, report.json and report.html")
    compare.add_argument("--arms", nargs="+", metavar="ARM", help="instead of the suite's, such as naive known-step-1")
    compare.add_argument("--seeds", type=int, nargs="+", metavar="N", help="trajectory seeds instead of the suite's")
    compare.add_argument("--processes", type=int, default=1, metavar="N", help="cells at a time (default: 1)")
    for flag, what in (("--data", "dataset"), ("--model", "pretrained model")):
        compare.add_argument(
            flag, type=_pair, action="append", metavar="ID=PATH", help=f"read this {what} from a folder"
        )
    compare.add_argument(
        "--known",
        type=_pair,
        action="append",
        metavar="NAME=ID",
        help="more KNOWN weights, folder or Hub id",
    )
    compare.set_defaults(run=_compare)

    push = commands.add_parser("push", help="push a checkpoint, a trajectory or KNOWN weights to the Hub")
    push.add_argument("path", metavar="PATH", help="their folder")
    push.add_argument("repo_id", metavar="ID", help="Hub repo, made if it is not there")
    push.add_argument("--message", metavar="TEXT", help="first line of the commit")
    _add_push_flags(push)
    push.set_defaults(run=_push)

    pull = commands.add_parser("pull", help="pull a checkpoint, a trajectory or KNOWN weights from the Hub, whole")
    pull.add_argument("repo_id", metavar="ID", help="Hub repo")
    pull.add_argument("--output-dir", required=True, metavar="DIR", help="folder; it appears once all is there")
    pull.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: main)")
    pull.set_defaults(run=_pull)
    return parser


def _quickstart(args: argparse.Namespace) -> None:
    from .quickstart import run_quickstart

    _say(str(run_quickstart(args.output_dir, seed=args.seed)))


def _record(args: argparse.Namespace) -> None:
    from .tasks.arguments import read_flags

    arguments = read_flags(args)  # before the heavy imports: mistyped keys are told at once

    from accelerate import PartialState

    from .tasks.record import plan_task, record_task
    from .trajectory.summary import inspect_trajectory

    if args.plan:
        plan = plan_task(arguments)
        if PartialState().is_main_process:
            _say(str(plan))
        return
    trajectory = record_task(arguments)
    if PartialState().is_main_process:
        enhanced = trajectory.path.with_name("enhanced")
        _say(f"{inspect_trajectory(trajectory)}\n\nrecorded in {trajectory.path}; next:")
        _say(shlex.join(["know-hf", "predict", str(trajectory.path), "--output-dir", str(enhanced)]))


def _inspect(args: argparse.Namespace) -> None:
    from .trajectory import WeightTrajectory
    from .trajectory.summary import inspect_trajectory

    trajectory = WeightTrajectory(args.trajectory)
    _say(str(inspect_trajectory(trajectory)))
    if args.roles:
        _say("")
        for name, role in trajectory.roles.items():
            _say(f"{role.role:7} {'×'.join(map(str, trajectory.shape(name))):>16}  {name}: {role.reason}")


def _merge(args: argparse.Namespace) -> None:
    import torch

    from .trajectory.merging import merge_adapters

    merged = merge_adapters(
        args.trajectory,
        args.base_model,
        output_dir=args.output_dir,
        dtype=getattr(torch, args.dtype),
        overwrite=args.overwrite,
    )
    _say(f"{merged.num_states} states of whole models, written to {merged.path}")


def _predict(args: argparse.Namespace) -> None:
    from pathlib import Path

    import torch
    from accelerate import Accelerator

    from .checkpoint import write_json
    from .predict import predict_overflowed_weights
    from .prediction import plan_prediction

    for flag in ("private", "revision", "create_pr"):
        if getattr(args, flag) and not args.push_to_hub:
            raise ValueError(f"--{flag.replace('_', '-')} is of a push; give --push-to-hub too")
    if args.report and not Path(args.report).absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--report {args.report}: there is no folder {Path(args.report).parent}; make it first"
        )
    shared = {
        "trajectory": args.trajectory,
        "known": args.known,
        "steps": args.steps,
        "predictor": args.predictor,
        "predictor_options": args.predictor_options,
        "norm": args.norm,
        "dtype": getattr(torch, args.dtype) if args.dtype else None,
        "kernel": args.kernel,
    }
    accelerator = Accelerator()
    if args.dry_run:
        plan = plan_prediction(**shared, device=accelerator.device)
        if accelerator.is_main_process:
            _say(str(plan))
        return
    result = predict_overflowed_weights(
        **shared,
        output_dir=args.output_dir,
        overwrite=args.overwrite,
        accelerator=accelerator,
        push_to_hub=args.push_to_hub,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
    )
    if accelerator.is_main_process:
        if args.report:
            write_json(Path(args.report), result.to_dict())
        _say(f"{result}\n\nwritten to {result.path}" + (f", pushed: {result.url}" if result.url else ""))


def _compare(args: argparse.Namespace) -> None:
    from .evaluation import run_suite

    report = run_suite(
        args.suite,
        args.output_dir,
        arms=args.arms,
        data=dict(args.data or ()),
        models=dict(args.model or ()),
        known=dict(args.known or ()),
        seeds=args.seeds,
        num_processes=args.processes,
        command=shlex.join(["know-hf", *sys.argv[1:]]),
    )
    _say(str(report))


def _push(args: argparse.Namespace) -> None:
    from .hub import push

    url = push(
        args.path,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
    )
    _say(f"pushed: {url}")


def _pull(args: argparse.Namespace) -> None:
    from .hub import pull

    _say(f"pulled to {pull(args.repo_id, args.output_dir, revision=args.revision)}")


def _add_push_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--private", action="store_true", default=None, help="make the repo private")
    parser.add_argument("--revision", metavar="NAME", help="branch to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, write it like '{{\"factor\": 0.9}}'")
    return content


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
