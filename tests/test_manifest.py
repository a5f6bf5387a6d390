import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import make_resnet
from safetensors.torch import save_file
from torch import nn

from know_hf import ForgettingSchedule, WeightTrajectory
from know_hf.trajectory import TrajectoryError
from know_hf.trajectory.manifest import MAX_BYTES, FileRecord, Manifest, StateRecord, recordable
from know_hf.trajectory.schema import SchemaError, build

SHA256 = "0" * 64


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Three states of a tiny ResNet, the second of which holds only what moved."""
    trajectory = WeightTrajectory.create(tmp_path_factory.mktemp("manifest") / "states", ForgettingSchedule())
    model = make_resnet()
    for state in range(3):
        trajectory.record(model, num_examples=8 >> state, steps=1, seed=state, metrics={"eval_loss": 0.5})
        with torch.no_grad():
            model.classifier[1].weight += 1
    return trajectory.path


@pytest.fixture
def folder(template, tmp_path):
    return shutil.copytree(template, tmp_path / "states")


def edit(folder, change):
    path = folder / "trajectory.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(content, place, value):
    """Sets what stands at a place like `("states", 0, "steps")`."""
    for step in place[:-1]:
        content = content[step]
    content[place[-1]] = value


def test_what_was_written_is_read_and_written_again_byte_for_byte(folder):
    before = (folder / "trajectory.json").read_bytes()
    manifest = Manifest.read(folder)
    assert manifest.states[2].unchanged["resnet.embedder.embedder.convolution.weight"] == 0
    assert manifest.schedule == ForgettingSchedule()
    manifest.write(folder)
    assert (folder / "trajectory.json").read_bytes() == before
    assert Manifest.read(folder) == manifest


STEPS = ("states", 1, "steps")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (STEPS, "3", r"states\[1\]\.steps is '3', expected a whole number"),
        (STEPS, 2.0, r"states\[1\]\.steps is 2\.0, expected a whole number"),
        (STEPS, True, r"states\[1\]\.steps is True, expected a whole number"),
        (STEPS, -1, r"states\[1\]\.steps is -1, expected a whole number of at least 0"),
        (STEPS, 2**63, r"states\[1\]\.steps is 9223372036854775808, expected a whole number of at least 0"),
        (STEPS, 10**400, r"states\[1\]\.steps is 1000000.*\.\.\..*000, expected a whole number below 2\*\*64"),
        (STEPS, None, r"states\[1\]\.steps is None"),
        (("states", 1, "num_examples"), "4", r"num_examples is '4'"),
        (("states", 1, "num_examples"), -4, r"num_examples is -4"),
        (("states", 1, "fraction"), 1.5, r"fraction is 1\.5, expected a share from 0 to 1"),
        (("states", 1, "seed"), 0.5, r"states\[1\]\.seed is 0\.5"),
        (("states", 1, "metrics"), {"eval_loss": "low"}, r"states\[1\]\.metrics\['eval_loss'\] is 'low'.* finite"),
        (("states", 1, "metrics"), {"eval_loss": True}, r"metrics\['eval_loss'\] is True, expected a finite number"),
        (("states", 1, "metrics"), {"eval_loss": 10**400}, r"expected a finite number"),
        (("states", 1, "metrics"), {"a\x1b[2J": 1}, r"metrics has the name 'a\\x1b\[2J', expected text"),
        (("states", 1, "unchanged"), {"a": 1}, r"state 1 takes 'a' from state 1, none before it"),
        (("states", 1, "unchanged"), {"a": "0"}, r"unchanged\['a'\] is '0'"),
        (("states", 1, "unchanged"), [], r"unchanged is \[\], expected an object"),
        (("states", 1, "index"), 7, r"state at position 1 has index 7"),
        (("states", 1, "files"), {}, r"states\[1\]\.files is \{\}, expected a list"),
        (("states", 1, "files", 0, "size"), -1, r"states\[1\]\.files\[0\]\.size is -1"),
        (("states", 1, "files", 0, "sha256"), "A" * 64, r"sha256 is 'AAAA.* expected 64 hexadecimal digits in lower"),
        (("states", 1, "files", 0, "sha256"), "a" * 65, r"expected 64 hexadecimal digits"),
        (("states",), {}, r"states is \{\}, expected a list"),
        (("states",), [[]], r"states\[0\] is \[\], expected an object"),
        (("states",), [{}], r"states\[0\] has no 'index'"),
        (("roles", "x"), {"role": "fc"}, r"roles\['x'\] has no 'reason'"),
        (("roles", "x"), {"role": ["fc"], "reason": ""}, r"roles\['x'\]\.role is \['fc'\], expected text"),
        (("roles", "x"), {"role": "matrix", "reason": ""}, r"roles\['x'\]: unknown role 'matrix'"),
        (("tied_weights",), {"a": 1}, r"tied_weights\['a'\] is 1, expected text"),
        (("base_model",), 3, r"base_model is 3, expected text"),
        (("base_model",), "me/x\nlicense: mine", r"base_model is 'me/x\\nlicense: mine', expected text"),
        (("base_model",), "\ud800", r"base_model is '\\ud800', expected text"),
        (("base_model",), "x" * 5000, r"base_model is 'xxxxx.*\.\.\..*x', expected text of at most 4096"),
        (("base_revision",), [], r"base_revision is \[\]"),
        (("library_versions", "torch"), 2.1, r"library_versions\['torch'\] is 2\.1"),
        (("schedule",), "half", r"schedule is 'half', expected an object"),
        (("schedule", "ratio"), "0.5", r"schedule\.ratio is '0\.5', expected a finite number"),
        (("schedule", "ratio"), 1.5, r"schedule: ratio must lie strictly between 0 and 1, got 1\.5"),
        (("schedule", "stratify_by"), ["a"], r"schedule\.stratify_by is \['a'\], expected text"),
        (("schedule", "num_states"), 10**9, r"schedule is .* expected at most 1000 states"),
        (("format_version",), 1.0, r"format version 1\.0; expected one like '1\.0'"),
        (("format_version",), "²", r"format version '²'; expected one like"),
        (("format_version",), "0.9", r"format version '0\.9'; expected one like"),
        (("format_version",), "10.0", r"format version 10\.0, this know_hf reads up to 1\.0; install a newer"),
    ],
)
def test_a_value_that_may_not_stand_there(folder, place, value, message):
    edit(folder, lambda content: put(content, place, value))
    with pytest.raises(TrajectoryError, match=message) as caught:
        WeightTrajectory(folder)
    assert str(folder / "trajectory.json") in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(folder))


@pytest.mark.parametrize(
    "path",
    [
        "../secret.json", "state-1/../../secret.json", "state-1/..", "/etc/passwd.json", "//host/share.json",
        "C:/secret.json", "c:secret.json", "state-1\\..\\..\\secret.json", "..\\secret.json",
    ],
)  # fmt: skip
def test_no_path_leads_outside(folder, path):
    for place in (("states", 1, "files", 0), ("files", 0)):
        edit(folder, lambda content, place=place: put(content, place, {"path": path, "size": 0, "sha256": SHA256}))
        with pytest.raises(TrajectoryError, match=r"path is .* expected a (relative )?path"):
            WeightTrajectory(folder)


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "state-1/", "state-1//x.json", "./x.json", "state-1/./x.json", "~/.x.json", ".hidden.json", "x.json ",
        "x.json.", "nul.json", "COM1.json", "con", "x:stream.json", "x*.json", "x" * 251 + ".json", "x\x00.json",
        "x\n.json", "\ud800.json", "x/" * 3000 + "x.json",
    ],
)  # fmt: skip
def test_no_path_means_something_else_on_another_system(folder, path):
    edit(folder, lambda content: put(content, ("files", 0, "path"), path))
    with pytest.raises(TrajectoryError, match=r"files\[0\]\.path is .* expected"):
        WeightTrajectory(folder)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "vocab.pkl", "x.pickle", "x.npy", "x.npz",
        "x.joblib", "x.h5", "x.msgpack", "modeling_x.py", "x.pyc", "x.so", "x.dll", "x.exe", "x.sh", "x.zip",
        "x.json.py", "Makefile", "x.JSON", "json",
    ],
)  # fmt: skip
def test_no_file_can_run(folder, name):
    for place, path in ((("files", 0, "path"), name), (("states", 1, "files", 0, "path"), f"state-1/{name}")):
        edit(folder, lambda content, place=place, path=path: put(content, place, path))
        with pytest.raises(
            TrajectoryError, match="expected weights as safetensors, JSON or text: pickles and code are"
        ):
            WeightTrajectory(folder)


@pytest.mark.parametrize(
    ("place", "path"),
    [
        (("files", 0), "state-1/config.json"),
        (("files", 0), "State-9/config.json"),
        (("files", 0), "model.safetensors"),
        (("files", 0), "model.safetensors.index.json"),
        (("files", 0), "trajectory.json"),
        (("states", 1, "files", 0), "state-0/config.json"),
        (("states", 1, "files", 0), "state-11/config.json"),
        (("states", 1, "files", 0), "config.json"),
        (("states", 1, "files", 1), "state-1/CONFIG.json"),
    ],
)
def test_every_file_stands_in_its_place_once(folder, place, path):
    edit(folder, lambda content: put(content, (*place, "path"), path))
    with pytest.raises(
        TrajectoryError, match=f"names '{path}' among the files of .* stands once, weights in the folder"
    ):
        WeightTrajectory(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is not JSON"),
        (b"\xff\xfe{}", "it is not JSON"),
        (b"\xef\xbb\xbf{}", "it is not JSON"),
        (b"[" * 200_000, "it is nested too deeply"),
        (b'{"a":' * 200_000, "it is nested too deeply"),
        (b'{"format_version": ' + b"[" * 900 + b"]" * 900 + b"}", r"format version \[\[\[\.\.\.\]\]\]; expected one"),
        (
            b'{"format_version": "1.0", "states": ' + b"[" * 900 + b"]" * 900 + b"}",
            r"states\[0\] is \[\[\[\.\.\.\]\]\], expected an object",
        ),
        (b'{"format_version": "1.0", "states": [], "schedule": null, "states": []}', "key 'states'"),
        (b'{"format_version": "1.0", "states": [], "x": {"a": 1, "b": 2, "a": 3}}', "key 'a'"),
        (b'{"format_version": "1.0", "states": [], "x": NaN}', "NaN"),
        (b'{"format_version": "1.0", "states": [], "x": -Infinity}', "-Infinity"),
        (b'{"format_version": "1.0", "states": [], "x": ' + b"9" * 5000 + b"}", "it is not JSON"),
        (b"[]", "has the format version None"),
        (b'"1.0"', "has the format version None"),
        (b'{"format_version": "1.0"}', "it has no 'states'"),
    ],
)
def test_bytes_that_are_no_manifest(tmp_path, text, message):
    (tmp_path / "trajectory.json").write_bytes(text)
    with pytest.raises(TrajectoryError, match=message) as caught:
        WeightTrajectory(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "trajectory.json"))
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_an_overflowing_number_is_infinite(folder):
    path = folder / "trajectory.json"
    path.write_text(path.read_text().replace('"eval_loss": 0.5', '"eval_loss": 1e999', 1))
    with pytest.raises(TrajectoryError, match=r"metrics\['eval_loss'\] is inf, expected a finite number"):
        WeightTrajectory(folder)


def test_a_manifest_may_not_be_huge(tmp_path):
    path = tmp_path / "trajectory.json"
    with path.open("wb") as handle:
        handle.truncate(10**12)  # a file of holes takes no room
    with pytest.raises(TrajectoryError, match="more than 64 MB"):
        WeightTrajectory(tmp_path)
    path.write_bytes(b'{"format_version": "1.0", "states": []}'.ljust(MAX_BYTES))
    assert Manifest.read(tmp_path) == Manifest(states=())


def test_too_many_states(tmp_path):
    states = [{"index": k, "num_examples": 2000 - k, "steps": 1, "files": []} for k in range(1001)]
    (tmp_path / "trajectory.json").write_text(json.dumps({"format_version": "1.0", "states": states}))
    with pytest.raises(TrajectoryError, match="expected at most 1000 states"):
        WeightTrajectory(tmp_path)


def test_fields_of_a_newer_minor_version_are_passed_over(folder):
    expected = Manifest.read(folder)

    def add(content):
        content["format_version"] = "1.7"
        for part in (content, content["schedule"], content["states"][0], content["states"][0]["files"][0]):
            part["curriculum"] = [{"deep": [1, None, "\ud800"]}]
        next(iter(content["roles"].values()))["curriculum"] = "../x"

    edit(folder, add)
    manifest = Manifest.read(folder)
    assert manifest.format_version == "1.7"
    assert manifest.states == expected.states
    assert manifest.schedule == expected.schedule
    assert manifest.roles == expected.roles


def test_fields_that_an_older_minor_version_lacks_have_their_defaults(tmp_path):
    (tmp_path / "trajectory.json").write_text('{"format_version": "1.0", "states": [], "schedule": {"ratio": 0.33}}')
    assert Manifest.read(tmp_path) == Manifest(states=(), schedule=ForgettingSchedule(ratio=0.33))


def test_links_that_lead_outside_are_refused(folder, tmp_path):
    for name, message in (
        ("state-1/config.json", "of state 1 is a link that leads outside"),
        ("trajectory.json", "is not a file of this folder"),
    ):
        path = folder / name
        moved = path.rename(tmp_path / f"outside-{path.name}")
        path.symlink_to(moved)
        with pytest.raises(TrajectoryError, match=message):
            WeightTrajectory(folder)
        path.unlink()
        moved.rename(path)
    (folder / "state-1").rename(tmp_path / "outside")
    (folder / "state-1").symlink_to("../outside")
    with pytest.raises(TrajectoryError, match="leads outside"):
        WeightTrajectory(folder)


def test_links_within_the_folder_and_in_circles(folder):
    path = folder / "state-1/config.json"
    path.unlink()
    path.symlink_to("../state-0/config.json")
    WeightTrajectory(folder).verify()
    path.unlink()
    path.symlink_to("config.json")
    with pytest.raises(TrajectoryError, match=r"config\.json of state 1 is missing"):
        WeightTrajectory(folder)


def test_a_snapshot_of_the_hub_cache_links_to_its_store(folder, tmp_path):
    blobs = tmp_path / "models--me--states/blobs"
    snapshot = tmp_path / "models--me--states/snapshots/abc"
    blobs.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = blobs / str(len(list(blobs.iterdir())))
            path.rename(blob)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    WeightTrajectory(snapshot).verify()
    secret = tmp_path / "models--me--states/secret.json"
    secret.write_bytes((snapshot / "state-1/config.json").read_bytes())
    (snapshot / "state-1/config.json").unlink()
    (snapshot / "state-1/config.json").symlink_to("../../../secret.json")
    with pytest.raises(TrajectoryError, match="leads outside"):
        WeightTrajectory(snapshot)


def test_a_manifest_that_is_no_file(tmp_path):
    (tmp_path / "trajectory.json").mkdir()
    with pytest.raises(TrajectoryError, match="is not a file of this folder"):
        WeightTrajectory(tmp_path)
    (tmp_path / "trajectory.json").rmdir()
    os.mkfifo(tmp_path / "trajectory.json")
    with pytest.raises(TrajectoryError, match="is not a file of this folder"):
        WeightTrajectory(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_verify_finds_what_loading_would_read_but_was_not_recorded(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "state-0/notes.md").write_text("harmless")
    WeightTrajectory(folder).verify()
    with (folder / "state-0/pytorch_model.bin").open("wb") as handle:
        pickle.dump(Bomb(), handle)
    with pytest.raises(TrajectoryError, match=r"pytorch_model\.bin was not recorded, but loading state 0 may read it"):
        WeightTrajectory(folder).verify()
    (folder / "state-0/pytorch_model.bin").unlink()
    save_file({"a": torch.zeros(1)}, folder / "state-1/model.safetensors")
    with pytest.raises(TrajectoryError, match=r"state-1/model\.safetensors was not recorded"):
        WeightTrajectory(folder).verify()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            '{"a": "../../model.safetensors"}',
            r"index\.json leads to '\.\./\.\./model\.safetensors', which is no recorded",
        ),
        ('{"a": "/model.safetensors"}', "which is no recorded file"),
        ('{"a": 1}', "leads to 1, which is no recorded file"),
        ("[]", "leads to None, which is no recorded file"),
        ("NaN", r"index\.json can't be read: it is not JSON"),
    ],
)
def test_an_index_leads_to_recorded_files_only(folder, weight_map, message):
    path = folder / "state-1/model.safetensors.index.json"
    assert "../state-0/model.safetensors" in path.read_text()
    path.write_text(f'{{"weight_map": {weight_map}}}')
    record = FileRecord.of(path, "state-1/model.safetensors.index.json")

    def enter(content):
        records = content["states"][1]["files"]
        records[[r["path"] for r in records].index(record.path)] = vars(record)

    edit(folder, enter)
    with pytest.raises(TrajectoryError, match=message):
        WeightTrajectory(folder).verify()


def test_nothing_is_written_that_could_not_be_read(folder):
    trajectory = WeightTrajectory(folder)
    before = (folder / "trajectory.json").read_bytes()
    for metrics in ({"eval_loss": float("nan")}, {"eval_loss": "low"}, {"eval_loss": None}, {"a\n": 1.0}):
        with pytest.raises(TrajectoryError, match="can't be written, as it could not be read again: states"):
            trajectory.update_metrics(0, metrics)
    with pytest.raises(TrajectoryError, match=r"states\[3\]\.steps is '1', expected a whole number"):
        trajectory.record(make_resnet(), num_examples=1, steps="1")
    assert (folder / "trajectory.json").read_bytes() == before
    with pytest.raises(TrajectoryError, match="among the files of the model's files"):
        Manifest(states=(), files=(FileRecord("state-0/x.json", 0, SHA256),)).write(folder)


class CodeAndPickles:
    """A processor that saves what trajectories don't have, as those with code of their own do."""

    def save_pretrained(self, folder):
        for name in ("processing_mine.py", "voices.npy", "vocab.txt", "additional_chat_templates/tool_use.jinja"):
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")


