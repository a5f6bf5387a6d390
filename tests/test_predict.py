"""`predict_overflowed_weights`: what is written, refused and reported."""

import json
from dataclasses import dataclass

import pytest
import torch
from conftest import edit_manifest, make_images, make_resnet, rewrite_state
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForSemanticSegmentation,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetForImageClassification,
)

from know_hf import KNOWNConfig, KNOWNModel, WeightTrajectory, plan_prediction, predict_overflowed_weights
from know_hf.trajectory import TrajectoryError

CONV = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
FC = "classifier.1.weight"
BIAS = "classifier.1.bias"
NORM = "resnet.embedder.embedder.normalization.bias"
MEAN = "resnet.embedder.embedder.normalization.running_mean"


@dataclass
class Constant:
    """Predicts the same residual for every weight and notes what it was asked."""

    value: float = 0.0
    num_states: int | None = None

    def __post_init__(self):
        self.asked = []

    def residual(self, history, role):
        self.asked.append((role, history.clone()))
        return torch.full((len(history),), self.value)


@pytest.fixture(scope="module")
def known() -> KNOWNModel:
    torch.manual_seed(0)
    return KNOWNModel(KNOWNConfig())


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_zero_residual_gives_the_full_data_state_bit_for_bit(trajectory, tmp_path):
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.0), output_dir=tmp_path / "out", steps=3)
    before = trajectory.path / "state-0/model.safetensors"
    assert (result.path / "model.safetensors").read_bytes() == before.read_bytes()


def test_negative_zero_stays(record_states, tmp_path):
    module = nn.Linear(2, 2)
    module.weight.data.fill_(-0.0)
    trajectory = record_states(module, num_states=2)
    predict_overflowed_weights(trajectory, predictor=Constant(0.0), output_dir=tmp_path / "out")
    assert torch.signbit(weights(tmp_path / "out")["weight"]).all()


def test_each_role_is_predicted_by_its_network(trajectory, known, tmp_path):
    predict_overflowed_weights(trajectory, known, output_dir=tmp_path / "out")
    out = weights(tmp_path / "out")
    for name, role in ((CONV, "conv"), (FC, "fc"), (BIAS, "bias")):
        history = trajectory.history(name)
        with torch.no_grad():
            expected = known(history=history.reshape(5, -1).T, role=role).prediction.reshape(history.shape[1:])
        torch.testing.assert_close(out[name], expected, rtol=0, atol=1e-6)
        assert not torch.equal(out[name], trajectory.tensor(name))


def test_norms_and_buffers_are_those_of_the_full_data_state(trajectory, known, tmp_path):
    predict_overflowed_weights(trajectory, known, output_dir=tmp_path / "out")
    out = weights(tmp_path / "out")
    for name, role in trajectory.roles.items():
        if role.role in ("norm", "copied"):
            assert torch.equal(out[name], trajectory.tensor(name)), name


def test_norms_can_be_predicted_as_biases_are(trajectory, tmp_path):
    predictor = Constant(0.5)
    predict_overflowed_weights(trajectory, predictor=predictor, norm="predict", output_dir=tmp_path / "out")
    out = weights(tmp_path / "out")
    assert torch.equal(out[NORM], trajectory.tensor(NORM) + 0.5)
    assert torch.equal(out[MEAN], trajectory.tensor(MEAN))
    assert {role for role, _ in predictor.asked} == {"conv", "fc", "bias"}


def test_steps_are_a_recursion_with_the_full_data_last(trajectory, tmp_path):
    predictor = Constant(0.25, num_states=3)
    predict_overflowed_weights(trajectory, predictor=predictor, steps=3, output_dir=tmp_path / "out")
    history = trajectory.history(BIAS)
    first, second, third = (window for role, window in predictor.asked if role == "bias")
    assert torch.equal(first, history[-3:].T)
    torch.testing.assert_close(second, torch.stack([history[3], history[4], history[4] + 0.25], dim=1))
    torch.testing.assert_close(third[:, 1:], torch.stack([history[4] + 0.25, history[4] + 0.5], dim=1))
    torch.testing.assert_close(weights(tmp_path / "out")[BIAS], trajectory.tensor(BIAS) + 0.75)


