"""Suites of scikit-learn's digits that train in seconds."""

import yaml

from know_hf.evaluation.suites import Suite
from know_hf.evaluation.suites.suite_task import SuiteTask

KNOWN_TRUTH = """
name: known-truth
description: The oracle is better than naive, and shuffled weights are worth nothing.
seeds: 4
inputs: {image_size: 8, mean: 0.3, std: 0.35}
source: {dataset: sklearn/digits, classes: [0, 2, 4, 6, 8], train: 40, validation: 50, test: 500}
target: {dataset: sklearn/digits, classes: [1, 3, 5, 7, 9], train: 25, validation: 100, test: 400}
model: {class_name: SmallCNN, config: {width: 8, num_layers: 2}}
schedule: {ratio: 0.25, num_states: 3}
training: {num_train_epochs: 8, per_device_train_batch_size: 2, learning_rate: 0.003, use_cpu: true}
trials_per_rate: 1
protocols:
  - {kind: zero_shot}
  - {kind: linear_probe, learning_rates: [0.03, 0.1, 0.3], steps: 60}
arms: [naive, random, oracle, shuffled]
"""


def write_suite(folder, text=KNOWN_TRUTH, **changes):
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(text), **changes}, sort_keys=False))
    return path


def make_task(**changes):
    content = {
        **yaml.safe_load(KNOWN_TRUTH),
        "inputs": {"image_size": 8},
        "source": digits(40, classes=[0, 2, 4], test=100),
        "target": digits(20, classes=[5, 3]),
        "model": {"class_name": "SmallCNN", "config": {"width": 4, "num_layers": 1}},
        "schedule": {"ratio": 0.5, "num_states": 2},
        "training": {"use_cpu": True},
    }
    paths = {name: changes.pop(name) for name in ("dataset_paths", "model_paths") if name in changes}
    return SuiteTask(Suite.from_dict({**content, **changes}, "a test"), **paths)


def digits(train, **options):
    return {"dataset": "sklearn/digits", "train": train, "validation": 30, **options}
