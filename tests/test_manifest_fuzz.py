"""Any bytes of `trajectory.json` give a valid trajectory or a `TrajectoryError`, and no file outside is opened."""

import copy
import io
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from know_hf import WeightTrajectory
from know_hf.checkpoint import file_sha256
from know_hf.trajectory import TrajectoryError
from know_hf.trajectory.manifest import Manifest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import configuration, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

configuration.set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "hypothesis"))  # not into the repository

HOSTILE_PATHS = [
    "../secret.json", "state-0/../../secret.json", "state-1/..", "..", ".", "", "/", "//", "./config.json",
    "C:\\secret.json", "c:secret.json", "..\\secret.json", "state-0\\model.safetensors", "state-0/model.safetensors",
    "state-1/model.safetensors", "state-0/pytorch_model.bin", "state-0/x.py", "config.json", "trajectory.json",
    "state-0/config.json\x00.bin", "\ud800.json", "a" * 300 + ".json", "a/" * 2500 + "a.json", "nul.json", ".lock",
]  # fmt: skip
HOSTILE_VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.0, -0.0, 0.5, 1e308, float("inf"),
    float("nan"), "", "0", "1.0", "1.9", "2.0", "fc", "é\u202e", "\x1b[2J", "\u2028", "x" * 10_000, [], {}, [[]], [{}],
    {"": {}}, {"role": "fc", "reason": ""},
]  # fmt: skip

keys = st.sampled_from(["states", "files", "path", "size", "index", "role", "unchanged", "ratio"]) | st.text(
    max_size=8
)
scalars = st.sampled_from(HOSTILE_VALUES + HOSTILE_PATHS) | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
)


@pytest.fixture(scope="module")
def folder(stored_once, tmp_path_factory):
    """A trajectory, with a secret file beside the folder."""
    home = tmp_path_factory.mktemp("fuzz")
    (home / "secret.json").write_text("{}")
    return shutil.copytree(stored_once, home / "states")


@pytest.fixture(scope="module")
def valid(stored_once):
    return json.loads((stored_once / "trajectory.json").read_text())


@pytest.fixture(scope="module")
def opened(folder):
    """Every path that Python opens during the tests of this module."""
    paths = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (io, os):
            original = module.open

            def watch(path, *args, _original=original, **kwargs):
                paths.append(path)
                return _original(path, *args, **kwargs)

            patch.setattr(module, "open", watch)
        yield paths


def open_bytes(folder, opened, data):
    """Opens a trajectory with these bytes; returns `"refused"`, `"read"` (but not verified) or `"verified"`."""
    path = folder / "trajectory.json"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    files = tree(folder.parent)
    opened.clear()
    outcome = "refused"
    try:
        manifest = Manifest.read(folder)
    except TrajectoryError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 1500 + len(str(path))
    else:
        outcome = "read"
        assert tree(folder.parent) == files
        assert all(math.isfinite(value) for state in manifest.states for value in state.metrics.values())
        manifest.write(folder)
        assert Manifest.read(folder) == manifest
        with suppress(TrajectoryError):
            WeightTrajectory(folder).verify()
            outcome = "verified"
    outside = [p for p in opened if isinstance(p, str | Path) and not Path(os.path.realpath(p)).is_relative_to(folder)]
    assert not outside
    assert {name for name in tree(folder.parent) if name != path} == {name for name in files if name != path}
    return outcome


def tree(home):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in home.rglob("*") if path.is_file()}


def check(max_examples):
    return settings(max_examples=max_examples, derandomize=True, deadline=None, database=None)


def test_opened_files_are_watched(folder, opened, valid):
    assert open_bytes(folder, opened, json.dumps(valid).encode()) == "verified"
    names = {Path(path).name for path in opened if isinstance(path, str | Path)}
    assert {"trajectory.json", "model.safetensors"} <= names


def test_random_bytes_and_random_json(folder, opened):
    outcomes = Counter()

    @check(150)
    @given(st.binary(max_size=200) | st.text(alphabet='[]{}",:\\u0123456789.eE-+ntrf al\n', max_size=60))
    def run(data):
        assert open_bytes(folder, opened, data if isinstance(data, bytes) else data.encode()) == "refused"

    @check(80)
    @given(values, st.dictionaries(keys, values, max_size=3))
    def run_json(value, more):
        for content in (value, {"format_version": "1.0", "states": value, **more}):
            outcomes[open_bytes(folder, opened, json.dumps(content).encode())] += 1

    run()
    run_json()
    assert outcomes["refused"] > 80


@st.composite
def mutations(draw):
    """A function that changes a manifest at one random location, drawn level by level."""
    turns = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=5))
    kind = draw(st.sampled_from(["replace", "replace", "delete", "twice"]))
    value = draw(values)

    def change(content):
        child = content
        for turn in turns:
            if not isinstance(child, dict | list) or not child:
                break
            node = child
            key = turn % len(node) if isinstance(node, list) else list(node)[turn % len(node)]
            child = node[key]
        if child is content:  # an earlier change emptied it
            return
        if kind == "delete":
            del node[key]
        elif kind == "twice" and isinstance(node, list):
            node.insert(key, copy.deepcopy(child))
        else:
            node[key] = value

    return change


def test_a_valid_manifest_with_random_changes(folder, opened, valid):
    outcomes = Counter()

    @check(250)
    @given(st.lists(mutations(), min_size=1, max_size=2))
    def run(changes):
        content = copy.deepcopy(valid)
        for change in changes:
            change(content)
        outcomes[open_bytes(folder, opened, json.dumps(content).encode())] += 1

    run()
    assert min(outcomes["refused"], outcomes["verified"]) > 20, outcomes


def test_a_valid_manifest_with_random_edits_of_its_text(folder, opened, valid):
    text = json.dumps(valid).encode()
    outcomes = Counter()

    @check(200)
    @given(
        st.integers(0, len(text)),
        st.integers(0, 6),
        st.sampled_from([b"", b"{", b"]", b'"', b"\\", b"\xff", b"1e999", b"NaN", b"-", b"\x00", b'"a":1,'])
        | st.binary(max_size=4),
    )
    def run(start, length, inserted):
        outcomes[open_bytes(folder, opened, text[:start] + inserted + text[start + length :])] += 1

    run()
    assert outcomes["refused"] > 100


def test_hostile_paths(folder, opened, valid):
    """With size and hash of the file that each leads to, as an attacker who knows it would write."""
    secret = folder.parent / "secret.json"
    for path in HOSTILE_PATHS:
        record = {"path": path, "size": secret.stat().st_size, "sha256": file_sha256(secret)}
        for part in (valid, valid["states"][0], valid["states"][1]):
            content = copy.deepcopy(valid)
            target = content if part is valid else content["states"][part["index"]]
            target["files"].append(record)
            assert open_bytes(folder, opened, json.dumps(content).encode()) != "verified"
