import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import make_images, make_resnet
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, DefaultDataCollator

from know_hf.batch_norm import recalibrate_batch_norm
from know_hf.predict import predict_overflowed_weights
from know_hf.prediction import Gate, choose, plan_prediction, predict_through_gate
from know_hf.predictors import Average
from know_hf.trajectory import TrajectoryError

BIAS = "classifier.1.bias"
KERNEL = "resnet.embedder.embedder.convolution.weight"


@dataclass
class Constant:
    """Adds the same to every weight."""

    value: float = 0.01
    num_states: int | None = None

    def residual(self, history, role):
        return torch.full((len(history),), self.value)


def bert():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=8, max_position_embeddings=8, **sizes))


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def distance_to(target: float):
    """Losses of 20 "examples" that are lowest where the first bias is at `target`."""
    noise = np.random.RandomState(0).rand(20)

    def compute_loss(model):
        away = abs(float(model.state_dict()[BIAS][0]) - target)
        return [away * (1 + value) for value in noise]

    return compute_loss


def through(gate, trajectory, folder, predictor=None, steps=2, **arguments):
    plan = plan_prediction(trajectory, steps=steps, predictor=predictor or Constant(), estimate_time=False)
    return predict_through_gate(gate, plan, output_dir=folder / "out", **arguments)


# Choosing


def noise(random, kind, size):
    if kind == "normal":
        return random.normal(size=size)
    if kind == "heavy right tail":
        return np.exp(1.5 * random.normal(size=size)) - np.exp(1.5**2 / 2)
    return 5.0 * (random.random(size) < 0.02) - 0.1  # rare disasters: mean 0, most values below it


@pytest.mark.parametrize("kind", ["normal", "heavy right tail", "rare disasters"])
@pytest.mark.parametrize("count", [20, 200])
def test_noise_is_rarely_chosen(kind, count):
    random = np.random.default_rng(count)
    chosen = 0
    for run in range(60):
        reference = random.exponential(size=count)
        own = noise(random, kind, (6, count))
        losses = {f"candidate {k}": reference + 0.3 * values for k, values in enumerate(own)}
        result = choose({"Θ0": reference, **losses}, num_resamples=199, seed=run)
        chosen += not result.is_reference
    # level 0.05; of 60 runs 9 or more are seen with probability 0.003 then
    assert chosen <= 8


def test_a_planted_gain_is_found_and_the_largest_taken():
    random = np.random.default_rng(0)
    found = []
    for run in range(20):
        reference = random.exponential(size=200)
        losses = {"Θ0": reference}
        for gain in (0.0, 0.1, 0.2, 0.4):
            losses[f"gain {gain}"] = reference - gain + 0.5 * random.normal(size=200)
        result = choose(losses, num_resamples=199, seed=run)
        found.append(result.chosen)
        best = next(candidate for candidate in result.candidates if candidate.name == "gain 0.4")
        assert best.low < -0.4 < best.high
    assert found == ["gain 0.4"] * 20


def test_intervals_cover_all_candidates_at_once():
    random = np.random.default_rng(1)
    missed = 0
    for run in range(60):
        reference = random.exponential(size=100)
        losses = {str(k): reference + 0.1 * k + random.normal(size=100) for k in range(6)}
        result = choose({"Θ0": reference, **losses}, num_resamples=199, seed=run)
        missed += any(not c.low < 0.1 * k < c.high for k, c in enumerate(result.candidates[1:]))
    assert missed <= 8


def test_one_candidate_is_tested_as_student_does():
    """For normal values the studentised bootstrap and the t-test agree."""
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(2)
    reference = random.normal(size=400)
    other = reference + random.normal(-0.1, 1, size=400)
    result = choose({"Θ0": reference, "other": other}, num_resamples=9999)
    test = stats.ttest_rel(other, reference)
    candidate = result.candidates[1]
    assert candidate.p_value == pytest.approx(test.pvalue, abs=0.01)
    interval = test.confidence_interval(0.95)
    assert [candidate.low, candidate.high] == pytest.approx([interval.low, interval.high], abs=0.005)


def test_more_candidates_need_more_evidence():
    random = np.random.default_rng(3)
    reference = random.normal(size=100)
    noise = random.normal(size=100)
    good = reference + noise - noise.mean() - 0.2
    alone = choose({"Θ0": reference, "good": good}).candidates[1]
    others = {str(k): reference + random.normal(size=100) for k in range(20)}
    among = choose({"Θ0": reference, "good": good, **others}).candidates[1]
    assert among.p_value > 2 * alone.p_value
    assert among.high - among.low > 1.3 * (alone.high - alone.low)


