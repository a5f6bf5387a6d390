"""Kill every command of know_hf at random moments and compare what it leaves with an uninterrupted run.

python recipes/reliability/kills.py --kills 300 --seed 0

A trial runs a command in a forked process on a model of a few hundred weights and kills it: before a random change on
disk or request to the Hub, or at a random time; with SIGKILL, or in 40% of the kills with SIGINT or SIGTERM. Then the
files are checked: a folder that appears in one step is the old or the new one, every other visible file is complete.
In the end the command runs once more, and its files must be those of an uninterrupted run, byte for byte. Exits with
1 if anything is wrong.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from local_hub import LocalHub

if TYPE_CHECKING:
    from commands import Command, Commands, Contents

NAMES = ("record", "predict", "gate", "merge", "compare", "meta-train", "push", "pull")
SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGINT, signal.SIGTERM) * 2
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
COLUMNS = ("kills", "wrong bytes", "half-written", "refusals", "left-over")
TIMEOUT = 300
MANIFEST = "trajectory.json"


@dataclass(frozen=True)
class Kill:
    """A signal at the n-th change on disk or request to the Hub, or after some seconds."""

    signal: signal.Signals
    event: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        when = f"event {self.event}" if self.seconds is None else f"{self.seconds:.2f} s"
        return f"{self.signal.name} at {when}"


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: what it writes, how long it takes, and the numbers of its events by kind and file name."""

    before: "Contents"
    after: "Contents"
    names: frozenset[str]
    events: dict[str, list[int]]
    seconds: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="kills over all commands (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and signals (default: 0)")
    parser.add_argument("--only", help=f"commands, separated by commas (default: {','.join(NAMES)})")
    parser.add_argument("--trial", type=int, help="run only the trial of this number")
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(NAMES)
    with tempfile.TemporaryDirectory(prefix="know_hf-kills-") as temporary:
        root = Path(temporary)
        commands = prepare(root)
        counts = {}
        print(f"{'command':12}" + "".join(f"{column:>14}" for column in COLUMNS), flush=True)
        for index, name in enumerate(names):
            kills = args.kills // len(names) + (index < args.kills % len(names))
            counts[name] = Campaign(name, commands, root, args.seed).run(kills, args.trial)
            print_row(name, counts[name])
    print_row("all", sum(counts.values(), Counter()))
    return int(any(count[column] for count in counts.values() for column in COLUMNS[1:]))


def print_row(name: str, count: Counter[str]) -> None:
    print(f"{name:12}" + "".join(f"{count[column]:14}" for column in COLUMNS), flush=True)


def prepare(root: Path) -> "Commands":
    """Start the Hub, point huggingface_hub to it and import what the commands need, once for all forks."""
    hub = LocalHub()
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "home"), "HF_TOKEN": "hf_local", "TQDM_DISABLE": "1"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    os.environ.update(settings, OMP_NUM_THREADS="1")
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default lock is shared by forks, and a killed one would keep it
    from commands import Commands

    commands = Commands(root / "inputs", hub)
    gc.freeze()  # a collection in a fork would copy the memory of all imports
    return commands