def test_the_checkpoint_is_an_ordinary_one(trajectory, known, tmp_path):
    result = predict_overflowed_weights(trajectory.path, known, output_dir=tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert isinstance(model, ResNetForImageClassification)
    assert torch.equal(model.classifier[1].weight, weights(tmp_path / "out")[FC])
    assert torch.equal(result.load_model().classifier[1].weight, model.classifier[1].weight)
    batch = make_images(4)[:]
    assert torch.isfinite(model(**batch).loss)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == json.loads((trajectory.path / "config.json").read_text())


def test_the_card_is_written_with_the_checkpoint(trajectory, tmp_path):
    options = {"predictor": "shrink", "predictor_options": {"factor": 0.9}, "norm": "predict", "dtype": torch.bfloat16}
    result = predict_overflowed_weights(trajectory, output_dir=tmp_path / "out", **options)
    card = ModelCard.load(result.path / "README.md")
    assert card.data.library_name == "transformers" and "know_hf" in card.data.tags
    call = 'predictor="shrink", predictor_options={"factor": 0.9}, steps=1, norm="predict", dtype=torch.bfloat16'
    assert call in card.text
    flags = """--predictor shrink --predictor-options '{"factor": 0.9}' --norm predict --dtype bfloat16"""
    assert flags in card.text
    assert "No comparison was run" in card.text
    assert (result.path / "forgetting.png").stat().st_size > 1000


def test_the_report_says_what_happened(trajectory, tmp_path):
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.5), steps=2, output_dir=tmp_path / "out")
    report = result.report
    assert {role: r.tensors for role, r in report.items()} == {"bias": 1, "conv": 5, "copied": 18, "fc": 2, "norm": 12}
    assert report["fc"].parameters == 4 * 16 + 16 * 8
    assert report["fc"].mean_residual == report["fc"].largest_residual == 1.0
    total = sum(float(trajectory.tensor(n).abs().sum()) for n, r in trajectory.roles.items() if r.role == "fc")
    assert report["fc"].mean_ratio == pytest.approx(192 / total)
    assert report["norm"].mean_residual == 0
    lines = str(result).splitlines()
    assert lines[0].split()[:8] == ["role", "tensors", "parameters", "unchanged", "mean", "|R|", "max", "|R|"]
    assert lines[4].split()[:6] == ["fc", "2", "192", "0", "1", "1"]


def test_frozen_tensors_are_copied_and_not_asked_for(record_states, tmp_path):
    model = make_resnet()
    model.resnet.requires_grad_(False)
    trajectory = record_states(model)
    predictor = Constant(0.5)
    result = predict_overflowed_weights(trajectory, predictor=predictor, output_dir=tmp_path / "out")
    assert [role for role, _ in predictor.asked] == ["bias", "fc"]
    assert torch.equal(weights(tmp_path / "out")[CONV], trajectory.tensor(CONV))
    assert result.report["conv"].unchanged == 5
    assert result.report["conv"].mean_residual == 0
    assert result.report["fc"].unchanged == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_on_disk_is_kept(record_states, tmp_path, dtype):
    trajectory = record_states(nn.Linear(8, 8).to(dtype), num_states=3)
    predict_overflowed_weights(trajectory, predictor=Constant(0.5), output_dir=tmp_path / "out")
    out = weights(tmp_path / "out")["weight"]
    assert out.dtype == dtype
    assert torch.equal(out, (trajectory.tensor("weight").double() + 0.5).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_to_write_can_be_chosen(trajectory, tmp_path, dtype):
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.5), dtype=dtype, output_dir=tmp_path / "out")
    out = weights(tmp_path / "out")
    assert torch.equal(out[FC], (trajectory.tensor(FC) + 0.5).to(dtype))
    assert torch.equal(out[NORM], trajectory.tensor(NORM).to(dtype))
    assert {t.dtype for name, t in out.items() if "num_batches" not in name} == {dtype}
    assert result.load_model().dtype == dtype
    with pytest.raises(ValueError, match=r"dtype.*torch\.int8"):
        predict_overflowed_weights(trajectory, predictor="shrink", dtype=torch.int8, output_dir=tmp_path / "no")


def test_residuals_below_the_rounding_are_told(record_states, tmp_path):
    trajectory = record_states(nn.Linear(8, 8).to(torch.bfloat16), num_states=2)
    trajectory = WeightTrajectory(trajectory.path)
    result = predict_overflowed_weights(trajectory, predictor=Constant(1e-7), output_dir=tmp_path / "out")
    assert sum(report.lost for report in result.report.values()) == 72
    assert result.warnings[0].startswith("100% of the residuals")
    result = predict_overflowed_weights(
        trajectory, predictor=Constant(1e-4), dtype=torch.float32, output_dir=tmp_path / "single"
    )
    assert result.warnings == []
    assert torch.equal(weights(tmp_path / "single")["weight"], trajectory.tensor("weight").float() + 1e-4)


