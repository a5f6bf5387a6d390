"""Predictions with the variant "combination" of KNOWN from recorded trajectories."""

import math

import pytest
import torch
from conftest import make_resnet
from doubles.constant_predictor import weights
from doubles.small_trainers import PEFT_WARNING
from doubles.task_fixtures import SIZES
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from know_hf import Gate, KNOWNConfig, KNOWNModel, WeightTrajectory, meta_train, plan_prediction
from know_hf import predict_overflowed_weights as predict
from know_hf.cards import known_card
from know_hf.known import combine
from know_hf.known.combination_network import ELEMENTS
from know_hf.prediction.tensor_contexts import followed_by_norm, tensor_contexts
from know_hf.predictors import KNOWNCombination, KNOWNPredictor, TensorSnapshots
from know_hf.roles import tensor_roles

HEAD = "classifier.1.weight"


def combination(**coefficients: float) -> KNOWNModel:
    """A model with the same coefficients for every tensor, and `states` for each state; random ones by default."""
    torch.manual_seed(0)
    model = KNOWNModel(KNOWNConfig(variant="combination"))
    network = model.combination
    if not coefficients:
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        for name, value in coefficients.items():
            bias = network.state_head.bias if name == "states" else network.tensor_head.bias
            bias[0 if name == "states" else ELEMENTS.index(name)] = math.atanh(value / 1.5)
    return model


def written(trajectory: WeightTrajectory, folder, known=None, **options: object) -> dict[str, torch.Tensor]:
    return weights(predict(trajectory, known, output_dir=folder, card=False, **options).path)


def test_predictions_are_combinations_of_what_is_recorded(trajectory, tmp_path, monkeypatch):
    model = combination()
    model.save_pretrained(tmp_path / "known")
    values = written(trajectory, tmp_path / "out", tmp_path / "known")
    contexts, predictor = tensor_contexts(trajectory), KNOWNCombination(model)
    assert plan_prediction(trajectory, model).snapshots == ["start", 4, 3, 2, 1, 0]
    for name, role in trajectory.roles.items():
        theta0, start = trajectory.tensor(name), trajectory.tensor(name, "start")
        if role.role == "copied":
            assert torch.equal(values[name], theta0)
            continue
        states = [trajectory.tensor(name, k) for k in range(1, 5)]
        snapshots = TensorSnapshots(theta0, start, start, states=states, context=contexts[name])
        basis = predictor.basis(snapshots)
        residual = combine(basis.elements, model.coefficients(basis.tensor_features, basis.state_features))
        assert residual.any()
        torch.testing.assert_close(values[name], theta0 + residual)
    monkeypatch.setattr("know_hf.prediction.pieces.PIECE_SIZE", 100)
    again = written(trajectory, tmp_path / "pieces", tmp_path / "known")
    assert all(torch.equal(again[name], value) for name, value in values.items())


def test_contexts_of_a_recorded_trajectory(trajectory):
    contexts = tensor_contexts(trajectory)
    head, first = contexts[HEAD], contexts["resnet.embedder.embedder.convolution.weight"]
    assert (head.role, head.depth, head.is_normalised) == ("fc", 1.0, False)
    assert (first.role, first.depth, first.is_normalised) == ("conv", 0.0, True)
    sizes = [state.num_examples for state in trajectory.states]
    assert head.fractions == tuple(size / sizes[0] for size in sizes)
    assert head.steps == tuple(state.steps for state in trajectory.states)
    assert head.eval_losses == tuple(state.metrics["eval_loss"] for state in trajectory.states)
    assert head.train_losses == ()


def test_layers_that_a_norm_seems_to_follow():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    model.conv1, model.bn1, model.conv2, model.out = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), None
    assert followed_by_norm(tensor_roles(model)) == {"0.weight", "0.bias", "conv1.weight", "conv1.bias"}


def test_controls_as_models(trajectory, tmp_path):
    for name, model, options in (
        ("shrink", combination(theta0=0.1), {"factor": 0.9}),
        ("average", combination(states=0.2), {}),
        ("start_interpolation", combination(start=-0.25), {"scale": 0.75}),
    ):
        expected = written(trajectory, tmp_path / name, predictor=name, predictor_options=options, norm="predict")
        values = written(trajectory, tmp_path / f"{name}-known", model)
        for tensor, value in expected.items():
            torch.testing.assert_close(values[tensor], value)


