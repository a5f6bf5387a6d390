r"""Record trajectories of structured forgetting, drawn from a YAML space, for meta-training KNOWN.

python recipes/collect/collect.py --output-dir known_data --workers 2
python recipes/collect/collect.py --output-dir known_data --data mnist=/path/to/mnist   # a local copy
python recipes/collect/collect.py --output-dir known_data --plan                        # only print the recipes
accelerate launch --config_file recipes/accelerate_configs/ddp.yaml recipes/collect/collect.py --output-dir known_data

You can run the command again, also on several machines that share the folder. It skips finished trajectories,
continues unfinished ones with their first missing state, and records none twice.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs import Job
    from space import Space


def main(arguments: argparse.Namespace) -> int:
    from space import Space

    if arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
    space = Space.from_yaml(arguments.space)
    recipes = space.recipes()
    if arguments.plan:
        for recipe in recipes:
            print(json.dumps(recipe.to_dict()))
        return 0
    from index import push, summary, write_index
    from jobs import RECIPE_NAME, RESULT_NAME, Job
    from workers import record_all

    from know_hf.checkpoint import check_output

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and arguments.workers > 1:
        raise ValueError(f"--workers {arguments.workers}: the launcher starts one process per rank; remove the flag")
    sources, models = read_sources(space, arguments.data), read_pairs("--model", arguments.model)
    check_output(arguments.output_dir, models.values(), replaces=False)
    job = Job(recipes, sources, models, arguments.output_dir)
    for recipe in recipes:
        recipe.check_same(job.folder(recipe) / RECIPE_NAME)
        if arguments.retry_failed and rank == 0 and job.error(recipe) is not None:
            (job.folder(recipe) / RESULT_NAME).unlink()
    if not all(job.result(recipe) for recipe in recipes):
        from examples import check_same_data

        check_same_data(job)
    record_all(job, arguments.workers, int(os.environ.get("LOCAL_RANK", 0)), show=rank == 0)
    rows = write_index(job, space, arguments.space)
    if rank:
        return 0  # rank 0 reports; a launcher stops all ranks if one fails
    print(f"{job.output_dir}: {len(rows)} of {len(recipes)} trajectories finished")
    print_table(summary(rows))
    if arguments.push_to_hub is not None:
        print(push(job.output_dir, rows, arguments.push_to_hub, arguments.private))
    return report_failures(job)


def report_failures(job: "Job") -> int:
    """Print the trajectories that failed; return the exit code."""
    failures = {recipe.name: error for recipe in job.recipes if (error := job.error(recipe)) is not None}
    for name, error in failures.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if failures:
        print("failed trajectories are not in the index; run again with --retry-failed", file=sys.stderr)
    return 1 if failures else 0


def read_sources(space: "Space", overrides: list[str]) -> dict[str, dict[str, str]]:
    """Return the datasets of the space, with the paths of `--data`."""
    sources = {name: dict(dataset) for name, dataset in space.datasets.items()}
    for name, path in read_pairs("--data", overrides).items():
        if name not in sources:
            raise ValueError(f"--data {name}={path}: the space has no such dataset; it has {', '.join(sources)}")
        sources[name]["path"] = path
    return sources


def read_pairs(flag: str, pairs: list[str]) -> dict[str, str]:
    """Split `NAME=PATH` pairs."""
    for pair in pairs:
        if not re.fullmatch(".+?=.+", pair):
            raise ValueError(f"{flag} {pair}: expected NAME=PATH")
    return {name: os.path.expanduser(path) for name, _, path in (pair.partition("=") for pair in pairs)}


def print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    shipped = Path(__file__).with_name("known_base.yaml")
    add("--output-dir", type=Path, required=True, help="folder of the collection")
    add("--space", type=Path, default=shipped, help="YAML space (default: known_base.yaml)")
    override = {"action": "append", "default": []}
    data_help = "read this dataset of the space from a folder or another Hub id; repeatable"
    add("--data", metavar="NAME=PATH", help=data_help, **override)
    add("--model", metavar="ID=PATH", help="read this pretrained model from a folder; repeatable", **override)
    add("--workers", type=int, default=1, help="processes, one thread each (default: 1)")
    add("--retry-failed", action="store_true", help="retry trajectories that failed")
    add("--push-to-hub", metavar="ID", help="push the finished trajectories as this dataset repo")
    add("--private", action="store_true", help="create the repo as private")
    add("--plan", action="store_true", help="print the recipes, one JSON line each, and exit")
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("collect.py", lambda: main(arguments)))
