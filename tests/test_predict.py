"""`predict_overflowed_weights`: what is written, refused and reported."""

import json

import pytest
import torch
from conftest import edit_manifest, make_images, make_resnet, rewrite_state
from doubles.constant_predictor import Constant, weights
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForSemanticSegmentation,
    ResNetForImageClassification,
)

from know_hf import KNOWNConfig, KNOWNModel, WeightTrajectory, predict_overflowed_weights
from know_hf.prediction import SHIPPED_KNOWN
from know_hf.trajectory import TrajectoryError

CONV = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
FC = "classifier.1.weight"
BIAS = "classifier.1.bias"
NORM = "resnet.embedder.embedder.normalization.bias"
MEAN = "resnet.embedder.embedder.normalization.running_mean"


@pytest.fixture(scope="module")
def known() -> KNOWNModel:
    torch.manual_seed(0)
    return KNOWNModel(KNOWNConfig())


@pytest.fixture
def predict(tmp_path):
    """Predict into `out`; returns the result and the written tensors."""

    def predict(trajectory, predictor=None, **options):
        result = predict_overflowed_weights(trajectory, predictor=predictor, output_dir=tmp_path / "out", **options)
        return result, weights(result.path)

    return predict


def test_zero_residual_gives_theta_0_bit_for_bit(trajectory, record_states, predict):
    result, _ = predict(trajectory, Constant(0.0), steps=3)
    before = trajectory.path / "state-0/model.safetensors"
    assert (result.path / "model.safetensors").read_bytes() == before.read_bytes()
    module = nn.Linear(2, 2)
    module.weight.data.fill_(-0.0)
    _, written = predict(record_states(module, num_states=2), Constant(0.0), overwrite=True)
    assert torch.signbit(written["weight"]).all()


def test_each_role_is_predicted_by_its_network_and_other_tensors_are_copied(trajectory, known, predict):
    result, written = predict(trajectory.path, known=known)
    for name, role in ((CONV, "conv"), (FC, "fc"), (BIAS, "bias")):
        history = trajectory.history(name)
        with torch.no_grad():
            expected = known(history=history.reshape(5, -1).T, role=role).prediction.reshape(history.shape[1:])
        torch.testing.assert_close(written[name], expected, rtol=0, atol=1e-6)
        assert not torch.equal(written[name], trajectory.tensor(name))
    for name, role in trajectory.roles.items():
        if role.role in ("norm", "copied"):
            assert torch.equal(written[name], trajectory.tensor(name)), name
    model = AutoModelForImageClassification.from_pretrained(result.path)
    for loaded in (model, result.load_model()):
        assert isinstance(loaded, ResNetForImageClassification)
        assert torch.equal(loaded.classifier[1].weight, written[FC])
    assert torch.isfinite(model(**make_images(4)[:]).loss)
    assert (result.path / "config.json").read_text() == (trajectory.path / "config.json").read_text()


def test_steps_are_a_recursion_and_norms_can_be_predicted_as_biases(trajectory, predict):
    predictor = Constant(0.25, num_states=3)
    _, written = predict(trajectory, predictor, steps=3, norm="predict")
    assert torch.equal(written[NORM], trajectory.tensor(NORM) + 0.75)
    assert torch.equal(written[MEAN], trajectory.tensor(MEAN))
    assert {role for role, _ in predictor.calls} == {"conv", "fc", "bias"}
    history = trajectory.history(BIAS)
    first, second, third = (window for role, window in predictor.calls if role == "bias" and len(window) == 4)
    assert torch.equal(first, history[-3:].T)
    torch.testing.assert_close(second, torch.stack([history[3], history[4], history[4] + 0.25], dim=1))
    torch.testing.assert_close(third[:, 1:], torch.stack([history[4] + 0.25, history[4] + 0.5], dim=1))
    torch.testing.assert_close(written[BIAS], trajectory.tensor(BIAS) + 0.75)


def test_the_card_is_written_with_the_checkpoint(trajectory, predict):
    options = {"predictor_options": {"factor": 0.9}, "norm": "predict", "dtype": torch.bfloat16}
    result, _ = predict(trajectory, "shrink", **options)
    card = ModelCard.load(result.path / "README.md")
    assert card.data.library_name == "transformers" and "know_hf" in card.data.tags
    call = 'predictor="shrink", predictor_options={"factor": 0.9}, steps=1, norm="predict", dtype=torch.bfloat16'
    flags = """--predictor shrink --predictor-options '{"factor": 0.9}' --norm predict --dtype bfloat16"""
    assert call in card.text and flags in card.text and "No comparison was run" in card.text
    assert (result.path / "forgetting.png").stat().st_size > 1000


