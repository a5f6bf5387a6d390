"""Metrics of the `evaluate` library that meta-training, recording and comparison compute with.

Create them from their class: they need neither the Hub nor a cache folder. Import this module where a metric is
computed, because importing `evaluate` takes about a second.

```python
>>> from know_hf.metrics import KnowledgeGain
>>> KnowledgeGain().compute(predictions=[0.82, 0.84], references=[0.80, 0.81], oracle=[0.85, 0.86])
{'knowledge_gain': 0.025, 'relative_knowledge_gain': 0.5}
```
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


class _OfflineMetric(evaluate.Metric):
    """A metric of two columns of numbers, kept in memory unless several processes share it (`num_process`)."""

    inputs = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"keep_in_memory": kwargs.get("num_process", 1) == 1, **kwargs})

    def _build_data_dir(self) -> str:
        if self.keep_in_memory:  # the base class creates the folder, and leaves it empty
            return os.path.join(self._data_dir_root, self.name, self.config_name)
        return super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self.inputs,
            features=datasets.Features({"predictions": number, "references": number}),
        )


class RetrodictionSkill(_OfflineMetric):
    """Skill of predicted weights against a reference prediction: `1 - Σ|Θ̂ - Θ(-1)| / Σ|Θref - Θ(-1)|`.

    1 is perfect, 0 as good as the reference, below 0 worse. The usual reference predicts that nothing changes,
    `Θref = Θ0`. If the reference has no error, the skill is 0 for a prediction without error, otherwise `-inf`.

    `compute` takes `predictions`, absolute errors of the prediction, and `references`, those of the reference: one
    entry per weight, or sums over weights. It returns `retrodiction_skill`; with `groups`, one name per entry, it
    returns the skill of each group by its name.
    """

    inputs = "predictions: errors of the prediction; references: errors of the reference; groups (optional): names."

    def _compute(
        self, predictions: Sequence[float], references: Sequence[float], groups: Sequence[str] | None = None
    ) -> dict[str, float]:
        names = ["retrodiction_skill"] * len(predictions) if groups is None else groups
        errors, reference_errors = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for name, error, reference in zip(names, predictions, references, strict=True):
            errors[name] += error
            reference_errors[name] += reference
        return {name: _skill(error, reference_errors[name]) for name, error in errors.items()}


class ForgettingRate(_OfflineMetric):
    """Change of a metric per halving of the training data.

    The rate is the slope of the least-squares line of the metric over log2 of the number of examples. It is positive
    if a metric such as accuracy falls with less data, negative if a loss rises.

    `compute` takes `predictions`, the metric of each state, and `references`, the number of examples of each state.
    It returns `forgetting_rate`, and `r_squared`, the share of the metric's variance that the line explains, unless
    the metric is constant. [`of_trajectory`] reads both from a trajectory.
    """

    inputs = "predictions: metric of each state; references: its number of examples."

    def of_trajectory(self, trajectory: Any, metric: str = "eval_accuracy") -> dict[str, float]:
        """Compute the rate of a trajectory from a metric of its states.

        Raises:
            `ValueError`: if a state has no such metric or no number of examples, or there are fewer than two states.
        """
        for state in trajectory.states:
            if metric not in state.metrics:
                names = ", ".join(state.metrics) or "none"
                raise ValueError(f"state {state.index} of {trajectory.path} has no metric {metric!r}, only: {names}")
            if state.num_examples is None:
                raise ValueError(f"state {state.index} of {trajectory.path} was trained on a stream of unknown length")
        values, sizes = zip(*((state.metrics[metric], state.num_examples) for state in trajectory.states), strict=True)
        return self.compute(predictions=values, references=sizes)

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        values, sizes = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        if not (sizes > 0).all() or len(set(sizes.tolist())) < 2:
            raise ValueError(f"references must contain two different positive numbers of examples, got {references}")
        halvings = np.log2(sizes) - np.log2(sizes).mean()
        slope = float((halvings * values).sum() / (halvings**2).sum())
        result = {"forgetting_rate": slope}
        if variance := float(((values - values.mean()) ** 2).sum()):
            result["r_squared"] = slope**2 * float((halvings**2).sum()) / variance
        return result


class KnowledgeGain(_OfflineMetric):
    """Gain of enhanced over naive weights on the target task, absolute and as a share of the oracle's gain.

    `compute` takes `predictions`, the values of the enhanced arm, `references`, those of the naive arm, and
    optionally `oracle`: one entry per seed, in the same order. It returns `knowledge_gain`, the mean difference, and
    `relative_knowledge_gain`, its quotient by the mean difference of the oracle: 1 is all the oracle gains. The
    quotient is left out without an oracle, or if the oracle is not better than naive.
    """

    inputs = "predictions: values of the enhanced arm; references: of the naive arm; oracle (optional)."

    def _compute(
        self, predictions: Sequence[float], references: Sequence[float], oracle: Sequence[float] | None = None
    ) -> dict[str, float]:
        enhanced, naive = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        result = {"knowledge_gain": float((enhanced - naive).mean())}
        if oracle is not None:
            if len(oracle) != len(naive):
                raise ValueError(f"oracle has {len(oracle)} entries, references {len(naive)}; give one per seed")
            headroom = float((np.asarray(oracle, dtype=np.float64) - naive).mean())
            if headroom > 0:
                result["relative_knowledge_gain"] = result["knowledge_gain"] / headroom
        return result


def _skill(error: float, reference: float) -> float:
    if reference == 0:
        return 0.0 if error == 0 else -math.inf
    return 1 - error / reference
