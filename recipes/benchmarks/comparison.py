"""Seconds of an arm of a comparison: one trial after the other, against the trials of `know-hf compare`.

    python recipes/benchmarks/comparison.py mnist-halves --data ylecun/mnist=FOLDER

Records one trajectory, then measures each arm in both ways in turns, on one thread. Prints seconds per arm and seed
(CPU time without an accelerator) for each protocol and for all of them; each includes reading the data and making the
weights. *One by one*: the head is trained in the whole model, whose body runs again in each step, and every probe and
model has an optimizer of its own.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

PATHS = ("one by one", "together")
Seconds = dict[str, dict[str, dict[str, list[float]]]]  # by arm, protocol and path


def main(args: argparse.Namespace) -> None:
    seconds, suite, kind = measure(args)
    print(table(seconds))
    if args.json is not None:
        args.json.write_text(json.dumps({"suite": suite, "device": kind, "seconds": seconds}), encoding="utf-8")


def measure(args: argparse.Namespace) -> tuple[Seconds, str, str]:
    """Return the seconds, the name of the suite and the kind of the device."""
    import torch
    from one_by_one import one_by_one

    from know_hf.evaluation import load_suite
    from know_hf.evaluation.comparison_checks import Design
    from know_hf.evaluation.measure import device, measure_arm
    from know_hf.evaluation.suites.suite_task import SuiteTask

    torch.set_num_threads(1)
    suite, kind = load_suite(args.suite), device().type
    task = SuiteTask(suite, pairs(args.data), pairs(args.model)).comparison_task()
    arms = [arm for arm in suite.arms if arm.name in args.arms]
    clock = time.process_time if kind == "cpu" else time.perf_counter
    seconds: Seconds = {}
    with tempfile.TemporaryDirectory(dir=args.output_dir) as name:
        folder = Path(name)
        task.trajectory(args.seed, folder / "trajectories" / f"seed-{args.seed}")
        for label, protocols in [(protocol.name, (protocol,)) for protocol in suite.protocols] + [
            ("all", suite.protocols)
        ]:
            paths = dict(zip(PATHS, (tuple(map(one_by_one, protocols)), protocols), strict=True))
            for arm in arms:
                for path in PATHS * args.repetitions:
                    design = Design(task, paths[path], (arm,), (args.seed,), suite.draws, suite.trials_per_rate)
                    started = clock()
                    measure_arm((args.seed, arm), design=design, output_dir=folder)
                    of_arm = seconds.setdefault(arm.name, {}).setdefault(label, {})
                    of_arm.setdefault(path, []).append(clock() - started)
    return seconds, suite.name, kind


def pairs(texts: list[str]) -> dict[str, str]:
    """Split texts such as `ylecun/mnist=~/mnist`."""
    return {name: str(Path(path).expanduser()) for name, _, path in (text.partition("=") for text in texts)}


def table(seconds: Seconds) -> str:
    """Format medians in Markdown."""
    lines = ["| arm | protocol | one by one, s | together, s | ratio |", "| --- | --- | ---: | ---: | ---: |"]
    for arm, protocols in seconds.items():
        for protocol, paths in protocols.items():
            old, new = (statistics.median(paths[path]) for path in PATHS)
            lines.append(f"| {arm} | {protocol} | {old:.2f} | {new:.2f} | {old / new:.1f} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="mnist-halves", help="default: mnist-halves")
    parser.add_argument("--arms", nargs="+", default=["naive", "shrink"], metavar="ARM", help="default: naive shrink")
    parser.add_argument("--data", nargs="+", default=[], metavar="ID=PATH", help="folders of the suite's datasets")
    parser.add_argument("--model", nargs="+", default=[], metavar="ID=PATH", help="folders of its pretrained models")
    parser.add_argument("--seed", type=int, default=1000, help="trajectory seed (default: 1000)")
    parser.add_argument("--repetitions", type=int, default=3, help="measurements of each number (default: 3)")
    parser.add_argument("--output-dir", type=Path, help="folder for temporary files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