def test_code_and_pickles_are_not_recorded(tmp_path):
    trajectory = WeightTrajectory.create(tmp_path / "states")
    trajectory.record(nn.Linear(2, 2), num_examples=2, steps=1, processing_class=CodeAndPickles())
    again = WeightTrajectory(trajectory.path)
    again.verify()
    names = [path.relative_to(again.path).as_posix() for path in again.model_files]
    assert names == ["additional_chat_templates/tool_use.jinja", "vocab.txt"]
    assert not (again.path / "processing_mine.py").exists()


def test_recordable_warns_of_what_it_leaves_out(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("know_hf.trajectory.manifest.logger.warning_once", said.append)
    for name in ("config.json", "modeling_mine.py"):
        (tmp_path / name).write_text("x")
    assert recordable(tmp_path) == ["config.json"]
    assert len(said) == 1
    assert said[0].startswith("modeling_mine.py is neither safetensors nor JSON nor text and is left out")


def test_the_vocabularies_of_transformers_can_be_recorded(tmp_path):
    names = {
        "tokenizer.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "merges.txt", "bpe.codes",
        "source.spm", "prophetnet.tokenizer", "qwen.tiktoken", "tokenizer.model.v3", "chat_template.jinja",
    }  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    assert recordable(tmp_path) == sorted(names)


def test_a_state_record_made_by_hand_is_of_the_same_schema():
    content = {"index": 0, "num_examples": None, "steps": 0, "files": []}
    assert build(StateRecord, content) == StateRecord(0, None, 0, ())
    with pytest.raises(SchemaError, match=r"^it is \[\], expected an object$"):
        build(StateRecord, [])
