"""One of two processes that predict together, started by `torchrun`; writes its results for the test to read."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed import distributed_c10d

from know_hf import predict_overflowed_weights
from know_hf.distributed import on_main_process
from know_hf.prediction import Gate


def size_of_the_first_bias(model: torch.nn.Module) -> list[float]:
    """Losses of twelve "examples", lowest where the first bias of the head is 0."""
    size = abs(float(model.state_dict()["classifier.1.bias"][0]))
    return [size * (1 + number / 100) for number in range(12)]


def labelled_images() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(20, 1, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": torch.tensor(row % 4)} for row, image in enumerate(images)]


class FailOnRankOne:
    num_states = None

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        if self.rank == 1:
            raise ValueError("rank 1 fails")
        return torch.zeros(len(history))


def main(root: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    result = predict_overflowed_weights(
        root / "trajectory", steps=2, output_dir=root / "together", max_shard_size=5000, accelerator=accelerator
    )
    gated = predict_overflowed_weights(
        root / "trajectory",
        predictor="shrink",
        output_dir=root / "gated-together",
        gate=Gate(size_of_the_first_bias, candidates=[1, "average"]),
        accelerator=accelerator,
    )
    classified = predict_overflowed_weights(
        root / "trajectory",
        predictor="average",
        output_dir=root / "classified",
        gate=Gate(dataset=labelled_images(), batch_size=2, candidates=[1]),
        accelerator=accelerator,
    )
    parameters = {role: report.parameters for role, report in result.report.items()}
    notes = [parameters, result.report["conv"].mean_residual, str(gated.gate), str(classified.gate)]
    fails = FailOnRankOne(accelerator.process_index)
    try:
        predict_overflowed_weights(
            root / "trajectory", predictor=fails, output_dir=root / "failed", accelerator=accelerator
        )
    except Exception as error:
        notes.append(f"{type(error).__name__}: {error}")
    distributed_c10d._set_pg_timeout(timedelta(seconds=0.5))
    on_main_process(accelerator, lambda: time.sleep(1))  # the other process waits
    (root / f"rank-{accelerator.process_index}.json").write_text(json.dumps(notes))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