def test_the_margin_must_be_passed_too():
    random = np.random.default_rng(4)
    reference = random.normal(size=100)
    losses = {"Θ0": reference, "good": reference - 0.2 + 0.1 * random.normal(size=100)}
    assert choose(losses).chosen == "good"
    assert choose(losses, margin=0.1).chosen == "good"
    kept = choose(losses, margin=0.3)
    assert kept.is_reference
    assert "lies below -0.3 (95%" in kept.rule
    assert "lies below 0 (95%" in choose(losses).rule


def test_what_is_not_finite_or_without_spread_is_not_chosen():
    reference = np.linspace(1, 2, 20)
    result = choose({"Θ0": reference, "diverged": [*reference[:-1] - 1, np.nan], "shifted": reference - 0.5})
    assert result.is_reference
    diverged, shifted = result.candidates[1:]
    assert (diverged.loss, diverged.p_value) == (None, None)
    assert (shifted.difference, shifted.low, shifted.high, shifted.p_value) == (-0.5, None, None, None)
    assert result.scores == {"Θ0": 1.5, "shifted": 1.0}
    assert "| diverged | not finite |  |  |  |" in result.markdown()
    assert (
        "with a validation loss of 1 (-0.5 on every value, so that nothing says how sure that is)" in result.sentence
    )
    assert result.rule.endswith("no noise to test it by: it is not chosen unless a margin is set.")


def test_equal_differences_are_chosen_by_the_margin_alone():
    random = np.random.default_rng(6)
    reference = random.exponential(size=50).astype(np.float32)
    moved = [reference - np.float32(0.3), reference - np.float32(0.1)]
    losses = {"Θ0": reference, "more": moved[0], "less": moved[1], "noisy": reference + random.normal(size=50)}
    assert moved[0].astype(float).std() != reference.astype(float).std()  # but for the rounding of float32
    assert choose(losses).is_reference and choose(losses, margin=0.0).is_reference
    assert choose(losses, margin=0.4).is_reference
    result = choose(losses, margin=0.2)
    assert result.chosen == "more"
    assert "the gate chose more, with a validation loss of" in result.sentence
    assert "(-0.3 on every value, so that nothing says how sure that is); Θ0 has" in result.sentence
    assert result.rule.endswith("it is better when it is lower by more than 0.2.")
    assert result.candidates[3].p_value is not None
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_gain_on_a_single_example_is_not_enough():
    reference = np.ones(20)
    lucky = np.r_[0.0, np.ones(19)]
    result = choose({"Θ0": reference, "lucky": lucky})
    assert result.is_reference
    assert result.candidates[1].low is None
    assert "| lucky | 0.95 | -0.05 | unbounded |" in result.markdown()
    json.dumps(result.to_dict(), allow_nan=False)


def test_one_number_is_compared_with_the_margin_and_no_test_is_claimed():
    losses = {"Θ0": 1.0, "a": 0.95, "b": 0.92}
    assert choose(losses, margin=0.1).is_reference
    result = choose(losses, margin=0.06)
    assert result.chosen == "b"
    assert "no test was made" in result.rule
    assert result.sentence == (
        "Of Θ0 and 2 other candidates the gate chose b, with a validation loss of 0.92 (-0.08); Θ0 has 1."
    )


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ({"a": [1.0] * 10}, {}, "there are no losses of Θ0, only of a"),
        ({"Θ0": 1.0, "a": 0.5}, {}, "compute_loss gave one number.*set margin="),
        ({"Θ0": [1.0] * 9, "a": [0.5] * 9}, {}, "9 losses of Θ0.*at least 10"),
        ({"Θ0": [], "a": []}, {}, "0 losses of Θ0"),
        ({"Θ0": [1.0] * 9 + [np.nan], "a": [0.5] * 10}, {}, "losses of Θ0 are to be finite"),
        ({"Θ0": [1.0] * 10, "a": [0.5] * 11}, {}, r"a has losses of shape \(11,\), Θ0 of shape \(10,\)"),
        ({"Θ0": [1.0] * 10}, {"level": 1.0}, "level must lie strictly between 0 and 1, got 1.0"),
        ({"Θ0": [1.0] * 10}, {"margin": -0.1}, "margin must be 0 or more.*got -0.1"),
    ],
)
def test_losses_that_cannot_be_compared_are_an_error(losses, options, message):
    with pytest.raises(ValueError, match=message):
        choose(losses, **options)


