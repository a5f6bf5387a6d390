"""Speed of meta-training, and whether the network or the reading limits it.

    python recipes/benchmarks/meta_training.py
    python recipes/benchmarks/meta_training.py --sizes small --processes 1 2 --json meta_training.json

Records temporary trajectories of random walks. Then it measures, with the published network and batch size, the time
per step of the network alone, of drawing and reading a batch, and of loading full states for every batch with
`safetensors.torch.load_file`, and trainings on one and two processes, the best of the repetitions. The CPU time of a
process does not include waiting for a core. Prints Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import nn

    from know_hf import TransitionDataset

# Width of the net, number of trajectories.
SIZES = {"small": (32, 40), "large": (1024, 3)}
READERS = ("mapped", "in memory", "full states of one trajectory")
NUM_STATES = 7
ROLES = 3


def main(args: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    results = {"sizes": {}, "processes": {}, "cores": len(os.sched_getaffinity(0)), "batch_size": args.batch_size}
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix="benchmark-") as name:
        for size in args.sizes:
            folder = Path(name, size)
            results["sizes"][size] = measure(folder, size, args)
        for processes in args.processes:
            runs = [train_in_processes(Path(name, args.sizes[0]), processes, args) for _ in range(args.repetitions)]
            results["processes"][processes] = {key: min(run[key] for run in runs) for key in ("wall", "cpu")}
    print("", steps_table(results), processes_table(results), sep="\n\n")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


def measure(folder: Path, size: str, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from tqdm.auto import tqdm

    from know_hf import KNOWNConfig, KNOWNModel, TransitionDataset
    from know_hf.meta_learning import BalancedBatchSampler, MetaTrainingArguments
    from know_hf.meta_learning.objective import MetaObjective

    torch.set_num_threads(1)
    parameters = record(folder, *SIZES[size])
    paths = sorted(path.parent for path in folder.glob("*/trajectory.json"))

    start = time.process_time()
    mapped = TransitionDataset(paths, cache_dir=folder / "samples", progress=False)
    drawing = time.process_time() - start
    in_memory = TransitionDataset(paths, progress=False)
    batches = iter(BalancedBatchSampler(mapped, args.batch_size, 1_000_000))
    again = iter(BalancedBatchSampler(in_memory, args.batch_size, 1_000_000))

    model = KNOWNModel(KNOWNConfig())
    objective = MetaObjective(model, mapped, MetaTrainingArguments())
    optimizer = torch.optim.Adam(model.parameters())
    batch = mapped.by_role(next(batches))

    def step(precision: torch.dtype | None = None) -> None:
        with torch.autocast("cpu", precision, enabled=precision is not None):
            losses = objective(batch)
        losses["objective"].backward()
        for network in model.networks.values():
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    states = full_states(paths, mapped, args.batch_size)
    readers = (
        lambda: mapped.by_role(next(batches)),
        lambda: in_memory.by_role(next(again)),
        lambda: next(states),
    )
    contestants: dict[str, Callable[[], object]] = {
        "network": step,
        "network in bfloat16": lambda: step(torch.bfloat16),
        **dict(zip(READERS, readers, strict=True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in tqdm(range(args.repetitions), desc=size):  # contestants take turns, so that all see the same load
        for name, contestant in contestants.items():
            seconds[name].append(timed(contestant, args.seconds))
    return {
        "parameters": parameters,
        "trajectories": len(paths),
        "drawing_once": drawing,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
    }


def timed(contestant: Callable[[], object], seconds: float) -> float:
    """Return the mean CPU seconds of a call, measured for `seconds` seconds after a first call."""
    contestant()
    start, calls = time.process_time(), 0
    while time.process_time() - start < seconds:
        contestant()
        calls += 1
    return (time.process_time() - start) / calls


def full_states(paths: list[Path], dataset: "TransitionDataset", batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield batches of one trajectory, loading all of its states for each.

    A batch mixed over trajectories would take as long for each of them.
    """
    import torch
    from safetensors.torch import load_file

    from know_hf import WeightTrajectory

    length = dataset.num_states + 1
    roles = {path: {name: role.role for name, role in WeightTrajectory(path).roles.items()} for path in paths}
    generator = torch.Generator().manual_seed(0)
    while True:
        path = paths[int(torch.randint(len(paths), (), generator=generator))]
        states = [load_file(path / f"state-{k}/model.safetensors") for k in reversed(range(NUM_STATES))]
        batch = {}
        for role in dataset.roles:
            names = [name for name, of_tensor in roles[path].items() if of_tensor == role]
            history = torch.stack([torch.cat([state[name].flatten() for name in names]) for state in states])
            rows = torch.randint(history.shape[1], (batch_size,), generator=generator)
            first = torch.randint(NUM_STATES - length + 1, (batch_size,), generator=generator)
            windows = history[first[:, None] + torch.arange(length), rows[:, None]]
            batch[role] = {"history": windows[:, :-1], "labels": windows[:, -1]}
        yield batch