def test_tail_and_branches_are_read(tmp_path):
    model, trajectory = nn.Linear(6, 4), WeightTrajectory.create(tmp_path / "trajectory")

    def move() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape)

    for index in range(2):
        trajectory.record_tail(model, index, index + 1)
        move()
    trajectory.record(model, num_examples=8, steps=3)
    for _ in range(2):
        move()
        trajectory.record(model, num_examples=4, steps=3, kind="branch")
    trajectory = WeightTrajectory(trajectory.path)
    assert set(plan_prediction(trajectory, combination()).snapshots) == {"tail-0", "tail-1", "branch-0", "branch-1", 0}
    for name, known in (("tail_average", combination(tail=2 / 3)), ("branch_average", combination(branches=1.0))):
        expected = written(trajectory, tmp_path / name, predictor=name)
        values = written(trajectory, tmp_path / f"{name}-known", known)
        for tensor, value in expected.items():
            torch.testing.assert_close(values[tensor], value)


def test_a_new_model_and_unmoved_tensors_keep_theta0(trajectory, record_states, tmp_path):
    values = written(trajectory, tmp_path / "new", KNOWNModel(KNOWNConfig(variant="combination")))
    assert all(torch.equal(values[name], trajectory.tensor(name)) for name in trajectory.names)
    model = make_resnet()
    for parameter in model.resnet.parameters():
        parameter.requires_grad = False
    frozen = record_states(model, 2)
    values = written(frozen, tmp_path / "frozen", combination())
    changed = {name for name in frozen.names if not torch.equal(values[name], frozen.tensor(name))}
    assert changed == {HEAD, "classifier.1.bias"}


@PEFT_WARNING
def test_adapters_by_their_products(record_states, tmp_path):
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(BertForSequenceClassification(BertConfig(vocab_size=32, **SIZES)), config)
    nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    trajectory = record_states(model, 3)

    def product(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        first, second = (next(t for n, t in tensors.items() if part in n) for part in ("lora_A", "lora_B"))
        return second @ first

    values = written(trajectory, tmp_path / "out", combination(theta0=0.3))
    theta0 = {name: trajectory.tensor(name) for name in trajectory.names}
    torch.testing.assert_close(product(values), 0.7 * product(theta0), rtol=1e-4, atol=1e-6)
    same = written(trajectory, tmp_path / "same", KNOWNModel(KNOWNConfig(variant="combination")))
    assert all(torch.equal(same[name], theta0[name]) for name in theta0)


def test_a_gate_has_it_among_its_candidates(trajectory, tmp_path):
    result = predict(
        trajectory,
        combination(start=0.3),
        output_dir=tmp_path / "out",
        gate=Gate(lambda model: [float(sum(p.abs().mean() for p in model.parameters()))] * 10, margin=0.0),
    )
    assert "KNOWN, 1 step" in {candidate.name for candidate in result.gate.candidates}


def test_the_cards(trajectory, tmp_path):
    model = combination(start=0.3)
    model.save_pretrained(tmp_path / "known")
    result = predict(trajectory, tmp_path / "known", output_dir=tmp_path / "out")
    card = (result.path / "README.md").read_text()
    assert "combines the displacements" in card and "times the data" not in card
    card = str(known_card(KNOWNConfig(variant="combination"), title="x", path="me/x"))
    assert f"one network of {model.num_parameters():,} parameters" in card and "steps=" not in card
    assert "not scale-equivariant" not in card and "three networks" not in card


def test_what_the_variant_does_not_do_is_refused(trajectory, tmp_path):
    model, output = combination(), {"output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match="KNOWNCombination predicts in one step, got steps=2"):
        predict(trajectory, model, steps=2, **output)
    with pytest.raises(ValueError, match=r"kernel='eager' .*combination"):
        predict(trajectory, model, kernel="eager", **output)
    with pytest.raises(ValueError, match=r"meta_train .*combination"):
        meta_train(model, None)
    with pytest.raises(ValueError, match="KNOWNCombination"):
        KNOWNPredictor(model)
    with pytest.raises(ValueError, match="KNOWNPredictor"):
        KNOWNCombination(KNOWNModel(KNOWNConfig()))
    assert not (tmp_path / "out").exists()