# Trying


def test_the_best_number_of_steps_is_kept(trajectory, tmp_path):
    goal = float(trajectory.tensor(BIAS)[0]) + 2.0
    gate = Gate(distance_to(goal), metric="distance")
    result, decided = through(gate, trajectory, tmp_path, Constant(1.0), steps=3)
    assert decided.chosen == "Constant, 2 steps"
    names = ["Θ0", "Θ1", "Θ2", "Θ3", "Θ4", *(f"Constant, {n} step{'s' * (n > 1)}" for n in (1, 2, 3))]
    assert [candidate.name for candidate in decided.candidates] == [*names, "average of the states"]
    assert torch.equal(weights(tmp_path / "out")[BIAS], trajectory.tensor(BIAS) + 2)
    assert result.path == tmp_path / "out"
    assert result.report["bias"].mean_residual == pytest.approx(2)
    assert torch.equal(result.load_model().classifier[1].bias, trajectory.tensor(BIAS) + 2)
    assert decided.recipe == {
        "predictor": None,
        "predictor_options": None,
        "steps": 2,
        "recalibrated": False,
        "state": None,
    }
    assert decided.sentence.startswith(
        "Of Θ0 and 8 other candidates the gate chose Constant, 2 steps, with a distance"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in result.path.iterdir()) == ["config.json", "model.safetensors"]


def test_theta_0_is_kept_bit_for_bit_when_nothing_is_better(trajectory, tmp_path):
    gate = Gate(distance_to(float(trajectory.tensor(BIAS)[0])))
    batches = ({"pixel_values": make_images(8)[:]["pixel_values"]} for _ in range(1))
    result, decided = through(gate, trajectory, tmp_path, recalibrate_with=batches)
    assert decided.is_reference
    assert (decided.recipe["state"], decided.recipe["recalibrated"]) == (0, False)
    before = trajectory.path / "state-0/model.safetensors"
    assert (result.path / "model.safetensors").read_bytes() == before.read_bytes()
    assert decided.candidates[1].name == "Θ0, BatchNorm recalibrated"
    assert "The gate kept Θ0: none of 8 other candidates is better by more than noise." in decided.sentence


def test_a_state_can_be_chosen_and_is_copied_bit_for_bit(trajectory, tmp_path):
    gate = Gate(distance_to(float(trajectory.tensor(BIAS, 2)[0])))
    result, decided = through(gate, trajectory, tmp_path)
    assert decided.chosen == "Θ2"
    assert decided.recipe == {
        "predictor": "task_vector",
        "predictor_options": {"scale": -1.0, "since": 2},
        "steps": 1,
        "recalibrated": False,
        "state": 2,
    }
    written = weights(result.path)
    assert all(torch.equal(written[name], trajectory.tensor(name, 2)) for name in trajectory.names)
    moved = (trajectory.tensor(BIAS, 2) - trajectory.tensor(BIAS)).abs().max()
    assert result.tensors[BIAS].largest_residual == pytest.approx(float(moved))
    norms = [name for name, role in trajectory.roles.items() if role.role == "norm"]
    moved = max(float((trajectory.tensor(n, 2) - trajectory.tensor(n)).abs().max()) for n in norms)
    assert result.report["norm"].largest_residual == pytest.approx(moved)
    assert result.report["norm"].tensors == len(norms)
    assert result.report["norm"].parameters == sum(trajectory.shape(name).numel() for name in norms)


def test_a_state_gets_statistics_of_its_own(trajectory, tmp_path):
    batches = [{"pixel_values": make_images(16)[:]["pixel_values"]}]
    gate = Gate(distance_to(float(trajectory.tensor(BIAS, 1)[0])))
    result, decided = through(gate, trajectory, tmp_path, recalibrate_with=batches)
    assert decided.chosen == "Θ1"
    assert decided.recipe["recalibrated"] is True
    expected = trajectory.load_model(1)
    recalibrate_batch_norm(expected, batches)
    written = result.load_model().state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_dataset_is_tried_batch_by_batch(trajectory, tmp_path):
    dataset = make_images(40, seed=3)
    gate = Gate(dataset=dataset, batch_size=4)
    model = trajectory.load_model()
    model.eval()
    with torch.no_grad():
        expected = [float(model(**dataset[start : start + 4]).loss) for start in range(0, 40, 4)]
    assert gate.losses(model) == pytest.approx(expected)
    _, decided = through(gate, trajectory, tmp_path, Constant(0.5), steps=1)
    assert decided.num_values == 10
    assert decided.scores["Θ0"] == pytest.approx(np.mean(expected))


