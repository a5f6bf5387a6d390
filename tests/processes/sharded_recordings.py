"""Recordings with sharded weights, of full models and of adapters, complete and interrupted.

As a script, it is one of the processes that `accelerate launch` starts with a file of `recipes/accelerate_configs`.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import edit_manifest, make_trainer
from doubles.small_trainers import OPTIONS, SCHEDULE, StopAfter, adapt, next_tokens, tiny_llama
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments, set_seed

from know_hf import (
    ForgettingSchedule,
    WeightTrajectory,
    WeightTransitionCallback,
    induce_forgetting,
    predict_overflowed_weights,
)

WITH_TAIL = replace(SCHEDULE, tail_states=1)
HALVES = ForgettingSchedule(kind="complementary", branch_from="start")
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}


@contextmanager
def sharding() -> Iterator[None]:
    """Makes accelerate use FSDP on CPUs with gloo; by default it does so only on several GPUs."""
    init = AcceleratorState.__init__

    def init_sharding(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    before = PartialState().distributed_type
    AcceleratorState._reset_state()
    AcceleratorState.__init__ = init_sharding
    try:
        yield
    finally:
        AcceleratorState.__init__ = init
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = before


def make_sharded_trainer(root: Path, lora: bool = False, **arguments: Any) -> Trainer:
    """A trainer whose processes take 8 examples per step together."""
    set_seed(0)
    data = next_tokens()
    batch = {"per_device_train_batch_size": 8 // int(os.environ["WORLD_SIZE"])}
    args = TrainingArguments(str(root / "out"), **arguments, **{**OPTIONS, **batch})
    trainer = Trainer(tiny_llama(), args, train_dataset=data, eval_dataset=data.select(range(8)))
    return adapt(trainer, "llama") if lora else trainer


def record_interrupted(make: Callable[[], Trainer], schedule: ForgettingSchedule, folder: Path) -> None:
    """All processes stop in the training of state 2 and resume."""
    trainer = make()
    trainer.add_callback(StopAfter(2))
    with suppress(KeyboardInterrupt):
        induce_forgetting(trainer, schedule, folder)
    assert WeightTrajectory(folder).num_states == 2
    if folder.name == "interrupted":  # as after a kill between a state and its metrics: evaluated before a training
        PartialState().wait_for_everyone()  # the other process has read the manifest
        if PartialState().is_main_process:
            edit_manifest(folder, lambda content: content["states"][-1].pop("metrics"))
        PartialState().wait_for_everyone()
    induce_forgetting(make(), schedule, folder)


def record_in_a_loop(root: Path, name: str, **arguments: Any) -> list[float]:
    """The callback alone, in a loop that evaluates before or between its trainings; returns the last weights."""
    trainer = make_sharded_trainer(root, **arguments)
    data = trainer.train_dataset
    if name == "evaluated_first":
        trainer.evaluate()
    trainer.add_callback(WeightTransitionCallback(root / name, SCHEDULE))
    if name == "loop":
        trainer.evaluate()
    for indices in SCHEDULE.indices(len(data)):
        trainer.train_dataset = data.select(indices)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        trainer.evaluate()
    return local(trainer.model.lm_head.weight).flatten().tolist()


def record_sharded(root: Path, **arguments: Any) -> dict[str, Any]:
    """Record full weights and an adapter, each complete and interrupted, and return what this process saw."""
    notes: dict[str, Any] = {}
    for name, lora in (("sharded", False), ("sharded_lora", True)):

        def make(lora: bool = lora) -> Trainer:
            return make_sharded_trainer(root, lora, **arguments)

        trainer = make()
        trajectory = induce_forgetting(trainer, WITH_TAIL, root / name)
        record_interrupted(make, WITH_TAIL, root / f"{name}_interrupted")
        notes[name] = {
            "distributed_type": trainer.accelerator.distributed_type,
            "model": type(trainer.model_wrapped).__name__,
            "num_states": trajectory.num_states,
            "holds_state_0": holds(trainer.model, trajectory),
        }
    return notes


def record_statistics(root: Path) -> None:
    """Record BatchNorm statistics, which differ between the processes; accelerate cannot shard a ResNet with FSDP2."""

    def make() -> Trainer:
        batch = 8 // int(os.environ["WORLD_SIZE"])
        return make_trainer(root / "out", num_train_epochs=1, per_device_train_batch_size=batch)

    induce_forgetting(make(), SCHEDULE, root / "sharded_statistics")
    record_interrupted(make, SCHEDULE, root / "sharded_statistics_interrupted")


def holds(model: nn.Module, trajectory: WeightTrajectory) -> bool:
    """Whether a sharded model holds Θ0: loading it changes nothing."""
    before = {name: local(tensor).clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    trajectory.load_into(model)
    after = model.state_dict(keep_vars=True)
    return all(torch.equal(local(after[name]), tensor) for name, tensor in before.items())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has."""
    if isinstance(tensor, DTensor):
        return tensor.detach().to_local()
    return getattr(tensor, "ds_tensor", tensor).detach()


def main(root: Path) -> None:
    torch.set_num_threads(1)
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if uses_deepspeed:
        import deepspeed.ops

        # otherwise DeepSpeed compiles it, which takes minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with nullcontext() if uses_deepspeed else sharding():
        notes = record_sharded(root)
        induce_forgetting(make_sharded_trainer(root), HALVES, root / "sharded_branches")
        if uses_deepspeed:
            record_statistics(root)
        accelerator = make_sharded_trainer(root).accelerator
        predict_overflowed_weights(
            root / "sharded", predictor="shrink", output_dir=root / "enhanced", accelerator=accelerator
        )
        (root / f"rank-{accelerator.process_index}.json").write_text(json.dumps(notes))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
