"""A small convolutional network for suites, with or without BatchNorm."""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


@strict
class SmallCNNConfig(PreTrainedConfig):
    r"""
    Args:
        width (`int`, *optional*, defaults to `16`):
            Channels of the first layer. Each further layer doubles them.
        num_layers (`int`, *optional*, defaults to `3`):
            Number of convolutions. Each halves the image.
        num_channels (`int`, *optional*, defaults to `1`):
            Channels of an image.
        batch_norm (`bool`, *optional*, defaults to `False`):
            Whether BatchNorm follows each convolution, which then has no bias.
    """

    model_type = "know_hf_small_cnn"

    width: int = 16
    num_layers: int = 3
    num_channels: int = 1
    batch_norm: bool = False


class SmallCNN(PreTrainedModel):
    """3×3 convolutions, each with 2×2 max pooling and ReLU, then global average pooling and a linear classifier."""

    config_class = SmallCNNConfig
    base_model_prefix = "features"
    main_input_name = "pixel_values"

    def __init__(self, config: SmallCNNConfig) -> None:
        super().__init__(config)
        channels = config.num_channels
        layers: list[nn.Module] = []
        for index in range(config.num_layers):
            width = config.width * 2**index
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not config.batch_norm))
            layers += [nn.BatchNorm2d(width)] if config.batch_norm else []
            layers += [nn.MaxPool2d(2), nn.ReLU()]  # ReLU after pooling: the same values, a quarter of the work
            channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        """Map images `(B, C, H, W)` to logits `(B, num_labels)`; with labels `(B,)` also return the cross-entropy."""
        # Pooling is twice as fast with channels last. Tensor.to() does not convert images with a single channel.
        images = pixel_values.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
        logits = self.classifier(self.features(images))
        loss = None if labels is None else cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