def test_columns_that_the_model_does_not_take_are_dropped_as_by_a_trainer():
    model, images = make_resnet(), make_images(12)
    plain = Gate(dataset=images).losses(model)
    named = images.add_column("file", [f"{index}.png" for index in range(12)])
    collator = DefaultDataCollator()
    assert Gate(dataset=named, data_collator=collator).losses(model) == plain
    seen = []

    def collate(rows):
        seen.extend(row.pop("file") for row in rows)
        return collator(rows)

    assert Gate(dataset=named, data_collator=collate, remove_unused_columns=False).losses(model) == plain
    assert len(seen) == 12


def test_examples_of_different_lengths_need_a_collator_that_pads():
    tokens = [[5] * (3 + index % 4) for index in range(24)]
    examples = [{"input_ids": ids, "labels": 0} for ids in tokens]
    model = bert()
    with pytest.raises(
        ValueError, match=r"8 examples .*expected sequence.*data_collator=.*DataCollatorWithPadding"
    ) as e:
        Gate(dataset=examples).losses(model)
    assert isinstance(e.value.__cause__, ValueError)
    columns = Dataset.from_list(examples).with_format("torch")
    with pytest.raises(ValueError, match=r"stack expects each tensor .*pass data_collator="):
        Gate(dataset=columns).losses(model)
    with pytest.raises(ZeroDivisionError):  # one's own collator says itself what is wrong
        Gate(dataset=examples, data_collator=lambda rows: 1 / 0).losses(model)


def test_a_plain_module_is_refused_before_the_work_and_can_be_chosen_by_hand(record_states, tmp_path):
    module = nn.Linear(2, 2)
    trajectory = record_states(module, num_states=2)
    with pytest.raises(ValueError, match=r"plain module, which the gate can't make: .*load_into"):
        through(Gate(lambda model: [1.0] * 10), trajectory, tmp_path)
    assert not (tmp_path / "out").exists()
    result = predict_overflowed_weights(trajectory, predictor=Constant(1.0), output_dir=tmp_path / "out")
    losses = {}
    for name, source in {"Θ0": trajectory, "predicted": result}.items():
        source.load_into(module)
        losses[name] = [module.bias[0].item() + index for index in range(10)]
    assert choose(losses).candidates[1].difference == pytest.approx(1)


def test_a_head_that_was_replaced_is_an_error_and_not_a_random_head(record_states, tmp_path):
    model = bert()
    model.classifier = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    trajectory = record_states(model, num_states=2)
    dataset = [{"input_ids": [index % 8, 1], "labels": index % 2} for index in range(80)]
    with pytest.raises(TrajectoryError, match=r"'classifier\.(0\.)?(bias|weight)'"):
        through(Gate(dataset=dataset), trajectory, tmp_path)
    assert not (tmp_path / "out").exists()


def test_every_model_sees_the_same_random_numbers_and_no_gradient(trajectory):
    seen = []

    def compute_loss(model):
        seen.append((torch.rand(1).item(), torch.is_grad_enabled(), model.training))
        return [torch.tensor(1.0)] * 10

    gate = Gate(compute_loss, seed=5)
    torch.manual_seed(0)
    assert gate.losses(make_resnet()) == [1.0] * 10
    after = torch.rand(1).item()
    gate.losses(make_resnet())
    assert seen[0] == seen[1]
    assert seen[0][1:] == (False, False)
    torch.manual_seed(0)
    make_resnet()
    assert torch.rand(1).item() == after


def test_the_card_says_what_the_gate_chose(trajectory, tmp_path):
    goal = float(trajectory.tensor(BIAS, 1)[0])
    result = predict_overflowed_weights(
        trajectory, predictor=Constant(), steps=2, output_dir=tmp_path / "out", gate=Gate(distance_to(goal))
    )
    assert result.gate.chosen == "Θ1"
    assert result.gate.sentence in str(result)
    assert result.to_dict()["gate"]["chosen"] == "Θ1"
    card = (result.path / "README.md").read_text()
    assert "the gate chose Θ1, with a validation loss of" in card
    assert "| `Θ1` (these weights) |" in card
    assert "| candidate | `validation loss` | minus Θ0 | 95% interval | p (corrected) |" in card
    assert "| all tensors | those of the state Θ1 as it was recorded |" in card
    assert "| normalisation layers |" not in card
    assert result.gate.rule.replace("|t|", "&#124;t&#124;") in card
    assert "model = trajectory.load_model(1)\nmodel.save_pretrained(" in card and "know-hf predict" not in card
    assert torch.equal(weights(result.path)[BIAS], trajectory.tensor(BIAS, 1))