def test_the_report_has_every_role(trajectory, predict):
    result, _ = predict(trajectory, Constant(0.5), steps=2)
    report = result.report
    assert {role: r.tensors for role, r in report.items()} == {"bias": 1, "conv": 5, "copied": 18, "fc": 2, "norm": 12}
    assert report["fc"].parameters == 4 * 16 + 16 * 8
    assert report["fc"].mean_residual == report["fc"].largest_residual == 1.0
    total = sum(float(trajectory.tensor(n).abs().sum()) for n, r in trajectory.roles.items() if r.role == "fc")
    assert report["fc"].mean_ratio == pytest.approx(192 / total)
    assert report["norm"].mean_residual == 0
    assert str(result).startswith(f"Wrote Constant, 2 steps, to {result.path}/; nothing checks whether it is better")
    loading = f'model = AutoModelForImageClassification.from_pretrained("{result.path}/")'
    assert str(result).endswith(f"next: from transformers import AutoModelForImageClassification; {loading}")


def test_frozen_tensors_are_copied_without_a_prediction(record_states, predict):
    model = make_resnet()
    model.resnet.requires_grad_(False)
    trajectory = record_states(model)
    predictor = Constant(0.5)
    result, written = predict(trajectory, predictor)
    assert [role for role, _ in predictor.calls] == ["bias", "fc"]
    assert torch.equal(written[CONV], trajectory.tensor(CONV))
    assert (result.report["conv"].unchanged, result.report["fc"].unchanged) == (5, 1)
    assert result.report["conv"].mean_residual == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_recorded_dtype_is_written_by_default(record_states, predict, dtype):
    trajectory = record_states(nn.Linear(8, 8).to(dtype), num_states=3)
    _, written = predict(trajectory, Constant(0.5))
    assert torch.equal(written["weight"], (trajectory.tensor("weight").double() + 0.5).to(dtype))


@pytest.fixture
def record_values(tmp_path):
    """Records a layer beside a parameter `w` with one value per state, repeated 8 times."""

    def record(dtype, values):
        module, path = nn.Linear(2, 2), tmp_path / f"{dtype} {values}"
        trajectory = WeightTrajectory.create(path)
        for state, value in enumerate(values):
            module.w = nn.Parameter(torch.full((2, 4), value, dtype=torch.float64).to(dtype), requires_grad=False)
            trajectory.record(module, num_examples=2 ** (len(values) - state), steps=1)
            module.weight.data += 0.01
        return trajectory

    return record


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_dtypes_that_cannot_be_predicted_are_kept_with_a_warning_if_they_moved(record_values, predict, dtype):
    trajectory = record_values(dtype, [1.0, 2.0, 1.0])
    result, written = predict(trajectory, Constant(0.5))
    assert torch.equal(written["w"].view(torch.uint8), trajectory.tensor("w").view(torch.uint8))
    assert torch.equal(written["weight"], trajectory.tensor("weight") + 0.5)
    assert (result.tensors["w"].kept, result.tensors["weight"].kept) == (8, 0)
    (text,) = result.warnings
    assert "'w'" in text and str(dtype) in text
    assert text in (result.path / "README.md").read_text()
    still, _ = predict(record_values(dtype, [1.0, 1.0]), Constant(0.5), overwrite=True)
    assert still.warnings == [] and still.tensors["w"].kept == 0


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz])
def test_dtypes_that_cannot_be_stored_are_refused_before_anything_is_written(record_values, tmp_path, dtype):
    with pytest.raises(TrajectoryError, match=rf"'w'.*{dtype}"):
        record_values(dtype, [1.0, 2.0])
    assert list(tmp_path.iterdir()) == []


