"""Merge the adapters of a trajectory into their base model, state by state, with peft.

Predicting merged weights differs from predicting adapters. An adapter holds the factors of `ΔW = s·B·A`; a predictor
that adds b to B and a to A changes the weight by `s·(b·A + B·a + b·a)`. The two agree only to first order, and the
factors are not unique: `(c·B)·(A/c)` is the same model with another history. Predicted adapters stay small and of low
rank. Merged weights form a full model, most of whose values barely move. DoRA magnitudes are predicted only if merged.
"""

import copy
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..checkpoint import ADAPTER_NAME, CheckpointReader, atomic_folder, check_free_disk, check_holds_no_trajectory
from ..checkpoint.safe_loading import from_safetensors
from ..local_paths import is_unknown, loaded_from, resolved_name
from ..model_tensors import unwrapped
from .adapters import AUTO_CLASSES, read_adapter_config
from .loading import load_pretrained
from .snapshot import state_nbytes
from .store import StateName
from .weight_trajectory import WeightTrajectory

logger = logging.get_logger(__name__)

# raised by transformers for a damaged config or damaged weights
_UNLOADABLE = (AttributeError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError, StrictDataclassError)
_STAGE_FIELDS = ("kind", "num_examples", "steps", "fraction", "subset_fingerprint", "seed", "metrics")
_PREFIX = "base_model.model."
_UNMERGED = "predict the adapters without merging"
_WRAPPERS = ("base_layer", "modules_to_save", "original_module", "token_adapter")  # peft's modules around the base's


