"""Loading a model of a recorded architecture: class of transformers, task on the Hub, and Python code."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import read_json_object
from ..markdown import python
from ..trajectory.adapters import AUTO_CLASSES

if TYPE_CHECKING:
    from .base import Source

# auto class, its table in transformers, task on the Hub; the first match counts
_AUTO_CLASSES = (
    ("AutoModelForSequenceClassification", "FOR_SEQUENCE_CLASSIFICATION", "text-classification"),
    ("AutoModelForImageClassification", "FOR_IMAGE_CLASSIFICATION", "image-classification"),
    ("AutoModelForImageTextToText", "FOR_IMAGE_TEXT_TO_TEXT", "image-text-to-text"),
    ("AutoModelForCausalLM", "FOR_CAUSAL_LM", "text-generation"),
    ("AutoModelForTokenClassification", "FOR_TOKEN_CLASSIFICATION", "token-classification"),
    ("AutoModelForQuestionAnswering", "FOR_QUESTION_ANSWERING", "question-answering"),
    ("AutoModelForSpeechSeq2Seq", "FOR_SPEECH_SEQ_2_SEQ", "automatic-speech-recognition"),
    ("AutoModelForCTC", "FOR_CTC", "automatic-speech-recognition"),
    ("AutoModelForAudioClassification", "FOR_AUDIO_CLASSIFICATION", "audio-classification"),
    ("AutoModelForVideoClassification", "FOR_VIDEO_CLASSIFICATION", "video-classification"),
    ("AutoModelForObjectDetection", "FOR_OBJECT_DETECTION", "object-detection"),
    ("AutoModelForSemanticSegmentation", "FOR_SEMANTIC_SEGMENTATION", "image-segmentation"),
    ("AutoModelForSeq2SeqLM", "FOR_SEQ_TO_SEQ_CAUSAL_LM", None),
    ("AutoModelForMaskedLM", "FOR_MASKED_LM", "fill-mask"),  # last: it lists BART, an encoder-decoder
    ("AutoModel", "", None),
)


def architecture(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> str | None:
    """Return the class name of a model, or of an adapter's base, from `config.json` and `adapter_config.json`."""
    names = config.get("architectures")
    if adapter:
        mapping = adapter.get("auto_mapping")
        names = [mapping.get("base_model_class")] if isinstance(mapping, dict) else None
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) and name.isidentifier() else None


def auto_class(architecture: str | None, adapter_task: object = None) -> tuple[str | None, str | None]:
    """Return the class that loads an architecture, and its task on the Hub; of an adapter, by its task type."""
    import transformers
    from transformers.models.auto import modeling_auto

    if isinstance(adapter_task, str) and (name := AUTO_CLASSES.get(adapter_task)):
        return name, next(tag for auto_class, _, tag in _AUTO_CLASSES if auto_class == name)
    if architecture is None:
        return None, None
    for name, table, tag in _AUTO_CLASSES:
        mapping = getattr(modeling_auto, f"MODEL_{table}_MAPPING_NAMES".replace("__", "_"), {})
        if any(architecture in (names if isinstance(names, tuple) else (names,)) for names in mapping.values()):
            return name, tag
    return (architecture if hasattr(transformers, architecture) else None), None


def loading_code(path: str, load_with: str | None, architecture: str | None, on_hub: bool = False) -> str:
    """Return Python code that loads a checkpoint, with a class of transformers if one is known."""
    if load_with is not None:
        return f"from transformers import {load_with}\n\nmodel = {load_with}.from_pretrained({python(path)})"
    if architecture is not None:
        comment = f"# {architecture} is not in transformers; import it from your code"
        return f"{comment}\nmodel = {architecture}.from_pretrained({python(path)})"
    file = f'hf_hub_download({python(path)}, "model.safetensors")' if on_hub else python(f"{path}model.safetensors")
    imports = "from huggingface_hub import hf_hub_download\n" if on_hub else ""
    return f"{imports}from safetensors.torch import load_file\n\nmodel.load_state_dict(load_file({file}))"


def adapter_loading_code(path: str, load_with: str | None, base: "Source | None") -> str:
    """Return Python code that loads an adapter on its base model; the code loads a base model from the Hub as well."""
    lines = ["from peft import PeftModel", "", "# base_model: the model that the adapter was trained on"]
    if base is not None and base["on_hub"] and load_with is not None:
        revision = "" if base["revision"] is None else f", revision={python(base['revision'])}"
        classes = "  # and num_labels=, as trained" if load_with.endswith("Classification") else ""
        lines[1:] = [f"from transformers import {load_with}", ""]
        lines.append(f"base_model = {load_with}.from_pretrained({python(base['name'])}{revision}){classes}")
    return "\n".join([*lines, f"model = PeftModel.from_pretrained(base_model, {python(path)})"])


def loading_line(folder: Path, path: str) -> str:
    """Return one line, imports included, that loads a checkpoint; from the JSON files in a folder of the same model.

    The code of an adapter takes `base_model`.
    """
    config, adapter = (read_json(folder / name) for name in ("config.json", "adapter_config.json"))
    if adapter:
        return f"from peft import PeftModel; model = PeftModel.from_pretrained(base_model, {python(path)})"
    model_class = architecture(config, adapter)
    lines = loading_code(path, auto_class(model_class)[0], model_class).splitlines()
    return "; ".join(line for line in lines if line and not line.startswith("#"))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or `{}` if there is no file."""
    return read_json_object(path) if path.is_file() else {}
