"""Helpers for several processes, on stand-ins for a launched run; tests/processes/ launches real ones."""

import copy
import sys
from importlib.machinery import ModuleSpec
from socket import gethostname
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from know_hf import WeightTrajectory
from know_hf.distributed import check_sharding, check_shared, gathering, is_sharded, on_every_process, on_main_process
from know_hf.trajectory import TrajectoryError


def make_trainer(distributed_type, zero_stage=0, is_fsdp2=True, **config):
    accelerator = SimpleNamespace(
        distributed_type=distributed_type,
        num_processes=1,
        is_main_process=True,
        is_fsdp2=is_fsdp2,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=zero_stage, deepspeed_config=config)),
    )
    return SimpleNamespace(accelerator=accelerator)


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
def test_trainers_that_shard_weights(distributed_type, zero_stage, sharded):
    trainer = make_trainer(distributed_type, zero_stage)
    assert is_sharded(trainer) == sharded
    check_sharding(trainer)


class WrappedByFSDP1(FullyShardedDataParallel):
    def __init__(self):
        nn.Module.__init__(self)


def test_fsdp_1_is_refused():
    with pytest.raises(ValueError, match=r"FSDP1 .*fsdp_version: 2"):
        check_sharding(make_trainer(DistributedType.FSDP, is_fsdp2=False))
    with pytest.raises(ValueError, match="FSDP1"), gathering(WrappedByFSDP1()):
        pass


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_config_has_no_optimizer_of_its_own(section):
    with pytest.raises(ValueError, match=f"DeepSpeed .*{section}"):
        check_sharding(make_trainer(DistributedType.DEEPSPEED, 2, **{section: {"type": "AdamW"}}))


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Gathered:
    """`deepspeed.zero.GatheredParameters` of a single process: outside of the block, parameters are empty."""

    def __init__(self, parameters, modifier_rank=None):
        (self.parameter,), self.modifies = parameters, modifier_rank == 0

    def __enter__(self):
        self.parameter.data = self.parameter.ds_tensor.clone()

    def __exit__(self, *error):
        if self.modifies:
            self.parameter.ds_tensor = self.parameter.data
        self.parameter.data = torch.empty(0)


@pytest.fixture(params=["FSDP2", "ZeRO-3"])
def shard(request, process_group, monkeypatch):
    """Function that shards the weights of a model."""
    zero = SimpleNamespace(GatheredParameters=Gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero, __spec__=ModuleSpec("deepspeed", None)))

    def partition(model):
        for parameter in model.parameters():
            parameter.ds_shape, parameter.ds_tensor = parameter.shape, parameter.data
            parameter.data = torch.empty(0)

    mesh = init_device_mesh("cpu", (1,))
    return (lambda model: fully_shard(model, mesh=mesh)) if request.param == "FSDP2" else partition


@pytest.fixture
def models(shard):
    """A plain model and a sharded copy."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    plain[2].weight = plain[0].weight
    sharded = copy.deepcopy(plain)
    shard(sharded)
    return plain, sharded


def test_sharded_weights_are_recorded_and_loaded(models, tmp_path):
    plain, sharded = models
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    with pytest.raises(TrajectoryError, match=r"Sequential .*sharded .*state_dict="):
        trajectory.record(sharded, num_examples=2, steps=1)
    for num_examples in (2, 1):
        with gathering(sharded) as state_dict:
            trajectory.record(sharded, state_dict=state_dict, num_examples=num_examples, steps=1)
        with torch.no_grad():
            for tensor in (*plain.parameters(), *plain.buffers()):  # tied ones once
                tensor.add_(1)
        if num_examples == 2:
            alone = WeightTrajectory.create(tmp_path / "alone")
            alone.record(plain, num_examples=2, steps=1)
            alone.load_into(sharded)
    assert trajectory.tied_weights == {"2.weight": "0.weight"}
    for name in trajectory.names:
        after = alone.tensor(name)
        torch.testing.assert_close([trajectory.tensor(name, k) for k in (0, 1)], [after - 1, after])


def test_a_process_that_fails_takes_part_in_gathering_the_rest(models):
    _, sharded = models
    with pytest.raises(ArithmeticError), gathering(sharded) as state_dict:
        assert next(iter(state_dict.items()))[0] == "0.weight"
        raise ArithmeticError
    with pytest.raises(KeyError):  # each tensor once
        state_dict["2.bias"]


def test_complete_weights_are_not_gathered():
    with gathering(nn.Linear(2, 2)) as state_dict:
        assert state_dict is None


def test_a_single_process_runs_the_action():
    for accelerator in (None, make_trainer(DistributedType.NO).accelerator):
        assert on_main_process(accelerator, lambda: 7) == 7
        assert on_every_process(accelerator, lambda: 7) == [7]


def test_a_folder_that_the_nodes_do_not_share(tmp_path):
    check_shared(None, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none.*{gethostname()}.*share"):
        check_shared(None, tmp_path / "none")