def test_tied_weights_are_predicted_once_and_tied_in_the_output(record_states, tmp_path):
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    trajectory = record_states(LlamaForCausalLM(config), num_states=2)
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.5), output_dir=tmp_path / "out")
    model = result.load_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, trajectory.tensor("model.embed_tokens.weight") + 0.5)


def test_shards_change_nothing(trajectory, known, tmp_path):
    predict_overflowed_weights(trajectory, known, output_dir=tmp_path / "one")
    predict_overflowed_weights(trajectory, known, output_dir=tmp_path / "many", max_shard_size=5000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "many")
    assert torch.equal(model.classifier[1].weight, one[FC])


def test_batch_norm_statistics_are_those_of_the_predicted_weights(trajectory, tmp_path):
    batch = {"pixel_values": make_images()[:]["pixel_values"]}
    result = predict_overflowed_weights(
        trajectory, predictor="shrink", recalibrate_with=[batch], output_dir=tmp_path / "out"
    )
    model = result.load_model()
    with torch.no_grad():
        features = model.resnet.embedder.embedder.convolution(batch["pixel_values"])
    statistics = model.resnet.embedder.embedder.normalization
    torch.testing.assert_close(statistics.running_mean, features.mean((0, 2, 3)))
    assert not torch.equal(statistics.running_mean, trajectory.tensor(MEAN))
    assert torch.equal(weights(tmp_path / "out")[MEAN], statistics.running_mean)


def test_batch_norm_statistics_have_other_names_on_disk_in_some_models(record_states, tmp_path):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 4}
    config = BeitConfig(
        **sizes, image_size=32, patch_size=8, out_indices=[1, 2, 3, 4], pool_scales=[1], auxiliary_channels=4
    )
    trajectory = record_states(BeitForSemanticSegmentation(config), num_states=2)
    mean = next(name for name in trajectory.names if name.endswith("running_mean"))
    batch = {"pixel_values": torch.randn(4, 3, 32, 32)}
    predict_overflowed_weights(
        trajectory, predictor=Constant(0.1), recalibrate_with=[batch], output_dir=tmp_path / "out"
    )
    model = BeitForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert mean not in model.state_dict(), "or this tests nothing"
    assert not torch.equal(weights(tmp_path / "out")[mean], trajectory.tensor(mean))


def test_statistics_can_be_computed_for_weights_in_bfloat16(trajectory, tmp_path):
    batch = {"pixel_values": make_images()[:]["pixel_values"]}
    options = {"predictor": "shrink", "dtype": torch.bfloat16, "output_dir": tmp_path / "out"}
    predict_overflowed_weights(trajectory, recalibrate_with=[batch], **options)
    written = weights(tmp_path / "out")[MEAN]
    assert written.dtype == torch.bfloat16 and not torch.equal(written, trajectory.tensor(MEAN).bfloat16())
    half = {"pixel_values": batch["pixel_values"].bfloat16()}
    predict_overflowed_weights(trajectory, recalibrate_with=[half], **options, overwrite=True)
    torch.testing.assert_close(weights(tmp_path / "out")[MEAN], written, rtol=0.05, atol=0.02)


def test_numbers_that_are_too_large_for_the_dtype_are_told(record_states, tmp_path):
    model = make_resnet()
    model.get_buffer(MEAN.replace("running_mean", "running_var")).fill_(1e5)
    trajectory = record_states(model, num_states=2)
    with pytest.raises(ValueError, match=r"running_var'.*too large for torch\.float16"):
        predict_overflowed_weights(trajectory, predictor="shrink", dtype=torch.float16, output_dir=tmp_path / "out")


def test_weights_that_were_all_zero_have_no_ratio(record_states, tmp_path):
    module = nn.Linear(3, 2)
    module.bias.data.zero_()
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    for state in range(2):
        module.bias.data.fill_(float(state))
        trajectory.record(module, num_examples=4 >> state, steps=1)
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.1), output_dir=tmp_path / "out")
    assert result.to_dict()["tensors"]["bias"]["mean_ratio"] is None
    json.dumps(result.to_dict(), allow_nan=False)
    assert "inf" not in str(result) and "inf" not in (tmp_path / "out" / "README.md").read_text()


