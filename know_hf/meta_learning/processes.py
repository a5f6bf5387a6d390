"""Processes of a meta-training, checked against the number of launched ones."""

import os

from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, parse_flag_from_env

from .training_arguments import MetaTrainingArguments


def start_processes() -> PartialState:
    """Join the launched processes. Call it before reading data.

    Raises:
        `RuntimeError`: if several processes were launched, or requested from `accelerate launch`, but each would run
            alone.
    """
    # Only accelerate's larger classes read this variable themselves.
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    _check_number(processes.num_processes)
    return processes


def make_accelerator(args: MetaTrainingArguments) -> Accelerator:
    """Create the accelerator of a meta-training on all launched processes.

    Raises:
        `RuntimeError`: see [`start_processes`].
        `ValueError`: if a tracker is unknown.
        `ImportError`: if a tracker is not installed.
    """
    available = {LoggerType.ALL.value, *(tracker.value for tracker in get_available_trackers())}
    # accelerate drops trackers that are not installed, and names the wrong ones.
    if missing := [name for name in args.report_to if name in LoggerType.list() and name not in available]:
        raise ImportError(f"report_to={', '.join(missing)} is not installed; pip install {' '.join(missing)}")
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to or None,
        project_dir=args.logging_dir,
        # The schedule counts steps of all processes together; accelerate would advance it once per process.
        step_scheduler_with_optimizer=False,
    )
    _check_number(accelerator.num_processes)
    return accelerator


def _check_number(num_processes: int) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # `accelerate launch --cpu --num_processes 2` starts one process. It sets the address of the others, but neither
    # their number nor the rank of this one.
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ
    if launched > num_processes or (alone and num_processes == 1):
        requested = f"{launched} processes were launched" if launched > 1 else "several processes were requested"
        raise RuntimeError(
            f"{requested}, but accelerate runs {num_processes}; on CPUs launch with"
            " `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 …` or `ACCELERATE_USE_CPU=1 accelerate launch"
            " --multi_gpu --num_processes 2 --num_machines 1 …`"
        )