def merge_adapters(
    trajectory: WeightTrajectory | str | Path,
    base_model: nn.Module | str | Path | None = None,
    *,
    output_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> WeightTrajectory:
    """Write a trajectory of full models from one of adapters.

    peft loads each state on a fresh copy of the base model and merges it with `merge_and_unload(safe_merge=True)`,
    which handles scaling (rsLoRA), magnitudes (DoRA), transposed layers and `modules_to_save`. Tensors that no adapter
    changes are stored once. Sizes, seeds, fingerprints and metrics of the states, the schedule, and tokenizer and
    processor files are kept; start, tail states and branches are merged too. Buffers that adapters do not hold, such
    as BatchNorm statistics, come from the base model.

    An adapter on one of two tied embeddings (`embed_tokens` without `lm_head`) unties them, because
    `merge_and_unload` alone would change both. The merged model then has `tie_word_embeddings=False`.

    If the vocabulary was resized before the training, the base model is resized too, provided that the adapters hold
    both embeddings, as peft saves them in this case. Otherwise, pass the base model with the embeddings used in
    training.

    Merging needs memory for two models in `dtype`, the merged one and the copy to write. A base model passed as an
    object is a third.

    Args:
        trajectory ([`WeightTrajectory`], `str` or `Path`):
            A trajectory of LoRA adapters, or of another kind that peft can merge.
        base_model (`nn.Module`, `str` or `Path`, *optional*):
            The model that the adapters were trained on, as it was loaded: an object (which is not changed), a Hub id
            or a folder. By default the base model of the trajectory, if it is recorded.
        output_dir (`str` or `Path`):
            Folder of the new trajectory, which appears only when it is complete.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Floating-point dtype of the merged weights. In bfloat16, with 8 significant bits, most of the change from
            state to state is rounded away.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an existing `output_dir` may be replaced.

    Returns:
        [`WeightTrajectory`]: the merged states, of the class of the base model.

    Raises:
        `ValueError`: when the trajectory does not hold adapters, or peft cannot merge them (`layer_replication`,
            prompts); when the base model is unknown, quantised, incomplete, or not the one that the adapters were
            trained on; when `output_dir` contains or is inside a trajectory or the base model.
        `TrajectoryError`: when a file of the trajectory is not the recorded one.
        `FileExistsError`: when `output_dir` is not empty and `overwrite` is off.
        `OSError`: when the base model cannot be loaded, or the disk is too small.
    """
    if not isinstance(trajectory, WeightTrajectory):
        trajectory = WeightTrajectory(trajectory)
    if not trajectory.is_adapter:
        raise ValueError(
            f"{trajectory.path} records full models, so there is nothing to merge: pass it to know-hf predict directly"
        )
    base = _Base.of(trajectory, base_model, dtype)
    if dtype.itemsize < 4:
        logger.warning(
            f"{dtype} rounds away changes below {torch.finfo(dtype).eps / 2:.1g} of a weight, possibly all differences"
            " between states; the default is torch.float32."
        )
    trajectory.verify()
    if overwrite:
        check_holds_no_trajectory(Path(output_dir), below=True)
    source = loaded_from(base.source) if isinstance(base.source, nn.Module) else base.source
    with atomic_folder(Path(output_dir), overwrite, [trajectory.path, source]) as work:
        merged = WeightTrajectory.create(work, trajectory.schedule)
        records = (trajectory.start, *trajectory.tail, *trajectory.states, *trajectory.branches)
        snapshots = [record for record in records if record is not None]
        for snapshot in tqdm(snapshots, desc="merging adapters", unit="state"):
            model = _merge(base.fresh(), trajectory, snapshot.name)
            if snapshot is snapshots[0]:
                check_free_disk(Path(output_dir), _nbytes(model, trajectory, len(snapshots) - 1))
            if snapshot.kind == "start":
                merged.record_start(model)
            elif snapshot.kind == "tail":
                merged.record_tail(model, snapshot.index, snapshot.steps)
            else:
                stage: Any = {name: getattr(snapshot, name) for name in _STAGE_FIELDS}
                merged.record(model, processing_class=_ModelFiles(trajectory), **stage)
            del model  # before the next one is loaded
        for snapshot in merged.tail:
            merged.update_metrics(snapshot.name, trajectory.tail[snapshot.index].metrics)
    return WeightTrajectory(output_dir)


def load_merged(checkpoint: Path, base_model: str | Path | None = None) -> Any:
    """Load an adapter in a folder, or Θ0 of a trajectory of adapters, merged in float32 into its base model.

    Raises:
        `ValueError` or `OSError`: as [`merge_adapters`].
    """
    is_trajectory = WeightTrajectory.exists(checkpoint)
    adapters = WeightTrajectory(checkpoint) if is_trajectory else AdapterFolder(checkpoint)
    return _merge(_Base.of(adapters, base_model, torch.float32).fresh(), adapters, "state-0")


def load_base(trajectory: WeightTrajectory, base_model: str | Path | None = None) -> Any:
    """Load the base model of a trajectory of adapters, with the head and the vocabulary of the adapters.

    Raises:
        `ValueError` or `OSError`: as [`merge_adapters`].
    """
    model = _Base.of(trajectory, base_model, torch.float32).fresh()
    _fit(model, trajectory)
    return model


def merge_adapter(adapted: Any, trajectory: "Adapters") -> Any:
    """Merge an adapter into its base model and return it; `adapted` cannot be used afterwards.

    If the adapter changes one of two tied embeddings, they are untied.

    Raises:
        `ValueError`: when peft cannot merge adapters of this kind, or they change tied weights that cannot be untied.
    """
    adapts_tied = _adapts_tied_embeddings(adapted, trajectory)
    if adapts_tied:
        _untie_adapted(adapted)
    try:
        with warnings.catch_warnings():
            # peft warns about any adapter on tied weights
            warnings.filterwarnings("ignore", message="(?s).*tie_word_embeddings", category=UserWarning)
            merged = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"peft cannot merge the {adapted.active_peft_config.peft_type.value} adapters of {trajectory.path}"
            f" ({type(error).__name__}: {error}); {_UNMERGED}"
        ) from error
    if adapts_tied:
        _tie_equal_embeddings(merged)
    return merged


class AdapterFolder:
    """An adapter in a folder, with what merging reads of a trajectory."""

    base_model = base_revision = None

    def __init__(self, path: Path) -> None:
        reader = CheckpointReader([path / ADAPTER_NAME])
        self.path, self.names, self.shape = path, reader.names, reader.shape

    def load_model(self, state: StateName, *, base_model: Any) -> Any:
        return load_pretrained(self.path, base_model=base_model)


Adapters = WeightTrajectory | AdapterFolder


