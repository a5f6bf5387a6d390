"""recipes/reliability with a few kills and damaged inputs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[1] / "recipes" / "reliability"


@pytest.mark.parametrize(
    ("script", "flags", "total"),
    [
        ("kills.py", ["--kills", "2", "--only", "predict,pull"], 2),
        ("mutations.py", ["--inputs", "15", "--only", "trajectory,known,record-yaml"], 15),
    ],
)
def test_campaign(script: str, flags: list[str], total: int) -> None:
    path = os.pathsep.join([str(RECIPE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(RECIPE / script), *flags],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name, count, *rest = done.stdout.splitlines()[-1].split()
    assert name == "all" and int(count) >= total
    assert not any(map(int, rest[2:] if script == "mutations.py" else rest))
