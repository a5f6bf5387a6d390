"""Collections of trajectories: indexes, splits and unfinished trajectories."""

import json

import h5py
import pytest
from doubles.toy_trajectories import record_lines

from know_hf import ForgettingSchedule
from know_hf.meta_learning import collection, read_collection, split_collection


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("cnn-0", "cnn-1", "vit-0")):
        record_lines(tmp_path / name, num_states=3, seed=number)
    return tmp_path


def write_index(folder, rows):
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_index(folder):
    rows = [
        {"path": "vit-0", "split": "held_out_architecture", "ratio": 0.7, "num_states": 3},
        {"path": "cnn-0", "split": "train"},
        {"name": "cnn-1", "split": "held_out_trajectory"},
    ]
    write_index(folder, rows)
    trajectories = read_collection(folder, num_states=2)
    assert [trajectory.name for trajectory in trajectories] == ["cnn-0", "cnn-1", "vit-0"]
    assert [trajectory.of_schedule("ratio") for trajectory in trajectories] == [None, None, 0.7]
    assert trajectories[2].path == folder / "vit-0"
    splits = split_collection(trajectories)
    assert list(splits) == ["train", "held_out_architecture", "held_out_trajectory"]
    assert [[t.name for t in part] for part in splits.values()] == [["cnn-0"], ["vit-0"], ["cnn-1"]]


def test_folders_with_and_without_a_recipe(folder):
    recipe = {"split": "train", "architecture": "cnn", "schedule": {"ratio": 0.5, "num_states": 3}}
    (folder / "cnn-0" / "recipe.json").write_text(json.dumps(recipe))
    trajectories = read_collection([folder / "vit-0", folder], num_states=2)
    assert [trajectory.name for trajectory in trajectories] == ["vit-0", "cnn-0", "cnn-1"]
    assert [trajectory.split for trajectory in trajectories] == [None, "train", None]
    assert trajectories[1].about["architecture"] == "cnn" and trajectories[1].of_schedule("ratio") == 0.5
    with pytest.raises(ValueError, match=r"vit-0 .*index\.jsonl or recipe\.json"):
        split_collection(trajectories)
    (folder / "cnn-1" / "recipe.json").write_text(json.dumps({"split": "held_out_trajectory"}))
    splits = split_collection(read_collection([folder / "cnn-0", folder / "cnn-1"], num_states=2))
    assert {name: [t.name for t in part] for name, part in splits.items()} == {
        "train": ["cnn-0"],
        "held_out_trajectory": ["cnn-1"],
    }


def test_index_entry_wins_over_the_trajectory_itself(folder):
    row = {"path": "vit-0", "split": "held_out_architecture", "ratio": 0.7}
    write_index(folder, [row])
    for given in ([folder / "vit-0", folder], [folder, folder / "vit-0"]):
        (trajectories,) = read_collection(given, num_states=2)
        assert (trajectories.split, trajectories.about) == ("held_out_architecture", row)


def test_published_files_beside_folders(folder):
    with h5py.File(folder / "net.h5", "w") as file:
        file["Bias"] = [[0.0, 1.0, 2.0]]
    assert [trajectory.name for trajectory in read_collection(folder, num_states=2)][-1] == "vit-0"
    assert {trajectory.path for trajectory in read_collection(folder, num_states=2)} >= {folder / "net.h5"}
    assert [trajectory.path for trajectory in read_collection(folder / "net.h5", num_states=2)] == [folder / "net.h5"]


def test_unfinished_trajectories_are_skipped(folder, monkeypatch):
    (folder / "vit-1").mkdir()
    (folder / "vit-1" / "recipe.json").write_text("{}")
    (folder / "cnn-1" / "recipe.json").write_text(json.dumps({"schedule": {"num_states": 7}}))
    record_lines(folder / "cut", num_states=3, schedule=ForgettingSchedule(num_states=5))
    record_lines(folder / "complete", num_states=3, schedule=ForgettingSchedule(num_states=3))
    warnings = []
    monkeypatch.setattr(collection.logger, "warning", warnings.append)
    assert [t.name for t in read_collection(folder, num_states=2)] == ["cnn-0", "complete", "vit-0"]
    assert "cnn-1 (3 of 7 states), cut (3 of 5 states), vit-1 (no finished state)" in warnings[0]
    with pytest.raises(ValueError, match="4 states"):
        read_collection(folder, num_states=3)
    assert len(warnings) == 2


def test_held_out_by_name(folder):
    trajectories = read_collection(folder, num_states=2)
    splits = split_collection(trajectories, ["vit-*", "cnn-1"])
    assert [[t.name for t in part] for part in splits.values()] == [["cnn-0"], ["cnn-1", "vit-0"]]
    assert list(splits) == ["train", "held_out"]
    with pytest.raises(ValueError, match=r"resnet-\*.*cnn-0"):
        split_collection(trajectories, ["vit-*", "resnet-*"])
    with pytest.raises(ValueError, match=r"3 of 3"):
        split_collection(trajectories, ["*"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "line 1 of .*index.jsonl"),
        ('{"split": "train"}', "line 1 of .*index.jsonl"),
        ("[1]", "line 1 of .*index.jsonl"),
        ('{"path": "../other"}', "line 1 of .*index.jsonl .*'../other'"),
        ('{"path": "/etc"}', "'/etc'"),
        ('{"path": "x", "split": ["train"]}', "line 1 of .*index.jsonl has split="),
        ('{"path": "x", "num_states": "7"}', "line 1 of .*index.jsonl has num_states='7'"),
        ("[" * 100_000, "line 1 of .*index.jsonl"),
        ('{"path": "x", "ratio": NaN}', "line 1 of .*index.jsonl"),
    ],
)
def test_damaged_index(folder, line, message):
    (folder / "index.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_collection(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_collection(tmp_path / "missing")
