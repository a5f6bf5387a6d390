"""`recipes/accelerate_configs`, of which tests/processes launches `cpu_2.yaml`, and `recipes/SCALING.md`."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted((RECIPES / "accelerate_configs").glob("*.yaml"))
TEXT = (RECIPES / "SCALING.md").read_text(encoding="utf-8")


def launched(path):
    args = launch_command_parser().parse_args(["--config_file", str(path), "--num_cpu_threads_per_process=1", "x.py"])
    return _validate_launch_command(args)[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(path):
    config, args = load_config_from_file(str(path)), launched(path)
    assert (config.mixed_precision, args.mixed_precision) == ("no", "no")
    assert args.num_processes == config.num_processes > 1
    assert (args.use_fsdp, args.use_deepspeed) == ("fsdp" in path.stem, "deepspeed" in path.stem)
    assert args.multi_gpu == (not (args.use_fsdp or args.use_deepspeed))  # accelerate starts one process otherwise


def test_sharded_weights_are_gathered():
    assert launched(FILES[0].with_name("fsdp2.yaml")).fsdp_version == 2
    assert launched(FILES[0].with_name("deepspeed_zero3.yaml")).zero3_save_16bit_model is True


def test_every_file_is_marked_and_listed():
    assert len(FILES) == 4
    for path in FILES:
        (first, *_), row = path.read_text(encoding="utf-8").splitlines(), re.search(rf"\| `{path.name}` \|.*", TEXT)
        assert re.match("# (Tested|Not tested)", first) and row
        assert ("Not tested" in first) == ("not tested" in row[0]), path.name


def test_the_sizes_are_those_that_the_code_prints(capsys):
    code, output = re.search("```python\n(.*?)```\n```text\n(.*?)```", TEXT, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == output
