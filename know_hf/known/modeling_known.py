"""KNOWN: three small networks, one per role, that map the history of a scalar weight to its next step.

Each scalar weight is processed independently: `prediction = history[:, -1] + KNOWN(W, dW)`, where `W` is the history,
most forgotten state first and full-data state last, and `dW` its consecutive differences (arXiv 2508.05059). As
published, the network is not scale-equivariant and its input is not normalized. The variant "combination" has a
different network, which reads complete tensors, see `combination_network`.
"""

import math
import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, cached_file

from .combination_network import ELEMENTS, KNOWNCoefficientLinear, KNOWNCombinationNetwork
from .configuration_known import KNOWNConfig

_WEIGHTS_NAME = "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")
# Arguments of from_pretrained that say where the files of a Hub repo are.
_LOCATION = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class KNOWNOutput(ModelOutput):
    """
    Output of [`KNOWNModel`].

    Attributes:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
            Mean absolute error of the prediction, in units of the weights.
        residual (`torch.Tensor` of shape `(N,)`):
            Value added to the full-data state, in (-1, 1), the range of the head's tanh.
        prediction (`torch.Tensor` of shape `(N,)`):
            Full-data state plus residual.
    """

    loss: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    prediction: torch.Tensor | None = None


class KNOWNTrAct(nn.Module):
    """
    TrAct activation, whose shape depends on its input through a bottleneck: `z = relu(squeeze(x))`,
    `y = shift(z) + scale(z) * exp(exponent(z) * x)` (arXiv 2508.05059).
    """

    def __init__(self, config: KNOWNConfig):
        super().__init__()
        self.squeeze = nn.Linear(config.hidden_size, config.bottleneck_size)
        self.shift = nn.Linear(config.bottleneck_size, config.hidden_size)
        self.scale = nn.Linear(config.bottleneck_size, config.hidden_size)
        self.exponent = nn.Linear(config.bottleneck_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `(N, hidden_size)` to `(N, hidden_size)`."""
        bottleneck = torch.relu(self.squeeze(hidden))
        return self.shift(bottleneck) + self.scale(bottleneck) * torch.exp(self.exponent(bottleneck) * hidden)


class KNOWNOuterLinear(nn.Linear):
    """First or last layer of a stream, with its own initializer; only these layers are regularized."""


class KNOWNStream(nn.Module):
    """One stream: Linear(num_inputs → hidden) → TrAct → Linear(hidden → stream) → LeakyReLU."""

    def __init__(self, config: KNOWNConfig, num_inputs: int):
        super().__init__()
        self.expand = KNOWNOuterLinear(num_inputs, config.hidden_size)
        self.activation = KNOWNTrAct(config)
        self.contract = KNOWNOuterLinear(config.hidden_size, config.stream_size)
        self.leaky_slope = config.leaky_slope

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map `(N, num_inputs)` to `(N, stream_size)`."""
        hidden = self.contract(self.activation(self.expand(inputs)))
        return nn.functional.leaky_relu(hidden, self.leaky_slope)


class KNOWNNetwork(nn.Module):
    """Network of one role: a stream for the history, one for its differences, and a tanh head over both."""

    def __init__(self, config: KNOWNConfig):
        super().__init__()
        self.history_stream = KNOWNStream(config, config.num_states)
        self.difference_stream = KNOWNStream(config, config.num_states - 1)
        self.head = nn.Linear(2 * config.stream_size, 1)

    def forward(self, history: torch.Tensor, differences: torch.Tensor) -> torch.Tensor:
        """Map `(N, S)` and `(N, S - 1)` to the residual `(N,)`."""
        streams = torch.cat([self.history_stream(history), self.difference_stream(differences)], dim=-1)
        return torch.tanh(self.head(streams)).squeeze(-1)


class KNOWNPreTrainedModel(PreTrainedModel):
    """Base class of KNOWN for weight initialization and loading."""

    config_class = KNOWNConfig
    base_model_prefix = "known"
    main_input_name = "history"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, KNOWNOuterLinear):
            limit = math.sqrt(3 * self.config.initializer_scale / module.in_features)
            init.uniform_(module.weight, -limit, limit)
            init.zeros_(module.bias)
        elif isinstance(module, KNOWNCoefficientLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)


