"""The gate: evaluating candidates and writing the best."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import make_images, make_resnet
from datasets import Dataset
from doubles.constant_predictor import Constant, weights
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DefaultDataCollator,
    default_data_collator,
)

from know_hf.batch_norm import recalibrate_batch_norm
from know_hf.predict import predict_overflowed_weights
from know_hf.prediction import Gate, WriteOptions, choose, plan_prediction
from know_hf.prediction.choosing import candidate_model
from know_hf.prediction.choosing.candidates import Candidate, plan_candidates
from know_hf.prediction.choosing.gate import write_best_candidate
from know_hf.prediction.pieces import Piece
from know_hf.predictors import Average, Rescale, Shrink, StartInterpolation
from know_hf.trajectory import TrajectoryError

BIAS = "classifier.1.bias"
PREDICTION = {"predictor": None, "predictor_options": None, "steps": 0, "recalibrated": False, "state": None}


def bert():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=8, max_position_embeddings=8, **sizes))


def distance_to(target: float):
    """Losses of 20 "examples" that are lowest where the first bias is at `target`."""
    noise = np.random.RandomState(0).rand(20)

    def compute_loss(model):
        away = abs(float(model.state_dict()[BIAS][0]) - target)
        return [away * (1 + value) for value in noise]

    return compute_loss


def through(gate, trajectory, folder, predictor=None, steps=2, finish=None, **options):
    plan = plan_prediction(trajectory, steps=steps, predictor=predictor or Constant(0.01), estimate_time=False)
    result = write_best_candidate(gate, plan, folder / "out", WriteOptions(**options), finish)
    return result, result.gate


def test_the_best_number_of_steps_is_written(trajectory, tmp_path):
    goal = float(trajectory.tensor(BIAS)[0]) + 2.0
    gate = Gate(distance_to(goal), metric="distance", candidates=[1, 4, "average", Shrink(0.9)])
    result, decided = through(gate, trajectory, tmp_path, Constant(1.0), steps=3)
    assert decided.chosen == "Constant, 2 steps"
    names = ["Θ0", "Constant", "Constant, 2 steps", "Constant, 3 steps"]
    names += ["Θ1", "Θ4", "average", "Shrink, factor 0.9"]
    assert [candidate.name for candidate in decided.candidates] == names
    assert torch.equal(weights(tmp_path / "out")[BIAS], trajectory.tensor(BIAS) + 2)
    assert result.path == tmp_path / "out"
    assert result.report["bias"].mean_residual == pytest.approx(2)
    assert torch.equal(result.load_model().classifier[1].bias, trajectory.tensor(BIAS) + 2)
    assert decided.recipe == {**PREDICTION, "steps": 2}
    assert decided.sentence.startswith("Chose Constant, 2 steps: distance ")
    assert "; 7 candidates. Constant, 3 steps, is" in decided.sentence and decided.requested == "Constant, 3 steps"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in result.path.iterdir()) == ["config.json", "model.safetensors"]


def test_theta_0_is_kept_bit_for_bit_when_nothing_is_better(trajectory, tmp_path):
    gate = Gate(distance_to(float(trajectory.tensor(BIAS)[0])), candidates=[1])
    batches = ({"pixel_values": make_images(8)[:]["pixel_values"]} for _ in range(1))
    result, decided = through(gate, trajectory, tmp_path, recalibrate_with=batches)
    assert decided.is_reference
    assert (decided.recipe["state"], decided.recipe["recalibrated"]) == (0, False)
    before = trajectory.path / "state-0/model.safetensors"
    assert (result.path / "model.safetensors").read_bytes() == before.read_bytes()
    assert decided.candidates[1].name == "Θ0, BatchNorm recalibrated"
    assert "Kept Θ0: none of 4 candidates is better by more than noise" in decided.sentence


def test_a_state_can_be_chosen_and_is_copied_bit_for_bit(trajectory, tmp_path):
    gate = Gate(distance_to(float(trajectory.tensor(BIAS, 2)[0])), candidates=[1, 2, 3])
    result, decided = through(gate, trajectory, tmp_path)
    assert decided.chosen == "Θ2"
    assert decided.recipe == {**PREDICTION, "state": 2}
    written = weights(result.path)
    assert all(torch.equal(written[name], trajectory.tensor(name, 2)) for name in trajectory.names)
    for role in ("bias", "norm"):
        names = [name for name, tensor in trajectory.roles.items() if tensor.role == role]
        moved = max(float((trajectory.tensor(n, 2) - trajectory.tensor(n)).abs().max()) for n in names)
        assert result.report[role].largest_residual == pytest.approx(moved)
        assert result.report[role].parameters == sum(trajectory.shape(name).numel() for name in names)


def test_the_statistics_of_a_state_are_recalibrated(trajectory, tmp_path):
    batches = [{"pixel_values": make_images(16)[:]["pixel_values"]}]
    gate = Gate(distance_to(float(trajectory.tensor(BIAS, 1)[0])), candidates=[1])
    result, decided = through(gate, trajectory, tmp_path, recalibrate_with=batches)
    assert decided.chosen == "Θ1"
    assert decided.recipe["recalibrated"] is True
    expected = trajectory.load_model(1)
    recalibrate_batch_norm(expected, batches)
    written = result.load_model().state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_dataset_is_evaluated_batch_by_batch(trajectory, tmp_path):
    dataset = make_images(40, seed=3)
    gate = Gate(dataset=dataset, batch_size=4, candidates=[], metric="validation loss")
    model = trajectory.load_model().eval()
    with torch.no_grad():
        expected = [float(model(**dataset[start : start + 4]).loss) for start in range(0, 40, 4)]
    assert gate.losses(model) == pytest.approx(expected)
    _, decided = through(gate, trajectory, tmp_path, Constant(0.5), steps=1)
    assert decided.num_values == 10
    assert decided.scores["Θ0"] == pytest.approx(np.mean(expected))


def test_the_family_fits_the_trajectory(trajectory, record_states):
    for recorded, others, count in ((trajectory, ["start"], 25), (record_states(make_resnet(), num_states=2), [], 9)):
        plan = plan_prediction(recorded, predictor=Constant(0.01), estimate_time=False)
        planned = plan_candidates(plan, None, recalibrates=False)
        expected = [f"Θ{index}" for index in range(recorded.num_states)] + others
        expected.append("Constant")
        family = planned[len(expected) :]
        assert [candidate.name for candidate in planned[: len(expected)]] == expected and len(family) == count
        name = "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"
        piece = Piece(name, 0, 50)
        values = torch.stack(
            [candidate.tensors.values(piece, candidate.tensors.read(piece))[0] for candidate in family]
        )
        distances = torch.cdist(values, values) + torch.eye(len(values))
        assert distances.min() > 1e-4  # no two are the same
    recipe = next(candidate.recipe for candidate in family if candidate.name == "task_vector, scale 0.5")
    assert recipe == {**PREDICTION, "predictor": "task_vector", "predictor_options": {"scale": 0.5}, "steps": 1}


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_screening_evaluates_a_part_of_the_batches_and_confirms_on_the_others(trajectory, tmp_path):
    rows = [{**row, "labels": int(row["labels"])} for row in make_images(80, seed=3)]
    seen = []

    def collate(batch):
        seen.append(float(batch[0]["pixel_values"].sum()))
        return default_data_collator(batch)

    names = [Candidate("shrink", {"factor": factor}) for factor in (0.5, 0.8, 1.0)]
    options = {"batch_size": 1, "data_collator": collate, "candidates": names, "num_confirmed": 2}
    _, decided = through(Gate(dataset=rows, **options), trajectory, tmp_path, Constant(30.0), steps=1)
    assert (decided.num_values, decided.num_screening_values) == (64, 16)
    assert len(decided.candidates) == 3 and len(decided.screened) == 2
    assert len(seen) == 80 + 5 * 16 + 3 * 64  # Θ0 is scaled to each part, like the candidates
    (same,) = (one for one in (*decided.candidates, *decided.screened) if "1" in one.name)
    assert decided.metric == "calibrated loss" and same.difference == 0
    assert set(seen[-64:]).isdisjoint(seen[80:96]) and set(seen[:80]) == {*seen[-64:], *seen[80:96]}
    assert max(decided.screened, key=lambda one: one.loss).name == "Constant"
    assert "4 candidates" in decided.sentence and "Constant was screened out." in decided.sentence
    assert "2 others were screened out on 16 batches" in str(decided)
    assert len(decided.to_dict()["screened"]) == 2
    streamed = through(Gate(dataset=Stream(rows), **options), trajectory, tmp_path / "s", Constant(30.0), steps=1)
    assert streamed[1] == decided


def test_a_batch_gets_the_same_random_numbers_whichever_others_are_read():
    images, model = make_images(12), make_resnet()

    def collate(batch):
        return {**default_data_collator(batch), "pixel_values": torch.randn(1, *batch[0]["pixel_values"].shape)}

    gate = Gate(dataset=[*images], batch_size=1, data_collator=collate, metric="validation loss")
    assert gate.losses(model, [2, 5]) == [gate.losses(model)[number] for number in (2, 5)]


def test_the_card_has_the_code_of_a_chosen_candidate(trajectory, tmp_path):
    gate = Gate(distance_to(float(trajectory.tensor(BIAS)[0]) / 2), candidates=[Shrink(0.5)])
    result = predict_overflowed_weights(trajectory, predictor=Constant(9.0), output_dir=tmp_path / "out", gate=gate)
    assert result.gate.chosen == "Shrink, factor 0.5"
    assert result.predictor == Shrink(0.5)
    assert "predictor=Shrink(factor=0.5), steps=1" in (result.path / "README.md").read_text()


def test_a_move_towards_the_start_is_written_and_described(trajectory, tmp_path):
    goal = 0.75 * float(trajectory.tensor(BIAS)[0]) + 0.25 * float(trajectory.tensor(BIAS, "start")[0])
    result = predict_overflowed_weights(
        trajectory, predictor=Constant(9.0), output_dir=tmp_path / "out", gate=Gate(distance_to(goal))
    )
    assert result.gate.chosen == "start_interpolation, scale 0.75" and result.predictor == StartInterpolation(0.75)
    assert float(weights(result.path)[BIAS][0]) == pytest.approx(goal)
    card = (result.path / "README.md").read_text()
    assert 'predictor="start_interpolation", predictor_options={"scale": 0.75}, steps=1' in card


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (["averge"], "unknown predictor 'averge'"),
        ([Candidate], "a candidate is a predictor"),
        (["known"], "'known'.*model"),
        (["average+rescale"], "rescales.*keeps the function"),
        ([Rescale()], "rescales"),
    ],
)
def test_invalid_candidates(candidates, message):
    with pytest.raises(ValueError, match=message):
        Gate(len, candidates=candidates)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [([0], "the name 'Θ0'"), (["bema", "bema"], "'bema'"), ([9], "state 9"), ([Constant(1.0, 7)], "7")],
)
def test_candidates_that_do_not_fit_the_trajectory(trajectory, tmp_path, candidates, message):
    with pytest.raises(ValueError, match=message):
        through(Gate(distance_to(0.0), candidates=candidates), trajectory, tmp_path)


def test_columns_that_the_model_does_not_accept_are_dropped():
    model, images, files = make_resnet(), make_images(12), [f"{index}.png" for index in range(12)]
    plain, named = Gate(dataset=images, batch_size=1).losses(model), images.add_column("file", files)
    collator, seen = DefaultDataCollator(), []

    def collate(rows):
        seen.extend(row.pop("file") for row in rows)
        return collator(rows)

    assert Gate(dataset=named, batch_size=1, data_collator=collator).losses(model) == plain
    assert Gate(dataset=named, batch_size=1, data_collator=collate, remove_unused_columns=False).losses(model) == plain
    assert seen == files
    with pytest.raises(ValueError, match="no loss for batches of pixel_values"):
        Gate(dataset=images.remove_columns("labels"), batch_size=1).losses(model)


def test_examples_of_different_lengths_need_a_collator_that_pads():
    examples, model = [{"input_ids": [5] * (3 + index % 4), "labels": 0} for index in range(80)], bert()
    for dataset in (examples, Dataset.from_list(examples).with_format("torch")):
        with pytest.raises(ValueError, match=r"8 examples.*data_collator=.*DataCollatorWithPadding"):
            Gate(dataset=dataset).losses(model)
    with pytest.raises(ZeroDivisionError):  # errors of a custom collator are not wrapped
        Gate(dataset=examples, data_collator=lambda rows: 1 / 0).losses(model)


def test_a_plain_module_is_refused_and_can_be_compared_by_hand(record_states, tmp_path):
    module = nn.Linear(2, 2)
    trajectory = record_states(module, num_states=2)
    with pytest.raises(ValueError, match=r"plain nn\.Module.*load_into"):
        through(Gate(lambda model: [1.0] * 10), trajectory, tmp_path)
    assert not (tmp_path / "out").exists()
    result = predict_overflowed_weights(trajectory, predictor=Constant(1.0), output_dir=tmp_path / "out")
    losses = {}
    for name, source in {"Θ0": trajectory, "predicted": result}.items():
        source.load_into(module)
        losses[name] = [module.bias[0].item() + index for index in range(10)]
    assert choose(losses).candidates[1].difference == pytest.approx(1)


def test_a_replaced_head_is_an_error(record_states, tmp_path):
    model = bert()
    model.classifier = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    trajectory = record_states(model, num_states=2)
    dataset = [{"input_ids": [index % 8, 1], "labels": index % 2} for index in range(80)]
    with pytest.raises(TrajectoryError, match=r"'classifier\.(0\.)?(bias|weight)'"):
        through(Gate(dataset=dataset), trajectory, tmp_path)
    assert not (tmp_path / "out").exists()


def test_every_model_sees_the_same_random_numbers_and_no_gradient(trajectory):
    seen, model = [], make_resnet()

    def compute_loss(model):
        seen.append((torch.rand(1).item(), torch.is_grad_enabled(), model.training))
        return [torch.tensor(1.0)] * 10

    gate, state = Gate(compute_loss, seed=5), torch.get_rng_state()
    assert gate.losses(model) == gate.losses(model.train()) == [1.0] * 10
    assert seen[0] == seen[1] == (seen[0][0], False, False)
    assert torch.equal(torch.get_rng_state(), state)


class Masking:
    """A collator with a generator of its own, as that for masked language modelling."""

    seed, generator = 1, None

    def __call__(self, rows):
        batch = default_data_collator(rows)
        self.generator = self.generator or torch.Generator().manual_seed(self.seed)
        factors = torch.rand(1, generator=self.generator), torch.rand(1), np.random.rand(), random.random()
        return {**batch, "pixel_values": batch["pixel_values"] * math.prod(factors)}


def test_every_candidate_gets_the_same_random_masks():
    gate = Gate(dataset=make_images(40, seed=3), batch_size=4, data_collator=Masking(), seed=-1)
    model = make_resnet()
    losses, some = gate.losses(model), gate.losses(model, [3, 5])
    before = random.getstate()
    assert gate.losses(model) == losses and gate.losses(model, [3, 5]) == some
    assert random.getstate() == before


def test_the_card_names_the_chosen_candidate(trajectory, tmp_path):
    goal = float(trajectory.tensor(BIAS, 1)[0])
    result = predict_overflowed_weights(
        trajectory,
        predictor=Constant(0.01),
        steps=2,
        output_dir=tmp_path / "out",
        gate=Gate(distance_to(goal), candidates=[1]),
    )
    assert result.gate.chosen == result.to_dict()["gate"]["chosen"] == "Θ1"
    lines = str(result).splitlines()
    assert lines[0].startswith(f"Wrote Θ1 to {result.path}/: a recorded state, not a prediction; validation loss ")
    assert lines[2].startswith("candidate ") and lines[-1].startswith("next: from transformers import ")
    card = (result.path / "README.md").read_text()
    assert result.gate.sentence in card.replace("&#124;", "|")
    assert "| `Θ1` (these weights) |" in card
    assert "| candidate | `validation loss` | minus Θ0 | 95% interval | p (corrected) |" in card
    assert "# Recorded state Θ1 of" in card and "- recorded-state\n" in card and "weight-prediction" not in card
    assert "| all tensors | Θ1, a recorded state, not a prediction |" in card
    assert "| normalisation layers |" not in card
    assert result.gate.rule.replace("|t|", "&#124;t&#124;") in card
    assert "model = trajectory.load_model(1)\nmodel.save_pretrained(" in card and "know-hf predict" not in card
    assert torch.equal(weights(result.path)[BIAS], trajectory.tensor(BIAS, 1))


def test_the_checkpoint_is_finished_before_it_appears(trajectory, tmp_path):
    def finish(folder, result):
        assert not (tmp_path / "out").exists()
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert result.path == tmp_path / "out"
        (folder / "README.md").write_text(result.gate.sentence)

    def compute_loss(model):
        numbers.append(len(list(tmp_path.rglob("*.safetensors"))))
        return 1.0

    numbers = []
    gate = Gate(compute_loss, margin=0.0, candidates=[1, "average"])
    result, decided = through(gate, trajectory, tmp_path, Average(), steps=1, finish=finish)
    assert (result.path / "README.md").read_text() == decided.sentence
    assert [candidate.name for candidate in decided.candidates[1:]] == ["Average", "Θ1"]  # evaluated once
    assert numbers == [0] * 3  # no candidate stays on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [make_resnet, bert])
def test_candidates_in_memory_have_the_losses_of_candidates_on_disk(
    record_states, tmp_path, monkeypatch, architecture, dtype
):
    """Names in memory, BatchNorm statistics, dtypes and copied tensors are those of a checkpoint."""
    loads, load = [], candidate_model.load_pretrained
    monkeypatch.setattr(candidate_model, "load_pretrained", lambda *args: loads.append(args) or load(*args))
    torch.manual_seed(0)
    trajectory = record_states(architecture().to(dtype), num_states=3)
    batches = [{"pixel_values": make_images(16)[:]["pixel_values"]}] if architecture is make_resnet else None

    def compute_loss(model):
        values = torch.stack([tensor.double().abs().mean() for tensor in model.state_dict().values()])
        return values.repeat(10).tolist()

    def losses(folder):
        _, decided = through(Gate(compute_loss), trajectory, folder, recalibrate_with=batches)
        return decided.scores

    in_memory = losses(tmp_path / "memory")
    assert len(loads) == 1 and len(set(in_memory.values())) > 15
    monkeypatch.setattr(candidate_model, "_layout", lambda model: [object()])  # a changed model is loaded again
    assert losses(tmp_path / "disk") == in_memory
    assert len(loads) == 1 + len(in_memory)


def test_a_model_that_the_evaluation_changed_is_loaded_again(trajectory, tmp_path):
    def compute_loss(model):
        dtypes.add(model.dtype)
        losses = distance_to(0.5)(model)
        model.half()
        return losses

    dtypes = set()
    _, decided = through(Gate(compute_loss, candidates=[1]), trajectory, tmp_path / "half")
    assert decided.scores == through(Gate(distance_to(0.5), candidates=[1]), trajectory, tmp_path)[1].scores
    assert dtypes == {torch.float32}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_adapters_are_evaluated_on_their_base_model_which_stays_unchanged(record_states, tmp_path):
    def base():
        return make_resnet(seed=3)

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"])
    trajectory = record_states(get_peft_model(base(), config), num_states=3)
    bias = next(name for name in trajectory.names if name.endswith(BIAS))
    goal = float(trajectory.tensor(bias, 1)[0])
    seen = []

    def compute_loss(model):
        biases = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("bias")}
        (value,) = (float(tensor[0]) for name, tensor in biases.items() if "modules_to_save" in name)
        seen.append(value)
        return [abs(value - goal) * (1 + k / 10) for k in range(10)]

    model = base().train()
    next(model.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    gate = Gate(compute_loss, base_model=model, candidates=[1, 2, "average"])
    result, decided = through(gate, trajectory, tmp_path, steps=1)
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == before
    assert decided.chosen == "Θ1"
    assert len(set(seen)) == 5
    assert torch.equal(weights(result.path)[bias], trajectory.tensor(bias, 1))
    untouched = base().state_dict()
    assert model.state_dict().keys() == untouched.keys()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"adapters.*base_model="):
        through(Gate(compute_loss), trajectory, tmp_path / "other")


def test_errors_come_early_and_leave_nothing_behind(trajectory, tmp_path):
    calls = []

    def compute_loss(model):
        calls.append(model)
        return [0.5, 0.6]

    with pytest.raises(ValueError, match="2 losses of Θ0"):
        through(Gate(compute_loss), trajectory, tmp_path)
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"compute_loss must return.*None"):
        through(Gate(lambda model: None), trajectory, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError):
        through(Gate(distance_to(0.0)), trajectory, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of compute_loss and dataset"),
        ({"compute_loss": len, "dataset": [1]}, "exactly one"),
        ({"compute_loss": [1]}, "compute_loss .*list.*dataset="),
        ({"dataset": [1], "batch_size": 0}, "batch_size.*0"),
        ({"dataset": [1], "level": 0.0}, "level.*0.0"),
        ({"dataset": [1], "screening": 1.0}, "screening.*1.0"),
        ({"dataset": [1], "num_confirmed": 0}, "num_confirmed.*0"),
        ({"dataset": [1], "margin": float("nan")}, "margin.*nan"),
        ({"dataset": range(30)}, "4 batches of 8 .*batch_size="),
        ({"dataset": [1]}, "1 batches"),
        ({"dataset": range(16), "margin": 0.1}, "2 batches"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        Gate(**options)


def test_a_dataset_of_one_batch_needs_a_margin():
    assert Gate(dataset=[1], margin=0.1).margin == 0.1


def test_a_dataset_instead_of_a_gate_is_refused(trajectory, tmp_path):
    with pytest.raises(TypeError, match=r"Gate or CrossFit, got list; .*Gate\(dataset"):
        predict_overflowed_weights(trajectory, output_dir=tmp_path / "out", gate=[1])
    assert list(tmp_path.iterdir()) == []
