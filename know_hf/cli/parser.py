"""The parser of `know-hf`. Names of kernels and predictors are repeated here, because their modules import torch."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from .. import __version__
from ..config_files import add_flags, name_and_value
from ..tasks import RecordArguments
from . import commands

KERNELS = ("auto", "eager", "folded", "cpu", "triton")
PREDICTORS = (
    "known average bema branch_average ema jackknife james_stein linear lines log model_stock rescale shrink"
    " shrunken_jackknife spectral_filter start_interpolation tail_average task_vector"
).split()
_DTYPES = ("float32", "bfloat16", "float16")
_TRAJECTORY: dict[str, Any] = {"metavar": "TRAJECTORY", "help": "folder with trajectory.json"}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    description = "Record how a model forgets, predict weights from the recording, and test whether they are better."
    parser = argparse.ArgumentParser(prog="know-hf", description=description)
    parser.add_argument("--version", action="version", version=f"know_hf {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_quickstart, _add_record, _add_import, _add_inspect, _add_merge, _add_predict, _add_compare):
        add(parsers)
    _add_push_pull(parsers)
    return parser


def flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the flags of a parser by the names of their values, such as `--output-dir` by `output_dir`."""
    actions = parser._actions  # noqa: SLF001  argparse has no public name for it
    return {action.dest: action.option_strings[0] for action in actions if action.option_strings}


def _add_quickstart(parsers: Any) -> None:
    example = "quickstart --output-dir outputs/quickstart"
    summary = "record, predict and compare on small images, offline"
    add = _add_command(parsers, commands.quickstart, example, summary).add_argument
    add("--output-dir", required=True, metavar="DIR", help="folder for all files")
    add("--seed", type=int, default=0, metavar="N", help="first seed of the comparison (default: 0)")


def _add_record(parsers: Any) -> None:
    parser = _add_command(
        parsers,
        commands.record,
        "record --task text-classification --model google/bert_uncased_L-2_H-128_A-2 --dataset stanfordnlp/imdb"
        " --output-dir outputs/imdb",
        "fine-tune a model on smaller and smaller subsets of a dataset and record every state",
        "Flags override the YAML file. A second run with the same arguments resumes at the first missing state.",
        offline="give local folders with --model and --dataset",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the flags below as keys, with _ for -")
    parser.add_argument("--plan", action="store_true", help="print steps, cost and disk without training")
    add_flags(parser, RecordArguments)


def _add_inspect(parsers: Any) -> None:
    example = "inspect outputs/imdb/trajectory --roles"
    summary = "print states, sizes, roles and displacement of a trajectory"
    add = _add_command(parsers, commands.inspect, example, summary).add_argument
    add("trajectory", **_TRAJECTORY)
    add("--roles", action="store_true", help="print the role of every tensor and the reason for it")


def _add_import(parsers: Any) -> None:
    parser = _add_command(
        parsers,
        commands.import_,
        "import trainer/checkpoint-100 trainer/checkpoint-200 --output-dir outputs/imported",
        "make a trajectory out of existing checkpoints",
        "Weights are hard-linked if the file system supports it, and are never unpickled.",
        offline="give local folders as CHECKPOINT",
    )
    add = parser.add_argument
    sources = "folders with safetensors weights, Hub ids such as me/model@revision, or the output folder of a Trainer"
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help=sources)
    add("--output-dir", required=True, metavar="DIR", help="folder for the new trajectory")
    kinds = "tail: one training, the last is Θ0; branches: other seeds or folds; ordered: states, full data first"
    add("--kind", choices=("tail", "branches", "ordered"), default="tail", help=f"{kinds} (default: tail)")
    sizes = "for --kind ordered, the size of the training set of each checkpoint"
    add("--num-examples", type=int, nargs="+", metavar="N", help=sizes)
    add("--start", metavar="CHECKPOINT", help="weights before the training, with the same head")
    add("--copy", action="store_true", help="copy the weights instead of linking them")
    add("--overwrite", action="store_true", help="replace DIR if it exists")


