"""Records many trajectories of structured forgetting, drawn from a YAML space, for meta-training KNOWN.

python recipes/collect/collect.py --output-dir known_data --workers 2
python recipes/collect/collect.py --output-dir known_data --data mnist=/path/to/mnist   # a copy on this machine
python recipes/collect/collect.py --output-dir known_data --plan                        # only list what is drawn

Safe to run again: finished trajectories are skipped, unfinished ones go on with their first missing state.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterator
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from space import Recipe, Space

RECIPE_NAME = "recipe.json"
INDEX_NAME = "index.jsonl"


def main(arguments: argparse.Namespace) -> int:
    from space import Space

    space = Space.from_yaml(arguments.space)
    recipes = space.recipes()
    if arguments.plan:
        for recipe in recipes:
            print(json.dumps(recipe.to_dict()))
        return 0
    sources = _sources(space, arguments.data)
    for recipe in recipes:
        recipe.check_same(arguments.output_dir / recipe.name / RECIPE_NAME)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    failures = _record_all(recipes, sources, arguments.output_dir, arguments.workers)
    rows = _write_index(recipes, arguments.output_dir)
    _print_summary(rows, len(recipes), arguments.output_dir)
    for name, error in failures.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    return 1 if failures else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="one folder a trajectory, and index.jsonl")
    parser.add_argument(
        "--space",
        type=Path,
        default=Path(__file__).with_name("known_base.yaml"),
        help="the YAML space (default: known_base.yaml beside this script)",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="read this dataset of the space from a folder or another Hub id; may be given several times",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default: 1)")
    parser.add_argument("--plan", action="store_true", help="print the recipes, one JSON line each, and stop")
    return parser


def _sources(space: "Space", overrides: list[str]) -> dict[str, dict[str, str]]:
    sources = {name: dict(dataset) for name, dataset in space.datasets.items()}
    for override in overrides:
        name, _, path = override.partition("=")
        if name not in sources or not path:
            raise ValueError(f"--data {override}: give NAME=PATH with a name of the space: {', '.join(sources)}")
        sources[name]["path"] = path
    return sources


def _record_all(
    recipes: "list[Recipe]", sources: dict[str, dict[str, str]], output_dir: Path, workers: int
) -> dict[str, str]:
    """Records what is not finished yet; returns the error of each trajectory that failed."""
    from concurrent.futures.process import BrokenProcessPool

    from tqdm.auto import tqdm

    todo = [recipe for recipe in recipes if not _finished(recipe, output_dir)]
    failures: dict[str, str] = {}
    with tqdm(
        total=len(recipes), initial=len(recipes) - len(todo), desc="trajectories", smoothing=0, disable=False
    ) as bar:
        for name, error in _run(todo, sources, output_dir, workers):
            bar.update()
            if error is None:
                continue
            if isinstance(error, BrokenProcessPool):
                failures[name] = "its process, or one beside it, was killed (out of memory?); run again to go on"
            else:
                failures[name] = f"{type(error).__name__}: {error}"
                bar.write("".join(traceback.format_exception(error)), file=sys.stderr)
            bar.set_postfix(failed=len(failures))
    return failures


def _run(
    recipes: "list[Recipe]", sources: dict[str, dict[str, str]], output_dir: Path, workers: int
) -> Iterator[tuple[str, BaseException | None]]:
    """Yields name and error of each recipe as it ends; a process that dies takes only those in flight with it."""
    from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    waiting = list(reversed(recipes))
    while waiting:
        running: dict[Future[None], str] = {}
        broken = False
        with ProcessPoolExecutor(min(workers, len(waiting)), get_context("spawn"), _start_worker) as pool:
            while running or (waiting and not broken):
                while waiting and not broken and len(running) < workers:
                    recipe = waiting[-1]
                    try:
                        future = pool.submit(_record, recipe, sources[recipe.dataset], output_dir)
                    except BrokenProcessPool:
                        broken = True
                    else:
                        running[future] = waiting.pop().name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    error = future.exception()
                    broken = broken or isinstance(error, BrokenProcessPool)
                    yield running.pop(future), error


def _start_worker() -> None:
    # A worker whose main process was killed would wait for work for ever, and hold its trajectory's lock.
    Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; the one bar is the main process's
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # safe at any moment: a state counts only once it is written whole


def _record(recipe: "Recipe", source: dict[str, str], output_dir: Path) -> None:
    """Records one trajectory, or what is missing of it."""
    from tempfile import TemporaryDirectory

    import torch
    from filelock import FileLock, Timeout
    from images import accuracy, arg_max, load_images
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from know_hf import ForgettingSchedule, induce_forgetting
    from know_hf.checkpoint import write_json

    folder = output_dir / recipe.name
    locks = output_dir / ".locks"
    folder.mkdir(exist_ok=True)
    locks.mkdir(exist_ok=True)
    try:
        lock = FileLock(locks / f"{recipe.name}.lock").acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"{folder} is being recorded by another process; wait until it ends") from error
    with lock, TemporaryDirectory() as scratch:
        train, test, num_labels = load_images(recipe, source)
        torch.manual_seed(recipe.seed)
        model = _make_model(recipe, num_labels)
        found = {
            "num_labels": num_labels,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "data_fingerprint": train.fingerprint,
        }
        _check_same_data(folder / RECIPE_NAME, train.fingerprint)
        write_json(folder / RECIPE_NAME, {**recipe.to_dict(), **found})
        trainer = Trainer(
            model,
            TrainingArguments(
                scratch,
                seed=recipe.seed,
                per_device_eval_batch_size=250,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                **recipe.training_arguments,
            ),
            data_collator=lambda batch: batch,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=arg_max,
        )
        trainer.remove_callback(PrinterCallback)
        induce_forgetting(trainer, ForgettingSchedule(**recipe.schedule), folder, start="train")


def _make_model(recipe: "Recipe", num_labels: int) -> Any:
    import models
    import transformers

    model_class = getattr(models, recipe.model_class, None) or getattr(transformers, recipe.model_class, None)
    if model_class is None:
        raise ValueError(
            f"architecture {recipe.architecture!r}: neither models.py nor transformers has a {recipe.model_class!r}"
        )
    config = model_class.config_class(
        **recipe.model_config,
        image_size=recipe.image_size,
        num_channels=recipe.image_channels,
        num_labels=num_labels,
    )
    return model_class(config)


def _check_same_data(path: Path, fingerprint: str) -> None:
    if path.exists() and (recorded := json.loads(path.read_text())["data_fingerprint"]) != fingerprint:
        raise ValueError(
            f"{path.parent} was begun with other images (fingerprint {recorded}, now {fingerprint}); give the same"
            " dataset or delete the folder"
        )


def _finished(recipe: "Recipe", output_dir: Path) -> bool:
    from know_hf import WeightTrajectory

    folder = output_dir / recipe.name
    if not WeightTrajectory.exists(folder):
        return False
    states = WeightTrajectory(folder).states
    return len(states) == recipe.schedule["num_states"] and bool(states[-1].metrics)


def _write_index(recipes: "list[Recipe]", output_dir: Path) -> list[dict[str, Any]]:
    """Writes one JSON line a finished trajectory: its recipe and the curves over its states, full data first."""
    from know_hf import WeightTrajectory

    rows = []
    for recipe in recipes:
        folder = output_dir / recipe.name
        if _finished(recipe, output_dir):
            states = WeightTrajectory(folder).states
            row = json.loads((folder / RECIPE_NAME).read_text(encoding="utf-8"))
            row["state_examples"] = [state.num_examples for state in states]
            row["state_steps"] = [state.steps for state in states]
            row["eval_accuracy"] = [state.metrics["eval_accuracy"] for state in states]
            row["eval_loss"] = [state.metrics["eval_loss"] for state in states]
            rows.append(row)
    partial = output_dir / f".{INDEX_NAME}.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(output_dir / INDEX_NAME)
    return rows


def _print_summary(rows: list[dict[str, Any]], wanted: int, output_dir: Path) -> None:
    held_out = sum(row["split"] == "held_out" for row in rows)
    print(f"{output_dir}: {len(rows)} of {wanted} trajectories finished, {held_out} of them held out")
    print(f"{'':28}accuracy of the first and the last state, mean (lowest to highest)")
    for key in dict.fromkeys((row["architecture"], row["dataset"]) for row in rows):
        curves = [row["eval_accuracy"] for row in rows if (row["architecture"], row["dataset"]) == key]
        columns = []
        for state in (0, -1):
            values = [curve[state] for curve in curves]
            columns.append(f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        print(f"{' on '.join(key):28}{columns[0]:28}{columns[1]}")


if __name__ == "__main__":
    sys.exit(main(make_parser().parse_args()))
