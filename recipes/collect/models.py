"""Small convolutional architectures that transformers lacks."""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


@strict
class SmallConfig(PreTrainedConfig):
    r"""
    Base class of the configs.

    Args:
        image_size (`int`, *optional*, defaults to `28`):
            Height and width of an image in pixels, at least 8.
        num_channels (`int`, *optional*, defaults to `1`):
            Channels of an image.
    """

    image_size: int = 28
    num_channels: int = 1

    def validate_image_size(self) -> None:
        """Check that three halvings leave at least one pixel."""
        if self.image_size < 8:
            raise ValueError(f"image_size must be at least 8 to be halved three times, got {self.image_size}")


class SmallModel(PreTrainedModel):
    """Base class of the models: `features` and a linear `classifier`."""

    base_model_prefix = "features"
    main_input_name = "pixel_values"
    features: nn.Module
    classifier: nn.Module

    def _finish(self, layers: list[nn.Module], channels: int, pool: bool = True) -> None:
        pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pool else []
        self.features = nn.Sequential(*layers, *pooling)
        self.classifier = nn.Linear(channels, self.config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            # A depthwise kernel has nine inputs: with fan_in, its weights would be too large to change.
            depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
            init.kaiming_normal_(module.weight, mode="fan_out" if depthwise else "fan_in", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        """Map images `(B, C, H, W)` to logits `(B, num_labels)`, and with labels `(B,)` to the cross-entropy."""
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


@strict
class SmallCNNConfig(SmallConfig):
    r"""
    Args:
        width (`int`, *optional*, defaults to `16`):
            Channels of the first layer; each later layer has twice as many.
        batch_norm (`bool`, *optional*, defaults to `False`):
            Whether a BatchNorm follows each convolution, which then has no bias.
    """

    model_type = "small_cnn"

    width: int = 16
    batch_norm: bool = False


class SmallCNN(SmallModel):
    """Three 3×3 convolutions, each followed by a 2×2 max pooling, and two linear layers."""

    config_class = SmallCNNConfig

    def __init__(self, config: SmallCNNConfig) -> None:
        super().__init__(config)
        channels, size = config.num_channels, config.image_size
        layers: list[nn.Module] = []
        for width in (config.width, 2 * config.width, 4 * config.width):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not config.batch_norm))
            if config.batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, size // 2
        layers += [nn.Flatten(), nn.Linear(channels * size**2, channels), nn.ReLU()]
        self._finish(layers, channels, pool=False)


@strict
class SmallDenseNetConfig(SmallConfig):
    r"""
    Args:
        growth (`int`, *optional*, defaults to `8`):
            Channels that each layer adds.
        depths (`list[int]`, *optional*, defaults to `[3, 3, 3]`):
            Layers of each block.
        batch_norm (`bool`, *optional*, defaults to `True`):
            Whether a BatchNorm precedes each convolution, which then has no bias.
    """

    model_type = "small_densenet"

    growth: int = 8
    depths: list[int] | tuple[int, ...] = (3, 3, 3)
    batch_norm: bool = True


class SmallDenseNet(SmallModel):
    """DenseNet (arXiv 1608.06993): each layer sees all previous outputs; images are halved between blocks."""

    config_class = SmallDenseNetConfig

    def __init__(self, config: SmallDenseNetConfig) -> None:
        super().__init__(config)
        channels = 2 * config.growth
        layers: list[nn.Module] = [nn.Conv2d(config.num_channels, channels, 3, stride=2, padding=1)]
        for index, depth in enumerate(config.depths):
            if index:
                channels //= 2
                layers += [_before(2 * channels, channels, 1, config.batch_norm), nn.AvgPool2d(2)]
            for _ in range(depth):
                layers.append(_DenseLayer(channels, config.growth, config.batch_norm))
                channels += config.growth
        self._finish([*layers, nn.ReLU()], channels)


class _DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int, batch_norm: bool) -> None:
        super().__init__()
        self.layer = _before(channels, growth, 3, batch_norm)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([inputs, self.layer(inputs)], dim=1)


def _before(channels: int, out: int, kernel: int, batch_norm: bool) -> nn.Sequential:
    """Return a convolution with its preceding BatchNorm and ReLU."""
    norm = [nn.BatchNorm2d(channels)] if batch_norm else []
    return nn.Sequential(*norm, nn.ReLU(), nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=not batch_norm))


@strict
class SmallMobileNetConfig(SmallConfig):
    r"""
    Args:
        width (`int`, *optional*, defaults to `16`):
            Channels of the first layer; each later stage has twice as many.
        depths (`list[int]`, *optional*, defaults to `[1, 2, 2]`):
            Blocks of each stage.
        expansion (`int`, *optional*, defaults to `1`):
            With 1, each block is a depthwise separable convolution (MobileNet, arXiv 1704.04861). With more, it is an
            inverted residual that multiplies its channels by this factor (MobileNetV2, arXiv 1801.04381).
    """

    model_type = "small_mobilenet"

    width: int = 16
    depths: list[int] | tuple[int, ...] = (1, 2, 2)
    expansion: int = 1


class SmallMobileNet(SmallModel):
    """Stages of depthwise separable convolutions or inverted residuals, each later one at half the size."""

    config_class = SmallMobileNetConfig

    def __init__(self, config: SmallMobileNetConfig) -> None:
        super().__init__(config)
        channels = config.width
        layers: list[nn.Module] = [_convolution(config.num_channels, channels, 3, stride=2), nn.ReLU6()]
        for stage, depth in enumerate(config.depths):
            for block in range(depth):
                out = config.width * 2**stage
                layers.append(_MobileBlock(channels, out, 2 if stage and not block else 1, config.expansion))
                channels = out
        self._finish(layers, channels)


class _MobileBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [_convolution(channels, wide, 1), nn.ReLU6()]
        layers += [_convolution(wide, wide, 3, stride, groups=wide), nn.ReLU6(), _convolution(wide, out, 1)]
        if expansion == 1:
            layers.append(nn.ReLU6())
        self.layers = nn.Sequential(*layers)
        self.residual = expansion > 1 and stride == 1 and channels == out

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layers(inputs)
        return inputs + outputs if self.residual else outputs


def _convolution(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out))
