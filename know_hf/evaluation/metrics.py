"""Metrics of the `evaluate` library: made by their class, they need neither the Hub nor a cache on the disk.

>>> from know_hf.evaluation.metrics import KnowledgeGain
>>> KnowledgeGain().compute(predictions=[0.82, 0.84], references=[0.80, 0.81], oracle=[0.85, 0.86])
{'knowledge_gain': 0.025, 'relative_knowledge_gain': 0.5}
"""

import os
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from ..predictors import get_predictor
from ..trajectory import WeightTrajectory

# Of predictors that learn nothing; 0 is as good as "nothing changed", which needs none.
RIVALS = ("linear", "average")


class _OfflineMetric(evaluate.Metric):
    """
    A metric that keeps what it is given in memory; a folder is only used where `keep_in_memory` is switched off, as
    several processes need it (`num_process`).
    """

    def __init__(self, *args: Any, keep_in_memory: bool | None = None, **kwargs: Any) -> None:
        in_memory = kwargs.get("num_process", 1) == 1 if keep_in_memory is None else keep_in_memory
        super().__init__(*args, keep_in_memory=in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        if self.keep_in_memory:  # evaluate would make a folder and leave it empty
            return os.path.join(self._data_dir_root, self.name, self.config_name)
        return super()._build_data_dir()


class RetrodictionSkill(_OfflineMetric):
    """
    How much better than "nothing changed" the next less forgotten state was predicted, by role:
    `1 - Σ|Θ̂ - Θ(-1)| / Σ|Θ0 - Θ(-1)|`, 1 is perfect and below 0 is worse than predicting no change.

    `compute` and `add_batch` take, one entry a scalar weight, `predictions` (Θ̂), `references` (Θ(-1)), `histories`
    (`(N, S)`, most forgotten state first, Θ0 last) and `roles`. The result has, for each role, `<role>_skill`,
    `<role>_skill_against_linear` and `<role>_skill_against_average`, the same with the error of the least-squares line
    or of the mean of the history in the place of that of no change. An entry whose divisor is zero is left out.

    For whole trajectories use [`retrodiction_skill`], which needs no copy of the weights.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Skill of predicted weights against predicting that nothing changes, by role.",
            citation="",
            inputs_description="predictions, references, histories, roles: one entry a scalar weight.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float32"),
                    "references": datasets.Value("float32"),
                    "histories": datasets.Sequence(datasets.Value("float32")),
                    "roles": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        histories: Sequence[Sequence[float]],
        roles: Sequence[str],
    ) -> dict[str, float]:
        predicted, target, history = (np.asarray(v, dtype=np.float32) for v in (predictions, references, histories))
        if history.ndim != 2 or history.shape[1] < 2:
            raise ValueError(f"histories have the shape {history.shape}, expected (N, S) with S of at least 2")
        of_role = np.asarray(roles)
        found = {}
        for role in dict.fromkeys(roles):
            chosen = of_role == role
            states, after = torch.from_numpy(history[chosen]), target[chosen]
            error = _sum(predicted[chosen] - after)
            full_data = history[chosen, -1]
            rivals = {"skill": full_data}
            for name in RIVALS:
                residual = get_predictor(name).residual(states, role).numpy()
                rivals[f"skill_against_{name}"] = full_data + residual
            for name, prediction in rivals.items():
                if rival_error := _sum(prediction - after):
                    found[f"{role}_{name}"] = 1 - error / rival_error
        return found


class ForgettingRate(_OfflineMetric):
    """
    How fast a metric falls as the data is halved: the slope of the least-squares line of the metric over the logarithm
    to base 2 of the number of examples, in units of the metric for each halving. Positive where less data makes an
    accuracy smaller (for a loss, which then grows, negative).

    `compute` takes `predictions`, the metric of every state, and `references`, the number of examples each was trained
    on last; `forgetting_rate` is the slope, `r_squared` the share of the metric's variance that the line explains,
    left out where the metric is constant. [`of_trajectory`] takes both from a trajectory.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fall of a metric for each halving of the training data.",
            citation="",
            inputs_description="predictions: metric of each state; references: its number of examples.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def of_trajectory(self, trajectory: WeightTrajectory, metric: str = "eval_accuracy") -> dict[str, float]:
        """
        Args:
            trajectory ([`WeightTrajectory`]):
                A trajectory whose states were evaluated.
            metric (`str`, *optional*, defaults to `"eval_accuracy"`):
                Which of their metrics.

        Raises:
            `ValueError`: when a state has no such metric or no number of examples, or there are fewer than two.
        """
        for state in trajectory.states:
            if metric not in state.metrics or state.num_examples is None:
                missing = f"metric {metric!r} (it has {', '.join(state.metrics) or 'none'})"
                missing = missing if metric not in state.metrics else "number of examples"
                raise ValueError(f"state {state.index} of {trajectory.path} has no {missing}; evaluate every state")
        return self.compute(
            predictions=[state.metrics[metric] for state in trajectory.states],
            references=[state.num_examples for state in trajectory.states],
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        values, sizes = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        if not (sizes > 0).all() or len(set(sizes.tolist())) < 2:
            raise ValueError(f"references={list(references)}: at least two different numbers of examples are needed")
        place = np.log2(sizes) - np.log2(sizes).mean()
        slope = float((place * values).sum() / (place**2).sum())
        found = {"forgetting_rate": slope}
        if variance := float(((values - values.mean()) ** 2).sum()):
            found["r_squared"] = slope**2 * float((place**2).sum()) / variance
        return found


class KnowledgeGain(_OfflineMetric):
    """
    What enhanced weights gain over naive ones in the downstream task, in units of its metric, and as a share of what
    an oracle gains that was trained on as much data as the enhanced weights stand for.

    `compute` takes `predictions`, the metric of the enhanced arm, `references`, that of the naive arm, and, if there
    is one, `oracle`: one entry a seed, in the same order. `knowledge_gain` is the mean difference,
    `relative_knowledge_gain` its quotient by that of the oracle: 1 is all of the headroom. It is left out without an
    oracle, and where the oracle is no better than the naive arm: then there is no knowledge to gain.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Gain of enhanced over naive weights, also as a share of an oracle's.",
            citation="",
            inputs_description="predictions: enhanced; references: naive; oracle (optional): one entry a seed.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self, predictions: Sequence[float], references: Sequence[float], oracle: Sequence[float] | None = None
    ) -> dict[str, float]:
        enhanced, naive = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        if oracle is not None and len(oracle) != len(naive):
            raise ValueError(f"oracle has {len(oracle)} entries, the other arms have {len(naive)}; give one a seed")
        gain = float((enhanced - naive).mean())
        found = {"knowledge_gain": gain}
        headroom = 0.0 if oracle is None else float((np.asarray(oracle, dtype=np.float64) - naive).mean())
        if headroom > 0:
            found["relative_knowledge_gain"] = gain / headroom
        return found


def _sum(error: np.ndarray) -> float:
    return float(np.abs(error).sum(dtype=np.float64))
