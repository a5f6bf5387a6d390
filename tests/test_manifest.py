"""`trajectory.json`: valid and invalid content, and the value and location that an error names."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from conftest import edit_manifest, make_resnet
from torch import nn

from know_hf import ForgettingSchedule, WeightTrajectory
from know_hf.roles import TensorRole
from know_hf.trajectory import TrajectoryError
from know_hf.trajectory.manifest import MAX_BYTES, FileRecord, Manifest

SHA256 = "0" * 64


@pytest.fixture
def folder(stored_once, tmp_path):
    return shutil.copytree(stored_once, tmp_path / "states")


def put(folder, location, value):
    """Sets the value at a location such as `("states", 0, "steps")`."""

    def change(content):
        for step in location[:-1]:
            content = content[step]
        content[location[-1]] = value

    edit_manifest(folder, change)


def refused(folder, message, start=None):
    """Opening fails with a short error that names the file; returns its text."""
    with pytest.raises(TrajectoryError, match=message) as caught:
        WeightTrajectory(folder)
    text = str(caught.value)
    assert text.startswith(str(start or folder / "trajectory.json"))
    assert len(text) < 600 + len(str(folder))
    return text


def test_a_manifest_is_written_again_byte_for_byte(folder):
    before = (folder / "trajectory.json").read_bytes()
    manifest = Manifest.read(folder)
    assert manifest.states[2].unchanged["resnet.embedder.embedder.convolution.weight"] == 0
    assert manifest.schedule == ForgettingSchedule()
    assert manifest.roles["resnet.embedder.embedder.normalization.weight"].is_batch_norm
    manifest.write(folder)
    assert (folder / "trajectory.json").read_bytes() == before
    assert Manifest.read(folder) == manifest


STEPS = ("states", 1, "steps")


@pytest.mark.parametrize(
    ("location", "value", "message"),
    [
        (STEPS, "3", r"states\[1\]\.steps is '3' .*integer"),
        (STEPS, True, r"states\[1\]\.steps is True .*integer"),
        (STEPS, -1, r"states\[1\]\.steps is -1 .*greater than or equal to 0"),
        (STEPS, 2**63, r"states\[1\]\.steps is 9223372036854775808 .*less than"),
        (STEPS, 10**400, r"states\[1\]\.steps is 1000000.*\.\.\..*000 .*less than"),
        (("states", 1, "num_examples"), "4", r"num_examples is '4'"),
        (("states", 1, "fraction"), 1.5, r"fraction is 1\.5 .*less than or equal to 1"),
        (("states", 1, "seed"), 2**64, r"states\[1\]\.seed is 18446744073709551616"),
        (("states", 1, "metrics"), {"eval_loss": "low"}, r"states\[1\]\.metrics\.eval_loss is 'low' .*finite"),
        (("states", 1, "metrics"), {"eval_loss": True}, r"metrics\.eval_loss is True .*finite"),
        (("states", 1, "metrics"), {"eval_loss": 10**400}, r"finite number"),
        (("states", 1, "metrics"), {"a\x1b[2J": 1}, r"metrics\['a\\x1b\[2J'\] .*control characters"),
        (("states", 1, "metrics"), {"\ud800": 1}, r"metrics.* .*control characters"),
        (("states", 1, "metrics"), {"a" * 5000: 1}, r"metrics\['aaa.*\.\.\..*a'\] .*at most 4096"),
        (("states", 1, "unchanged"), {"a": 1}, r"state 1 takes 'a' from state 1"),
        (("states", 1, "unchanged"), {"a": "0"}, r"unchanged\.a is '0'"),
        (("states", 1, "index"), 7, r"position 1 has index 7"),
        (("states", 1, "files", 0, "size"), -1, r"states\[1\]\.files\[0\]\.size is -1"),
        (("states", 1, "files", 0, "sha256"), "A" * 64, r"sha256 is 'AAAA.* 64 hexadecimal digits in lower"),
        (("states",), {}, r"states is \{\}"),
        (("states",), [{}], r"states\[0\]\.index is missing"),
        (("roles", "x"), {"role": "fc"}, r"roles\.x\.reason is missing"),
        (("roles", "x"), {"role": "matrix", "reason": ""}, r"roles\.x .*unknown role 'matrix'"),
        (("roles", "x"), {"role": "fc", "reason": "", "is_batch_norm": 1}, r"roles\.x\.is_batch_norm is 1 .*boolean"),
        (("tied_weights",), {"a": 1}, r"tied_weights\.a is 1 .*string"),
        (("tied_weights",), dict.fromkeys(map(str, range(250_001)), 0), r"tied_weights .*at most 250000 entries"),
        (("base_model",), "me/x\nlicense: mine", r"base_model is 'me/x\\nlicense: mine' .*control characters"),
        (("base_model",), "\ud800", r"base_model is '\\ud800' .*control characters"),
        (("base_model",), "x" * 5000, r"base_model is 'xxxxx.*\.\.\..*x' .*at most 4096"),
        (("schedule",), "half", r"schedule is 'half'"),
        (("schedule", "ratio"), "0.5", r"schedule\.ratio is '0\.5' .*finite number"),
        (("schedule", "ratio"), 1.5, r"schedule .*ratio must .*1\.5"),
        (("schedule", "num_states"), 10**9, r"schedule\.num_states is 1000000000 .*1000"),
        (("format_version",), 1.0, r"format version 1\.0, expected '1\.1'"),
        (("format_version",), "²", r"format version '²', expected"),
        (("format_version",), "0.9", r"format version '0\.9', expected"),
        (("format_version",), "10.0", r"format version '10\.0', expected '1\.1'; install a newer"),
        # a path that is listed twice or in the folder of another owner
        (("files", 0, "path"), "state-1/config.json", "lists 'state-1/config.json'"),
        (("files", 0, "path"), "State-9/config.json", "lists 'State-9/config.json'"),
        (("files", 0, "path"), "model.safetensors", "lists 'model.safetensors'"),
        (("files", 0, "path"), "model.safetensors.index.json", "lists 'model.safetensors.index.json'"),
        (("files", 0, "path"), "trajectory.json", "lists 'trajectory.json'"),
        (("states", 1, "files", 0, "path"), "state-0/config.json", "lists 'state-0/config.json'"),
        (("states", 1, "files", 0, "path"), "state-11/config.json", "lists 'state-11/config.json'"),
        (("states", 1, "files", 0, "path"), "config.json", "lists 'config.json'"),
        (("states", 1, "files", 1, "path"), "state-1/CONFIG.json", "lists 'state-1/CONFIG.json'"),
    ],
)
def test_invalid_values(folder, location, value, message):
    put(folder, location, value)
    refused(folder, message)


OUTSIDE = [
    "../secret.json", "state-1/../../secret.json", "state-1/..", "/etc/passwd.json", "//host/share.json",
    "C:/secret.json", "c:secret.json", "x:stream.json", "state-1\\..\\..\\secret.json", "..\\secret.json",
]  # fmt: skip
NOT_PLAIN = [
    "", ".", "state-1/", "state-1//x.json", "./x.json", "state-1/./x.json", "~/.x.json", ".hidden.json", "x.json ",
    "x.json.", "nul.json", "COM1.json", "con", "x*.json", "x" * 251 + ".json", "x\x00.json",
    "x\n.json", "\ud800.json", "x/" * 3000 + "x.json",
]  # fmt: skip
EXECUTABLE = [
    "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "vocab.pkl", "x.pickle", "x.npy", "x.npz", "x.joblib",
    "x.h5", "x.msgpack", "modeling_x.py", "x.pyc", "x.so", "x.dll", "x.exe", "x.sh", "x.zip", "x.json.py", "Makefile",
    "x.JSON", "json",
]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "message"),
    [(OUTSIDE, "path inside"), (NOT_PLAIN, "plain names|text|at most 4096"), (EXECUTABLE, "pickles and code")],
)
def test_paths_that_are_refused(folder, paths, message):
    valid = (folder / "trajectory.json").read_bytes()
    for path in paths:
        for location, prefix in ((("files", 0), ""), (("states", 1, "files", 0), "state-1/")):
            (folder / "trajectory.json").write_bytes(valid)
            put(folder, (*location, "path"), prefix + path if paths is EXECUTABLE else path)
            refused(folder, rf"files\[0\]\.path is .*({message})")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"format_version": ' + b"[" * 900 + b"]" * 900 + b"}", r"format version \[\[\[\.\.\.\]\]\], expected"),
        (
            b'{"format_version": "1.0", "states": ' + b"[" * 900 + b"]" * 900 + b"}",
            r"states\[0\] is \[\[\[\.\.\.\]\]\]",
        ),
        (b'{"format_version": "1.0", "states": [], "schedule": null, "states": []}', "'states'.* twice"),
        (b'{"format_version": "1.0", "states": [], "x": {"a": 1, "b": 2, "a": 3}}', "'a'.* twice"),
        (b'{"format_version": "1.0", "states": [], "x": NaN}', "NaN"),
        (b'{"format_version": "1.0", "states": [], "x": -Infinity}', "-Infinity"),
        (b'{"format_version": "1.0", "states": [], "x": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "format version None"),
        (b'"1.0"', "format version None"),
        (b'{"format_version": "1.0"}', "states is missing"),
        (b'{"format_version": "1.0", "states": [], "schedule": {"ratio": 1e999}}', r"schedule\.ratio is inf .*finite"),
    ],
)
def test_bytes_that_are_not_a_manifest(tmp_path, text, message):
    (tmp_path / "trajectory.json").write_bytes(text)
    refused(tmp_path, message)


def test_size_and_number_of_states_are_limited(tmp_path):
    path = tmp_path / "trajectory.json"
    with path.open("wb") as handle:
        handle.truncate(10**12)  # a sparse file
    refused(tmp_path, "more than 64 MB")
    path.write_bytes(b'{"format_version": "1.0", "states": []}'.ljust(MAX_BYTES))
    assert Manifest.read(tmp_path).states == ()
    states = [{"index": k, "num_examples": 2000 - k, "steps": 1, "files": []} for k in range(1001)]
    path.write_text(json.dumps({"format_version": "1.0", "states": states}))
    refused(tmp_path, "at most 1000")


def test_unknown_fields_of_a_newer_minor_version_are_ignored(folder):
    expected = Manifest.read(folder)

    def add(content):
        content["format_version"] = "1.7"
        role = next(iter(content["roles"].values()))
        for part in (content, content["schedule"], content["states"][0], content["states"][0]["files"][0], role):
            part["curriculum"] = [{"deep": [1, None, "\ud800", "../x"]}]

    edit_manifest(folder, add)
    assert Manifest.read(folder) == replace(expected, format_version="1.7")


def test_missing_fields_of_an_older_minor_version_have_defaults(tmp_path):
    content = '{"format_version": "1.0", "states": [], "schedule": {"ratio": 0.33}, "roles": {"a": %s}}'
    (tmp_path / "trajectory.json").write_text(content % '{"role": "norm", "reason": "weight of SyncBatchNorm"}')
    role = TensorRole("norm", "weight of SyncBatchNorm", is_batch_norm=True)
    assert Manifest.read(tmp_path) == Manifest(
        (), ForgettingSchedule(ratio=0.33), roles={"a": role}, format_version="1.0"
    )


def test_links_that_lead_outside_are_refused(folder, tmp_path):
    for name, message in (("state-1/config.json", "outside"), ("trajectory.json", "not a file")):
        path = folder / name
        moved = path.rename(tmp_path / f"outside-{path.name}")
        path.symlink_to(moved)
        refused(folder, message, path)
        path.unlink()
        moved.rename(path)
    (folder / "state-1").rename(tmp_path / "outside")
    (folder / "state-1").symlink_to("../outside")
    refused(folder, "outside", folder / "state-1")


def test_links_inside_the_folder_and_circular_links(folder):
    path = folder / "state-1/config.json"
    for target in ("../state-0/config.json", "config.json"):
        WeightTrajectory(folder).verify()
        path.unlink()
        path.symlink_to(target)
    refused(folder, "is missing", path)


def test_a_snapshot_of_the_hub_cache_links_to_its_blobs(folder, tmp_path):
    blobs = tmp_path / "models--me--states/blobs"
    snapshot = tmp_path / "models--me--states/snapshots/abc"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        path.rename(blobs / str(number))
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    WeightTrajectory(snapshot).verify()
    config = snapshot / "state-1/config.json"
    (tmp_path / "models--me--states/secret.json").write_bytes(config.read_bytes())
    config.unlink()
    config.symlink_to("../../../secret.json")
    refused(snapshot, "outside", config)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_manifest_that_is_not_a_file(tmp_path, make):
    make(tmp_path / "trajectory.json")
    refused(tmp_path, "not a file")


def test_verify_names_unrecorded_files_that_loading_may_read(folder):
    (folder / "state-0/notes.md").write_text("harmless")
    WeightTrajectory(folder).verify()
    for name in ("state-1/model.safetensors", "state-0/pytorch_model.bin"):
        (folder / name).write_bytes(b"x")
        with pytest.raises(TrajectoryError, match=f"{name} was not recorded"):
            WeightTrajectory(folder).verify()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ('{"a": "../../model.safetensors"}', r"unrecorded '\.\./\.\./model\.safetensors'"),
        ('{"a": "/model.safetensors"}', r"unrecorded '/model\.safetensors'"),
        ('{"a": 1}', "unrecorded 1"),
        ("[]", "unrecorded None"),
        ("NaN", "not JSON"),
    ],
)
def test_an_index_refers_to_recorded_files_only(folder, weight_map, message):
    path = folder / "state-1/model.safetensors.index.json"
    assert "../state-0/model.safetensors" in path.read_text()
    path.write_text(f'{{"weight_map": {weight_map}}}')
    record = FileRecord.of(path, "state-1/model.safetensors.index.json")

    def enter(content):
        records = content["states"][1]["files"]
        records[[r["path"] for r in records].index(record.path)] = vars(record)

    edit_manifest(folder, enter)
    with pytest.raises(TrajectoryError, match=rf"index\.json .*{message}"):
        WeightTrajectory(folder).verify()


def test_an_invalid_manifest_is_not_written(folder):
    trajectory = WeightTrajectory(folder)
    before = (folder / "trajectory.json").read_bytes()
    for metrics in ({"eval_loss": float("nan")}, {"eval_loss": "low"}, {"eval_loss": None}, {"a\n": 1.0}):
        with pytest.raises(TrajectoryError, match=r"states\[0\]\.metrics"):
            trajectory.update_metrics(0, metrics)
    with pytest.raises(TrajectoryError, match=r"states\[3\]\.steps is '1' .*integer"):
        trajectory.record(make_resnet(), num_examples=1, steps="1")
    assert (folder / "trajectory.json").read_bytes() == before
    with pytest.raises(TrajectoryError, match=r"state-0/x\.json"):
        Manifest(states=(), files=(FileRecord("state-0/x.json", 0, SHA256),)).write(folder)


RECORDED = {
    "tokenizer.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "merges.txt", "bpe.codes", "source.spm",
    "prophetnet.tokenizer", "qwen.tiktoken", "tokenizer.model.v3", "additional_chat_templates/tool_use.jinja",
}  # fmt: skip


class Processor:
    def save_pretrained(self, folder):
        for name in (*RECORDED, "processing_mine.py", "voices.npy"):
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")


def test_code_and_pickles_are_not_recorded(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("know_hf.trajectory.manifest.logger.warning_once", warned.append)
    trajectory = WeightTrajectory.create(tmp_path / "states")
    trajectory.record(nn.Linear(2, 2), num_examples=2, steps=1, processing_class=Processor())
    again = WeightTrajectory(trajectory.path)
    again.verify()
    assert [path.relative_to(again.path).as_posix() for path in again.model_files] == sorted(RECORDED)
    assert not (again.path / "processing_mine.py").exists()
    assert [message.split()[0] for message in warned] == ["processing_mine.py", "voices.npy"]