def test_float64_is_compared_as_stored(record_values, predict):
    result, written = predict(record_values(torch.float64, [1.0, 1 + 1e-12]), Constant(0.5))
    assert (result.tensors["w"].unchanged, result.tensors["w"].predicted) == (0, 8)
    assert (written["w"] == 1.5).all()
    result, written = predict(record_values(torch.float64, [1e300, 1e300]), Constant(0.5), overwrite=True)
    assert result.tensors["w"].unchanged == 1 and (written["w"] == 1e300).all()
    for values in ([1e300, 2e300], [1.0, 1e300]):
        with pytest.raises(ValueError, match=r"'w' of state \d .*e\+300.*float32"):
            predict(record_values(torch.float64, values), Constant(0.5), overwrite=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_dtype_can_be_written(trajectory, predict, dtype):
    result, written = predict(trajectory, Constant(0.5), dtype=dtype)
    assert torch.equal(written[FC], (trajectory.tensor(FC) + 0.5).to(dtype))
    assert torch.equal(written[NORM], trajectory.tensor(NORM).to(dtype))
    assert {t.dtype for name, t in written.items() if "num_batches" not in name} == {dtype}
    assert result.load_model().dtype == dtype


def test_values_too_large_for_the_dtype_are_an_error(record_states, predict):
    model = make_resnet()
    model.get_buffer(MEAN.replace("running_mean", "running_var")).fill_(1e5)
    with pytest.raises(ValueError, match=r"running_var'.*too large for torch\.float16"):
        predict(record_states(model, num_states=2), "shrink", dtype=torch.float16)


def test_residuals_below_the_rounding_are_reported(record_states, predict):
    trajectory = record_states(nn.Linear(8, 8).to(torch.bfloat16), num_states=2)
    result, _ = predict(trajectory, Constant(1e-7))
    assert sum(report.lost for report in result.report.values()) == 72
    assert result.warnings[0].startswith("100% of the predicted changes are lost")
    result, written = predict(trajectory, Constant(1e-4), dtype=torch.float32, overwrite=True)
    assert result.warnings == []
    assert torch.equal(written["weight"], trajectory.tensor("weight").float() + 1e-4)


def test_shards_change_nothing(trajectory, predict):
    _, one = predict(trajectory)
    result, many = predict(trajectory, max_shard_size=5000, overwrite=True)
    assert len(list(result.path.glob("*.safetensors"))) > 2
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    model = AutoModelForImageClassification.from_pretrained(result.path)
    assert torch.equal(model.classifier[1].weight, one[FC])


def test_batch_norm_statistics_are_those_of_the_predicted_weights(trajectory, predict):
    pixels = make_images()[:]["pixel_values"]
    result, written = predict(trajectory, "shrink", recalibrate_with=[{"pixel_values": pixels}])
    model = result.load_model()
    with torch.no_grad():
        features = model.resnet.embedder.embedder.convolution(pixels)
    statistics = model.resnet.embedder.embedder.normalization
    torch.testing.assert_close(statistics.running_mean, features.mean((0, 2, 3)))
    assert not torch.equal(statistics.running_mean, trajectory.tensor(MEAN))
    assert torch.equal(written[MEAN], statistics.running_mean)
    for batch in (pixels, pixels.bfloat16()):
        options = {"dtype": torch.bfloat16, "recalibrate_with": [{"pixel_values": batch}], "overwrite": True}
        half = predict(trajectory, "shrink", **options)[1][MEAN]
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), written[MEAN], rtol=0.05, atol=0.02)


def test_batch_norm_statistics_have_other_names_on_disk_in_some_models(record_states, predict):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 4}
    pools = {"out_indices": [1, 2, 3, 4], "pool_scales": [1], "auxiliary_channels": 4}
    model = BeitForSemanticSegmentation(BeitConfig(**sizes, **pools, image_size=32, patch_size=8))
    trajectory = record_states(model, num_states=2)
    mean = next(name for name in trajectory.names if name.endswith("running_mean"))
    assert mean not in model.state_dict(), "or this tests nothing"
    _, written = predict(trajectory, Constant(0.1), recalibrate_with=[{"pixel_values": torch.randn(4, 3, 32, 32)}])
    assert not torch.equal(written[mean], trajectory.tensor(mean))


def test_weights_that_were_all_zero_have_no_ratio(tmp_path, predict):
    module = nn.Linear(3, 2)
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    for state in range(2):
        module.bias.data.fill_(float(state))
        trajectory.record(module, num_examples=4 >> state, steps=1)
    result, _ = predict(trajectory, Constant(0.1))
    assert result.to_dict()["tensors"]["bias"]["mean_ratio"] is None
    json.dumps(result.to_dict(), allow_nan=False)
    assert "inf" not in str(result) and "inf" not in (result.path / "README.md").read_text()


def test_a_prediction_is_copied_into_a_model(record_states, predict):
    def adapter():
        return get_peft_model(make_resnet(), LoraConfig(r=2, target_modules=["convolution"]))

    for make in (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), make_resnet, adapter):
        trajectory = record_states(make(), num_states=2, name=f"states of {make}")
        result, written = predict(trajectory, Constant(0.5), max_shard_size=1000, overwrite=True)
        model = make()
        result.load_into(model)
        loaded = get_peft_model_state_dict(model) if make is adapter else model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())
    assert list(result.tensors) == trajectory.names
    assert all(torch.equal(tensor, trajectory.tensor(name) + 0.5) for name, tensor in loaded.items())
    with pytest.raises(TrajectoryError, match="Linear"):
        result.load_into(nn.Linear(2, 2))