@dataclass(frozen=True)
class _Base:
    """The base model: an object to copy, or a Hub id or folder to load for each state."""

    source: nn.Module | str | Path
    dtype: torch.dtype
    trajectory: Adapters
    model_class: Any = None
    revision: str | None = None

    @classmethod
    def of(cls, trajectory: Adapters, source: nn.Module | str | Path | None, dtype: torch.dtype) -> "_Base":
        adapter = read_adapter_config(trajectory.path)
        if adapter.is_prompt_learning or adapter.is_adaption_prompt:
            raise ValueError(
                f"the {adapter.peft_type.value} adapters of {trajectory.path} do not change weights; {_UNMERGED}"
            )
        if getattr(adapter, "layer_replication", None):
            raise ValueError(
                f"the adapters of {trajectory.path} have layer_replication={adapter.layer_replication}: copies of a"
                f" layer share the weights that each adapter would be merged into; {_UNMERGED}"
            )
        if isinstance(source, nn.Module):
            source = unwrapped(source)
            name = type(source).__name__
            if hasattr(source, "peft_config"):
                raise ValueError(f"base_model is a {name} with an adapter; pass the model without it (model.unload())")
            _check_not_quantised(getattr(source, "config", None), name)
            return cls(source, dtype, trajectory)
        recorded = resolved_name(trajectory.path, trajectory.base_model or adapter.base_model_name_or_path or "")
        source = source or recorded
        if not source:
            raise ValueError(f"{trajectory.path} does not name its base model; pass base_model=")
        if is_unknown(str(source)):
            raise ValueError(
                f"the folder of the base model {source} of {trajectory.path} is not recorded; pass base_model="
            )
        revision = trajectory.base_revision if str(source) == recorded else None
        try:
            config, _ = PreTrainedConfig.get_config_dict(str(source), revision=revision)
        except _UNLOADABLE as error:
            raise _unloadable(source, error) from error
        if not config.get("model_type"):  # transformers would build a model of its default sizes
            raise ValueError(f"the base model {source} has no config.json with a model_type; pass a complete one")
        _check_not_quantised(config, str(source))
        return cls(source, dtype, trajectory, _model_class(adapter, config, str(source)), revision)

    def fresh(self) -> nn.Module:
        """Return a new base model in `dtype`."""
        if isinstance(self.source, nn.Module):
            model = copy.deepcopy(self.source).to(self.dtype)
            config = getattr(model, "config", None)
            if isinstance(config, PreTrainedConfig) and not config.name_or_path:
                config.name_or_path = resolved_name(self.trajectory.path, self.trajectory.base_model or "")
            return model
        options = {"dtype": self.dtype, "output_loading_info": True}
        try:
            model, loading = from_safetensors(self.model_class, self.source, self.revision, **options)
        except _UNLOADABLE as error:
            raise _unloadable(self.source, error) from error
        for name, tensor in model.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"tensor {name!r} of the base model {self.source} contains NaN or infinite values")
        for name in sorted(loading["missing_keys"]):
            if _PREFIX + name not in self.trajectory.names:
                raise ValueError(
                    f"tensor {name!r} is neither in {self.source} nor in the adapters of {self.trajectory.path} and"
                    " would be initialised at random; pass the model itself as base_model="
                )
        return model


def _unloadable(source: str | Path, error: Exception) -> ValueError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"the base model {source} cannot be loaded ({reason:.300})")


def _model_class(adapter: Any, config: dict[str, Any], source: str) -> Any:
    """The class that the adapter was trained on, else that of its task, else that of the base's checkpoint."""
    import transformers

    names = [
        (adapter.auto_mapping or {}).get("base_model_class"),
        AUTO_CLASSES.get(adapter.task_type or ""),
        *(config.get("architectures") or []),
    ]
    for name in names:
        if name and hasattr(transformers, name):
            return getattr(transformers, name)
    raise ValueError(
        f"transformers has no class for {source}, of architecture {', '.join(filter(None, names)) or 'unknown'}; pass"
        " the model itself as base_model="
    )


def _check_not_quantised(config: Any, name: str) -> None:
    content = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    if content.get("quantization_config"):
        raise ValueError(f"the base model {name} is quantised; pass the original model, or model.dequantize()")


def _merge(model: Any, trajectory: Adapters, state: StateName) -> nn.Module:
    from peft import get_peft_model_state_dict

    _fit(model, trajectory)
    unfit = f"does not fit its base model, a {type(model).__name__}; pass the model of the training as base_model=."
    try:
        adapted: Any = trajectory.load_model(state, base_model=model)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{state} of {trajectory.path} {unfit} {error}") from error
    in_model = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    recorded = set(trajectory.names)
    # adapted or resized embeddings are recorded with their own weights and those tied to them
    own = {name.replace(f".{adapted.active_adapter}", "") for name in adapted.state_dict()}
    if differing := (in_model - recorded) | (recorded - in_model - own):
        raise ValueError(f"tensor {min(differing)!r} of {trajectory.path} {unfit}")
    return merge_adapter(adapted, trajectory)


def _fit(model: Any, trajectory: Adapters) -> None:
    """Give a base model the vocabulary and the number of labels of the adapters."""
    _fit_vocabulary(model, trajectory)
    _fit_head(model, trajectory)


