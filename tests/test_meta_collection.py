"""Collections of trajectories: indexes, splits, and what is not finished."""

import json

import pytest
from test_training import record

from know_hf import ForgettingSchedule
from know_hf.meta_learning import collection, read_collection, split_collection


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("cnn-0", "cnn-1", "vit-0")):
        record(tmp_path / name, num_states=3, seed=number)
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
    found = read_collection(folder, num_states=2)
    assert [trajectory.name for trajectory in found] == ["cnn-0", "cnn-1", "vit-0"]
    assert [trajectory.of_schedule("ratio") for trajectory in found] == [None, None, 0.7]
    assert found[2].path == folder / "vit-0"
    splits = split_collection(found)
    assert list(splits) == ["train", "held_out_architecture", "held_out_trajectory"]
    assert [[t.name for t in part] for part in splits.values()] == [["cnn-0"], ["vit-0"], ["cnn-1"]]


def test_folders_with_and_without_a_recipe(folder):
    recipe = {"split": "train", "architecture": "cnn", "schedule": {"ratio": 0.5, "num_states": 3}}
    (folder / "cnn-0" / "recipe.json").write_text(json.dumps(recipe))
    found = read_collection([folder / "vit-0", folder], num_states=2)
    assert [trajectory.name for trajectory in found] == ["vit-0", "cnn-0", "cnn-1"]
    assert [trajectory.split for trajectory in found] == [None, "train", None]
    assert found[1].about["architecture"] == "cnn" and found[1].of_schedule("ratio") == 0.5
    with pytest.raises(ValueError, match=r"vit-0 has no split: neither index\.jsonl nor recipe\.json"):
        split_collection(found)


def test_a_trajectory_given_by_itself_knows_its_split(folder):
    for name, split in (("cnn-0", "train"), ("cnn-1", "held_out_trajectory")):
        (folder / name / "recipe.json").write_text(json.dumps({"split": split, "schedule": {"ratio": 0.5}}))
    splits = split_collection(read_collection([folder / "cnn-0", folder / "cnn-1"], num_states=2))
    assert {name: [t.name for t in part] for name, part in splits.items()} == {
        "train": ["cnn-0"],
        "held_out_trajectory": ["cnn-1"],
    }


def test_what_the_index_says_is_not_lost_where_a_trajectory_is_given_too(folder):
    row = {"path": "vit-0", "split": "held_out_architecture", "ratio": 0.7}
    write_index(folder, [row])
    for given in ([folder / "vit-0", folder], [folder, folder / "vit-0"]):
        (found,) = read_collection(given, num_states=2)
        assert (found.split, found.about) == ("held_out_architecture", row)


def test_what_its_own_schedule_still_misses(folder, monkeypatch):
    record(folder / "cut", num_states=3, schedule=ForgettingSchedule(num_states=5))
    record(folder / "whole", num_states=3, schedule=ForgettingSchedule(num_states=3))
    warnings = []
    monkeypatch.setattr(collection.logger, "warning", warnings.append)
    names = [trajectory.name for trajectory in read_collection(folder, num_states=2)]
    assert names == ["cnn-0", "cnn-1", "vit-0", "whole"]
    assert "cut (3 of 5 states)" in warnings[0]


def test_published_files_stand_beside_folders(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "net.h5", "w") as file:
        file["Bias"] = [[0.0, 1.0, 2.0]]
    assert [trajectory.name for trajectory in read_collection(folder, num_states=2)][-1] == "vit-0"
    assert {trajectory.path for trajectory in read_collection(folder, num_states=2)} >= {folder / "net.h5"}
    assert [trajectory.path for trajectory in read_collection(folder / "net.h5", num_states=2)] == [folder / "net.h5"]


def test_unfinished_trajectories_are_left_out(folder, monkeypatch):
    (folder / "vit-1").mkdir()
    (folder / "vit-1" / "recipe.json").write_text("{}")
    (folder / "cnn-1" / "recipe.json").write_text(json.dumps({"schedule": {"num_states": 7}}))
    warnings = []
    monkeypatch.setattr(collection.logger, "warning", warnings.append)
    assert [trajectory.name for trajectory in read_collection(folder, num_states=2)] == ["cnn-0", "vit-0"]
    (warning,) = warnings
    assert "cnn-1 (3 of 7 states), vit-1 (no finished state)" in warning
    with pytest.raises(ValueError, match="no finished trajectory of at least 4 states"):
        read_collection(folder, num_states=3)
    assert len(warnings) == 2


def test_held_out_by_name(folder):
    found = read_collection(folder, num_states=2)
    splits = split_collection(found, ["vit-*", "cnn-1"])
    assert [[t.name for t in part] for part in splits.values()] == [["cnn-0"], ["cnn-1", "vit-0"]]
    assert list(splits) == ["train", "held_out"]
    with pytest.raises(ValueError, match=r"no trajectory matches held_out resnet-\*; name one of cnn-0"):
        split_collection(found, ["vit-*", "resnet-*"])
    with pytest.raises(ValueError, match=r"3 of 3 trajectories are held out"):
        split_collection(found, ["*"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "line 1 of .*index.jsonl is no row with path and split"),
        ('{"split": "train"}', "line 1 of .*index.jsonl is no row with path and split"),
        ("[1]", "line 1 of .*index.jsonl is no row with path and split"),
        ('{"path": "../other"}', "line 1 of .*index.jsonl names '../other', which is not in its folder"),
        ('{"path": "/etc"}', "names '/etc', which is not in its folder"),
    ],
)
def test_damaged_index(folder, line, message):
    (folder / "index.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_collection(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone not found; give a folder of trajectories"):
        read_collection(tmp_path / "gone")
