"""From a trajectory of adapters to one of whole models: every state merged into the base model by peft itself.

What is predicted differs. An adapter changes a weight by a product, `ΔW = s·B·A`, and its own trajectory holds the
factors. A predictor that adds a to A and b to B changes the weight by `s·(b·A + B·a + b·a)`; predicting the merged
weight instead extrapolates ΔW itself. The two agree to first order only: with factors that moved by dA and dB, a task
vector on the factors arrives at `2·s·dB·dA` more than one on the product, and shrinking both factors by f shrinks ΔW
by f². Moreover the factors are not determined by what the model does: `(c·B)·(A/c)`, or any invertible r×r matrix and
its inverse between them, is the same model, but not the same history to anything that looks at the size of each
number, as KNOWN does. In favour of the factors, their prediction is again an adapter of the same rank and size. That
of the merged weights is a whole model, its change has no low rank, and each of its scalars is mostly the base weight,
beside which all that moved may be small.

In DoRA, `W = m·(W0 + s·B·A) / ‖W0 + s·B·A‖`, the same holds, and the magnitudes m are not predicted in a trajectory of
adapters (their role is `kept`); merged, they are part of the weight. In rsLoRA only s is another.
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
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..checkpoint import atomic_folder, check_free_disk
from ..model_tensors import is_adapter
from .snapshot import state_nbytes
from .weight_trajectory import WeightTrajectory

logger = logging.get_logger(__name__)

_PREFIX = "base_model.model."
_WRAPPERS = ("base_layer", "modules_to_save", "original_module", "token_adapter")  # peft's modules around the base's
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def merge_adapters(
    trajectory: WeightTrajectory | str | Path,
    base_model: nn.Module | str | Path | None = None,
    *,
    output_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> WeightTrajectory:
    """Makes a trajectory of whole models from one of adapters.

    Each state is loaded by peft on a fresh copy of the base model and merged by `merge_and_unload(safe_merge=True)`,
    so that scaling (rsLoRA), magnitudes (DoRA), transposed layers and `modules_to_save` are right by construction.
    What no adapter touches is stored once. Sizes, seeds, fingerprints, metrics and schedule of the states are kept,
    and so are tokenizer and processor files. Buffers that no adapter holds, such as BatchNorm statistics, are those of
    the base model, as they are when peft loads the adapter.

    An adapter on one of two tied embeddings (`embed_tokens` without `lm_head`) unties them, where `merge_and_unload`
    alone would change both: the merged model has `tie_word_embeddings=False`.

    Where the vocabulary was resized before the training, the base model is resized too if the adapters hold the whole
    embeddings, as peft saves them then; otherwise it has to be given with the embeddings of the training.

    Memory: two models in `dtype`, the merged one and the copy that is written; a base model given as an object is a
    third.

    Args:
        trajectory ([`WeightTrajectory`], `str` or `Path`):
            A trajectory of adapters: LoRA with its variants, or any kind that peft can merge.
        base_model (`nn.Module`, `str` or `Path`, *optional*):
            The model that they were trained on, as it was loaded: an object, which is left as it is, a Hub id or a
            folder. By default the one that the trajectory names.
        output_dir (`str` or `Path`):
            Folder of the new trajectory; it appears whole or not at all.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Floating-point dtype of the merged weights, whatever the base model's. In bfloat16 a weight has 8
            significant bits: most of what an adapter changes from state to state is rounded away.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an existing `output_dir` may be replaced.

    Returns:
        [`WeightTrajectory`]: the merged states, of the base model's class.

    Raises:
        `ValueError`: when the trajectory is not one of adapters or of a kind that can't be merged, or the base model
            is unknown, quantised, incomplete, or not the one that the adapters were trained on, such as of another
            vocabulary.
        `TrajectoryError`: when a file of the trajectory is not the one recorded.
        `FileExistsError`: when `output_dir` is not empty and `overwrite` is off.
        `ValueError`: when `output_dir` holds the trajectory or the base model.
        `OSError`: when the base model can't be loaded, or the disk has too little space.
    """
    if not isinstance(trajectory, WeightTrajectory):
        trajectory = WeightTrajectory(trajectory)
    if not trajectory.is_adapter:
        raise ValueError(f"{trajectory.path} is a trajectory of whole models already; there is nothing to merge")
    base = _Base.of(trajectory, base_model, dtype)
    if dtype.itemsize < 4:
        logger.warning(
            f"Merging in {dtype}: changes below {torch.finfo(dtype).eps / 2:.1g} of a weight are rounded away, which"
            " may be all that distinguishes the states; the default is torch.float32."
        )
    trajectory.verify()
    sources = [trajectory.path]
    if isinstance(base.source, str | Path) and Path(base.source).exists():
        sources.append(Path(base.source))
    with atomic_folder(Path(output_dir), overwrite, sources) as work:
        merged = WeightTrajectory.create(work, trajectory.schedule)
        for state in tqdm(trajectory.states, desc="merging adapters", unit="state"):
            model = _merge(base.fresh(), trajectory, state.index)
            if not state.index:
                check_free_disk(Path(output_dir), _nbytes(model, trajectory))
            merged.record(
                model,
                num_examples=state.num_examples,
                steps=state.steps,
                fraction=state.fraction,
                subset_fingerprint=state.subset_fingerprint,
                seed=state.seed,
                metrics=state.metrics,
                processing_class=_ModelFiles(trajectory),
            )
            del model  # before the next one is loaded
    return WeightTrajectory(output_dir)


@dataclass(frozen=True)
class _Base:
    """The base model: an object that is copied, or where it is loaded from each time."""

    source: nn.Module | str | Path
    dtype: torch.dtype
    trajectory: WeightTrajectory
    model_class: Any = None
    revision: str | None = None

    @classmethod
    def of(cls, trajectory: WeightTrajectory, source: nn.Module | str | Path | None, dtype: torch.dtype) -> "_Base":
        from peft import PeftConfig

        adapter = PeftConfig.from_pretrained(str(trajectory.path))
        if adapter.is_prompt_learning or adapter.is_adaption_prompt:
            raise ValueError(
                f"{trajectory.path} has adapters of the kind {adapter.peft_type.value}, which are no change of weights"
                " and can't be merged; predict them as they are"
            )
        if isinstance(source, nn.Module):
            if is_adapter(source) or hasattr(source, "peft_config"):
                raise ValueError(
                    f"the {type(source).__name__} given as base_model has an adapter; give the model without it"
                    " (model.unload())"
                )
            _refuse_quantised(getattr(source, "config", None), type(source).__name__)
            return cls(source, dtype, trajectory)
        recorded = trajectory.base_model or adapter.base_model_name_or_path
        source = source or recorded
        if not source:
            raise ValueError(
                f"{trajectory.path} does not say which model its adapters belong to; pass base_model=, the model or"
                " its Hub id"
            )
        revision = trajectory.base_revision if str(source) == recorded else None
        config, _ = PreTrainedConfig.get_config_dict(str(source), revision=revision)
        _refuse_quantised(config, str(source))
        return cls(source, dtype, trajectory, _model_class(adapter, config, str(source)), revision)

    def fresh(self) -> nn.Module:
        """A base model of its own, in `dtype`."""
        if isinstance(self.source, nn.Module):
            model = copy.deepcopy(self.source).to(self.dtype)
            config = getattr(model, "config", None)
            if isinstance(config, PreTrainedConfig) and not config._name_or_path:
                config._name_or_path = self.trajectory.base_model or ""
            return model
        model, loaded = self.model_class.from_pretrained(
            self.source, revision=self.revision, dtype=self.dtype, output_loading_info=True
        )
        for name in sorted(loaded["missing_keys"]):
            if _PREFIX + name not in self.trajectory.names:
                raise ValueError(
                    f"{self.source} has no {name!r}, which is then newly initialised, and the adapters of"
                    f" {self.trajectory.path} don't hold it: the values they were trained with are lost unless you"
                    " have the model; pass it as base_model="
                )
        return model


def _model_class(adapter: Any, config: dict[str, Any], source: str) -> Any:
    """The class that the adapter was trained on, else the one of its task, else the one of the base's checkpoint."""
    import transformers

    names = [
        (adapter.auto_mapping or {}).get("base_model_class"),
        _AUTO_CLASSES.get(adapter.task_type or ""),
        *(config.get("architectures") or []),
    ]
    for name in names:
        if name and hasattr(transformers, name):
            return getattr(transformers, name)
    raise ValueError(
        f"transformers has none of the classes that {source} may be of"
        f" ({', '.join(filter(None, names)) or 'none named'}); pass the model itself as base_model="
    )


