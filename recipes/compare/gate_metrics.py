"""Compare what a gate chooses by loss, calibrated loss and accuracy, on the recordings of a suite of classifiers.

    know-hf compare photos --output-dir outputs/photos --arms naive --seeds 1000 1001 1002 1003
    python recipes/compare/gate_metrics.py photos outputs/photos

The gate chooses on validation examples of the source task. The table shows accuracy and losses of its choice on test
examples, minus those of Θ0, with 95% intervals over the recordings.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from know_hf import WeightTrajectory
    from know_hf.evaluation.splits import Split

Measured = dict[str, list[float]]  # values of validation batches and, of length 1, of test examples, by metric


def main(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from know_hf import WeightTrajectory
    from know_hf.evaluation.suites import load_suite
    from know_hf.evaluation.suites.suite_run import suite_arguments
    from know_hf.markdown import table
    from know_hf.prediction import choose
    from know_hf.prediction.choosing.batch_losses import ACCURACY, CALIBRATED, LOSS, METRICS

    suite = load_suite(arguments.suite)
    paths = {"data": dict(arguments.data or ()), "models": dict(arguments.model or ())}
    task, _ = suite_arguments(suite, arguments.output_dir, arms=None, known=None, seeds=None, **paths)
    folders = sorted((arguments.output_dir / "trajectories").glob("seed-*"))
    if len(folders) < 2:
        raise ValueError(f"{arguments.output_dir} has {len(folders)} recordings; an interval needs at least two")
    changes: dict[str, list[list[float]]] = {metric: [] for metric in METRICS}
    kept = dict.fromkeys(METRICS, 0)
    for folder in tqdm(folders, "gates", unit="recording"):
        split = task.source_split(int(folder.name.removeprefix("seed-")))
        measured = measure_candidates(WeightTrajectory(folder), split, suite.model.model_class)
        for metric, values in changes.items():
            decision = choose({name: validation[metric] for name, (validation, _) in measured.items()})
            kept[metric] += decision.is_reference
            after, before = (measured[name][1] for name in (decision.chosen, "Θ0"))
            values.append([after[name][0] - before[name][0] for name in (ACCURACY, LOSS, CALIBRATED)])
    rows = [[f"{suite.name}: the gate compares", "kept Θ0", "test accuracy", "test loss", "calibrated test loss"]]
    for metric, values in changes.items():
        errors, *losses = zip(*values, strict=True)
        accuracy = interval([-100 * change for change in errors], 1)
        rows.append([metric, f"{kept[metric]} of {len(folders)}", accuracy, *(interval(of, 3) for of in losses)])
    print(table(rows))
    return 0


def interval(values: Sequence[float], digits: int) -> str:
    from know_hf.evaluation.statistics import mean_and_interval

    estimate = mean_and_interval(values)
    return f"{estimate.mean:+z.{digits}f} ± {estimate.half_width:.{digits}f}"


def measure_candidates(
    trajectory: "WeightTrajectory", split: "Split", model_class: Any
) -> dict[str, tuple[Measured, Measured]]:
    """Return what every candidate of a gate scores on batches of validation examples and on all test examples."""
    from know_hf import Gate, predict_overflowed_weights
    from know_hf.batch_norm import recalibrate_batch_norm
    from know_hf.evaluation import batches
    from know_hf.prediction.choosing.batch_losses import METRICS, batch_losses

    measured = []
    few = min(8, len(split.validation["labels"]) // 10)  # as the arm `gate`
    inputs = {name: tensor for name, tensor in split.train.items() if name != "labels"}

    def compute_loss(model: Any) -> list[float]:
        recalibrate_batch_norm(model, batches(inputs, 20))
        of_both = [
            {metric: batch_losses(model, batches(examples, size), metric)[1] for metric in METRICS}
            for examples, size in ((split.validation, few), (split.test, len(split.test["labels"])))
        ]
        measured.append(of_both)
        return of_both[0]["validation loss"]

    with TemporaryDirectory() as folder:
        gate = Gate(compute_loss)
        output_dir = Path(folder) / "enhanced"
        result = predict_overflowed_weights(trajectory, output_dir=output_dir, gate=gate, model_class=model_class)
    return {
        candidate.name: tuple(of_both) for candidate, of_both in zip(result.gate.candidates, measured, strict=True)
    }


def make_parser() -> argparse.ArgumentParser:
    from know_hf.config_files import name_and_value

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="name or YAML file of the suite")
    parser.add_argument("output_dir", type=Path, help="output folder of the comparison, with its trajectories")
    for kind, read in (("data", "dataset"), ("model", "model")):
        help_text = f"read this {read} from a local folder"
        parser.add_argument(f"--{kind}", type=name_and_value, action="append", metavar="ID=FOLDER", help=help_text)
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("gate_metrics.py", lambda: main(arguments)))
