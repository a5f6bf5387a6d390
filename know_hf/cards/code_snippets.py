"""The code that a card shows: how its weights are loaded, and how they are made again."""

import json
import shlex
from typing import TYPE_CHECKING

from ..markdown import python, python_call

if TYPE_CHECKING:
    from .checkpoint_card import CheckpointCard
    from .provenance import RecordedCard
    from .trajectory_card import TrajectoryCard

RECORDING = "recording"  # folder that `know-hf record` writes to in the examples


def loading_code(card: "RecordedCard", folder: str) -> str:
    """How a checkpoint of a card's model is loaded from a folder or Hub id, in Python."""
    place, name = python(folder), card.load_with
    if card.adapter_type is not None:
        lines = ["from peft import PeftModel", "", "# base_model: the model that the adapter was trained on"]
        base = card.base_model
        if base is not None and base["on_hub"] and name is not None:
            revision = "" if base["revision"] is None else f", revision={python(base['revision'])}"
            classes = "  # and num_labels=, as trained" if name.endswith("Classification") else ""
            lines[1:] = [f"from transformers import {name}", ""]
            lines.append(f"base_model = {name}.from_pretrained({python(base['name'])}{revision}){classes}")
        return "\n".join([*lines, f"model = PeftModel.from_pretrained(base_model, {place})"])
    if name is not None:
        return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({place})"
    if card.architecture is not None:
        comment = f"# {card.architecture} is no class of transformers: import it from where it is defined"
        return f"{comment}\nmodel = {card.architecture}.from_pretrained({place})"
    if card.repo_id is None:
        path = python(f"{folder}model.safetensors")
        return f"from safetensors.torch import load_file\n\nmodel.load_state_dict(load_file({path}))"
    return (
        "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n"
        f'model.load_state_dict(load_file(hf_hub_download({place}, "model.safetensors")))'
    )


def opening_code(card: "TrajectoryCard") -> str:
    """How a trajectory is opened and used, in Python."""
    opened = 'WeightTrajectory("trajectory/")'
    if card.repo_id is not None:
        opened = f"WeightTrajectory.from_hub({python(card.repo_id)})"
    base = "" if card.adapter_type is None else ", base_model=base_model"
    return f"""\
from know_hf import WeightTrajectory, predict_overflowed_weights

trajectory = {opened}
history = trajectory.history(trajectory.names[0])  # (S, *shape), most forgotten state first
model = trajectory.load_model({len(card.states) - 1}{base})  # the most forgotten state
enhanced = predict_overflowed_weights(trajectory, steps=1, output_dir="enhanced/")"""


def prediction_code(card: "CheckpointCard") -> str:
    """The calls that make an enhanced checkpoint again, in Python."""
    names, others, lines = ["predict_overflowed_weights"], [], []
    place = python(f"{RECORDING}/trajectory" if card.record_arguments else "trajectory/")
    if card.trajectory is not None:
        names.append("WeightTrajectory")
        revision = f", revision={python(card.trajectory['revision'])}" if card.trajectory["revision"] else ""
        lines.append(f"trajectory = WeightTrajectory.from_hub({python(card.trajectory['name'])}{revision})")
    elif card.schedule_call is not None and not card.record_arguments:
        names += ["ForgettingSchedule", "induce_forgetting"]
        lines += [
            f"schedule = {card.schedule_call}",
            f"trajectory = induce_forgetting(trainer, schedule, {place})  # trainer: the Trainer of the fine-tuning",
        ]
    if card.chosen_state:
        return _state_code(card, names, lines, place)
    arguments = ["trajectory" if lines else place]
    name, options, known = card.predictor["name"], card.predictor["options"], card.known
    if known is not None and known["revision"] is not None:
        names.append("KNOWNModel")
        lines.append(
            f"known = KNOWNModel.from_pretrained({python(known['name'])}, revision={python(known['revision'])})"
        )
        arguments.append("known")
    elif known is not None and not known["shipped"]:
        arguments.append(python(known["name"]))
    elif known is None and card.predictor["module"] is not None:
        others.append(f"from {card.predictor['module']} import {name}")
        arguments.append(f"predictor={python_call(name, options)}")
    elif known is None:
        arguments.append(f"predictor={python(name)}")
        arguments += [f"predictor_options={python(options)}"] if options else []
    arguments.append(f"steps={card.steps}")
    if card.norm != "keep":
        arguments.append(f"norm={python(card.norm)}")
    if card.dtype is not None:
        others.append("import torch")
        arguments.append(f"dtype=torch.{card.dtype}")
    if card.recalibrated:
        lines.append("# batches: keyword arguments of the model, made from the source data")
        arguments.append("recalibrate_with=batches")
    imports = _imports(names)
    call = f"predict_overflowed_weights({', '.join([*arguments, 'output_dir={}'.format(python('enhanced/'))])})"
    return "\n".join([imports, *others, "", *lines, call])


def _state_code(card: "CheckpointCard", names: list[str], lines: list[str], place: str) -> str:
    """How a state that a gate chose is made a checkpoint again: all of it is copied, not predicted."""
    names = [name for name in names if name != "predict_overflowed_weights"]
    if not lines:
        names, lines = ["WeightTrajectory"], [f"trajectory = WeightTrajectory({place})"]
    base = "" if card.adapter_type is None else ", base_model=base_model"
    lines = [*lines, f"model = trajectory.load_model({card.chosen_state}{base})"]
    if card.recalibrated:
        names = [*names, "recalibrate_batch_norm"]
        lines.append("# batches: keyword arguments of the model, made from the source data")
        lines.append("recalibrate_batch_norm(model, batches)")
    others = []
    if card.dtype is not None:
        others.append("import torch")
        lines.append(f"model.to(torch.{card.dtype})")
    return "\n".join([_imports(names), *others, "", *lines, 'model.save_pretrained("enhanced/")'])


def _imports(names: list[str]) -> str:
    return f"from know_hf import {', '.join(sorted(names, key=lambda name: (name.islower(), name)))}"


def prediction_command(card: "CheckpointCard") -> str | None:
    """The prediction from a recorded trajectory as a command, where there is one."""
    if card.chosen_state or card.recalibrated or card.trajectory is not None or card.predictor["module"] is not None:
        return None
    place = f"{RECORDING}/trajectory" if card.record_arguments else "trajectory/"
    words = ["know-hf", "predict", place, "--steps", str(card.steps)]
    if card.known is None:
        words += ["--predictor", card.predictor["name"]]
        if card.predictor["options"]:
            words += ["--predictor-options", json.dumps(card.predictor["options"])]
    elif card.known["revision"] is not None:
        return None
    elif not card.known["shipped"]:
        words += ["--known", card.known["name"]]
    if card.norm != "keep":
        words += ["--norm", card.norm]
    if card.dtype is not None:
        words += ["--dtype", card.dtype]
    return shlex.join([*words, "--output-dir", "enhanced/"])


def record_command() -> str:
    """The recording from `record.yaml` as a command."""
    return f"know-hf record --output-dir {RECORDING} --config record.yaml"
