"""Memory of recording a model that FSDP2 shards over processes of a CPU, by process.

    torchrun --nproc_per_node 2 recipes/benchmarks/sharded_recording.py
    torchrun --nproc_per_node 2 recipes/benchmarks/sharded_recording.py --gather-all

Prints the peak of the resident memory while three states are recorded, above that of the sharded model, as a share of
the weights: gathered one tensor at a time, as a recording does, or all at once with `get_model_state_dict` of torch.
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from memory import current_memory, peak_memory, reset_peak_memory


def main(args: argparse.Namespace) -> None:
    import torch
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from know_hf import WeightTrajectory
    from know_hf.distributed import gathering

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model = make_sharded(args.layers)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    reset_peak_memory()
    before = current_memory()
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        trajectory = WeightTrajectory.create(Path(folder) / "trajectory")
        for state in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1e-3)
            if args.gather_all:
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                block: Any = nullcontext(get_model_state_dict(model, options=options))
            else:
                block = gathering(model)
            with block as state_dict:
                if rank == 0:
                    trajectory.record(
                        model, num_examples=3 - state, steps=1, state_dict=state_dict, background=state < 2
                    )
            del block, state_dict
    results = {"rank": rank, "parameters": weights // 4, "peak_share_of_weights": (peak_memory() - before) / weights}
    everything: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everything, results)
    if rank == 0:
        print(json.dumps(everything, indent=2))
    distributed.destroy_process_group()


def make_sharded(layers: int) -> Any:
    """Return a GPT-2 of random weights, of which each process has a part and never has all."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=layers))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=24, help="layers of 7.1M parameters (default: %(default)s)")
    add("--gather-all", action="store_true", help="gather all weights at once instead of one tensor at a time")
    add("--output-dir", help="folder for temporary files (default: that of the system)")
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("sharded_recording.py", lambda: main(arguments)))