def _refuse_quantised(config: Any, name: str) -> None:
    found = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    if found.get("quantization_config"):
        raise ValueError(
            f"the base model {name} is quantised: merged into it, the adapters would be rounded. Give the model that"
            " it was made from, or model.dequantize()"
        )


def _merge(model: Any, trajectory: WeightTrajectory, state: int) -> nn.Module:
    from peft import get_peft_model_state_dict

    _fit_vocabulary(model, trajectory)
    advice = "pass base_model=, the model as it was loaded for the training"
    try:
        adapted: Any = trajectory.load_model(state, base_model=model)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"state {state} of {trajectory.path} does not fit the {type(model).__name__} that is its base ({error});"
            f" {advice}"
        ) from error
    found, recorded = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)), set(trajectory.names)
    # with embeddings that are adapted or resized, their own weights are recorded too, and what is tied to them
    own = {name.replace(f".{adapted.active_adapter}", "") for name in adapted.state_dict()}
    if differing := (found - recorded) | (recorded - found - own):
        raise ValueError(
            f"tensor {min(differing)!r} is not both in {trajectory.path} and in its adapter as it is on the"
            f" {type(model).__name__} that is its base; {advice}"
        )
    return merge_adapter(adapted, trajectory)


def _in_base(name: str) -> str:
    """Name in the base model of a weight of it that stands among an adapter's."""
    return ".".join(part for part in name.removeprefix(_PREFIX).split(".") if part not in _WRAPPERS)


