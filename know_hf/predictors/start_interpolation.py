"""Movement along the line from the weights before training to Θ0, uniform or linear in depth.

Between recorded states, [`TaskVector`] and [`LayerScaling`] do the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .protocol import check_finite, register_predictor
from .snapshot_predictor import SnapshotPredictor, TensorSnapshots


@register_predictor("start_interpolation")
@dataclass
class StartInterpolation(SnapshotPredictor):
    """The change from the start to Θ0, times `scale + slope * depth`; see [`move_from_start`].

    Args:
        scale (`float`, *optional*, defaults to `0.5`):
            Factor at depth 0; 1 gives Θ0, 0 the start.
        slope (`float`, *optional*, defaults to `0.0`):
            Factor at depth 1 minus factor at depth 0.
        depth (`float`, *optional*, defaults to `0.0`):
            Relative depth of the layer, set by [`at_depth`].
    """

    scale: float = 0.5
    slope: float = 0.0
    depth: float = 0.0

    def __post_init__(self) -> None:
        check_finite(**vars(self))

    def at_depth(self, depth: float) -> "StartInterpolation":
        return replace(self, depth=depth)

    def reads(self) -> Mapping[str, int]:
        return {"start": 1}

    def tensor(self, snapshots: TensorSnapshots) -> torch.Tensor:
        return move_from_start(snapshots.start, snapshots.theta0, **vars(self))


def move_from_start(
    start: torch.Tensor, theta0: torch.Tensor, scale: float, slope: float = 0.0, depth: float = 0.0
) -> torch.Tensor:
    """Scale the change from the start to Θ0: `P + (scale + slope * depth) (Θ0 - P)`.

    - Between 0 and 1 it interpolates: WiSE-FT (Wortsman et al., *Robust Fine-Tuning of Zero-Shot Models*, arXiv
      2109.01903).
    - Above 1 it extrapolates: ExPO (Zheng et al., *Model Extrapolation Expedites Alignment*, arXiv 2404.16792), whose
      α is `scale - 1`.
    - With a slope it changes with the layer: LiNeS (Wang et al., *LiNeS: Post-training Layer Scaling Prevents
      Forgetting and Enhances Model Merging*, arXiv 2410.17146); for a single task `slope = 1 - scale`.

    The product of LoRA's matrices starts at zero and is multiplied by the factor. For `depth`, see
    [`relative_depths`].
    """
    check_finite(scale=scale, slope=slope, depth=depth)
    # from Θ0, which is exact where nothing moved or the factor is 1
    return theta0.float() + (scale + slope * depth - 1) * (theta0.float() - start.float())
