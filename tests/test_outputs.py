"""Folders to write that are, or are inside, what is read or another trajectory."""

import pytest
from conftest import SCHEDULE, make_resnet, make_trainer
from doubles.small_trainers import assert_refused, hashes
from doubles.toy_trajectories import record_walk
from quadrants import source, target

from know_hf import KNOWNConfig, TransitionDataset, WeightTransitionCallback, meta_train
from know_hf.checkpoint import locked_folder
from know_hf.evaluation import ComparisonTask, ZeroShot, compare_arms, make_arm
from know_hf.evaluation.suites import run_suite
from know_hf.meta_learning import MetaTrainingArguments
from know_hf.prediction import SHIPPED_KNOWN
from know_hf.tasks import RecordArguments
from know_hf.tasks.record import record_task


def test_recordings(trajectory_copy, tmp_path):
    before = hashes(trajectory_copy)
    with pytest.raises(ValueError, match="inside the trajectory"):
        WeightTransitionCallback(trajectory_copy / "sub", SCHEDULE)
    assert_refused(
        make_trainer(tmp_path / "out"), trajectory_copy / "state-0/sub", ValueError, "inside the trajectory"
    )
    model = make_resnet()
    model.save_pretrained(tmp_path / "base")
    model.config.name_or_path = str(tmp_path / "base")
    assert_refused(make_trainer(tmp_path / "out", model), tmp_path / "base/sub", ValueError, "inside the input")
    trainer = make_trainer(tmp_path / "out", model)
    trainer.add_callback(WeightTransitionCallback(tmp_path / "base/sub"))
    with pytest.raises(ValueError, match="inside the input"):
        trainer.train()
    arguments = {"task": "image-classification", "model": "me/vit", "dataset": "me/data"}
    with pytest.raises(ValueError, match="inside the trajectory"):
        record_task(RecordArguments(**arguments, output_dir=str(trajectory_copy / "sub")))
    assert hashes(trajectory_copy) == before
    assert not (tmp_path / "base/sub").exists()


def test_comparisons(recorded, trajectory_copy):
    task = ComparisonTask([recorded] * 2, target, source)
    known = make_arm({"name": "mine", "kind": "predicted", "description": "", "known": str(SHIPPED_KNOWN)})
    for folder, arms in ((trajectory_copy / "sub", ["naive"]), (SHIPPED_KNOWN / "sub", ["naive", known])):
        with pytest.raises(ValueError, match="inside the"):
            compare_arms(task, folder, protocols=[ZeroShot()], arms=arms)
        assert not folder.exists()


def test_meta_trainings(tmp_path):
    trajectory = record_walk(tmp_path / "walk", num_states=4)
    data = TransitionDataset([trajectory.path], num_states=3)

    def train(folder):
        return meta_train(KNOWNConfig(num_states=3), data, args=MetaTrainingArguments(2, checkpoint_dir=str(folder)))

    with pytest.raises(ValueError, match="inside the input"):
        train(trajectory.path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    with locked_folder(tmp_path / "checkpoints"), pytest.raises(BlockingIOError, match=r"another process"):
        train(tmp_path / "checkpoints")
    assert train(tmp_path / "checkpoints").steps_done == 2


def test_outputs_in_the_folder_of_a_dataset(tmp_path):
    (tmp_path / "data").mkdir()
    arguments = {"task": "image-classification", "model": "me/vit", "dataset": str(tmp_path / "data")}
    with pytest.raises(ValueError, match="inside the input"):
        record_task(RecordArguments(**arguments, output_dir=str(tmp_path / "data/out")))
    with pytest.raises(ValueError, match="inside the input"):
        run_suite("mnist-halves", tmp_path / "data/out", data={"ylecun/mnist": str(tmp_path / "data")})
    assert not any((tmp_path / "data").iterdir())


@pytest.mark.parametrize("name", ["record.json", "forgetting.png"])
def test_recordings_keep_files_of_others(tmp_path, name):
    (tmp_path / name).write_text('{"my": "notes"}')
    arguments = {"task": "image-classification", "model": "me/vit", "dataset": "me/data"}
    with pytest.raises(FileExistsError, match=name):
        record_task(RecordArguments(**arguments, output_dir=str(tmp_path)))
    assert (tmp_path / name).read_text() == '{"my": "notes"}'
