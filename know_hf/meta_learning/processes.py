"""How many processes a training runs on, and that they are as many as were asked for."""

import os

from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, parse_flag_from_env

from .training_arguments import MetaTrainingArguments


def start_processes() -> PartialState:
    """
    Joins the processes that were launched, before anything is read or trained.

    Returns:
        `PartialState`: which of them this is, and of how many.

    Raises:
        `RuntimeError`: when several processes were launched, or asked of `accelerate launch`, and each would be alone.
    """
    # Only accelerate's larger classes look at this variable themselves.
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    _check_number(processes.num_processes)
    return processes


def make_accelerator(args: MetaTrainingArguments) -> Accelerator:
    """
    Args:
        args ([`MetaTrainingArguments`]):
            Give precision and trackers.

    Returns:
        `Accelerator` on all the processes that were launched.

    Raises:
        `RuntimeError`: when several processes were launched, or asked of `accelerate launch`, and each would train
            alone.
        `ValueError`: for a tracker that does not exist.
        `ImportError`: for one that is not installed.
    """
    available = {LoggerType.ALL.value, *(tracker.value for tracker in get_available_trackers())}
    # accelerate leaves out those that are not installed, and names the wrong ones
    if missing := [name for name in args.report_to if name in LoggerType.list() and name not in available]:
        raise ImportError(f"report_to={', '.join(missing)}: not installed; pip install {' '.join(missing)}")
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to or None,
        project_dir=args.logging_dir,
        # accelerate would make one step a process of the schedule, which is over steps of all processes together
        step_scheduler_with_optimizer=False,
    )
    _check_number(accelerator.num_processes)
    return accelerator


def _check_number(num_processes: int) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # `accelerate launch --cpu --num_processes 2` starts a single process; it says where the others could be reached,
    # but neither how many nor which one this is.
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ
    if launched > num_processes or (alone and num_processes == 1):
        asked = f"{launched} processes were launched" if launched > 1 else "several processes were asked for"
        raise RuntimeError(
            f"{asked}, but accelerate runs {num_processes}; on CPUs launch with"
            " `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 …` or `ACCELERATE_USE_CPU=1 accelerate launch"
            " --multi_gpu --num_processes 2 --num_machines 1 …`"
        )
