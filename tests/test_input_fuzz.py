"""Damaged or hostile files of users give one error that names the file, or are read: KNOWN, sample cache, YAML."""

import copy
import json
import random
from collections import Counter
from functools import partial

import torch
import yaml
from doubles.toy_trajectories import record_walk

from know_hf import KNOWNConfig, KNOWNModel, RecordArguments
from know_hf.evaluation.suites.suite import SUITES_DIR, load_suite
from know_hf.meta_learning import TransitionDataset

VALUES = [
    None, True, False, 0, -1, 1, 5, 64, 2**31, 2**64, 10**400, -0.0, 0.5, 1e308, float("inf"), float("nan"), "", "5",
    "evil", "é\u202e", "x" * 10_000, [], {}, [1], [[]], {"a": 1}, {"fc": None}, {"roles": 1},
]  # fmt: skip
DAMAGES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{}",
    b'{"a": 1, "a": 1}',
    b"[" * 100_000,
    b"9" * 5000,
]


def changed(content, rng):
    """A copy with a random change at a random place."""
    content = copy.deepcopy(content)
    node = content
    for _ in range(rng.randrange(4)):
        inner = list(node.values()) if isinstance(node, dict) else node
        inner = [child for child in inner if isinstance(child, dict | list) and child]
        if not inner:
            break
        node = rng.choice(inner)
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return content


def inputs(content, count, seed=0):
    """Bytes of damaged files: fixed ones, cut ones and ones with a random change."""
    rng = random.Random(seed)
    text = json.dumps(content).encode()
    yield from DAMAGES
    for _ in range(count // 5):
        yield text[: rng.randrange(len(text))]
    for _ in range(count):
        yield json.dumps(changed(content, rng)).encode()


def outcome(read, name, data):
    """Whether a reader refuses its file with an error that names it in one line."""
    try:
        read()
    except (ValueError, OSError) as error:
        message = str(error)
        assert name in message, (data[:300], message)
        assert "\n" not in message and len(message) < 2000, (data[:300], message)
        return "refused"
    return "read"


def test_config_of_known(tmp_path):
    KNOWNModel(KNOWNConfig(trained_on={"roles": {"fc": {"largest_weight": 1.0, "tensors": 3}}})).save_pretrained(
        tmp_path
    )
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    outcomes = Counter()
    for number, data in enumerate(inputs(content, 100)):
        path.write_bytes(data)
        read = KNOWNModel.from_pretrained if number % 4 == 0 else KNOWNConfig.from_pretrained
        outcomes[outcome(partial(read, tmp_path), str(tmp_path), data)] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_weights_of_known(tmp_path):
    KNOWNModel(KNOWNConfig()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights, rng = path.read_bytes(), random.Random(0)
    for _ in range(30):
        start = rng.randrange(2000)
        data = weights[:start] + rng.choice([b"", b"9", b'"', b"-", b"\xff"]) + weights[start + 1 :]
        data = data[: rng.choice([len(data), start])]
        path.write_bytes(data)
        outcome(lambda: KNOWNModel.from_pretrained(tmp_path), str(tmp_path), data)


def test_cached_samples(tmp_path):
    record_walk(tmp_path / "a", num_states=6)
    TransitionDataset([tmp_path / "a"], cache_dir=tmp_path / "cache", progress=False)
    (path,) = (tmp_path / "cache").glob("*.json")

    def read():
        dataset = TransitionDataset([tmp_path / "a"], cache_dir=tmp_path / "cache", progress=False)
        dataset.describe()
        assert torch.isfinite(dataset[0]["history"]).all()

    outcomes = Counter()
    for data in inputs(json.loads(path.read_text()), 150):
        path.write_bytes(data)
        outcomes[outcome(read, path.stem, data)] += 1
    assert min(outcomes.values()) > 5, outcomes
    path.unlink()
    read()
    numbers = path.with_suffix(".float32")
    for data in (b"", b"x", numbers.read_bytes() + b"x"):
        numbers.write_bytes(data)
        assert outcome(read, numbers.name, data) == "refused"


RECORD = {
    "task": "causal-lm", "model": "some/model", "dataset": "some/dataset", "output_dir": "out", "epochs": 2, "seed": 1,
    "max_length": 64, "ratio": 0.5, "num_states": 5, "start": "train", "lora": {"r": 4, "target_modules": ["q", "v"]},
    "training": {"learning_rate": 1e-5, "warmup_steps": 10, "fp16": False},
}  # fmt: skip
YAML_DAMAGES = [
    b"", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf[]", b"a: 1\na: 2\n", b"{" * 5000, b"? [a, b]\n: 1", b"a: &a [*a]",
    b"a: !!python/object/apply:os.system [ls]", b"a: !!int x", b"a: !!timestamp x", b"a: 2020-13-45", b"2020-01-01: 1",
    b"a: !!binary eA==", b"a: !!set {b}", b"a: " + b"9" * 5000, b"\ta: 1", b"a: \x00",
    b'a: "\\ud800"', b'"\\ud800": 1',
    "".join(f"a{n}: &a{n} [x{9 * f', *a{n - 1}'}]\n" if n else "a0: &a0 [x]\n" for n in range(12)).encode(),
]  # fmt: skip


def yaml_inputs(content, count):
    yield from YAML_DAMAGES
    rng = random.Random(0)
    for _ in range(count):
        yield yaml.safe_dump(changed(content, rng), allow_unicode=True).encode()


def test_yaml_of_record(tmp_path):
    path = tmp_path / "record.yaml"
    outcomes = Counter()
    for data in yaml_inputs(RECORD, 120):
        path.write_bytes(data)
        outcomes[outcome(lambda: RecordArguments.from_yaml(path), "record.yaml", data)] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_yaml_of_suites(tmp_path):
    path = tmp_path / "suite.yaml"
    content = yaml.safe_load((SUITES_DIR / "digits.yaml").read_text())
    outcomes = Counter()
    for data in yaml_inputs(content, 60):
        path.write_bytes(data)
        outcomes[outcome(lambda: load_suite(path), "suite.yaml", data)] += 1
    assert min(outcomes.values()) > 10, outcomes