def test_a_plan_of_a_predictor_that_differs_by_depth_has_a_time(trajectory):
    assert plan_prediction(trajectory, predictor="lines").seconds > 0


def test_statistics_of_a_plain_module_are_refused_before_the_work(record_states, tmp_path):
    trajectory = record_states(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), num_states=2)
    predictor = Constant()
    with pytest.raises(ValueError, match=r"plain nn\.Module.*recalibrate_batch_norm"):
        predict_overflowed_weights(
            trajectory,
            predictor=predictor,
            recalibrate_with=[{"input": torch.ones(2, 2)}],
            output_dir=tmp_path / "out",
        )
    assert predictor.asked == []


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), make_resnet])
def test_a_prediction_is_copied_into_a_model(record_states, tmp_path, make):
    trajectory = record_states(make(), num_states=2)
    result = predict_overflowed_weights(
        trajectory, predictor=Constant(0.5), max_shard_size=1000, output_dir=tmp_path / "out"
    )
    model = make()
    result.load_into(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights(result.path).items())
    with pytest.raises(TrajectoryError, match=r"tensor.*Linear"):
        result.load_into(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_a_predicted_adapter_is_copied_into_a_model(record_states, tmp_path):
    config = LoraConfig(r=2, target_modules=["convolution"])
    trajectory = record_states(get_peft_model(make_resnet(), config), num_states=2)
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.5), output_dir=tmp_path / "out")
    model = get_peft_model(make_resnet(), config)
    result.load_into(model)
    assert all(
        torch.equal(tensor, trajectory.tensor(name) + 0.5) for name, tensor in get_peft_model_state_dict(model).items()
    )


def test_a_prediction_of_a_class_of_ones_own_says_how_it_is_loaded(record_states, tmp_path):
    class MyResNet(ResNetForImageClassification):
        pass

    trajectory = record_states(MyResNet(make_resnet().config), num_states=2)
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.5), output_dir=tmp_path / "out")
    with pytest.raises(TrajectoryError, match=r"'MyResNet'.*model_class="):
        result.load_model()
    assert type(result.load_model(model_class=MyResNet)) is MyResNet


@pytest.mark.parametrize("place", ["trajectory", "."])
def test_the_trajectory_is_not_replaced_by_its_prediction(trajectory_copy, tmp_path, place):
    with pytest.raises(ValueError, match="trajectory"):
        predict_overflowed_weights(
            trajectory_copy,
            predictor=Constant(),
            output_dir=trajectory_copy.parent if place == "." else trajectory_copy,
            overwrite=True,
        )
    WeightTrajectory(trajectory_copy).verify()


def test_other_weights_are_not_taken_for_known(trajectory, tmp_path):
    make_resnet().save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="resnet holds no KNOWN weights"):
        predict_overflowed_weights(trajectory, tmp_path / "resnet", output_dir=tmp_path / "out")


def test_a_predictor_by_name(trajectory, tmp_path):
    predict_overflowed_weights(trajectory, predictor="average", output_dir=tmp_path / "out")
    expected = trajectory.history(FC).mean(dim=0)
    torch.testing.assert_close(weights(tmp_path / "out")[FC], expected, rtol=0, atol=1e-6)


def test_a_known_of_ones_own_by_path(trajectory, known, tmp_path):
    known.save_pretrained(tmp_path / "known")
    for name, given in (("a", known), ("b", tmp_path / "known"), ("c", str(tmp_path / "known"))):
        predict_overflowed_weights(trajectory, given, output_dir=tmp_path / name)
    a, b, c = (weights(tmp_path / name)[FC] for name in "abc")
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def test_the_shipped_weights_are_the_default(trajectory, tmp_path):
    predict_overflowed_weights(trajectory, output_dir=tmp_path / "out")
    predict_overflowed_weights(trajectory, KNOWNModel.from_pretrained(shipped()), output_dir=tmp_path / "same")
    assert torch.equal(weights(tmp_path / "out")[FC], weights(tmp_path / "same")[FC])


