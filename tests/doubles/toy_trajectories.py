"""Trajectories of toy networks, recorded without a training."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from know_hf import ForgettingSchedule, WeightTrajectory


class WalkNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 3)


class LineNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3)
        self.fc = nn.Linear(32, 40)


def record_walk(
    path: Path,
    num_states: int,
    width: int = 4,
    seed: int = 0,
    frozen: Collection[str] = (),
    dtype: torch.dtype | None = None,
) -> WeightTrajectory:
    """Record a trajectory in which each weight takes a random step from state to state."""
    generator = torch.Generator().manual_seed(seed)
    model, trajectory = WalkNet(width), WeightTrajectory.create(path)
    for state in range(num_states):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in frozen:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        trajectory.record(model, num_examples=1000 - state, steps=1, dtype=dtype)
    return trajectory


def record_lines(
    path: Path,
    num_states: int = 7,
    seed: int = 0,
    frozen: Collection[str] = (),
    moves_until: Mapping[str, int] | None = None,
    scale: float = 1.0,
    schedule: ForgettingSchedule | None = None,
) -> WeightTrajectory:
    """Record a trajectory in which each weight moves along a line, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    model, trajectory = LineNet(), WeightTrajectory.create(path, schedule)
    start = {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    slope = {name: 0.02 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    for state in range(num_states):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                time = 0 if name in frozen else max(state, num_states - 1 - (moves_until or {}).get(name, num_states))
                noise = 0 if name in frozen or moves_until else 0.002
                parameter.copy_(start[name] + scale * slope[name] * time)
                parameter += scale * noise * torch.randn(parameter.shape, generator=generator)
        trajectory.record(model, num_examples=1000 - state, steps=1)
    return trajectory
