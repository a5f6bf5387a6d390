"""Seconds of an arm of a comparison: one trial after the other, against the trials of `know-hf compare`.

    python recipes/benchmarks/comparison.py mnist-halves --data ylecun/mnist=FOLDER

Records one trajectory, then measures each arm in both ways in turns, on one thread. Prints seconds per arm and seed, CPU
seconds without an accelerator, for each protocol and for all of them; each includes reading the data and making the
weights. *One by one*: the head is trained in the whole model, whose body runs again in each step, and every probe and
model has an optimizer of its own.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

PATHS = ("one by one", "together")
Seconds = dict[str, dict[str, dict[str, list[float]]]]  # by arm, protocol and path


def main(args: argparse.Namespace) -> None:
    import torch

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
    print(table(seconds))
    if args.json is not None:
        args.json.write_text(json.dumps({"suite": suite.name, "device": kind, "seconds": seconds}), encoding="utf-8")


def one_by_one(protocol: Any) -> Any:
    """Return a protocol that trains one model or probe at a time, without cached features."""
    import copy

    import torch
    from torch.nn.functional import cross_entropy
    from transformers import get_cosine_schedule_with_warmup

    from know_hf.evaluation import FineTuning, LinearProbe, evaluate_classifier, fine_tune, with_new_head
    from know_hf.evaluation.fine_tuning import head_parameters
    from know_hf.evaluation.linear_probe import features
    from know_hf.evaluation.protocols import Trial, choose, first_of_each_class, refined

    class FineTuningOneByOne(FineTuning):
        def trials_of(self, runs, evaluate, measures, refinement, stacked):
            return [list(self.trials_one_by_one(*run, evaluate, measures, refinement)) for run in runs]

        def trials_one_by_one(self, model, split, seed, evaluate, measures, refinement):
            train = first_of_each_class(split.train, self.labels_per_class)
            start, rates = with_new_head(model, split.num_labels, seed), self.head_learning_rate
            heads = []
            for rate in rates if isinstance(rates, Sequence) else (rates,):
                heads.append(copy.deepcopy(start))
                head = [parameter for _, parameter in head_parameters(heads[-1])]
                fine_tune(heads[-1], train, rate, self.head_steps, seed, self.batch_size, head)
            scores = [{"validation": evaluate(head, split.validation)} for head in heads] if len(heads) > 1 else []
            start = heads[choose(scores, measures) if scores else 0]
            for rate in refined(self.learning_rates, refinement):
                tuned = copy.deepcopy(start)
                fine_tune(tuned, train, rate, self.steps, seed, self.batch_size)
                yield Trial(rate, evaluate(tuned, split.validation), evaluate(tuned, split.test))

    class LinearProbeOneByOne(LinearProbe):
        def trials_of(self, runs, evaluate, measures, refinement, stacked):
            return [list(self.trials_one_by_one(model, split, refinement)) for model, split, _ in runs]

        def trials_one_by_one(self, model, split, refinement):
            train = first_of_each_class(split.train, self.labels_per_class)
            inputs, *unseen = [features(model, part) for part in (train, split.validation, split.test)]
            for rate in refined(self.learning_rates, refinement):
                probe = torch.nn.Linear(inputs.shape[1], split.num_labels, device=inputs.device)
                optimizer = torch.optim.Adam(probe.parameters(), lr=rate)
                schedule = get_cosine_schedule_with_warmup(optimizer, 0, self.steps)
                for _ in range(self.steps):
                    optimizer.zero_grad()
                    cross_entropy(probe(inputs), train["labels"].to(inputs.device)).backward()
                    optimizer.step()
                    schedule.step()
                yield Trial(
                    rate,
                    *(
                        self.scores(probe, part, of)
                        for part, of in zip(unseen, (split.validation, split.test), strict=True)
                    ),
                )

        def scores(self, probe, inputs, examples):
            with torch.no_grad():
                outputs, labels = probe(inputs), examples["labels"].to(inputs.device)
            accuracy = float((outputs.argmax(dim=1) == labels).float().mean())
            return {"accuracy": accuracy, "loss": float(cross_entropy(outputs, labels))}

    classes = {FineTuning: FineTuningOneByOne, LinearProbe: LinearProbeOneByOne}
    if type(protocol) not in classes:
        return protocol
    return classes[type(protocol)](**{field.name: getattr(protocol, field.name) for field in fields(protocol)})


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