def _add_merge(parsers: Any) -> None:
    example = "merge outputs/lora/trajectory --output-dir outputs/lora/merged"
    summary = "merge a trajectory of adapters into one of full models"
    offline = "give a local folder with --base-model"
    add = _add_command(parsers, commands.merge, example, summary, offline=offline).add_argument
    add("trajectory", **_TRAJECTORY)
    add("--base-model", metavar="ID", help="Hub id or folder (default: the base model that was recorded)")
    add("--output-dir", required=True, metavar="DIR", help="folder for the new trajectory")
    add("--dtype", choices=_DTYPES, default="float32", help="dtype of the merged weights (default: float32)")
    add("--overwrite", action="store_true", help="replace DIR if it exists")


def _add_predict(parsers: Any) -> None:
    parser = _add_command(
        parsers,
        commands.predict,
        "predict outputs/imdb/trajectory --output-dir outputs/imdb/enhanced",
        "predict weights from a trajectory and write the enhanced checkpoint",
        "from_pretrained loads the checkpoint. --dry-run shows what the command would predict, and the memory, disk"
        " and time that it needs.",
        offline="give local folders with --known and --validation",
    )
    add = parser.add_argument
    add("trajectory", **_TRAJECTORY)
    steps = "number of steps, each of which stands for 1/ratio times the data (default: 1)"
    add("--steps", type=int, default=1, metavar="N", help=steps)
    add("--output-dir", required=True, metavar="DIR", help="folder for the enhanced checkpoint")
    add("--known", metavar="ID", help="folder or Hub id of KNOWN weights (default: the ones shipped with know_hf)")
    predictor = f"one of {', '.join(PREDICTORS)}; or several, such as average+rescale (default: known, unless a gate"
    add("--predictor", type=_predictor, metavar="NAME", help=f"{predictor} chooses)")
    options = "options of the predictor, for example '{\"factor\": 0.9}'"
    add("--predictor-options", type=_json_object, metavar="JSON", help=options)
    data = "write the candidate that is best on this dataset, or the recorded weights: Hub id, folder or"
    recorded = "'recorded' for the validation split of know-hf record (the default if there is one, without"
    add("--validation", metavar="DATASET", help=f"{data} {recorded} --predictor and --known)")
    split = "split of DATASET (default: its validation split, or its only one)"
    add("--validation-split", dest="split", metavar="NAME", help=split)
    rows = "use only this many rows of DATASET, drawn at random"
    add("--max-validation", dest="max_examples", type=int, metavar="N", help=rows)
    base = "base model of adapters, if it is not where it was recorded: Hub id or folder"
    add("--base-model", metavar="ID", help=base)
    cross_fit = "choose how far to move from the start without validation data, after know-hf record --kind"
    add("--cross-fit", action="store_true", help=f"{cross_fit} complementary --branch-from start")
    metric = "what --validation compares; calibrated-loss is the loss after temperature scaling (default:"
    metrics = ("calibrated-loss", "loss", "accuracy")
    add("--metric", choices=metrics, help=f"{metric} calibrated-loss for classifiers, loss for other models)")
    norm = "keep norm layers of state 0, or predict them (default: keep)"
    add("--norm", choices=("keep", "predict"), default="keep", help=norm)
    add("--dtype", choices=_DTYPES, help="dtype of the written weights (default: the recorded dtype)")
    add("--kernel", choices=KERNELS, default="auto", help="implementation of KNOWN (default: auto, the fastest)")
    add("--dry-run", action="store_true", help="print roles, memory, disk and time without writing")
    add("--report", metavar="FILE", help="write the statistics of every tensor to this JSON file")
    add("--overwrite", action="store_true", help="replace DIR if it exists")
    add("--push-to-hub", metavar="ID", help="push the checkpoint to this Hub repo")
    _add_push_flags(parser)


