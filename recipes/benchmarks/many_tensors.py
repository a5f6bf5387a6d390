"""Prediction of many small tensors, relative to one large tensor of the same bytes in the same run.

    python recipes/benchmarks/many_tensors.py
    python recipes/benchmarks/many_tensors.py --tensors 5000 --json results.json

Records two trajectories of five states: one of many square matrices, and one of a single matrix of as many weights.
Runs `predict_overflowed_weights` and `inspect_trajectory` on both. The two take turns in new processes. Prints medians
and their ratio as Markdown.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contestants import Contestant

NUM_STATES = 5
STEPS = ("record", "predict", "inspect")


def main(args: argparse.Namespace) -> None:
    threads = args.threads or len(os.sched_getaffinity(0))
    # Libraries read these when the processes below import them.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    side, count = args.side, args.tensors
    layers = {"many": (count, side, side), "one": (1, count, side * side)}
    times: dict[str, dict[str, list[float]]] = {step: {name: [] for name in layers} for step in STEPS}
    for _ in range(args.repetitions):
        for name, sizes in layers.items():
            with tempfile.TemporaryDirectory(dir=args.output_dir, prefix="benchmark-") as folder:
                with Contestant(prepare, *sizes, Path(folder), threads) as contestant:
                    measured = contestant.run()
                    if contestant.failure:
                        raise SystemExit(contestant.details)
            for step, seconds in measured.items():
                times[step][name].append(seconds)
    medians = {step: {name: statistics.median(each[name]) for name in layers} for step, each in times.items()}
    results = {"tensors": count, "parameters": count * side**2, "threads": threads, "seconds": medians}
    results["ratios"] = {step: each["many"] / each["one"] for step, each in medians.items()}
    print(table(results))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


def prepare(
    count: int, rows: int, columns: int, folder: Path, threads: int
) -> tuple[Callable[[], dict[str, float]], dict[str, Any]]:
    """Prepare recording, prediction and inspection of layers of random weights, timed without imports."""
    import torch

    from know_hf import WeightTrajectory, predict_overflowed_weights
    from know_hf.trajectory.summary import inspect_trajectory

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList()})
    for _ in range(count):
        layer = torch.nn.Linear(columns, rows, bias=False, device="meta").to_empty(device="cpu")
        torch.nn.init.normal_(layer.weight, std=0.05)
        model["layers"].append(layer)  # type: ignore[operator]
    noise = 0.001 * torch.randn(rows, columns)

    def record() -> None:
        trajectory = WeightTrajectory.create(folder / "trajectory")
        for state in range(NUM_STATES):
            trajectory.record(model, num_examples=1 << (NUM_STATES - state), steps=1)
            for parameter in model.parameters():
                parameter.data += noise

    def run() -> dict[str, float]:
        calls: dict[str, Callable[[], object]] = {
            "record": record,
            "predict": lambda: predict_overflowed_weights(folder / "trajectory", output_dir=folder / "enhanced"),
            "inspect": lambda: inspect_trajectory(WeightTrajectory(folder / "trajectory")),
        }
        seconds = {}
        for step, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[step] = time.perf_counter() - start
        return seconds

    return run, {}


def table(results: dict[str, Any]) -> str:
    from know_hf.markdown import table

    header = ["seconds", f"{results['tensors']:,} tensors", "one tensor of the same bytes", "ratio"]
    rows = [header]
    for step, seconds in results["seconds"].items():
        rows.append([step, f"{seconds['many']:.2f}", f"{seconds['one']:.2f}", f"{results['ratios'][step]:.2f}"])
    text = f"{results['parameters']:,} weights in each, {results['threads']} threads, {NUM_STATES} states in float32."
    return f"{text}\n\n{table(rows)}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tensors", type=int, default=20_000, help="number of matrices (default: %(default)s)")
    add("--side", type=int, default=64, help="rows and columns of each (default: %(default)s)")
    add("--repetitions", type=int, default=3, help="repetitions (default: %(default)s)")
    add("--threads", type=int, default=0, help="threads of every process (default: number of cores)")
    add("--output-dir", help="folder for temporary files (default: that of the system)")
    add("--json", metavar="FILE", help="write all numbers to this file")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args(sys.argv[1:]))