def test_a_model_of_another_class_is_loaded_with_model_class(record_states, predict):
    class MyResNet(ResNetForImageClassification):
        pass

    result, _ = predict(record_states(MyResNet(make_resnet().config), num_states=2), Constant(0.5))
    with pytest.raises(TrajectoryError, match=r"'MyResNet'.*model_class="):
        result.load_model()
    assert type(result.load_model(model_class=MyResNet)) is MyResNet


def test_known_is_given_as_model_or_path_and_shipped_by_default(trajectory, known, tmp_path, predict):
    known.save_pretrained(tmp_path / "known")
    for same in (
        (known, tmp_path / "known", str(tmp_path / "known")),
        (None, KNOWNModel.from_pretrained(SHIPPED_KNOWN)),
    ):
        first, *others = (predict(trajectory, known=given, overwrite=True)[1][FC] for given in same)
        assert all(torch.equal(first, other) for other in others)
    make_resnet().save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="resnet holds no KNOWN weights"):
        predict(trajectory, known=tmp_path / "resnet", overwrite=True)
    with pytest.raises(FileNotFoundError, match="nope"):
        predict(trajectory, known=tmp_path / "nope")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "state"), [(CONV, 2), (NORM, 0)])
def test_values_that_are_not_finite_name_tensor_and_state(trajectory_copy, predict, value, name, state):
    rewrite_state(trajectory_copy, state, lambda tensors: tensors[name].view(-1)[0].fill_(value))
    with pytest.raises(TrajectoryError, match=rf"'{name}' of state {state} .* 1 NaN or infinite"):
        predict(trajectory_copy)
    assert not (trajectory_copy.parent / "out").exists()


def test_a_quantised_model_cannot_be_predicted(trajectory_copy, predict):
    config = trajectory_copy / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"bits": 4}}))
    edit_manifest(trajectory_copy, lambda content: content["files"][0].update(size=config.stat().st_size))
    with pytest.raises(TrajectoryError, match=r"config\.json.*quanti.*dequantize"):
        predict(trajectory_copy)


def test_too_few_states_name_the_schedule(record_states, predict):
    with pytest.raises(ValueError, match=r"3 states.*KNOWN needs 5 states.*num_states=5"):
        predict(record_states(make_resnet(), num_states=3))


def test_statistics_of_a_plain_module_are_refused_before_the_work(record_states, predict):
    trajectory = record_states(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), num_states=2)
    predictor = Constant()
    with pytest.raises(ValueError, match=r"plain nn\.Module.*recalibrate_batch_norm"):
        predict(trajectory, predictor, recalibrate_with=[{"input": torch.ones(2, 2)}])
    assert predictor.calls == []


class Column(Constant):
    def residual(self, history, role):
        return super().residual(history, role)[:, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps.*got 0"),
        ({"steps": 1.5}, "got 1.5"),
        ({"norm": "drop"}, "norm.*'drop'"),
        ({"dtype": torch.int8}, r"dtype.*torch\.int8"),
        ({"dtype": torch.float8_e5m2}, r"dtype.*torch\.float8_e5m2"),
        ({"dtype": "float16"}, r"torch\.float16, got 'float16'"),
        ({"known": 3}, "known must be a KNOWNModel.*got 3"),
        ({"kernel": "foo"}, "unknown kernel 'foo'.*eager"),
        ({"known": SHIPPED_KNOWN, "predictor": "shrink"}, "'shrink' does not use KNOWN"),
        ({"predictor_options": {"factor": 1}}, "predictor_options=.*given by name"),
        ({"predictor": "shrnk"}, "'shrnk'"),
        ({"predictor": "known", "predictor_options": {"kernel": "eager"}}, "predictor_options.*KNOWN"),
        ({"predictor": "shrink", "kernel": "eager"}, "kernel='eager'.*KNOWN"),
        ({"predictor": "lines", "predictor_options": {"base": 5}}, "base.*5"),
        ({"predictor": "shrink", "predictor_options": {"fraction": 1}}, "'fraction'.*'shrink' takes factor.*0.8"),
        ({"predictor": Constant}, r"class; pass Constant\(\)"),
        ({"predictor": 3}, r"residual\(history, role\), got 3"),
        ({"predictor": Column()}, r"Column returned .*\(\d+, 1\).*'classifier\.1\.bias'"),
        ({"predictor": Constant(float("nan")), "steps": 2}, r"'classifier\.1\.bias'.*not finite after 2 step"),
    ],
)
def test_invalid_arguments(trajectory, tmp_path, predict, arguments, message):
    with pytest.raises(ValueError, match=message):
        predict(trajectory, **arguments)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="'speed'"):
        predict(trajectory, speed=2)