def _add_compare(parsers: Any) -> None:
    summary = "compare predicted weights with controls on a suite, or two checkpoints on a dataset"
    forms = (
        "know-hf compare SUITE --output-dir DIR compares arms over many trajectories; the same command resumes."
        " know-hf compare A B --dataset DATASET says which of two checkpoints (folders, Hub ids, or a"
        " trajectory for its state 0) is better on the dataset, before and after fine-tuning on a few examples."
    )
    example = """compare digits --output-dir outputs/digits
  know-hf compare outputs/imdb/trajectory outputs/imdb/enhanced --dataset stanfordnlp/imdb"""
    offline = "give folders with --data ID=FOLDER, --model ID=FOLDER and --known NAME=FOLDER, or with --dataset"
    add = _add_command(parsers, commands.compare, example, summary, forms, offline).add_argument
    compared = "a suite (a name, for example digits, or a YAML file), or two checkpoints"
    add("compared", nargs="*", metavar="SUITE | A B", help=compared)
    add("--template", action="store_true", help="print a commented example suite and exit")
    add("--output-dir", metavar="DIR", help="folder for the results of a suite; with two checkpoints, comparison.json")
    add("--dataset", metavar="ID", help="with two checkpoints: Hub id or folder of a dataset")
    add("--train-split", metavar="NAME", help="split to fine-tune on; none: no fine-tuning (default: train)")
    add("--test-split", metavar="NAME", help="split to test on (default: test, else validation)")
    add("--draws", type=int, metavar="N", help="number of fine-tunings of each checkpoint (default: 10)")
    base = "with two checkpoints: Hub id or folder of the base model of adapters (default: the one that they name)"
    add("--base-model", metavar="ID", help=base)
    add("--arms", nargs="+", metavar="ARM", help="arms to compare instead of the suite's, for example naive random")
    add("--seeds", type=int, nargs="+", metavar="N", help="trajectory seeds instead of the suite's")
    processes = "number of worker processes (default: 1)"
    add("--processes", dest="num_processes", type=int, metavar="N", help=processes)
    add("--plan", action="store_true", default=None, help="print cells, minutes and memory without running them")
    limit = "start no cell that would end later, and report the complete seeds; run again to continue"
    add("--max-minutes", type=float, metavar="M", help=limit)
    data, model = "read this dataset from a local folder", "read this model from a local folder"
    add("--data", type=name_and_value, action="append", metavar="ID=FOLDER", help=data)
    add("--model", type=name_and_value, action="append", metavar="ID=FOLDER", help=model)
    add("--known", type=name_and_value, action="append", metavar="NAME=ID", help="also compare these KNOWN weights")


def _add_push_pull(parsers: Any) -> None:
    example = "push outputs/imdb/trajectory me/imdb-trajectory --private"
    summary = "push a checkpoint, a trajectory or KNOWN weights to the Hub"
    parser = _add_command(parsers, commands.push, example, summary)
    add = parser.add_argument
    add("path", metavar="PATH", help="folder to push")
    add("repo_id", metavar="ID", help="Hub repo; created if it does not exist")
    add("--message", metavar="TEXT", help="first line of the commit message")
    _add_push_flags(parser)
    example = "pull me/imdb-trajectory --output-dir outputs/pulled"
    summary = "pull a checkpoint, a trajectory or KNOWN weights from the Hub"
    add = _add_command(parsers, commands.pull, example, summary).add_argument
    add("repo_id", metavar="ID", help="Hub repo")
    add("--output-dir", required=True, metavar="DIR", help="folder to create; it appears once all files are complete")
    add("--revision", metavar="NAME", help="branch, tag or commit (default: main)")


def _add_command(
    parsers: Any,
    run: Callable[[argparse.Namespace], object],
    example: str,
    summary: str,
    details: str = "",
    offline: str = "",
) -> argparse.ArgumentParser:
    """Add the parser of a command; `offline` is what to do if the Hub cannot be reached."""
    description = f"{summary[0].upper()}{summary[1:]}. {details}"
    epilog = f"example:\n  know-hf {example}"
    options = {"help": summary, "description": description, "epilog": epilog, "formatter_class": _Formatter}
    parser = parsers.add_parser(run.__name__.rstrip("_"), **options)
    parser.set_defaults(run=run, parser=parser, offline=offline)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and everything else to stderr")
    parser.add_argument("--quiet", action="store_true", help="print only errors and the JSON")
    return parser


class _Formatter(argparse.HelpFormatter):
    """Keeps the lines of an example, to copy."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)


def _add_push_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--private", action="store_true", default=None, help="create the repo as private")
    add("--revision", metavar="NAME", help="branch to push to (default: main)")
    add("--create-pr", action="store_true", help="open a pull request instead of pushing to the branch")


def _predictor(names: str) -> str:
    for name in names.split("+"):
        if name not in PREDICTORS:
            raise argparse.ArgumentTypeError(f"unknown predictor {name!r:.60}; choose from {', '.join(PREDICTORS)}")
    return names


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as '{{\"factor\": 0.9}}', got {text!r:.200}")
    return content
