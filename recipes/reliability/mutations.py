"""Damage the files that know_hf reads and check that it reports each damage in one line, or gives the right result.

python recipes/reliability/mutations.py --inputs 5000 --seed 0

Each input is a small folder (a trajectory, KNOWN weights, a comparison, YAML files and so on) of which one file is
damaged: flipped bits, missing bytes, other values, long names, paths that lead outside, links, swapped files, NaN. It
is read by a public function or a command. Allowed are the right result, and a `ValueError`, an `OSError` or exit code
1 with one line that names the file or its folder. All else is counted and printed: other errors, more than 30 s or
1.5 GB, unpickling, and files written or read outside of the folders. Exits with 1 if there is any.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

TIMEOUT = 30
MEMORY = 3 * 2**29
COLUMNS = (
    *("right", "refused", "other error", "unclear error", "wrong result"),
    *("too long", "memory", "unpickled", "outside"),
)
IN_PLACE = ("comparison", "report", "cache")  # write to the folder that they read


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5000, help="number of damaged inputs (default: 5000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damages (default: 0)")
    parser.add_argument("--only", help="targets, separated by commas (default: all)")
    parser.add_argument("--input", type=int, help="only the input of this number, with its traceback")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by default in the background
    with tempfile.TemporaryDirectory(prefix="know_hf-mutations-") as temporary:
        root = Path(temporary)
        campaign = Campaign(root, args.seed, args.only.split(",") if args.only else None, args.input is not None)
        numbers = range(args.inputs) if args.input is None else range(args.input, args.input + 1)
        counts: dict[str, Counter[str]] = {name: Counter() for name in campaign.targets}
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C prints the table of the inputs so far
            campaign.run(list(numbers), counts)
    print(f"{'target':12} {'inputs':>7}" + "".join(f"{column:>15}" for column in COLUMNS))
    for name, count in (*sorted(counts.items()), ("all", sum(counts.values(), Counter()))):
        print(f"{name:12} {count.total():7}" + "".join(f"{count[column]:15}" for column in COLUMNS))
    return int(any(count[column] for count in counts.values() for column in COLUMNS[2:]))


class Campaign:
    """Damaged inputs, tried in forked processes."""

    def __init__(self, root: Path, seed: int, only: list[str] | None, verbose: bool) -> None:
        settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "tmp" / "home"), "TMPDIR": str(root / "tmp")}
        settings |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(root / "tmp" / "mpl")}
        os.environ.update(settings, PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True
        tempfile.tempdir = str(root / "tmp")
        (root / "tmp").mkdir()
        import torch
        from damage import SECRET
        from targets import Targets
        from tqdm import tqdm

        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its default lock is shared by forks, and a killed one would keep it
        self.root, self.seed, self.verbose = root, seed, verbose
        (root / SECRET).write_text(json.dumps({"secret": 1}))
        self.targets = {name: t for name, t in Targets(root / "inputs").all().items() if only is None or name in only}
        self.expected: dict[str, Any] = {}
        for name, target in self.targets.items():
            target.make(self.intact(name))
            self.expected[name] = target.run(self.copy(name), self.empty_out())
        gc.freeze()  # a collection in a fork would copy the memory of all imports

    def intact(self, name: str) -> Path:
        (self.root / "intact" / name).mkdir(parents=True, exist_ok=True)
        return self.root / "intact" / name / "input"

    def copy(self, name: str) -> Path:
        """Copy the intact folder; the secret lies three folders above its files, or higher."""
        shutil.rmtree(self.root / "work", ignore_errors=True)
        return shutil.copytree(self.intact(name), self.root / "work" / "a" / "input")

    def empty_out(self) -> Path:
        shutil.rmtree(self.root / "out", ignore_errors=True)
        (self.root / "out").mkdir()
        return self.root / "out"

    def run(self, numbers: list[int], counts: dict[str, Counter[str]]) -> None:
        context = multiprocessing.get_context("fork")
        while numbers:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=self.work, args=(numbers, sender), daemon=True)
            process.start()
            sender.close()
            while numbers:
                name, kind, what = self.receive(receiver, process, numbers[0])
                counts[name][kind] += 1
                if kind not in ("right", "refused"):
                    command = f"mutations.py --seed {self.seed} --input {numbers[0]}"
                    only = f" --only {','.join(self.targets)}" if len(self.targets) < 14 else ""
                    print(f"{name}: {kind}: {what:.400} [{command}{only}]", flush=True)
                numbers = numbers[1:]
                if kind in ("too long", "memory"):
                    break
            process.kill()
            process.join()

    def receive(self, receiver: Any, process: Any, number: int) -> tuple[str, str, str]:
        try:
            if receiver.poll(TIMEOUT):
                return receiver.recv()
            kind = "too long"
        except EOFError:
            process.join()
            kind = "memory" if process.exitcode == -signal.SIGKILL else "too long"
        name, _, what = self.prepare(number)
        return name, kind, f"{what}; exit code {process.exitcode}"

    def prepare(self, number: int) -> tuple[str, Path, str]:
        """Damage the input of a number; return its target, the file and what was done."""
        from damage import damage

        rng = random.Random(f"{self.seed}/{number}")
        names = list(self.targets)
        (name,) = rng.choices(names, [self.targets[name].weight for name in names])
        path, what = damage(self.copy(name), rng)
        return name, path, f"{path.relative_to(self.root / 'work' / 'a' / 'input')}: {what}"

    def work(self, numbers: list[int], sender: Any) -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        if not self.verbose:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        watch = Watch(self.root)
        for number in numbers:
            name, path, what = self.prepare(number)
            out = self.empty_out()
            watch.start([out, self.root / "tmp"] + [self.root / "work"] * (name in IN_PLACE), "link: " in what)
            kind, message = self.attempt(name, path, out)
            watch.stop()
            kind, message = watch.fault or (kind, message)
            sender.send((name, kind, f"{what}: {message}"))

    def attempt(self, name: str, path: Path, out: Path) -> tuple[str, str]:
        target, folder = self.targets[name], self.root / "work" / "a" / "input"
        try:
            result = target.run(folder, out)
        except (ValueError, OSError) as error:
            message = str(error).strip()
            if self.verbose:
                traceback.print_exc()
            places = (path.name, str(folder), str(self.root / "inputs"))
            is_named = not target.names_file or any(place in message for place in places)
            is_clear = is_named and "\n" not in message and len(message) < 4000
            return "refused" if is_clear else "unclear error", f"{type(error).__name__}: {message}"
        except BaseException as error:
            if self.verbose:
                traceback.print_exc()
            kind = "memory" if isinstance(error, MemoryError) or "allocate memory" in str(error) else "other error"
            return kind, f"{type(error).__name__}: {error}"
        if target.has_hashes and path.name != "trajectory.json" and result != self.expected[name]:
            return "wrong result", ""
        return "right", ""


class Watch:
    """Sees what a process unpickles, and what it writes or reads outside of its folders."""

    def __init__(self, root: Path) -> None:
        import torch

        self.root, self.fault, self.is_on = root, None, False
        self.folders: list[str] = []
        self.links = False
        load = torch.load

        def watched(*args: Any, **options: Any) -> Any:
            self.fault = self.fault or ("unpickled", str(args[:1]))
            return load(*args, **options)

        torch.load = watched
        sys.addaudithook(self.hook)

    def start(self, folders: list[Path], links: bool) -> None:
        self.folders, self.links, self.fault = [str(folder) for folder in folders], links, None
        self.is_on = True

    def stop(self) -> None:
        self.is_on = False

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_on or self.fault:
            return
        if event == "pickle.find_class":
            self.fault = ("unpickled", ".".join(args))
        elif event == "open" and isinstance(args[0], str | bytes):
            path = os.fsdecode(args[0])
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.check(os.path.realpath(path))
            elif path.endswith(("secret.json", "/etc/passwd")) and not self.links:
                self.fault = ("outside", f"read {path}")
        elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate"):
            folder, name = os.path.split(os.fsdecode(args[0] if event in ("os.mkdir", "os.truncate") else args[1]))
            self.check(os.path.join(os.path.realpath(folder), name))  # not through a link of that name

    def check(self, path: str) -> None:
        if not path.startswith(("/dev/", *self.folders)):
            self.fault = ("outside", f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
