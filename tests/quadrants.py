"""A tiny task: images of four classes, each a bright quadrant."""

from functools import partial

import torch

from know_hf.evaluation import FineTuning, LinearProbe, Split, ZeroShot
from know_hf.evaluation import compare_arms as compare_arms_with_pages

compare_arms = partial(compare_arms_with_pages, pages=False)  # figures take longer than everything else

PROTOCOLS = (
    FineTuning((1e-3, 1e-2), steps=1, head_steps=1, head_learning_rate=(1e-2, 1e-1), labels_per_class=2),
    LinearProbe((1e-2, 1e-1), steps=5),
    ZeroShot(),
)


def quadrants(count, seed, noise=1.0, signal=1.0):
    """Examples whose classes take turns."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    pixels = noise * torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += signal
    return {"pixel_values": pixels, "labels": labels}


def source(seed):
    return Split(quadrants(32, 100 + seed), quadrants(20, 200 + seed), quadrants(20, 300 + seed))


def target(seed, draw):
    sizes = (16, 12, 12)
    return Split(*(quadrants(size, 1000 * part + 10 * seed + draw) for part, size in enumerate(sizes)), 4)
