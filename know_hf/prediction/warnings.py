"""Reasons to doubt a prediction, as sentences."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..markdown import percent
from ..roles import PREDICTED_ROLES
from ..terminal import first_names
from .residuals import ResidualReport

_PREDICTED = f"{', '.join(PREDICTED_ROLES[:-1])} or {PREDICTED_ROLES[-1]}"
FAR_SMALLER = 0.01  # mean move relative to the one KNOWN was trained on, below which a warning is given


def range_warnings(role: str, tensors: Mapping[str, ResidualReport], trained_on: Mapping[str, float]) -> list[str]:
    """Warn about inputs outside of the range that a predictor was trained on, see `trained_on` of [`KNOWNConfig`]."""
    warnings = []
    total = sum(tensors.values(), ResidualReport())
    if total.outside:
        worst = max(tensors, key=lambda name: tensors[name].outside)
        warnings.append(
            f"{role}: {percent(total.outside / total.predicted)} of the weights are outside of the range that the"
            f" predictor was trained on (values up to {trained_on['largest_weight']:.3g}, moves up to"
            f" {trained_on['largest_displacement']:.3g}), most of them in {worst!r} (values up to"
            f" {tensors[worst].largest_weight:.3g}, moves up to {tensors[worst].largest_move:.3g}). Check the"
            " prediction with gate=Gate(dataset=validation_set)"
        )
    mean = trained_on["mean_displacement"]
    if total.predicted and total.mean_move < FAR_SMALLER * mean:
        warnings.append(
            f"{role}: the weights moved by only {total.mean_move:.2g} on average between the last two states; the"
            f" predictor was trained on moves of {mean:.2g}. It then mostly sees the size of the weights: train each"
            " stage for longer, or check the prediction with gate=Gate(dataset=validation_set)"
        )
    return warnings


def forgetting_warnings(losses: Sequence[float | None], name: str = "eval_loss") -> list[str]:
    """Warn about later states whose loss is not above that of Θ0, the first: nothing was forgotten."""
    full_data, *later = losses
    if full_data is None:
        return []
    lower = {f"Θ{k} ({loss:.3g})": loss for k, loss in enumerate(later, 1) if loss is not None and loss <= full_data}
    if not lower:
        return []
    relation = "below" if max(lower.values()) < full_data else "not above"
    return [
        f"The model did not forget: {name} of {', '.join(lower)} is {relation} that of Θ0 ({full_data:.3g})."
        " Predicting backwards may undo training; train Θ0 longer"
    ]


def rounding_warnings(tensors: Mapping[str, ResidualReport]) -> list[str]:
    """Warn if most residuals are smaller than the rounding of the written dtype."""
    total = sum(tensors.values(), ResidualReport())
    if total.lost <= total.predicted / 2:
        return []
    return [
        f"{percent(total.lost / total.predicted)} of the predicted changes are lost to rounding in the written dtype."
        " Write float32 with dtype=torch.float32, or record in float32"
    ]


def unchanged_warnings(tensors: Mapping[str, ResidualReport], roles: Mapping[str, int]) -> list[str]:
    """Warn if a prediction equals Θ0; `roles` has the number of tensors of each role."""
    total = sum(tensors.values(), ResidualReport())
    if total.changed:
        return []
    if total.predicted:
        return ["The enhanced weights equal Θ0: every predicted change is zero or lost to rounding"]
    counts = ", ".join(f"{role}: {count:,}" for role, count in sorted(roles.items()))
    hint = '. norm="predict" predicts the weights of normalisation layers' if roles.get("norm") else ""
    return [
        f"The enhanced weights equal Θ0: nothing was predicted, because no tensor with the role {_PREDICTED} moved"
        f" (tensors by role: {counts}){hint}"
    ]


def dtype_warnings(tensors: Mapping[str, ResidualReport], dtype_of: Callable[[str], Any]) -> list[str]:
    """Warn about weights that moved but have a dtype that cannot be predicted."""
    kept = [f"{name!r} ({dtype_of(name)})" for name, report in tensors.items() if report.kept]
    if not kept:
        return []
    return [
        f"{first_names(kept, 3)} moved, but weights of this dtype cannot be predicted, so those of Θ0 are kept."
        " Record with dtype=torch.float32 to predict float8"
    ]


def code_warnings(configs: Sequence[Any], base_model: str | None) -> list[str]:
    """Warn about custom code that configs refer to (`auto_map`): trajectories and checkpoints hold no code."""
    maps = [config.get("auto_map") for config in configs if isinstance(config, dict)]
    values = [value for auto_map in maps if isinstance(auto_map, dict) for value in auto_map.values()]
    references = [name for value in values for name in (value if isinstance(value, list) else [value])]
    # repo--module.Class is fetched from that repo
    modules = {name.rpartition(".")[0] for name in references if isinstance(name, str) and "--" not in name}
    files = ", ".join(f"{module}.py" for module in sorted(modules))
    if not files:
        return []
    origin = "the folder or repo that the model was loaded from"
    if base_model:
        is_folder = base_model.startswith((".", "/")) or "\\" in base_model or Path(base_model).exists()
        origin = Path(base_model).name if is_folder else base_model  # cards show no paths
    return [
        f"The checkpoint lacks the custom code of the model ({files}). Copy these files and those they import from"
        f" {origin} and load with trust_remote_code=True, or pass the class: load_model(model_class=...)"
    ]
