"""Helpers for several processes, on stand-ins for a launched run; tests/processes/ launches real ones."""

from socket import gethostname
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from know_hf.distributed import (
    check_gathering,
    check_shared,
    gather_state_dict,
    is_sharded,
    on_every_process,
    on_main_process,
)

GATHER = "stage3_gather_16bit_weights_on_model_save"


def make_trainer(distributed_type, zero_stage=0, **zero_optimization):
    plugin = SimpleNamespace(zero_stage=zero_stage, deepspeed_config={"zero_optimization": zero_optimization})
    weights = {"weight": torch.ones(2)}
    accelerator = SimpleNamespace(
        distributed_type=distributed_type,
        num_processes=1,
        is_main_process=True,
        state=SimpleNamespace(deepspeed_plugin=plugin),
        get_state_dict=lambda model, unwrap: weights if model == "wrapped" and not unwrap else None,
    )
    return SimpleNamespace(accelerator=accelerator, model_wrapped="wrapped")


@pytest.mark.parametrize(
    ("distributed_type", "zero_stage", "sharded"),
    [
        (DistributedType.NO, 0, False),
        (DistributedType.MULTI_CPU, 0, False),
        (DistributedType.MULTI_GPU, 0, False),
        (DistributedType.FSDP, 0, True),
        (DistributedType.DEEPSPEED, 2, False),
        (DistributedType.DEEPSPEED, 3, True),
    ],
)
def test_sharded_weights_are_gathered(distributed_type, zero_stage, sharded):
    trainer = make_trainer(distributed_type, zero_stage, **{GATHER: True})
    assert is_sharded(trainer) == sharded
    gathered = gather_state_dict(nn.Linear(2, 2), trainer)
    assert gathered == (trainer.accelerator.get_state_dict("wrapped", unwrap=False) if sharded else None)


def test_zero_3_must_gather():
    for options in ({}, {GATHER: False}):
        with pytest.raises(ValueError, match=f"zero_optimization.{GATHER}"):
            check_gathering(make_trainer(DistributedType.DEEPSPEED, 3, **options))
    check_gathering(make_trainer(DistributedType.DEEPSPEED, 2))
    check_gathering(make_trainer(DistributedType.DEEPSPEED, 3, **{GATHER: True}))
    check_gathering(make_trainer(DistributedType.MULTI_GPU))


def test_sharded_weights_need_the_trainer():
    class FSDPLinear(nn.Linear):
        pass

    linear = nn.Linear(2, 2)
    assert gather_state_dict(linear, None) is None
    linear.weight.ds_shape, linear.weight.data = linear.weight.shape, torch.empty(0)  # as under ZeRO-3
    for model in (FSDPLinear(2, 2), linear):
        with pytest.raises(ValueError, match=rf"{type(model).__name__} .*trainer=trainer"):
            gather_state_dict(model, None)


def test_a_single_process_runs_the_action():
    for accelerator in (None, make_trainer(DistributedType.NO).accelerator):
        assert on_main_process(accelerator, lambda: 7) == 7
        assert on_every_process(accelerator, lambda: 7) == [7]


def test_a_folder_that_the_nodes_do_not_share(tmp_path):
    check_shared(None, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none.*{gethostname()}.*share"):
        check_shared(None, tmp_path / "none")
