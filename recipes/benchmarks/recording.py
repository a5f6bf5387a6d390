"""Cost of recording a state, relative to `save_pretrained` of the same model in the same run.

    python recipes/benchmarks/recording.py --model sentence-transformers/all-MiniLM-L6-v2
    python recipes/benchmarks/recording.py --model random-350m

Prints medians over the repetitions: the time that the training waits for a state, as a share of `save_pretrained`; the
memory of the copy, as a share of the weights; and the slowdown of training steps while a state is written.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import peak_memory


def main(args: argparse.Namespace) -> None:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    model = make_model(args.model)
    step = training_step(model, args.batch_size)
    step()
    with tempfile.TemporaryDirectory(dir=args.output_dir) as name:
        folder = Path(name)
        saving = median(lambda number: model.save_pretrained(folder / f"saved-{number}"), args.repetitions)
        blocked, written, extra = time_recording(model, step, folder, args.repetitions)
        alone, beside = time_stages(model, step, folder, args.repetitions, args.stage_seconds)
    results = {
        "model": args.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "save_pretrained_seconds": saving,
        "blocked_seconds": blocked,
        "written_after_seconds": written,
        "blocked_share_of_save_pretrained": blocked / saving,
        "extra_memory_share_of_weights": extra / sum(parameter.nbytes for parameter in model.parameters()),
        "stage_seconds": args.stage_seconds,
        "steps_slower_by": 1 - beside / alone,
    }
    print(json.dumps(results, indent=2))


def make_model(name: str) -> Any:
    from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

    if name == "random-350m":
        return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    return AutoModel.from_pretrained(name)


def training_step(model: Any, batch_size: int) -> Callable[[], None]:
    """Return a training step: forward and backward pass, and a small change of every weight."""
    import torch

    ids = torch.randint(0, 1000, (batch_size, 64), device=model.device)

    def step() -> None:
        model(input_ids=ids)[0].float().square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-1e-6)
                    parameter.grad = None

    return step


def time_recording(model: Any, step: Callable[[], None], folder: Path, repetitions: int) -> tuple[float, float, int]:
    """Return the median seconds until training continues and until the state is on disk, and the extra bytes."""
    from know_hf import WeightTrajectory

    gc.collect()
    before = peak_memory()
    trajectory = WeightTrajectory.create(folder / "trajectory")
    blocked, written = [], []
    for repetition in range(repetitions):
        step()
        start = time.perf_counter()
        trajectory.record(model, num_examples=repetitions - repetition, steps=1, background=True)
        blocked.append(time.perf_counter() - start)
        trajectory.check(wait=True)
        written.append(time.perf_counter() - start)
    return statistics.median(blocked), statistics.median(written), peak_memory() - before


def time_stages(
    model: Any, step: Callable[[], None], folder: Path, repetitions: int, seconds: float
) -> tuple[float, float]:
    """Return the median steps per second of stages alone, and of stages that begin with writing a state."""
    from know_hf import WeightTrajectory

    alone, beside = [], []
    for repetition in range(repetitions):
        alone.append(steps_per_second(step, seconds))
        stage = WeightTrajectory.create(folder / f"stage-{repetition}")
        stage.record(model, num_examples=1, steps=1, background=True)
        beside.append(steps_per_second(step, seconds))
        stage.check(wait=True)
    return statistics.median(alone), statistics.median(beside)


def steps_per_second(step: Callable[[], None], seconds: float) -> float:
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        count += 1
    return count / (time.perf_counter() - start)


def median(action: Callable[[int], object], repetitions: int) -> float:
    """Return the median seconds of an action, which takes the number of the repetition."""
    seconds = []
    for repetition in range(repetitions):
        start = time.perf_counter()
        action(repetition)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="random-350m", help="Hub id, folder, or random-350m (default: %(default)s)")
    add("--output-dir", help="folder for temporary files (default: that of the system)")
    add("--repetitions", type=int, default=5, help="recorded states, and stages (default: %(default)s)")
    add("--stage-seconds", type=float, default=30, help="seconds per stage of training (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="examples per step (default: %(default)s)")
    add("--threads", type=int, default=0, help="threads of torch (default: its default)")
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("recording.py", lambda: main(arguments)))
