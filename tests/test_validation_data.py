"""From a recording to a gated prediction: the validation data of a gate, by command and in Python."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from doubles.task_fixtures import QUICK, SIZES, make_texts
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertForSequenceClassification

from know_hf import RecordArguments, WeightTrajectory, record_task
from know_hf.cli import main
from know_hf.evaluation.checkpoints import compare_on_dataset
from know_hf.tasks import LoraArguments
from know_hf.tasks.task_data import class_numbers, overlap
from know_hf.tasks.validation_data import has_validation_split, load_cross_fit, load_validation_data

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A dataset without validation split."""
    folder = tmp_path_factory.mktemp("reviews")
    make_texts(120).to_parquet(folder / "train.parquet")
    make_texts(16, seed=7).to_parquet(folder / "test.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def recording(bert, reviews, tmp_path_factory):
    """A recording of two states that holds out 12 of 120 rows."""
    paths = {"model": bert, "dataset": reviews, "output_dir": str(tmp_path_factory.mktemp("recording") / "out")}
    args = RecordArguments(task="text-classification", **paths, num_states=2, epochs=1, training=QUICK)
    return record_task(args).path


@pytest.mark.parametrize(
    ("schedule", "names", "sizes"),
    [
        ("--num-states 2 --tail-states 2", ["Θ1", "start", "tail-0", "tail-1", "Average"], [108, 54]),
        ("--kind complementary", ["start", "branch-0", "branch-1", "branch_average"], [108]),
    ],
)
def test_the_last_line_of_record_is_a_gated_prediction(bert, reviews, tmp_path, capsys, schedule, names, sizes):
    out = tmp_path / "my out"
    flags = f"--task text-classification --model {bert} --dataset {reviews} --epochs 1 {schedule}"
    flags += " --training " + " ".join(f"{key}={value}" for key, value in QUICK.items())
    assert main(["record", *flags.split(), "--output-dir", str(out)]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command == ["know-hf", "predict", str(out / "trajectory"), "--output-dir", str(out / "enhanced")]
    assert main(command[1:]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in printed) for name in ("candidate", "Θ0"))
    card = (out / "enhanced/README.md").read_text()
    assert all(f"\n| `{name}`" in card for name in names), names
    assert [state.num_examples for state in WeightTrajectory(out / "trajectory").states] == sizes
    written = AutoModelForSequenceClassification.from_pretrained(out / "enhanced")
    assert written.config.id2label == {0: "bad", 1: "good"}
    assert "calibrated loss" in card


def test_the_held_out_rows_are_evaluated_as_in_the_recording(recording):
    data = load_validation_data(recording)
    gate = data.make_gate()
    assert (len(data.dataset), gate.batch_size, data.base_model) == (12, 1, None)
    trajectory = WeightTrajectory(recording)
    losses = data.make_gate(metric="validation loss").losses(trajectory.load_model())
    assert sum(losses) / 12 == pytest.approx(trajectory.states[0].metrics["eval_loss"], rel=1e-4)
    errors = data.make_gate(metric="accuracy").losses(trajectory.load_model())
    assert 1 - sum(errors) / 12 == pytest.approx(trajectory.states[0].metrics["eval_accuracy"])
    assert len(load_validation_data(recording, max_examples=10).dataset) == 10
    flags = ["--validation", "recorded", "--dry-run", "--output-dir", str(recording.with_name("none"))]
    assert main(["predict", str(recording), *flags]) == 0  # of two states, too few for KNOWN


def test_predict_chooses_on_the_recorded_split_unless_a_predictor_is_named(recording, recorded, tmp_path, capsys):
    assert has_validation_split(recording) and not has_validation_split(recorded)
    command = ["predict", str(recording), "--overwrite", "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--metric", "accuracy", "--max-validation", "10"]) == 0
    assert "error rate" in capsys.readouterr().out
    assert main([*command, "--predictor", "average"]) == 0
    assert "Wrote Average" in capsys.readouterr().out
    moved = shutil.copytree(recording.parent, tmp_path / "moved") / "record.json"
    arguments = json.loads(moved.read_text()) | {"model": str(tmp_path / "gone")}  # the trajectory has its tokenizer
    moved.write_text(json.dumps(arguments))
    assert len(load_validation_data(moved.with_name("trajectory")).dataset) == 12
    moved.write_text(json.dumps(arguments | {"dataset": str(tmp_path / "gone")}))
    assert main(["predict", str(moved.with_name("trajectory")), "--output-dir", str(tmp_path / "none")]) == 1
    assert "gone" in (error := capsys.readouterr().err) and "--predictor known" in error
    for trajectory, flags in ((recording, ["--predictor", "average"]), (recorded, [])):
        refused = ["predict", str(trajectory), *flags, "--metric", "accuracy", "--output-dir", str(tmp_path / "none")]
        assert main(refused) == 1
        assert "--metric needs --validation" in capsys.readouterr().err