class KNOWNModel(KNOWNPreTrainedModel):
    r"""
    KNOWN with one network for each of the roles conv, fc and bias (arXiv 2508.05059). The variant `"combination"` has
    one network for complete tensors of any role instead, see [`coefficients`].

    Args:
        config ([`KNOWNConfig`]):
            Variant and sizes; the defaults are the published ones.

    Example:

    ```python
    >>> known = KNOWNModel(KNOWNConfig())
    >>> output = known(history=torch.randn(1000, 5), role="conv")
    >>> output.prediction.shape
    torch.Size([1000])
    ```
    """

    def __init__(self, config: KNOWNConfig):
        super().__init__(config)
        self.networks = nn.ModuleDict({role: KNOWNNetwork(config) for role in config.roles})
        self.combination = KNOWNCombinationNetwork(config) if config.variant == "combination" else None
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: KNOWNConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Load weights from `model.safetensors`, with the arguments of [`~transformers.PreTrainedModel.from_pretrained`].

        The config is compared with the header of the file before the model is built. No other files are read, so
        pickled weights never are.

        Raises:
            `ValueError`: If config or weights are damaged, or do not match.
            `OSError`: If a file is missing, or the Hub cannot be reached.
        """
        source = pretrained_model_name_or_path
        if source is None:  # weights from state_dict
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        kwargs["use_safetensors"] = True
        checked: Any = config
        # not isinstance: transformers loads the code of a local folder twice, and then there are two such classes
        if getattr(config, "model_type", None) != KNOWNConfig.model_type:
            # Without the weights' dtype, and all other arguments that do not belong to the config.
            checked, _ = KNOWNConfig.from_pretrained(config or source, return_unused_kwargs=True, **kwargs)
        location = {name: kwargs[name] for name in _LOCATION if name in kwargs}
        _refuse_other_files(source, checked, location)
        path = cached_file(source, _WEIGHTS_NAME, **location, _raise_exceptions_for_missing_entries=False)
        if path is None:
            raise FileNotFoundError(f"{source} has no {_WEIGHTS_NAME}; save the weights of KNOWN with save_pretrained")
        _check_header(source, path, cls, checked)
        try:
            return super().from_pretrained(source, *model_args, config=config, **kwargs)
        except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}"[:500].split())
            raise ValueError(f"{source} cannot be loaded as KNOWN ({reason}); restore it from a copy") from error

    @classmethod
    def from_keras(cls, folder: str | os.PathLike, config: KNOWNConfig | None = None) -> "KNOWNModel":
        """
        Load the published Keras weights `KNOWN_Conv.h5`, `KNOWN_FC.h5` and `KNOWN_Bias.h5`.

        Args:
            folder (`str` or `os.PathLike`):
                Folder with the three files.
            config ([`KNOWNConfig`], *optional*):
                Sizes of the networks in the files; defaults to the published ones.

        Returns:
            [`KNOWNModel`] in evaluation mode, float32.

        Raises:
            `ImportError`: If h5py is not installed.
            `FileNotFoundError`: If a file is missing.
            `ValueError`: If a file is not HDF5, or one of its datasets is missing, has the wrong shape or dtype, or
            contains non-finite values.
        """
        # Not an import statement: transformers resolves those of remote code, even where know_hf is not installed.
        read_keras_weights = import_module("know_hf.known.keras_import").read_keras_weights
        model = cls(KNOWNConfig() if config is None else config)
        model.load_state_dict(read_keras_weights(folder, model))
        return model.eval()

    def forward(
        self,
        history: torch.Tensor,
        role: str,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> KNOWNOutput | tuple[torch.Tensor, ...]:
        r"""
        Args:
            history (`torch.Tensor` of shape `(N, S)`, floating point):
                One row per scalar weight: its value in every state, most forgotten first, full data last.
            role (`str`):
                Network to apply: `"conv"`, `"fc"` or `"bias"`.
            labels (`torch.Tensor` of shape `(N,)`, *optional*):
                Weights of the next less forgotten state, for the L1 `loss`.
            return_dict (`bool`, *optional*):
                Whether to return a [`KNOWNOutput`] instead of a tuple; defaults to `config.return_dict`.

        Returns:
            [`KNOWNOutput`] or `tuple`. Residual and prediction have the dtype of `history`; the network computes in
            the dtype of its weights.

        Raises:
            `ValueError`: If the role is unknown, `history` is not a floating-point `(N, S)` tensor, or `labels` is
            not `(N,)`.
        """
        self.check_inputs(history, role, labels)
        residual = self.networks[role](history.to(self.dtype), history.diff(dim=1).to(self.dtype))
        residual = residual.to(history.dtype)
        prediction = history[:, -1] + residual
        loss = None if labels is None else (prediction - labels).abs().mean()
        output = KNOWNOutput(loss=loss, residual=residual, prediction=prediction)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def coefficients(self, tensor_features: torch.Tensor, state_features: torch.Tensor) -> dict[str, float]:
        """
        Compute the coefficients of one tensor, for the variant `"combination"`.

        Args:
            tensor_features (`torch.Tensor` of shape `(F,)`):
                Statistics of the tensor, see [`~know_hf.known.tensor_basis`].
            state_features (`torch.Tensor` of shape `(K, Q)`):
                Statistics of each state except Θ0.

        Returns:
            `dict[str, float]`: Coefficients by element of the basis, `"start"`, `"state-1"`, …, for
            [`~know_hf.known.combine`].

        Raises:
            `ValueError`: If the model is of another variant.
        """
        if self.combination is None:
            raise ValueError(f"this KNOWN has the variant {self.config.variant!r}; 'combination' has coefficients")
        with torch.no_grad():
            inputs = (features.to(self.device, self.dtype) for features in (tensor_features, state_features))
            of_elements, of_states = (values.tolist() for values in self.combination(*inputs))
        states = {f"state-{index}": value for index, value in enumerate(of_states, 1)}
        return dict(zip(ELEMENTS, of_elements, strict=True)) | states

    def regularization(self, role: str | None = None, kernel_l1: float = 1e-6, bias_l1: float = 0.1) -> torch.Tensor:
        """
        Compute the published regularizers of meta-training: L1 norms of the first and last layer of every stream.

        Args:
            role (`str`, *optional*):
                Network to sum over; defaults to all three.
            kernel_l1 (`float`, *optional*, defaults to `1e-6`):
                Factor of the L1 norm of the kernels.
            bias_l1 (`float`, *optional*, defaults to `0.1`):
                Factor of the L1 norm of the biases.

        Returns:
            `torch.Tensor` of shape `()`, a term of the loss.

        Raises:
            `ValueError`: If the role is unknown.
        """
        if role is not None:
            self.check_role(role)
        module = self.networks if role is None else self.networks[role]
        layers = [layer for layer in module.modules() if isinstance(layer, KNOWNOuterLinear)]
        kernels = torch.stack([layer.weight.abs().sum() for layer in layers]).sum()
        biases = torch.stack([layer.bias.abs().sum() for layer in layers]).sum()
        return kernel_l1 * kernels + bias_l1 * biases

    def check_role(self, role: str) -> None:
        """Raise a `ValueError` if no network predicts this role."""
        if self.combination is not None:
            raise ValueError(
                "this KNOWN has the variant 'combination', which takes no histories of single weights; use it in"
                " predict_overflowed_weights, a gate or an arm"
            )
        if role not in self.networks:
            raise ValueError(f"KNOWN has no network for role {role!r}; choose one of {', '.join(self.networks)}")

    def check_inputs(self, history: torch.Tensor, role: str, labels: torch.Tensor | None = None) -> None:
        """Raise a `ValueError` if the arguments of `forward` have the wrong role, shape or dtype."""
        self.check_role(role)
        num_states = self.config.num_states
        if history.ndim != 2:
            hint = "convert an (S, *shape) history with history.flatten(1).T"
            raise ValueError(f"history must have shape (N, {num_states}), got {tuple(history.shape)}; {hint}")
        if (length := history.shape[1]) != num_states:
            hint = f"pass the last {num_states} states, or use a KNOWN with num_states={length}"
            raise ValueError(f"history has {length} states, but this KNOWN takes {num_states}; {hint}")
        if not history.is_floating_point():
            raise ValueError(f"history must have a floating-point dtype, got {history.dtype}")
        if labels is not None and labels.shape != history.shape[:1]:
            raise ValueError(f"labels must have shape {tuple(history.shape[:1])}, got {tuple(labels.shape)}")


def _refuse_other_files(source: str | os.PathLike, config: KNOWNConfig, location: dict[str, Any]) -> None:
    """Refuse a config, or an adapter beside it, that makes `from_pretrained` read other files than the weights."""
    for name in ("transformers_weights", "quantization_config"):
        if getattr(config, name, None) is not None:
            raise ValueError(f"config.json of {source} has the key {name!r}, which KNOWN does not support; remove it")
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(source, "adapter_config.json", **location, **lenient) is not None:
        raise ValueError(f"{source} has an adapter_config.json, but KNOWN takes no adapters; remove the file")


def _check_header(source: str | os.PathLike, path: str, model_class: type[KNOWNModel], config: KNOWNConfig) -> None:
    """Compare names, shapes and dtypes in the header of a safetensors file with those of a config."""
    with torch.device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            pieces = {name: file.get_slice(name) for name in file.keys() if name in expected}
            stored = {name: (piece.get_shape(), piece.get_dtype()) for name, piece in pieces.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); restore it from a copy") from error
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{source} holds no KNOWN weights: it lacks tensor {name!r}; give another folder or id")
        actual, dtype = stored[name]
        if actual != shape or dtype not in _DTYPES:
            raise ValueError(
                f"tensor {name!r} of {path} is {dtype} of shape {actual}, but the config needs floats of shape"
                f" {shape}; restore config and weights from the same copy"
            )


AutoModel.register(KNOWNConfig, KNOWNModel, exist_ok=True)

__all__ = ["KNOWNModel", "KNOWNOutput", "KNOWNPreTrainedModel"]
