"""FSDP2 and ZeRO-3 on two and four CPU processes, with the files of `recipes/accelerate_configs`.

    pytest -n 0 -m by_hand tests/processes/test_sharded_processes.py

ZeRO-3 needs `pip install deepspeed`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from doubles.small_trainers import PEFT_WARNING, hashes
from processes.test_recording_processes import assert_branches_of_one_process, assert_records_what_one_process_records

from know_hf import predict_overflowed_weights

WORKER = Path(__file__).with_name("sharded_recordings.py")
CONFIGS = WORKER.parents[2] / "recipes/accelerate_configs"
ENVIRONMENTS = {"fsdp2": {"ACCELERATE_USE_CPU": "1"}, "deepspeed_zero3": {"DS_ACCELERATOR": "cpu"}}
pytestmark = [pytest.mark.by_hand, PEFT_WARNING]


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("config", ENVIRONMENTS)
def test_sharded_weights_are_recorded_resumed_and_predicted(tmp_path, config, num_processes):
    if config == "deepspeed_zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    path = os.pathsep.join([str(WORKER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(num_processes)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, str(WORKER), str(tmp_path)],
        env={**os.environ, **ENVIRONMENTS[config], "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert_complete(tmp_path, config, num_processes)


def assert_complete(tmp_path: Path, config: str, num_processes: int) -> None:
    for rank in range(num_processes):
        for notes in json.loads((tmp_path / f"rank-{rank}.json").read_text()).values():
            assert notes["distributed_type"] == {"fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}[config]
            assert (notes["num_states"], notes["holds_state_0"]) == (3, True)
    statistics = ["sharded_statistics"] if config == "deepspeed_zero3" else []
    for name in ("sharded", "sharded_lora", *statistics):
        assert hashes(tmp_path / f"{name}_interrupted") == hashes(tmp_path / name)
    assert_branches_of_one_process(tmp_path / "sharded_branches", tmp_path)
    for name in ("sharded", "sharded_lora"):
        assert_records_what_one_process_records(tmp_path, name, tmp_path / f"{name}-alone")
    predict_overflowed_weights(tmp_path / "sharded", predictor="shrink", output_dir=tmp_path / "alone")
    weights = "model.safetensors"
    assert (tmp_path / "enhanced" / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
