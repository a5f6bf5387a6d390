"""One of two processes that predict together, started by `torchrun`; notes what it saw for the test to read."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from know_hf import predict_overflowed_weights


class FailOnRankOne:
    num_states = None

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        if self.rank == 1:
            raise ValueError("rank 1 fails on purpose")
        return torch.zeros(len(history))


def main(root: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    result = predict_overflowed_weights(
        root / "trajectory", steps=2, output_dir=root / "together", max_shard_size=5000, accelerator=accelerator
    )
    lines = [str({role: r.parameters for role, r in result.report.items()}), str(result.report["conv"].mean_residual)]
    try:
        predict_overflowed_weights(
            root / "trajectory",
            predictor=FailOnRankOne(accelerator.process_index),
            output_dir=root / "failed",
            accelerator=accelerator,
        )
    except Exception as error:
        lines.append(f"{type(error).__name__}: {error}")
    (root / f"rank-{accelerator.process_index}.txt").write_text("\n".join(lines))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
