r"""Record trajectories of structured forgetting, drawn from a YAML space, for meta-training KNOWN.

python recipes/collect/collect.py --output-dir known_data --workers 2
python recipes/collect/collect.py --output-dir known_data --data mnist=/path/to/mnist   # a local copy
python recipes/collect/collect.py --output-dir known_data --plan                        # only print the draws
accelerate launch --num_processes 8 recipes/collect/collect.py --output-dir /shared/known_data

Safe to run again, and on several machines that share the folder: finished trajectories are skipped, unfinished ones
continue with their first missing state, and none is recorded twice.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from space import Recipe, Space


def main(arguments: argparse.Namespace) -> int:
    from space import Space

    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}: give at least 1")
    space = Space.from_yaml(arguments.space)
    recipes = space.recipes()
    if arguments.plan:
        for recipe in recipes:
            print(json.dumps(recipe.to_dict()))
        return 0
    from index import push, summary, write_index
    from jobs import RESULT_NAME, Job, result
    from workers import record_all

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and arguments.workers > 1:
        raise ValueError(f"--workers {arguments.workers}: the launcher starts one process per rank; remove the flag")
    output_dir = arguments.output_dir
    job = Job(recipes, _sources(space, arguments.data), _pairs("--model", arguments.model), output_dir)
    for recipe in recipes:
        recipe.check_same(output_dir / recipe.name / "recipe.json")
        if arguments.retry_failed and rank == 0 and _failure(output_dir, recipe) is not None:
            (output_dir / recipe.name / RESULT_NAME).unlink()
    if not all(result(output_dir, recipe.name) for recipe in recipes):
        from examples import check_same_data

        check_same_data(job)
    record_all(job, arguments.workers, int(os.environ.get("LOCAL_RANK", 0)), show=rank == 0)
    rows = write_index(space, arguments.space, output_dir)
    if rank:
        return 0  # rank 0 reports; a launcher stops all ranks if one fails
    print(f"{output_dir}: {len(rows)} of {len(recipes)} trajectories finished")
    _print_table(summary(rows))
    if arguments.push_to_hub is not None:
        print(push(output_dir, rows, arguments.push_to_hub, arguments.private))
    return _report_failures(output_dir, recipes)


def _report_failures(output_dir: Path, recipes: "list[Recipe]") -> int:
    """Print the trajectories that failed; return the exit code."""
    failures = {recipe.name: error for recipe in recipes if (error := _failure(output_dir, recipe)) is not None}
    for name, error in failures.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if failures:
        print("failed trajectories are not in the index; run again with --retry-failed", file=sys.stderr)
    return 1 if failures else 0


def _failure(output_dir: Path, recipe: "Recipe") -> str | None:
    from jobs import result

    ended = result(output_dir, recipe.name)
    return str(ended["error"]) if ended is not None and ended["status"] == "failed" else None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the collection")
    parser.add_argument(
        "--space",
        type=Path,
        default=Path(__file__).with_name("known_base.yaml"),
        help="YAML space (default: known_base.yaml)",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="read this dataset of the space from a folder or another Hub id; repeatable",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="ID=PATH",
        help="read this pretrained model of the space from a folder; repeatable",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default: 1)")
    parser.add_argument("--retry-failed", action="store_true", help="retry trajectories that failed")
    parser.add_argument("--push-to-hub", metavar="ID", help="push the finished trajectories as this dataset repo")
    parser.add_argument("--private", action="store_true", help="make a new repo private")
    parser.add_argument("--plan", action="store_true", help="print the draws, one JSON line each, and stop")
    return parser


def _sources(space: "Space", overrides: list[str]) -> dict[str, dict[str, str]]:
    sources = {name: dict(dataset) for name, dataset in space.datasets.items()}
    for name, path in _pairs("--data", overrides).items():
        if name not in sources:
            raise ValueError(f"--data {name}={path}: the space has no such dataset; it has {', '.join(sources)}")
        sources[name]["path"] = path
    return sources


def _pairs(flag: str, given: list[str]) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in given]
    for name, equals, path in pairs:
        if not (name and equals and path):
            raise ValueError(f"{flag} {name}{equals}{path}: give NAME=PATH")
    return {name: os.path.expanduser(path) for name, _, path in pairs}


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main(make_parser().parse_args()))