def record(folder: Path, width: int, count: int) -> int:
    """Record trajectories of random walks of a small net; return its number of parameters."""
    import torch

    from know_hf import WeightTrajectory

    generator = torch.Generator().manual_seed(0)
    net = make_net(width)
    for number in range(count):
        trajectory = WeightTrajectory.create(folder / f"net-{number:03d}")
        for state in range(NUM_STATES):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
            trajectory.record(net, num_examples=NUM_STATES - state, steps=1)
    return sum(parameter.numel() for parameter in net.parameters())


def make_net(width: int) -> "nn.Module":
    from torch import nn

    layers: list[nn.Module] = [nn.Conv2d(1, 32, 3)]
    layers += [nn.Conv2d(32, 32, 3) for _ in range(4)]
    layers += [nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


def train_in_processes(folder: Path, processes: int, args: argparse.Namespace) -> dict[str, float]:
    """Train in new processes; return the seconds and CPU seconds per step."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, __file__, "--train", str(folder), "--steps", str(args.steps)]
    command += ["--batch_size", str(args.batch_size)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The training on {processes} processes failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def train(args: argparse.Namespace) -> None:
    from know_hf import TransitionDataset
    from know_hf.meta_learning import MetaTrainingArguments, meta_train, start_processes

    class Timed(TransitionDataset):
        """Record the CPU time at which each batch is read."""

        times: ClassVar[list[float]] = []

        def by_role(self, indices: Any) -> dict[str, dict[str, Any]]:
            self.times.append(time.process_time())
            return super().by_role(indices)

    processes = start_processes()
    paths = sorted(path.parent for path in args.train.glob("*/trajectory.json"))
    dataset = Timed(paths, cache_dir=args.train / "samples", progress=False)
    training = MetaTrainingArguments(steps=args.steps, batch_size=args.batch_size)
    result = meta_train(None, dataset, args=training, progress=False)
    if processes.is_main_process:
        cpu = statistics.median(after - before for before, after in pairwise(Timed.times))
        print(json.dumps({"wall": result.seconds / args.steps, "cpu": cpu}))
    processes.destroy_process_group()


def steps_table(results: dict[str, Any]) -> str:
    from know_hf.markdown import table

    columns = list(results["sizes"].values())
    header = [f"{size['trajectories']} nets of {size['parameters']:,} parameters" for size in columns]
    rows = [["one thread, CPU milliseconds per step", *header]]
    rows += [[name, *(f"{1e3 * size['seconds'][name]:.2f}" for size in columns)] for name in columns[0]["seconds"]]
    shares, rates = [], []
    for name in READERS:
        times = [(size["seconds"][name], size["seconds"][name] + size["seconds"]["network"]) for size in columns]
        shares.append([f"share of the reading, {name}", *(f"{reading / step:.1%}" for reading, step in times)])
        transitions = ROLES * results["batch_size"]
        rates.append([f"transitions per second, {name}", *(f"{transitions / step:,.0f}" for _, step in times)])
    drawing = ["drawing the samples once, seconds", *(f"{size['drawing_once']:.2f}" for size in columns)]
    return table([*rows, *shares, *rates, drawing])


def processes_table(results: dict[str, Any]) -> str:
    from know_hf.markdown import table

    if not results["processes"]:
        return ""
    first = next(iter(results["processes"].values()))
    header = [f"processes, {results['cores']} cores", "milliseconds per step", "transitions per second", "speed-up"]
    rows = [[*header, "CPU milliseconds per step and process", "speed-up"]]
    for processes, times in results["processes"].items():
        cells = [processes, f"{1e3 * times['wall']:.1f}", f"{ROLES * results['batch_size'] / times['wall']:,.0f}"]
        cells += [f"{first['wall'] / times['wall']:.2f}", f"{1e3 * times['cpu']:.1f}"]
        rows.append([*cells, f"{first['cpu'] / times['cpu']:.2f}"])
    return table(rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="sizes of the nets (default: small large)")
    add("--processes", nargs="*", type=int, default=[1, 2], help="numbers of processes (default: 1 2)")
    add("--output-dir", help="folder for temporary files (default: that of the system)")
    add(
        "--batch-size",
        "--batch_size",
        type=int,
        default=2048,
        help="transitions per role and step (default: %(default)s)",
    )
    add("--steps", type=int, default=200, help="steps per training (default: %(default)s)")
    add("--repetitions", type=int, default=5, help="repetitions of every measurement (default: %(default)s)")
    add("--seconds", type=float, default=0.5, help="CPU seconds per repetition (default: %(default)s)")
    add("--json", metavar="FILE", help="write all numbers to this file")
    add("--train", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("meta_training.py", lambda: train(arguments) if arguments.train else main(arguments)))
