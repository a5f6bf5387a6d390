"""Images: decoded once, augmented per batch."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

AUGMENTATIONS = ("flip", "shift", "crop")
_MAX_SHIFT = 2  # pixels
_MIN_CROP = 0.8  # share of height and width


class ImageBatches:
    """
    Convert stored images to `pixel_values` `(B, C, H, W)` in [-1, 1], with `labels`.

    Args:
        augmentation (`Sequence[str]`):
            Any of `"flip"` (horizontal, with probability 0.5), `"shift"` (by up to two pixels in each direction,
            padded with black) and `"crop"` (of at least 0.8 of height and width, resized). Uses
            torch's global random state, which the Trainer seeds.
    """

    def __init__(self, augmentation: Sequence[str]) -> None:
        if unknown := set(augmentation) - set(AUGMENTATIONS):
            raise ValueError(
                f"unknown augmentation {sorted(unknown)} of images; choose from {', '.join(AUGMENTATIONS)}"
            )
        self.augmentation = augmentation

    def __call__(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = stored["pixel_values"].float()
        if self.augmentation:
            pixels = self._augment(pixels)
        return {"pixel_values": pixels.div(127.5).sub(1), "labels": stored["labels"]}

    def _augment(self, pixels: Tensor) -> Tensor:
        count, (height, width) = len(pixels), pixels.shape[-2:]
        scale, sign, offset = torch.ones(count), torch.ones(count), torch.zeros(count, 2)
        if "crop" in self.augmentation:
            scale = _MIN_CROP + (1 - _MIN_CROP) * torch.rand(count)
            offset = (2 * torch.rand(count, 2) - 1) * (1 - scale)[:, None]
        if "shift" in self.augmentation:
            steps = torch.randint(-_MAX_SHIFT, _MAX_SHIFT + 1, (count, 2))
            offset = offset + 2 * steps / torch.tensor([width, height])
        if "flip" in self.augmentation:
            sign = 2.0 * torch.randint(2, (count,)) - 1
        affine = torch.zeros(count, 2, 3)
        affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = scale * sign, scale, offset
        grid = torch.nn.functional.affine_grid(affine, list(pixels.shape), align_corners=False)
        return torch.nn.functional.grid_sample(pixels, grid, align_corners=False)


def decode(split: datasets.Dataset, source: dict[str, str], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """
    Decode all images of a split. `source` names its columns `image` and `label`; `inputs` has the `image_size` in
    pixels and `image_channels`, 1 or 3.

    Returns:
        `dict[str, Tensor]`: `pixel_values` `(N, C, H, W)` uint8 and `labels` `(N,)` int64.
    """
    channels, size = inputs["image_channels"], (inputs["image_size"], inputs["image_size"])
    mode = {1: "L", 3: "RGB"}[channels]
    images = torch.empty(len(split), channels, *size, dtype=torch.uint8)
    for index, image in enumerate(split[source["image"]]):
        image = image.convert(mode)
        pixels = np.array(image if image.size == size else image.resize(size), dtype=np.uint8)
        images[index] = torch.from_numpy(pixels).reshape(*size, channels).permute(2, 0, 1)
    return {"pixel_values": images, "labels": torch.tensor(split[source["label"]][:])}