def shipped():
    from know_hf.prediction import SHIPPED_KNOWN

    return SHIPPED_KNOWN


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [CONV, NORM])
def test_values_that_are_not_finite_name_tensor_and_state(trajectory_copy, known, tmp_path, value, name):
    state = 2 if name == CONV else 0
    rewrite_state(trajectory_copy, state, lambda tensors: tensors[name].view(-1)[0].fill_(value))
    with pytest.raises(TrajectoryError, match=rf"'{name}' of state {state} .* 1 NaN or infinite"):
        predict_overflowed_weights(trajectory_copy, known, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prediction_that_is_not_finite_names_the_tensor(trajectory, tmp_path):
    with pytest.raises(ValueError, match=r"'classifier\.1\.bias'.*not finite after 2 step"):
        predict_overflowed_weights(trajectory, predictor=Constant(float("nan")), steps=2, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_reversed_states_are_refused(trajectory_copy, known, tmp_path):
    edit_manifest(trajectory_copy, lambda content: content["states"].reverse())
    with pytest.raises(TrajectoryError, match="index 4"):
        predict_overflowed_weights(trajectory_copy, known, output_dir=tmp_path / "out")


def test_swapped_state_folders_are_refused(trajectory_copy, known, tmp_path):
    (trajectory_copy / "state-0").rename(trajectory_copy / "x")
    (trajectory_copy / "state-1").rename(trajectory_copy / "state-0")
    (trajectory_copy / "x").rename(trajectory_copy / "state-1")
    with pytest.raises(TrajectoryError, match="state 0"):
        predict_overflowed_weights(trajectory_copy, known, output_dir=tmp_path / "out")


def test_a_truncated_state_is_refused(trajectory_copy, known, tmp_path):
    path = trajectory_copy / "state-4/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrajectoryError, match="state 4"):
        predict_overflowed_weights(trajectory_copy, known, output_dir=tmp_path / "out")


def test_a_missing_tensor_is_refused(trajectory_copy, known, tmp_path):
    rewrite_state(trajectory_copy, 1, lambda tensors: tensors.pop(FC))
    with pytest.raises(TrajectoryError, match=r"'classifier\.1\.weight'.*state 1"):
        predict_overflowed_weights(trajectory_copy, known, output_dir=tmp_path / "out")


def test_too_few_states_name_the_schedule(record_states, known, tmp_path):
    trajectory = record_states(make_resnet(), num_states=3)
    with pytest.raises(ValueError, match=r"3 states.*KNOWNPredictor needs 5.*num_states=5"):
        predict_overflowed_weights(trajectory, known, output_dir=tmp_path / "out")


def test_quantised_weights_are_refused(trajectory_copy, known, tmp_path):
    config = trajectory_copy / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"bits": 4}}))
    edit_manifest(trajectory_copy, lambda content: content["files"][0].update(size=config.stat().st_size))
    with pytest.raises(TrajectoryError, match=r"config\.json.*quanti.*dequantize"):
        predict_overflowed_weights(trajectory_copy, known, output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps.*got 0"),
        ({"steps": 1.5}, "got 1.5"),
        ({"norm": "drop"}, "norm.*'drop'"),
        ({"predictor": "shrink"}, "either known or predictor"),
        (
            {"predictor_options": {"factor": 1}},
            "predictor_options=.*name of a predictor",
        ),
        ({"known": None, "predictor": "shrnk"}, "'shrnk'"),
        (
            {"known": None, "predictor": "known", "predictor_options": {"kernel": "eager"}},
            "predictor_options.*KNOWN",
        ),
        (
            {"known": None, "predictor": "shrink", "kernel": "eager"},
            "kernel='eager'.*KNOWN",
        ),
        ({"known": None, "predictor": "lines", "predictor_options": {"base": 5}}, "base.*5"),
        (
            {"known": None, "predictor": "shrink", "predictor_options": {"fraction": 1}},
            "'shrink'.*'fraction'",
        ),
    ],
)
def test_bad_arguments_are_refused(trajectory, known, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        predict_overflowed_weights(trajectory, **{"known": known, "output_dir": tmp_path / "out", **arguments})


def test_an_output_that_exists_is_kept_unless_told(trajectory, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        predict_overflowed_weights(trajectory, predictor="shrink", output_dir=tmp_path / "out")
    assert (tmp_path / "out/mine").exists()
    predict_overflowed_weights(trajectory, predictor="shrink", output_dir=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/mine").exists()


def test_processor_files_come_along(record_states, known, tmp_path):
    from transformers import ViTImageProcessorPil

    trajectory = WeightTrajectory.create(tmp_path / "t")
    for state in range(2):
        processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
        trajectory.record(make_resnet(state), num_examples=4 - state, steps=1, processing_class=processor)
    predict_overflowed_weights(trajectory, predictor="shrink", output_dir=tmp_path / "out")
    name = "preprocessor_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (trajectory.path / name).read_bytes()
