"""Small architectures that transformers does not have."""

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


@strict
class SmallCNNConfig(PreTrainedConfig):
    r"""
    Args:
        image_size (`int`, *optional*, defaults to `28`): Height and width of an image in pixels, at least 8.
        num_channels (`int`, *optional*, defaults to `1`): Channels of an image.
        width (`int`, *optional*, defaults to `16`): Channels of the first layer; each later one has twice as many.
        batch_norm (`bool`, *optional*, defaults to `False`): Whether a BatchNorm follows each convolution, which then
            has no bias.
    """

    model_type = "small_cnn"

    image_size: int = 28
    num_channels: int = 1
    width: int = 16
    batch_norm: bool = False

    def validate_image_size(self) -> None:
        """Three poolings leave at least one pixel."""
        if self.image_size < 8:
            raise ValueError(f"image_size={self.image_size}: three poolings by 2 need at least 8 pixels")


class SmallCNN(PreTrainedModel):
    """Three 3×3 convolutions, each followed by a 2×2 max pooling, and two linear layers."""

    config_class = SmallCNNConfig
    base_model_prefix = "small_cnn"
    main_input_name = "pixel_values"

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
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Linear(channels * size**2, channels)
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        """Maps images `(B, C, H, W)` to logits `(B, num_labels)`; with labels `(B,)` also the cross-entropy."""
        logits = self.classifier(self.hidden(self.features(pixel_values)).relu())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