def _fit_vocabulary(model: Any, trajectory: Adapters) -> None:
    """Resize the embeddings to those of the adapters; raise a `ValueError` if the adapters lack some of them."""
    recorded = {_in_base(name): trajectory.shape(name) for name in trajectory.names}
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    differing = [name for name in sorted(recorded) if before.get(name, recorded[name]) != recorded[name]]
    tables = [name for name in differing if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)]
    if not tables or not isinstance(model, PreTrainedModel):
        return
    name, rows = tables[0], recorded[tables[0]][0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    after = model.state_dict(keep_vars=True)
    filled = {id(tensor) for other, tensor in after.items() if recorded.get(other) == tensor.shape}  # and tied ones
    for other, tensor in after.items():
        if tensor.shape != before[other] and id(tensor) not in filled:
            raise ValueError(
                f"tensor {name!r} is {tuple(recorded[name])} in {trajectory.path} and {tuple(before[name])} in its"
                f" base model, and the adapters lack {other!r}; pass base_model=, the model with {rows} tokens"
            )


def _fit_head(model: Any, trajectory: Adapters) -> None:
    """Replace layers with one output per label by layers with as many outputs as the adapters hold for them."""
    if not isinstance(model, PreTrainedModel):
        return
    recorded = {_in_base(name): trajectory.shape(name) for name in trajectory.names}
    num_labels, heads = model.config.num_labels, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.out_features == num_labels:
            outputs, inputs = recorded.get(f"{name}.weight", layer.weight.shape)
            if inputs == layer.in_features and outputs != num_labels:
                heads.append((name, layer, outputs))
    for name, layer, outputs in heads:
        bias = layer.bias is not None
        model.set_submodule(name, nn.Linear(layer.in_features, outputs, bias, dtype=layer.weight.dtype))
        model.config.num_labels = model.num_labels = outputs


def _in_base(name: str) -> str:
    """Name in the base model of one of its weights that is stored with an adapter."""
    return ".".join(part for part in name.removeprefix(_PREFIX).split(".") if part not in _WRAPPERS)


def _modules(names: Iterable[str]) -> set[str]:
    """Paths of the modules that own tensors of these names, and of the modules that contain those."""
    paths = [name.removeprefix(_PREFIX).split(".") for name in names]
    return {".".join(path[:end]) for path in paths for end in range(1, len(path))}


def _adapts_tied_embeddings(adapted: Any, trajectory: Adapters) -> bool:
    """Whether an adapter is on one of two tied embeddings; raise a `ValueError` for other tied weights."""
    model = adapted.get_base_model()
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    # resized embeddings are recorded under their names in the base model
    modules = _modules(set(trajectory.names) - adapted.state_dict().keys())
    for source in set(ties.values()):
        group = {source, *(name for name, other in ties.items() if other == source)}
        hit = sorted(name for name in group if name.endswith(".weight") and name.rpartition(".")[0] in modules)
        if hit and (len(group) > 2 or model.config.is_encoder_decoder or model.get_output_embeddings() is None):
            raise ValueError(
                f"merging the adapters of {trajectory.path} would also change {', '.join(sorted(group - {hit[0]}))} of"
                f" {type(model).__name__}, tied to the adapted {hit[0]!r}; {_UNMERGED}"
            )
        if hit:
            return True
    return False


def _untie_adapted(adapted: Any) -> None:
    """Give each adapted layer its own weight: peft would merge into a shared weight once for each of its layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = Counter(id(parameter) for module in adapted.modules() for parameter in module.parameters(recurse=False))
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            base_layer = layer.get_base_layer()
            if uses[id(weight := base_layer.weight)] > 1:
                base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _tie_equal_embeddings(merged: Any) -> None:
    embeddings, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    equal = torch.equal(embeddings.weight, head.weight)
    if equal:
        head.weight = embeddings.weight
    else:  # untie other parameters too, such as biases of heads, since from_pretrained will not tie them
        for name, source in merged.all_tied_weights_keys.items():
            if (parameter := merged.get_parameter(name)) is merged.get_parameter(source):
                path, _, attribute = name.rpartition(".")
                setattr(merged.get_submodule(path), attribute, nn.Parameter(parameter.detach().clone(), False))
    for config in (merged.config, merged.config.get_text_config()):
        config.tie_word_embeddings = equal


def _nbytes(model: nn.Module, trajectory: WeightTrajectory, others: int) -> int:
    """Bytes of the merged states: all tensors of the first, and those that adapters change of the others."""
    modules = _modules(trajectory.names)
    changed = sum(t.nbytes for name, t in model.state_dict().items() if name.rpartition(".")[0] in modules)
    return state_nbytes(model)[0] + others * changed


@dataclass(frozen=True)
class _ModelFiles:
    """Tokenizer and processor files of a trajectory, saved as a tokenizer is."""

    trajectory: WeightTrajectory

    def save_pretrained(self, folder: Path) -> None:
        for path in self.trajectory.model_files:
            target = folder / path.relative_to(self.trajectory.path)
            if path.name != "adapter_config.json" and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
