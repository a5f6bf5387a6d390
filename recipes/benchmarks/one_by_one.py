"""Protocols that train one model or probe at a time, without cached features: the baseline of `comparison.py`."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from know_hf.evaluation import Examples, FineTuning, LinearProbe, Split, fine_tune, with_new_head
from know_hf.evaluation.fine_tuning import head_parameters
from know_hf.evaluation.linear_probe import features
from know_hf.evaluation.protocols import MeasuringProtocol, Trial, choose, first_of_each_class, refined

Run = tuple[PreTrainedModel, Split, int]


def one_by_one(protocol: MeasuringProtocol) -> MeasuringProtocol:
    """Return the same protocol, one trial after the other."""
    for kind in (FineTuningOneByOne, LinearProbeOneByOne):
        if isinstance(protocol, kind.__bases__[0]):
            return kind(**{field.name: getattr(protocol, field.name) for field in fields(protocol)})
    return protocol


class FineTuningOneByOne(FineTuning):
    """Trains each head in the whole model."""

    def trials_of(self, runs: Sequence[Run], *options: Any, **_: Any) -> list[list[Trial]]:
        return [list(self._trials(*run, *options[:3])) for run in runs]

    def _trials(
        self, model: PreTrainedModel, split: Split, seed: int, evaluate: Any, measures: Any, refinement: int
    ) -> Iterator[Trial]:
        train = first_of_each_class(split.train, self.labels_per_class)
        assert split.num_labels is not None
        start, rates = with_new_head(model, split.num_labels, seed), self.head_learning_rate
        heads = []
        for rate in rates if isinstance(rates, Sequence) else (rates,):
            heads.append(copy.deepcopy(start))
            head = [parameter for _, parameter in head_parameters(heads[-1])]
            fine_tune(heads[-1], train, rate, self.head_steps, seed, self.batch_size, head)
        start = heads[0]
        if len(heads) > 1:
            start = heads[choose([{"validation": evaluate(head, split.validation)} for head in heads], measures)]
        for rate in refined(self.learning_rates, refinement):
            for head_rate in self.head_rates or (None,):
                tuned = copy.deepcopy(start)
                fine_tune(tuned, train, rate, self.steps, seed, self.batch_size, head_learning_rate=head_rate)
                yield Trial(rate, evaluate(tuned, split.validation), evaluate(tuned, split.test), {}, head_rate)


class LinearProbeOneByOne(LinearProbe):
    """Trains each probe with an optimizer of its own."""

    def trials_of(self, runs: Sequence[Run], *options: Any, **_: Any) -> list[list[Trial]]:
        return [list(self._trials(model, split, options[2])) for model, split, _ in runs]

    def _trials(self, model: PreTrainedModel, split: Split, refinement: int) -> Iterator[Trial]:
        train = first_of_each_class(split.train, self.labels_per_class)
        inputs, labels = features(model, train), train["labels"].to(model.device)
        unseen = [(features(model, part), part) for part in (split.validation, split.test)]
        for rate in refined(self.learning_rates, refinement):
            probe = nn.Linear(inputs.shape[1], split.num_labels or 1, device=inputs.device)
            nn.init.zeros_(probe.weight)
            nn.init.zeros_(probe.bias)
            optimizer = torch.optim.Adam(probe.parameters(), lr=rate)
            schedule = get_cosine_schedule_with_warmup(optimizer, 0, self.steps)
            for _ in range(self.steps):
                optimizer.zero_grad()
                cross_entropy(probe(inputs), labels).backward()
                optimizer.step()
                schedule.step()
            yield Trial(rate, *(_scores(probe, *part) for part in unseen))


@torch.no_grad()
def _scores(probe: nn.Linear, inputs: Tensor, examples: Examples) -> dict[str, float]:
    outputs, labels = probe(inputs), examples["labels"].to(inputs.device)
    accuracy = float((outputs.argmax(dim=1) == labels).float().mean())
    return {"accuracy": accuracy, "loss": float(cross_entropy(outputs, labels))}
