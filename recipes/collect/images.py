"""Images: decoded once, augmented per batch."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

AUGMENTATIONS = ("flip", "shift", "crop")
_MOST_SHIFTED = 2  # pixels
_LEAST_KEPT = 0.8  # of height and width


class ImageBatches:
    """Turn stored images into `pixel_values` `(B, C, H, W)` in [-1, 1], with `labels`.

    Args:
        augmentation (`Sequence[str]`):
            Any of `"flip"` (left to right, every other image), `"shift"` (by up to two pixels each way) and `"crop"`
            (a part of at least 0.8 of height and width, enlarged). Black comes in at the edges. Uses torch's global
            random state, which the Trainer seeds.
    """

    def __init__(self, augmentation: Sequence[str]) -> None:
        if unknown := set(augmentation) - set(AUGMENTATIONS):
            raise ValueError(
                f"augmentation {sorted(unknown)} of images is unknown; choose from {', '.join(AUGMENTATIONS)}"
            )
        self.augmentation = augmentation

    def __call__(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = stored["pixel_values"].float()
        if self.augmentation:
            pixels = self._augment(pixels)
        return {"pixel_values": pixels.div(127.5).sub(1), "labels": stored["labels"]}

    def _augment(self, pixels: Tensor) -> Tensor:
        count, (height, width) = len(pixels), pixels.shape[-2:]
        kept, flipped = torch.ones(count), torch.ones(count)
        moved = torch.zeros(count, 2)
        if "crop" in self.augmentation:
            kept = _LEAST_KEPT + (1 - _LEAST_KEPT) * torch.rand(count)
            moved = (2 * torch.rand(count, 2) - 1) * (1 - kept)[:, None]
        if "shift" in self.augmentation:
            steps = torch.randint(-_MOST_SHIFTED, _MOST_SHIFTED + 1, (count, 2))
            moved = moved + 2 * steps / torch.tensor([width, height])
        if "flip" in self.augmentation:
            flipped = 2.0 * torch.randint(2, (count,)) - 1
        affine = torch.zeros(count, 2, 3)
        affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = kept * flipped, kept, moved
        grid = torch.nn.functional.affine_grid(affine, list(pixels.shape), align_corners=False)
        return torch.nn.functional.grid_sample(pixels, grid, align_corners=False)


def decode(split: datasets.Dataset, source: dict[str, str], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return all images `(N, C, H, W)` uint8 with labels `(N,)` int64.

    Args:
        split (`datasets.Dataset`):
            Rows with an image and a class.
        source (`dict[str, str]`):
            Names of the columns as `image` and `label`.
        inputs (`dict`):
            `image_size` in pixels and `image_channels`, 1 or 3.
    """
    channels, size = inputs["image_channels"], (inputs["image_size"], inputs["image_size"])
    mode = {1: "L", 3: "RGB"}[channels]
    images = torch.empty(len(split), channels, *size, dtype=torch.uint8)
    for index, image in enumerate(split[source["image"]]):
        image = image.convert(mode)
        pixels = np.array(image if image.size == size else image.resize(size), dtype=np.uint8)
        images[index] = torch.from_numpy(pixels).reshape(*size, channels).permute(2, 0, 1)
    return {"pixel_values": images, "labels": torch.tensor(split[source["label"]][:])}