class Campaign:
    """Kills of one command."""

    def __init__(self, name: str, commands: "Commands", root: Path, seed: int) -> None:
        self.name, self.hub, self.seed = name, commands.hub, seed
        self.command: Command = commands.all()[name]
        self.trial, self.log, self.events = root / "trial", root / "log", root / "events.json"
        self.counts: Counter[str] = Counter()
        self.references: dict[bool, Reference] = {}

    def run(self, kills: int, only: int | None = None) -> Counter[str]:
        for replaces in (False, True) if self.command.old else (False,):
            self.measure(replaces)  # warms up
            self.references[replaces] = self.measure(replaces)
        trial = only or 0
        while self.counts["kills"] < kills:
            self.try_once(trial)
            trial += 1
            if only is not None:
                break
        return self.counts

    def measure(self, replaces: bool) -> Reference:
        before = self.reset(replaces)
        start = time.monotonic()
        if self.launch(None):
            raise RuntimeError(f"{self.name} fails without a kill:\n{self.log.read_text()}")
        seconds, events = time.monotonic() - start, json.loads(self.events.read_text())
        return Reference(before, self.contents(), frozenset(self.names()), events, seconds)

    def try_once(self, trial: int) -> None:
        rng = random.Random(f"{self.seed}/{self.name}/{trial}")
        replaces = self.command.old is not None and rng.random() < 0.5
        reference = self.references[replaces]
        self.reset(replaces)
        moments, code = [], 1
        while code and len(moments) < 3 and (not moments or rng.random() < 0.3):  # some runs are killed again
            moments.append(self.draw(rng, reference))
            code = self.launch(moments[-1])
            if code:
                self.counts["kills"] += 1
                self.check(reference, trial, moments)
        if code and self.launch(None):
            last = (self.log.read_text().strip().splitlines() or [""])[-1]
            self.report("refusals", trial, moments, last)
        elif differing := differences(self.contents(), reference.after):
            self.report("wrong bytes", trial, moments, differing)
        elif left := sorted(self.names() - reference.names):
            self.report("left-over", trial, moments, ", ".join(left))

    def draw(self, rng: random.Random, reference: Reference) -> Kill:
        number = rng.choice(SIGNALS)
        if rng.random() < 0.7:  # a kind of event first, and renames three times as often: they are what must not tear
            kinds = [kind for kind in reference.events for _ in range(3 if kind.startswith("os.rename") else 1)]
            return Kill(number, event=rng.choice(reference.events[rng.choice(kinds)]))
        return Kill(number, seconds=rng.uniform(0, reference.seconds))

    def reset(self, replaces: bool) -> "Contents":
        shutil.rmtree(self.trial, ignore_errors=True)
        self.trial.mkdir()
        self.hub.commits.pop("me/trajectory", None)
        self.hub.large_files.clear()
        if replaces and self.command.old:
            self.command.old(self.trial)
        return self.contents()

    def launch(self, kill: Kill | None) -> int:
        """Run the command in a forked process; return its exit code."""
        context = multiprocessing.get_context("fork")
        process = context.Process(target=self.run_child, args=(kill,))
        process.start()
        process.join(TIMEOUT if kill is None or kill.seconds is None else kill.seconds)
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, kill.signal if kill else signal.SIGKILL)
            process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
        return int(process.exitcode or 0)

    def run_child(self, kill: Kill | None) -> None:
        """Run the command with its output in the log; die at the event of a kill."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        events = count_events(self.trial, kill)
        self.command.run(self.trial)
        self.events.write_text(json.dumps(events))

    def contents(self) -> "Contents":
        from commands import REPO, contents

        if self.command.on_hub:
            return self.hub.files(REPO)
        return contents(self.trial / "out")

    def names(self) -> set[str]:
        if self.command.on_hub:
            return set(self.contents())
        skipped = ("trainer", "__pycache__")
        return {str(p.relative_to(self.trial)) for p in self.trial.rglob("*") if not set(p.parts) & set(skipped)}

    def check(self, reference: Reference, trial: int, moments: list[Kill]) -> None:
        """Whether everything visible after a kill is complete."""
        visible = {path: data for path, data in self.contents().items() if not path.startswith((".", "work/"))}
        visible = {path: data for path, data in visible.items() if "/." not in path}
        if self.command.on_hub and MANIFEST not in visible:
            return  # cannot be read as a trajectory
        if self.command.is_whole or self.command.on_hub:
            if not visible and not (reference.before and not self.command.on_hub):
                return
            if differing := min((differences(visible, c) for c in (reference.before, reference.after)), key=len):
                self.report("half-written", trial, moments, differing)
            return
        listed = {path.removesuffix(MANIFEST) for path in visible if path.endswith(MANIFEST)}
        for path, data in visible.items():
            early = re.match(r"(.*?)(start|tail-\d+)/", path)
            if early and early[1] not in listed:
                continue  # the manifest lists the start and tail states together with state 0
            if not is_complete(path, data, reference.after.get(path)):
                self.report("half-written", trial, moments, path)

    def report(self, kind: str, trial: int, moments: list[Kill], what: str) -> None:
        self.counts[kind] += 1
        command = f"kills.py --seed {self.seed} --only {self.name} --trial {trial}"
        print(f"{self.name}: {kind} after {', '.join(map(str, moments))}: {what:.300} [{command}]", flush=True)


def count_events(trial: Path, kill: Kill | None) -> dict[str, list[int]]:
    """Count changes on disk and requests, by kind and file name without digits; die at the event of a kill."""
    from huggingface_hub import get_session

    client_class: Any = type(get_session())
    writing, send, prefix = os.O_WRONLY | os.O_RDWR | os.O_CREAT, client_class.send, f"{trial}/"
    events: dict[str, list[int]] = {}
    numbers = itertools.count(1)

    def count(kind: str, path: str) -> None:
        number = next(numbers)
        events.setdefault(f"{kind} {re.sub('[0-9a-f]{32}|[0-9]', '', path.rpartition('/')[2])}", []).append(number)
        if kill is not None and number == kill.event:
            os.kill(os.getpid(), kill.signal)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if (event == "open" and isinstance(args[0], str | bytes) and args[2] & writing) or event in CHANGES:
            in_folder = event in ("os.remove", "os.rmdir") and args[-1] != -1  # of shutil.rmtree
            if in_folder or os.fsdecode(args[0]).startswith(prefix):
                count(event, os.fsdecode(args[0]))

    def counted(client: Any, request: Any, **options: Any) -> Any:
        count(request.method, request.url.path)
        return send(client, request, **options)

    client_class.send = counted
    sys.addaudithook(hook)
    return events


def is_complete(path: str, data: bytes, expected: bytes | None) -> bool:
    if expected is None or not path.endswith(MANIFEST):
        return data == expected
    actual, final = json.loads(data), json.loads(expected)
    for state in (*actual["states"], *final["states"]):
        state.pop("metrics", None)  # added after the state
    return actual == {**final, "states": final["states"][: len(actual["states"])]}


def differences(actual: "Contents", expected: "Contents") -> str:
    names = sorted(path for path in actual.keys() | expected.keys() if actual.get(path) != expected.get(path))
    return ", ".join(names)


if __name__ == "__main__":
    sys.exit(main())