def _fit_vocabulary(model: Any, trajectory: WeightTrajectory) -> None:
    """Resizes the embeddings to those that the adapters hold; a `ValueError` when these are not all that it takes."""
    held = {_in_base(name): trajectory.shape(name) for name in trajectory.names}
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    differing = [name for name in sorted(held) if before.get(name, held[name]) != held[name]]
    tables = [name for name in differing if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)]
    if not tables or not isinstance(model, PreTrainedModel):
        return
    name, rows = tables[0], held[tables[0]][0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    after = model.state_dict(keep_vars=True)
    filled = {id(tensor) for other, tensor in after.items() if held.get(other) == tensor.shape}  # by tied weights too
    for other, tensor in after.items():
        if tensor.shape != before[other] and id(tensor) not in filled:
            raise ValueError(
                f"tensor {name!r} is {tuple(held[name])} in {trajectory.path} and {tuple(before[name])} in the"
                f" {type(model).__name__} that is its base, which can't be resized, as the adapters don't hold"
                f" {other!r}: pass base_model=, the model with the {rows} rows that it was trained with"
            )


def merge_adapter(adapted: Any, trajectory: WeightTrajectory) -> Any:
    """The base model of an adapter with the adapter merged into it; embeddings of which one is adapted are untied.

    Args:
        adapted (`PeftModel`): The model with the adapter; it is used up.
        trajectory ([`WeightTrajectory`]): The trajectory of adapters that it is of.

    Raises:
        `ValueError`: when peft can't merge adapters of its kind, or they are on tied weights that can't be untied.
    """
    tied = _adapts_tied_embeddings(adapted, trajectory)
    if tied:
        _give_own_weights(adapted)
    try:
        with warnings.catch_warnings():
            # peft's, of any adapter on tied weights
            warnings.filterwarnings("ignore", message="(?s).*tie_word_embeddings", category=UserWarning)
            merged = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"peft can't merge the adapters of {trajectory.path}, of the kind"
            f" {adapted.active_peft_config.peft_type.value} ({type(error).__name__}: {error}); predict the adapters as"
            " they are"
        ) from error
    if tied:
        _tie_what_is_equal(merged)
    return merged


def _touched(names: Iterable[str]) -> set[str]:
    """Paths of the modules that an adapter has tensors for, and of all that hold one, from the tensors' names."""
    paths = [name.removeprefix(_PREFIX).split(".") for name in names]
    return {".".join(path[:end]) for path in paths for end in range(1, len(path))}


def _adapts_tied_embeddings(adapted: Any, trajectory: WeightTrajectory) -> bool:
    """Whether an adapter is on one of two tied embeddings; a `ValueError` for other tied weights."""
    model = adapted.get_base_model()
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    # resized embeddings stand among the adapters as they are in the base
    touched = _touched(set(trajectory.names) - adapted.state_dict().keys())
    for source in set(ties.values()):
        group = {source, *(name for name, other in ties.items() if other == source)}
        hit = sorted(name for name in group if name.endswith(".weight") and name.rpartition(".")[0] in touched)
        if hit and (len(group) > 2 or model.config.is_encoder_decoder or model.get_output_embeddings() is None):
            raise ValueError(
                f"the adapters of {trajectory.path} change {hit[0]!r}, which is tied to"
                f" {', '.join(sorted(group - {hit[0]}))} in {type(model).__name__}: merged, they would change too."
                " Predict the adapters as they are"
            )
        if hit:
            return True
    return False


def _give_own_weights(adapted: Any) -> None:
    """Unties the adapted layers: peft would merge into the one weight, once for each layer that uses it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = Counter(id(parameter) for module in adapted.modules() for parameter in module.parameters(recurse=False))
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            base_layer = layer.get_base_layer()
            if uses[id(weight := base_layer.weight)] > 1:
                base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _tie_what_is_equal(merged: Any) -> None:
    embeddings, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    equal = torch.equal(embeddings.weight, head.weight)
    if equal:
        head.weight = embeddings.weight
    else:  # as biases of heads are, which from_pretrained then doesn't tie either
        for name, source in merged.all_tied_weights_keys.items():
            if (parameter := merged.get_parameter(name)) is merged.get_parameter(source):
                path, _, attribute = name.rpartition(".")
                setattr(merged.get_submodule(path), attribute, nn.Parameter(parameter.detach().clone(), False))
    for config in (merged.config, merged.config.get_text_config()):
        config.tie_word_embeddings = equal


def _nbytes(model: nn.Module, trajectory: WeightTrajectory) -> int:
    """Bytes that the merged states take: the first one whole, of the others what the adapters touch."""
    touched = _touched(trajectory.names)
    changed = sum(t.nbytes for name, t in model.state_dict().items() if name.rpartition(".")[0] in touched)
    return state_nbytes(model)[0] + (trajectory.num_states - 1) * changed


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
