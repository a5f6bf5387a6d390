"""Record the trajectories of the meta-tasks of a split.

    python recipes/hyper_model/record.py --data omniglot --output-dir outputs/hyper_model

Another run records what is missing. `--plan` prints the tasks, one JSON line each.
"""

import argparse
import json
import sys
from pathlib import Path

PARTS = ("train", "validation", "test")


def main(arguments: argparse.Namespace) -> int:
    from meta_tasks import meta_tasks, read_split
    from tqdm import tqdm
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for each state
    split = read_split(arguments.split)
    tasks = [
        task for part in arguments.parts for task in meta_tasks(split, part, arguments.data, arguments.output_dir)
    ]
    if arguments.plan:
        for task in tasks:
            print(json.dumps({key: getattr(task, key) for key in ("name", "seed", "classes")}))
        return 0
    for task in tqdm([task for task in tasks if not task.is_recorded], "recording", unit="task"):
        task.record()
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the split")
    parser.add_argument("--plan", action="store_true", help="print the tasks and exit")
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    shipped = Path(__file__).with_name("split.yaml")
    parser.add_argument("--data", required=True, help="folder or Hub id of Omniglot: image, label, alphabet")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of recordings and results")
    parser.add_argument("--split", type=Path, default=shipped, help="YAML of the meta-tasks (default: split.yaml)")


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("record.py", lambda: main(arguments)))
