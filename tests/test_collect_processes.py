"""recipes/collect on several processes, run as its users run it; and what it pushes to the Hub."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import pytest
from collect_space import ARCHITECTURES, FOLDER, TRAINING, VISION, collect, sources, write_space
from huggingface_hub import snapshot_download
from doubles.loopback_hub import LoopbackHub, environment, hub

from know_hf import WeightTrajectory

__all__ = ["collect", "hub", "sources"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft's own
    "ignore:Could not find a config file in nobody/tiny-bert:UserWarning",  # peft asks the Hub
    "ignore:Use 'content=:DeprecationWarning",  # huggingface_hub sends large files in a way that httpx wants otherwise
)


def test_two_ranks_share_the_work_and_one_is_killed(
    collect: ModuleType, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trajectory is finished once, in the weights of one process that was never killed."""
    output = tmp_path / "shared"
    slow = {**ARCHITECTURES["cnn"], "draws": {"shapes": 1}, "training": "slow"}
    long = {**VISION, "schedule": {**VISION["schedule"], "epochs_per_stage": 100}}
    broken = {**slow, "model_class": "NoSuchNet"}
    space = write_space(
        tmp_path / "space.yaml",
        architectures={"slow": slow, **ARCHITECTURES, "broken": broken},
        training={**TRAINING, "slow": long},
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += [str(FOLDER / "collect.py"), f"--output-dir={output}", f"--space={space}", *sources]
    variables = os.environ | {"ACCELERATE_USE_CPU": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ranks:
        victim = _recorder_of(output / "slow-shapes-000", ranks)
        os.kill(victim, signal.SIGKILL)
        out, error = ranks.communicate(timeout=120)
    assert ranks.returncode == 1, error  # one of the trajectories fails
    assert f"a process died with exit code {-signal.SIGKILL}" in error
    assert "6 of 7 trajectories finished" in out
    assert re.search(
        r"^failed: broken-shapes-000: ValueError: architecture 'broken': neither models.py nor", error, re.M
    )
    logs = {path: path.read_text() for path in (output / ".logs").iterdir()}
    assert sum("recording" in log for log in logs.values()) >= 2  # both ranks had work
    finished = Counter(re.findall(r"^(\S+): finished$", "\n".join(logs.values()), re.M))
    names = [json.loads(line)["path"] for line in (output / "index.jsonl").read_text().splitlines()]
    assert finished == Counter(names) and len(names) == 6

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    _record_here(collect, [f"--output-dir={tmp_path / 'alone'}", f"--space={space}", *sources])
    for name in names:
        trajectory, reference = (WeightTrajectory(folder / name) for folder in (output, tmp_path / "alone"))
        trajectory.verify()
        assert _weights(trajectory) == _weights(reference), name
        metrics = [[state.metrics for state in t.states] for t in (trajectory, reference)]
        assert metrics[0] == metrics[1], name


def _weights(trajectory: WeightTrajectory) -> list[str]:
    files = [file for state in trajectory.states for file in state.files]
    return [file.sha256 for file in files if file.path.endswith(".safetensors")]


def _recorder_of(trajectory: Path, ranks: subprocess.Popen) -> int:
    """The process that is at a trajectory, once it has a state."""
    while ranks.poll() is None:
        if (trajectory / "trajectory.json").exists():
            for log in (trajectory.parent / ".logs").iterdir():
                if f"{trajectory.name}: recording" in log.read_text():
                    return int(log.stem.rpartition("-")[2])
        time.sleep(0.01)
    raise AssertionError(ranks.communicate()[1])


def _record_here(collect: ModuleType, flags: list[str]) -> None:
    """Records a collection in this process alone."""
    from space import Space
    from workers import Job, take_what_is_left

    arguments = collect.make_parser().parse_args(flags)
    space, models = Space.from_yaml(arguments.space), collect._pairs("--model", arguments.model)
    sources = collect._sources(space, arguments.data)
    (arguments.output_dir / ".locks").mkdir(parents=True)
    take_what_is_left(Job(space.recipes(), sources, models, arguments.output_dir), SimpleNamespace(send=id))


def test_what_kills_its_process_twice_is_a_failure(
    collect: ModuleType, sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from space import Space
    from workers import Job, record_all, result

    space = Space.from_yaml(write_space(tmp_path / "space.yaml"))
    deadly = defaultdict(partial(os._exit, 9))  # ends the process that looks for a dataset in it
    job = Job(space.recipes()[:1], deadly, {}, tmp_path / "collection")
    record_all(job, workers=3, first_device=0, show=False)
    assert result(job.output_dir, "cnn-shapes-000") == {
        "status": "failed",
        "error": "2 processes died of it (out of memory?)",
    }
    assert capsys.readouterr().err.count("a process died with exit code 9 at cnn-shapes-000") == 2


def test_a_failure_that_another_process_kept_from_being_written_is_written_later(
    collect: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second death another process is at the trajectory, at the third nobody is."""
    import workers

    job = workers.Job([SimpleNamespace(name="deadly")], {}, {}, tmp_path)
    deaths: list[int] = []

    def start(job: object, number: int) -> object:
        deaths.append(number)
        assert len(deaths) < 5, "it is never given up"
        ours, theirs = multiprocessing.Pipe(duplex=False)
        theirs.send(("deadly", None))
        process = multiprocessing.get_context("spawn").Process(target=os._exit, args=(9,))
        process.start()
        return workers._Worker(process, ours, number)

    give_up = workers._give_up
    monkeypatch.setattr(workers, "_start", start)
    monkeypatch.setattr(workers, "_give_up", lambda *given: give_up(*given) if len(deaths) > 2 else None)
    workers.record_all(job, workers=1, first_device=0, show=False)
    assert len(deaths) == 3 and workers.result(tmp_path, "deadly")["status"] == "failed"


class _Unreadable:
    name = "cnn-shapes-000"

    def __reduce__(self) -> tuple:
        return os._exit, (3,)


def test_processes_that_can_not_begin_are_an_error(collect: ModuleType, tmp_path: Path) -> None:
    from workers import Job, record_all

    job = Job([_Unreadable()], {}, {}, tmp_path)
    with pytest.raises(RuntimeError, match=r"processes end before they record anything; see .*\.logs"):
        record_all(job, workers=1, first_device=0, show=False)


def test_a_launcher_starts_the_processes(collect: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = write_space(tmp_path / "space.yaml")
    arguments = collect.make_parser().parse_args(["--output-dir=x", f"--space={space}", "--workers=2"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--workers 2: the launcher starts the processes, one a rank"):
        collect.main(arguments)


def test_a_collection_is_one_dataset_on_the_hub(
    collect: ModuleType,
    sources: list[str],
    tmp_path: Path,
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    output, space = tmp_path / "collection", write_space(tmp_path / "space.yaml", architectures=_TWO, held_out={})
    arguments = [f"--output-dir={output}", f"--space={space}", *sources]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    _record_here(collect, arguments)
    (output / "gpt2-reviews-000" / "result.json").write_text('{"status": "failed", "error": "?"}')

    parsed = collect.make_parser().parse_args([*arguments, "--push-to-hub=me/trajectories", "--private"])
    assert collect.main(parsed) == 1
    done = capsys.readouterr()
    assert "2 of 3 trajectories finished" in done.out and f"{hub.url}/datasets/me/trajectories/commit/" in done.out
    repo = hub.repo("me/trajectories", "dataset")
    files = repo.files()
    assert repo.private and repo.titles()[0] == "Upload 2 trajectories"
    assert {"README.md", "index.jsonl", "space.yaml", "cnn-shapes-001/state-2/model.safetensors"} <= set(files)
    assert not any(".lock" in path or "gpt2" in path or path.startswith((".cache", ".logs")) for path in files)

    pulled = Path(snapshot_download("me/trajectories", repo_type="dataset", local_dir=tmp_path / "pulled"))
    index = datasets.load_dataset(str(pulled), split="trajectories", cache_dir=str(tmp_path / "datasets"))
    assert index["path"][:] == ["cnn-shapes-000", "cnn-shapes-001"]
    for path in index["path"]:
        WeightTrajectory(pulled / path).verify()
    code = "import datasets; print(datasets.load_dataset('me/trajectories', split='trajectories')['path'][:])"
    variables = environment(hub, tmp_path / "home")
    found = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert found.stdout.strip() == "['cnn-shapes-000', 'cnn-shapes-001']", found.stderr


_TWO = {"cnn": ARCHITECTURES["cnn"], "gpt2": ARCHITECTURES["gpt2"]}
