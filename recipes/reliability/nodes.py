"""Kill one of two nodes in the middle of a command, start both again, and compare with an uninterrupted run.

python recipes/reliability/nodes.py                          # --only predict,collect: some of the commands

Two agents of `torchrun` on this machine, with one process each and a rendezvous on 127.0.0.1, stand for two nodes that
share a folder. A run in one go gives the expected bytes and the number of collective calls. Then a node, the other one
for every second command, kills its agent and itself with SIGKILL in the middle of these calls; of `collect`, which has
none, after the first state of a trajectory. Both nodes start again. Exits with 1 if any file differs.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commands import Contents

NAMES = ("record", "predict", "meta-train", "collect")
COLLECT = Path(__file__).parents[1] / "collect"
SPACE: dict[str, Any] = {
    "seed": 1,
    "architectures": {
        "cnn": {"training": "vision", "draws": {"digits": 2}, "model_class": "SmallCNN", "config": {"width": 2}}
    },
    "datasets": {"digits": {"path": "digits", "image": "image", "label": "label", "train": "train", "eval": "test"}},
    "training": {
        "vision": {
            "inputs": {"image_size": 8, "image_channels": 1},
            "augmentation": [],
            "num_examples": 64,
            "num_examples_limit": 64,
            "num_eval_examples": 10,
            "min_steps": 8,
            "schedule": {"num_states": 3, "ratio": 0.5, "epochs_per_stage": 1, "stratify_by": "labels"},
            "training_arguments": {"per_device_train_batch_size": 8},
            "optimizers": {"adamw": {"optim": "adamw_torch", "learning_rate": 0.01}},
        }
    },
}
SPACE["held_out"] = {"architectures": [], "datasets": [], "every": 2}
TIMEOUT = 600


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"commands, separated by commas (default: {','.join(NAMES)})")
    parser.add_argument("--worker", nargs=2, metavar=("COMMAND", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return run_node(args.worker[0], Path(args.worker[1]))
    failed = False
    with tempfile.TemporaryDirectory(prefix="know_hf-nodes-") as name:
        root = Path(name)
        prepare(root)
        for number, command in enumerate(args.only.split(",") if args.only else NAMES):
            differing = interrupted(root, command, victim=number % 2)
            failed |= bool(differing)
            print(f"{command}: {differing or 'the same bytes'}, node {number % 2} killed", flush=True)
    return int(failed)


def prepare(root: Path) -> None:
    """Write the inputs of the commands."""
    import PIL.Image
    import yaml
    from commands import record_walk
    from datasets import ClassLabel, Dataset, Features, Image
    from sklearn.datasets import load_digits

    (root / "inputs").mkdir()
    for seed, name in enumerate(("walk", "other")):
        record_walk(root / "inputs" / name, seed=seed)
    digits = load_digits()
    pictures = (digits.images * 15).astype("uint8")
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    for split, rows in (("train", slice(0, 200)), ("test", slice(200, 260))):
        columns = {"image": [PIL.Image.fromarray(p) for p in pictures[rows]], "label": digits.target[rows]}
        table = Dataset.from_dict(columns, features=features)
        table.to_parquet(root / "inputs/digits" / f"{split}.parquet")
    (root / "inputs/space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))


def interrupted(root: Path, command: str, victim: int) -> str:
    """Return the files of an interrupted run that differ from those of an uninterrupted one."""
    from commands import contents

    folders = [root / command / name for name in ("reference", "killed")]
    for folder in folders:
        folder.mkdir(parents=True)
    codes, output = launch(root, command, folders[0])
    if any(codes):
        raise RuntimeError(f"{command} fails without a kill:\n{output}")
    calls = folders[0] / "calls"
    kill = {"KILL_NODE": str(victim), "KILL_CALL": str(int(calls.read_text()) // 2 if calls.exists() else 0)}
    codes, _ = launch(root, command, folders[1], kill)
    if not codes[victim]:
        return "no node was killed"
    codes, output = launch(root, command, folders[1])
    if any(codes):
        return f"the restarted nodes end with the codes {codes}: {output[-2000:]}"
    reference, killed = (comparable(contents(folder / "out")) for folder in folders)
    return ", ".join(sorted(name for name in reference.keys() | killed if reference.get(name) != killed.get(name)))


def comparable(files: "Contents") -> "Contents":
    """Leave out hidden files, such as logs, and the times in the index of a collection."""
    return {
        name: re.sub(rb', "seconds": [0-9.]+', b"", data) if name.endswith(".jsonl") else data
        for name, data in files.items()
        if not name.startswith(".")
    }


def launch(root: Path, command: str, folder: Path, kill: dict[str, str] | None = None) -> tuple[list[int], str]:
    """Run a command on both nodes; return the exit codes of their agents."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    agents, logs = [], []
    for node in range(2):
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", folder.name]
        settings = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "NODE": str(node)}
        logs.append(folder / f"node-{node}.log")
        with logs[-1].open("wb") as log:
            program = [sys.executable, *launcher, __file__, "--worker", command, str(folder)]
            environment = {**os.environ, **settings, "INPUTS": str(root / "inputs"), **(kill or {})}
            agents.append(subprocess.Popen(program, env=environment, stdout=log, stderr=log))
    try:
        codes = [agent.wait(TIMEOUT) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return codes, "".join(log.read_text() for log in logs)


def run_node(command: str, folder: Path) -> int:
    """Run a command in the process of a node, which may kill itself and its agent."""
    inputs, out = Path(os.environ["INPUTS"]), folder / "out"
    is_victim = os.environ.get("KILL_NODE") == os.environ["NODE"]
    if command == "collect":
        if is_victim:
            Thread(target=die_after_a_state, args=(out,), daemon=True).start()
        sys.path.insert(0, str(COLLECT))
        import collect

        flags = [
            "--output-dir",
            str(out),
            "--space",
            str(inputs / "space.yaml"),
            "--data",
            f"digits={inputs / 'digits'}",
        ]
        return collect.main(collect.make_parser().parse_args(flags))
    import torch
    from accelerate import Accelerator
    from commands import record, train_known

    from know_hf import predict_overflowed_weights

    torch.set_num_threads(1)
    count_calls(folder, int(os.environ["KILL_CALL"]) if is_victim else None)
    if command == "record":
        record(out, trainer_dir=folder / "trainer")
    elif command == "predict":
        predict_overflowed_weights(inputs / "walk", steps=2, output_dir=out, accelerator=Accelerator())
    else:
        train_known(inputs, out)
    torch.distributed.destroy_process_group()
    return 0


def count_calls(folder: Path, last: int | None) -> None:
    """Count the collective calls of this node; die before the one of a number."""
    from torch import distributed

    calls, gather = 0, distributed.all_gather_object

    def counted(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            die()
        gather(*args, **options)
        (folder / "calls").write_text(str(calls))

    distributed.all_gather_object = counted


def die_after_a_state(collection: Path) -> None:
    while not list(collection.glob("*/state-0")):
        time.sleep(0.02)
    die()


def die() -> None:
    os.kill(os.getppid(), signal.SIGKILL)  # the agent
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
