"""The commands. Each returns what [`main`] prints, with `str` and `to_dict`; `None` on all but the main process."""

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config_files import flag, read_flags
from ..tasks import RecordArguments

_DEFAULT_GATE = (
    "By default, predict chooses on the validation split of the recording. If its dataset or the base model of"
    " adapters moved, pass --validation or --base-model; --predictor known writes the prediction without choosing."
)

# What can be a Hub id, of any revision, or an address; other names are paths.
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@.+)?|\w+://.+")


class Result(Protocol):
    """What a command prints: `str(result)`, or `to_dict()` as JSON."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Printed:
    """A text, and the values that `--json` prints instead."""

    text: str
    values: Mapping[str, Any]

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


def quickstart(args: argparse.Namespace) -> Result:
    from ..evaluation.suites import run_quickstart

    return run_quickstart(args.output_dir, seed=args.seed)


def record(args: argparse.Namespace) -> Result | None:
    given = read_flags(args, RecordArguments)  # before the heavy imports: a typo is reported at once
    read = RecordArguments.from_yaml
    arguments = read(args.config, given) if args.config else RecordArguments.from_dict(given, "the flags")
    check_folders({flag(name): getattr(arguments, name) for name in ("model", "dataset")})

    from accelerate import PartialState

    from ..tasks.record import record_task
    from ..tasks.recording_plan import plan_task
    from ..trajectory.summary import metrics_summary

    if args.plan:
        plan = plan_task(arguments)
        return plan if PartialState().is_main_process else None
    trajectory = record_task(arguments)
    if not PartialState().is_main_process:
        return None
    enhanced = trajectory.path.with_name("enhanced")
    command = shlex.join(["know-hf", "predict", str(trajectory.path), "--output-dir", str(enhanced)])
    text = f"Recorded in {trajectory.path}; next:\n\n{command}"  # the command on a line of its own, to copy
    return Printed(text, {"path": str(trajectory.path), **metrics_summary(trajectory).to_dict(), "next": command})


def inspect(args: argparse.Namespace) -> Result:
    from ..trajectory import WeightTrajectory
    from ..trajectory.summary import inspect_trajectory

    trajectory = WeightTrajectory(args.trajectory)
    summary = inspect_trajectory(trajectory)
    if not args.roles:
        return summary
    shapes = {name: tuple(trajectory.shape(name)) for name in trajectory.roles}
    lines = [
        f"{role.role:7} {'×'.join(map(str, shapes[name])):>16}  {name}: {role.reason}"
        for name, role in trajectory.roles.items()
    ]
    roles = {name: {**asdict(role), "shape": shapes[name]} for name, role in trajectory.roles.items()}
    return Printed("\n".join([f"{summary}", "", *lines]), {**summary.to_dict(), "roles": roles})


def import_(args: argparse.Namespace) -> Result:
    _check_output_dir(args)
    check_folders({"CHECKPOINT": args.checkpoints, "--start": args.start})
    from ..trajectory import WeightTrajectory

    options: dict[str, Any] = {
        name: getattr(args, name) for name in ("kind", "num_examples", "start", "copy", "overwrite")
    }
    trajectory = WeightTrajectory.from_checkpoints(args.checkpoints, args.output_dir, **options)
    names, path = _snapshot_names(trajectory), str(trajectory.path)
    command = shlex.join(["know-hf", "predict", path, "--validation", "DATASET", "--output-dir", f"{path}-enhanced"])
    text = f"{', '.join(names)} written to {path}; next:\n\n{command}"
    return Printed(text, {"path": path, "snapshots": names, "next": command})


def merge(args: argparse.Namespace) -> Result:
    _check_output_dir(args)
    check_folders({"--base-model": args.base_model})
    import torch

    from ..trajectory.merging import merge_adapters

    options = {"output_dir": args.output_dir, "dtype": getattr(torch, args.dtype), "overwrite": args.overwrite}
    merged = merge_adapters(args.trajectory, args.base_model, **options)
    names = _snapshot_names(merged)
    text = f"merged {', '.join(names)}, written to {merged.path}"
    return Printed(text, {"path": str(merged.path), "num_states": merged.num_states, "snapshots": names})


def predict(args: argparse.Namespace) -> Result | None:
    push_options = _push_options(args)
    _check_needs(args, "push_to_hub", push_options)
    if args.cross_fit and args.validation is not None:
        raise ValueError("--cross-fit chooses without --validation; remove one of them")
    if args.cross_fit or args.predictor or args.known:
        _check_validation_flags(args)
    check_folders({flag(name): getattr(args, name) for name in ("known", "validation", "base_model")})
    if not args.dry_run:
        _check_output_dir(args)
        _check_report(args)

    import torch
    from accelerate import Accelerator

    from ..checkpoint import write_json
    from ..predict import predict_overflowed_weights, requested_predictor
    from ..prediction import plan_prediction

    options = {name: getattr(args, name) for name in ("known", "steps", "predictor", "predictor_options", "norm")}
    options |= {"kernel": args.kernel, "dtype": getattr(torch, args.dtype) if args.dtype else None}
    accelerator = Accelerator()
    gate = _make_gate(args)
    if args.dry_run:
        requested = {name: options[name] for name in ("known", "steps", "predictor", "predictor_options")}
        options["predictor"] = requested_predictor(gate, args.trajectory, **requested)
        plan = plan_prediction(args.trajectory, **options, device=accelerator.device)
        plan.evaluates = gate is not None
        return plan if accelerator.is_main_process else None
    written = push_options | {name: getattr(args, name) for name in ("output_dir", "overwrite", "push_to_hub")}
    result = predict_overflowed_weights(args.trajectory, **options, **written, gate=gate, accelerator=accelerator)
    if not accelerator.is_main_process:
        return None
    report = result.to_dict()
    if args.report:
        write_json(Path(args.report), report)
    del report["tensors"]  # thousands of lines; they are for --report
    texts = {name: getattr(result, name) for name in ("name", "sentence", "next_step", "url")}
    return Printed(str(result), {"path": str(result.path), **texts, **report})


def _make_gate(args: argparse.Namespace) -> Any:
    """Return what chooses the weights to write, or `None`."""
    if args.validation is None and not args.cross_fit and (args.predictor or args.known):
        return None
    from ..prediction.choosing.batch_losses import ACCURACY, CALIBRATED, LOSS
    from ..prediction.selection import MINIMUM_VALUES
    from ..tasks.validation_data import RECORDED, has_validation_split, load_cross_fit, load_validation_data

    if args.cross_fit:
        return load_cross_fit(args.trajectory)
    if args.validation is None and not has_validation_split(args.trajectory):
        _check_validation_flags(args)
        return None
    options = {name: getattr(args, name) for name in ("split", "max_examples", "base_model")}
    try:
        data = load_validation_data(args.trajectory, args.validation or RECORDED, **options)
    except (OSError, ValueError) as error:
        if args.validation is None:
            error.add_note(_DEFAULT_GATE)
        raise
    if args.validation is None and args.max_examples is None and len(data.dataset) < MINIMUM_VALUES:
        return None
    metrics = {"calibrated-loss": CALIBRATED, "loss": LOSS, "accuracy": ACCURACY}
    return data.make_gate(metric=metrics.get(args.metric))


def compare(args: argparse.Namespace) -> Result:
    if args.template:
        from ..evaluation.suites import suite_template

        template = suite_template().rstrip()
        return Printed(template, {"template": template})
    if len(args.compared) == 2:
        return _compare_two(args)
    if len(args.compared) != 1 or args.output_dir is None:
        raise ValueError("give SUITE and --output-dir, or A B and --dataset; see know-hf compare --help")
    for name in ("dataset", "train_split", "test_split", "draws", "base_model"):
        if getattr(args, name) is not None:
            raise ValueError(f"{flag(name)} needs two checkpoints; a suite has its own data and draws")
    given = {name: dict(getattr(args, name) or ()) for name in ("data", "model", "known")}
    check_folders({flag(name): list(paths.values()) for name, paths in given.items()})
    from ..evaluation import plan_suite, run_suite
    from ..evaluation.suites import load_suite

    options: dict[str, Any] = {"data": given["data"], "models": given["model"], "known": given["known"]}
    chosen = {name: getattr(args, name) for name in ("arms", "seeds", "num_processes")}
    options |= {name: value for name, value in chosen.items() if value is not None}
    if args.plan:
        return plan_suite(args.compared[0], args.output_dir, **options)
    command = shlex.join(["know-hf", *sys.argv[1:]])
    try:
        return run_suite(args.compared[0], args.output_dir, **options, max_minutes=args.max_minutes, command=command)
    except TimeoutError as error:
        suite = load_suite(args.compared[0])
        seeds = args.seeds or range(suite.first_seed, suite.first_seed + suite.seeds)
        plan = plan_suite(args.compared[0], args.output_dir, **options | {"seeds": seeds[:2]})
        error.add_note(f"The first two seeds need about {plan.minutes:.2g} more minutes; pass a larger max_minutes=.")
        raise


def _compare_two(args: argparse.Namespace) -> Result:
    if args.dataset is None:
        raise ValueError("two checkpoints need --dataset, a Hub id or a folder")
    for name in ("arms", "seeds", "num_processes", "plan", "max_minutes", "data", "model", "known"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}= needs a suite")  # main names the flags
    check_folders({"A and B": args.compared, "--dataset": args.dataset, "--base-model": args.base_model})
    from ..checkpoint import write_json
    from ..evaluation.checkpoints import compare_on_dataset

    options: dict[str, Any] = {} if args.draws is None else {"draws": args.draws}
    options |= {"train_split": None if args.train_split == "none" else args.train_split or "train"}
    a, b = args.compared
    options |= {"test_split": args.test_split, "base_model": args.base_model}
    result = compare_on_dataset(a, b, args.dataset, **options)
    if args.output_dir is not None:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output_dir) / "comparison.json", result.to_dict())
    return result


def push(args: argparse.Namespace) -> Result:
    from .. import hub

    url = hub.push(args.path, args.repo_id, commit_message=args.message, **_push_options(args))
    return Printed(f"pushed to {url}", {"url": url})


def pull(args: argparse.Namespace) -> Result:
    from .. import hub

    path = str(hub.pull(args.repo_id, args.output_dir, revision=args.revision))
    return Printed(f"pulled to {path}", {"path": path})


def _snapshot_names(trajectory: Any) -> list[str]:
    records = (trajectory.start, *trajectory.states, *trajectory.tail, *trajectory.branches)
    return [record.name for record in records if record]


def _push_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"private": args.private, "revision": args.revision, "create_pr": args.create_pr}


def _check_output_dir(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    if not args.overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder or pass --overwrite")


def _check_validation_flags(args: argparse.Namespace) -> None:
    _check_needs(args, "validation", ("split", "max_examples", "metric", "base_model"))


def _check_needs(args: argparse.Namespace, needed: str, names: Iterable[str]) -> None:
    """Raise a `ValueError` for a flag that has no effect without another one."""
    for name in names:
        if getattr(args, name) not in (None, False) and not getattr(args, needed):
            raise ValueError(f"{name}= needs {needed}=")  # main names the flags


def check_folders(sources: Mapping[str, str | list[str] | None]) -> None:
    """Raise an error for a path to nothing or to a file, before a library asks the Hub for it.

    `sources` has names by flag or argument. A name such as `a/b` can be a Hub id.

    Raises:
        `FileNotFoundError`, `NotADirectoryError`: for the first name that is neither a folder nor a Hub id.
    """
    for argument, names in sources.items():
        for name in [names] if isinstance(names, str) else names or []:
            if Path(name).expanduser().is_file():
                raise NotADirectoryError(f"{name} is a file; give the folder that contains it ({argument})")
            if not (_HUB_ID.fullmatch(name) or Path(name).expanduser().exists()):
                raise FileNotFoundError(f"no such folder: {name} ({argument})")


def _check_report(args: argparse.Namespace) -> None:
    """Check the file of `--report` before the prediction, which may take hours."""
    from ..checkpoint import check_output

    if not args.report:
        return
    report = Path(args.report)
    if not report.absolute().parent.is_dir():
        raise FileNotFoundError(f"--report {report}: the folder of the file does not exist; create it")
    if report.is_dir() or (report.exists() and not args.overwrite):
        raise FileExistsError(f"--report {report} exists; choose another file or pass --overwrite")
    check_output(report, [args.trajectory, *filter(None, [args.known])])