def test_what_was_chosen_is_finished_before_it_appears(trajectory, tmp_path):
    def finish(folder, result, decided):
        assert not (tmp_path / "out").exists()
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert result.path == tmp_path / "out"
        (folder / "README.md").write_text(decided.sentence)

    gate = Gate(lambda model: 1.0, margin=0.0)
    result, decided = through(gate, trajectory, tmp_path, steps=1, finish=finish)
    assert (result.path / "README.md").read_text() == decided.sentence


def test_an_average_is_tried_once(trajectory, tmp_path):
    gate = Gate(lambda model: 1.0, margin=0.0)
    _, decided = through(gate, trajectory, tmp_path, Average(), steps=1)
    assert [candidate.name for candidate in decided.candidates[5:]] == ["Average, 1 step"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_adapters_are_tried_on_their_base_which_stays_as_it_was(record_states, tmp_path):
    def base():
        return make_resnet(seed=3)

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"])
    trajectory = record_states(get_peft_model(base(), config), num_states=3)
    bias = next(name for name in trajectory.names if name.endswith(BIAS))
    goal = float(trajectory.tensor(bias, 1)[0])
    seen = []

    def compute_loss(model):
        found = {name: tensor for name, tensor in model.state_dict().items() if "modules_to_save" in name}
        (value,) = (float(tensor[0]) for name, tensor in found.items() if name.endswith("bias"))
        seen.append(value)
        return [abs(value - goal) * (1 + k / 10) for k in range(10)]

    model = base().train()
    next(model.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    result, decided = through(Gate(compute_loss, base_model=model), trajectory, tmp_path, steps=1)
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == before
    assert decided.chosen == "Θ1"
    assert len(set(seen)) == 5
    assert torch.equal(weights(result.path)[bias], trajectory.tensor(bias, 1))
    untouched = base().state_dict()
    assert model.state_dict().keys() == untouched.keys()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"one of adapters.*pass it as base_model="):
        through(Gate(compute_loss), trajectory, tmp_path / "other")


def test_an_error_leaves_nothing_behind_and_comes_early(trajectory, tmp_path):
    calls = []

    def compute_loss(model):
        calls.append(model)
        return [0.5, 0.6]

    with pytest.raises(ValueError, match="2 losses of Θ0"):
        through(Gate(compute_loss), trajectory, tmp_path)
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="compute_loss is to give one number or a list of numbers, got None"):
        through(Gate(lambda model: None), trajectory, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError):
        through(Gate(distance_to(0.0)), trajectory, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_without_loss_is_an_error():
    images = make_images(12).remove_columns("labels")
    with pytest.raises(ValueError, match="gives no loss for batches of pixel_values; the validation examples need"):
        Gate(dataset=images).losses(make_resnet())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either compute_loss or dataset"),
        ({"compute_loss": len, "dataset": [1]}, "not both"),
        ({"dataset": [1], "batch_size": 0}, "batch_size=0: choose at least 1"),
        ({"dataset": [1], "level": 0.0}, "level must lie strictly between 0 and 1, got 0.0"),
        ({"dataset": [1], "margin": float("nan")}, "margin must be 0 or more.*got nan"),
    ],
)
def test_options_that_make_no_gate_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        Gate(**options)


def test_the_table_and_the_dictionary_say_what_was_tried():
    random = np.random.default_rng(5)
    reference = random.exponential(size=50)
    result = choose({"Θ0": reference, "Θ1": reference - 0.5 + 0.1 * random.normal(size=50)}, metric="error")
    lines = result.markdown().splitlines()
    assert lines[0] == "| candidate | error | minus Θ0 | 95% interval | p (corrected) |"
    assert lines[2].startswith("| Θ0 | ") and lines[2].endswith(" |  |  |  |")
    assert lines[3].startswith("| **Θ1** (chosen) | ")
    record = result.to_dict()
    assert record["scores"].keys() == {"Θ0", "Θ1"}
    assert record["chosen"] == "Θ1"
    assert record["sentence"] in str(result) and record["rule"] in str(result)
    assert record["candidates"][1]["p_value"] == result.candidates[1].p_value
