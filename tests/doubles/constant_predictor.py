from dataclasses import dataclass

import torch


@dataclass
class Constant:
    """Predictor with the same residual for every weight."""

    value: float = 0.0
    num_states: int | None = None

    def residual(self, history, role):
        return torch.full((len(history),), self.value)