def test_the_code_of_the_readme_runs(recording, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "recipes/predict/README.md").read_text(encoding="utf-8")
    code = next(code for code in readme.split("```python\n") if "load_validation_data" in code).split("```")[0]
    namespace = {}
    exec(code.replace("outputs/record/imdb/trajectory", str(recording)), namespace)
    assert namespace["enhanced"].gate.metric.startswith("error rate") and (tmp_path / "enhanced/config.json").exists()


def test_another_dataset_has_the_columns_and_classes_of_the_recording(recording, reviews, tmp_path):
    assert len(load_validation_data(recording, reviews, split="test").dataset) == 16
    for split, size in (("train", 30), ("dev", 20)):  # the only split, then the validation split
        make_texts(size).to_parquet(tmp_path / f"others/{split}.parquet")
        gate = load_validation_data(recording, str(tmp_path / "others")).make_gate()
        assert (len(gate.dataset), gate.batch_size) == (size, size // 10)
        assert gate.dataset["labels"][:] == [row % 2 for row in range(size)]


@pytest.mark.parametrize(
    ("dataset", "split", "words"),
    [
        ("{reviews}", None, "train, test"),
        ("{reviews}", "train", "trained on"),
        ("{reviews}", "train[90%:]", "trained on"),
        ("{reviews}/.", "train", "trained on"),
        ("{reviews}", "held-out", "no split 'held-out'.*test"),
        ("{reviews}", "auto", "no split 'auto'"),
        ("", None, "dataset is empty"),
        ("recorded", "test", "'recorded'"),
        ("{tmp}", None, "no column 'text'"),
    ],
)
def test_data_that_cannot_choose_is_refused(recording, reviews, tmp_path, dataset, split, words):
    datasets.Dataset.from_dict({"other": ["a"], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=words):
        load_validation_data(recording, dataset.format(reviews=reviews, tmp=tmp_path), split=split)


def test_recordings_without_a_validation_split_name_a_way_out(text_arguments, recorded, capsys):
    args = replace(text_arguments, num_states=2, epochs=1, start="train")
    trajectory = record_task(args)  # evaluated on the test split
    with pytest.raises(ValueError, match="test split"):
        load_validation_data(trajectory)
    assert not has_validation_split(trajectory)
    record = trajectory.path.with_name("record.json")
    record.write_text(record.read_text().replace('"eval_split": "test"', '"eval_split": null'))
    with pytest.raises(ValueError, match="no validation split"):
        load_validation_data(trajectory)
    assert main(["predict", str(recorded), "--validation", "recorded", "--output-dir", "out"]) == 1
    assert "record.json does not exist" in capsys.readouterr().err


def test_a_dataset_that_changed_is_refused(text_arguments, reviews, tmp_path):
    dataset = shutil.copytree(reviews, tmp_path / "reviews")
    trajectory = record_task(replace(text_arguments, dataset=str(dataset), eval_split="auto", num_states=2, epochs=1))
    make_texts(140).to_parquet(dataset / "train.parquet")
    with pytest.raises(ValueError, match=r"changed.*126 examples.*108"):
        load_validation_data(trajectory)
    make_texts(120, seed=9).to_parquet(dataset / "train.parquet")  # as many others
    with pytest.raises(ValueError, match=r"changed.*fingerprint"):
        load_validation_data(trajectory)


def test_slices_that_share_rows_are_refused(text_arguments, reviews):
    args = replace(text_arguments, dataset=reviews, train_split="train[:50%]")
    shared = {split: overlap(args, split) for split in ("train[50%:]", "train[59:]", "train[-61:]", "train", "test")}
    assert shared == {"train[50%:]": False, "train[59:]": True, "train[-61:]": True, "train": True, "test": False}
    assert overlap(args, "test+train[:1]") and overlap(args, "all")


def test_adapters_are_evaluated_on_their_base_model(text_arguments, reviews, tmp_path, capsys):
    base = shutil.copytree(
        text_arguments.model, Path(text_arguments.output_dir) / "base"
    )  # beside the trajectory, which records its name
    args = replace(text_arguments, dataset=reviews, eval_split="auto", num_states=2, lora=LoraArguments(r=2))
    trajectory = record_task(replace(args, model=str(base)))
    gate = load_validation_data(trajectory).make_gate(candidates=[1], metric="validation loss")
    model = trajectory.load_model(base_model=gate.base_model)
    assert sum(gate.losses(model)) / 12 == pytest.approx(trajectory.states[0].metrics["eval_loss"], rel=1e-4)
    flags = ["--validation", "recorded", "--metric", "accuracy", "--output-dir", str(tmp_path / "enhanced")]
    assert main(["predict", str(trajectory.path), *flags]) == 0
    trajectory.path.with_name("record.json").unlink()  # as of another training: the head is that of the adapters
    other = load_validation_data(trajectory, reviews, split="test").base_model
    assert other.config.num_labels == 2 and trajectory.load_model(base_model=other)
    assert "error rate (1 - accuracy)" in capsys.readouterr().out
    assert (tmp_path / "enhanced/adapter_model.safetensors").exists()


def test_cross_fitting_takes_the_training_rows(text_arguments, reviews, recording, tmp_path, capsys):
    schedule = {"kind": "complementary", "branch_from": "start", "num_states": 1, "epochs": 1}
    trajectory = record_task(replace(text_arguments, dataset=reviews, eval_split="auto", **schedule))
    cross_fit = load_cross_fit(trajectory)
    assert (len(cross_fit.dataset), cross_fit.batch_size) == (108, 5)
    assert {len(gate.dataset) for gate in cross_fit.gates(trajectory).values()} == {54}
    flags = ["--cross-fit", "--output-dir", str(tmp_path / "enhanced")]
    assert main(["predict", str(trajectory.path), *flags]) == 0
    assert "cross-fitted calibrated loss" in capsys.readouterr().out
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "enhanced").config.num_labels == 2
    for wrong, words in (([], "branches"), (["--validation", "recorded"], "--cross-fit")):
        assert main(["predict", str(recording), "--cross-fit", *wrong, "--output-dir", str(tmp_path / "none")]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (["good"] * 10, [1] * 10),  # by its name in the config
        ([1] * 10, [1] * 10),
        (["a", "b"] * 5, [0, 1] * 5),
        (["a", "b", "c"] * 4, r"classes a, b, c.* the model has 2: bad, good"),
    ],
)
def test_classes_of_other_trainings_are_those_of_the_model(recording, tmp_path, labels, numbers):
    trajectory = shutil.copytree(recording, tmp_path / "trajectory")
    rows = {"text": [f"text {index}" for index in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows/train.parquet")
    if isinstance(numbers, list):
        data = load_validation_data(trajectory, str(tmp_path / "rows"))
        assert data.dataset["labels"][:] == numbers
    else:
        with pytest.raises(ValueError, match=numbers):
            load_validation_data(trajectory, str(tmp_path / "rows"))


def test_models_of_other_tasks_are_named(tmp_path, reviews):
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    trajectory.record(BertForMaskedLM(BertConfig(vocab_size=9, **SIZES)), num_examples=2, steps=1)
    with pytest.raises(ValueError, match=r"BertForMaskedLM.*gate=Gate\(dataset="):
        load_validation_data(trajectory, reviews, split="test")
    with pytest.raises(FileNotFoundError, match=r"record.json .*gate=CrossFit\(dataset="):
        load_cross_fit(trajectory)
    trajectory = WeightTrajectory.create(tmp_path / "classifier")
    trajectory.record(BertForSequenceClassification(BertConfig(vocab_size=9, **SIZES)), num_examples=2, steps=1)
    with pytest.raises(ValueError, match="no tokenizer"):
        load_validation_data(trajectory, reviews, split="test")
    config = BertConfig(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"split test has one class per example.* multi_label_classification"):
        class_numbers(["0", "1"], config, "split test")


def test_adapters_without_a_tokenizer_take_that_of_their_base_model(bert, reviews, tmp_path):
    base = shutil.copytree(bert, tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    trajectory.record(adapted, num_examples=2, steps=1)
    assert "input_ids" in load_validation_data(trajectory, reviews, split="test").dataset.column_names
    assert compare_on_dataset(*[trajectory.path] * 2, reviews, train_split=None).notes  # of equal weights
    moved = base.rename(tmp_path / "moved")
    assert load_validation_data(trajectory, reviews, split="test", base_model=moved).base_model is not None


@pytest.mark.parametrize("task", ["image", "lm"])
def test_images_and_language_modelling(request, task):
    args = request.getfixturevalue(f"{task}_arguments")
    trajectory = record_task(replace(args, num_states=2, epochs=1))
    gate = load_validation_data(trajectory, args.dataset, split="test").make_gate(
        batch_size=8, margin=0, metric="validation loss"
    )
    losses = gate.losses(trajectory.load_model())  # of one batch, as in the recording
    assert losses == pytest.approx([trajectory.states[0].metrics["eval_loss"]], rel=1e-4)
    trajectory.path.with_name("record.json").unlink()  # as of another training
    data = load_validation_data(trajectory, args.dataset, split="test")
    again = data.make_gate(batch_size=8, margin=0, metric="validation loss")
    assert again.losses(trajectory.load_model()) == losses
