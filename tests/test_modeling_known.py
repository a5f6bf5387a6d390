"""KNOWN: sizes, arithmetic, initialization, saving and errors."""

import json
import math
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, PreTrainedModel

from know_hf.known.configuration_known import KNOWNConfig
from know_hf.known.modeling_known import KNOWNModel, KNOWNOutput


@pytest.fixture
def known() -> KNOWNModel:
    torch.manual_seed(0)
    return KNOWNModel(KNOWNConfig()).eval()


def test_parameters_per_role(known):
    sizes = {role: sum(p.numel() for p in network.parameters()) for role, network in known.networks.items()}
    assert sizes == {"conv": 9425, "fc": 9425, "bias": 9425}
    assert known.num_parameters() == 3 * 9425


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_adds_the_residual_to_the_last_state(known, dtype):
    history = torch.randn(7, 5, dtype=dtype)
    labels = torch.randn(7, dtype=dtype)
    output = known.to(dtype)(history=history, role="fc", labels=labels)
    assert isinstance(output, KNOWNOutput)
    assert output.residual.shape == output.prediction.shape == (7,)
    assert output.residual.dtype == output.prediction.dtype == dtype
    assert torch.equal(output.prediction, history[:, -1] + output.residual)
    assert torch.equal(output.loss, torch.nn.functional.l1_loss(output.prediction, labels))
    double = known.double()(history=history.double(), role="fc").residual
    torch.testing.assert_close(output.residual.double(), double, atol=1e-6, rtol=0)
    known.to(dtype)
    plain = known(history=history, role="fc", return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], output.residual) and len(plain) == 2


def test_residual_depends_on_role_and_order_but_not_on_other_rows(known):
    history = torch.randn(6, 5)
    residual = known(history=history, role="conv").residual
    torch.testing.assert_close(known(history=history[2:3], role="conv").residual, residual[2:3])
    assert not torch.allclose(known(history=history, role="bias").residual, residual)
    assert not torch.allclose(known(history=history.flip(1), role="conv").residual, residual)
    assert known(history=history[:0], role="conv").prediction.shape == (0,)


def test_initialization_is_the_published_one():
    torch.manual_seed(0)
    known = KNOWNModel(KNOWNConfig())
    for network in known.networks.values():
        for stream, inputs in ((network.history_stream, 5), (network.difference_stream, 4)):
            assert stream.expand.in_features == inputs
            for layer in (stream.expand, stream.contract):
                limit = math.sqrt(3 * 0.1 / layer.in_features)
                assert 0.95 * limit < layer.weight.abs().max() <= limit
            for layer in (stream.activation.squeeze, stream.activation.shift):
                limit = math.sqrt(6 / (layer.in_features + layer.out_features))
                assert 0.95 * limit < layer.weight.abs().max() <= limit
        assert all((p == 0).all() for name, p in network.named_parameters() if name.endswith("bias"))


def test_regularization_is_the_published_one(known):
    stream = known.networks["conv"].history_stream
    with torch.no_grad():
        stream.expand.bias.fill_(0.5)
    kernels = sum(
        layer.weight.abs().sum()
        for stream in (known.networks["conv"].history_stream, known.networks["conv"].difference_stream)
        for layer in (stream.expand, stream.contract)
    )
    expected = 1e-6 * kernels + 0.1 * 64 * 0.5
    torch.testing.assert_close(known.regularization("conv"), expected)
    total = sum(known.regularization(role) for role in known.config.roles)
    torch.testing.assert_close(known.regularization(), total)
    with pytest.raises(ValueError, match="'norm'"):
        known.regularization("norm")


def test_round_trip_is_bit_equal_also_through_auto_classes(known, tmp_path):
    known.config.trained_on = {"trajectories": 48, "architectures": ["cnn"], "largest_displacement": 0.25}
    known.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, KNOWNConfig) and config.trained_on == known.config.trained_on
    for loaded in (KNOWNModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, KNOWNModel) and not loaded.training
        assert loaded.state_dict().keys() == known.state_dict().keys()
        assert all(torch.equal(tensor, known.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    KNOWNModel(KNOWNConfig(num_states=3, hidden_size=16, bottleneck_size=4, stream_size=8)).save_pretrained(tmp_path)
    assert KNOWNModel.from_pretrained(tmp_path)(history=torch.randn(4, 3), role="bias").residual.shape == (4,)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"role": "norm"}, r"'norm'.*conv, fc, bias"),
        ({"history": torch.zeros(5, 3, 3)}, r"\(N, 5\).*\(5, 3, 3\).*flatten\(1\)\.T"),
        ({"history": torch.zeros(2, 4)}, r"4 states.*takes 5.*num_states=4"),
        ({"history": torch.zeros(2, 5, dtype=torch.int64)}, r"torch\.int64"),
        ({"labels": torch.zeros(3)}, r"labels.*\(2,\).*\(3,\)"),
        ({"labels": torch.zeros(2, 1)}, r"labels.*\(2,\).*\(2, 1\)"),
    ],
)
def test_wrong_inputs(known, inputs, message):
    with pytest.raises(ValueError, match=message):
        known(**{"history": torch.zeros(2, 5), "role": "fc", **inputs})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_states": 1}, "num_states.*1"),
        ({"bottleneck_size": 0}, "bottleneck_size.*0"),
        ({"leaky_slope": 1.5}, "leaky_slope.*1.5"),
        ({"initializer_scale": 0.0}, "initializer_scale.*0.0"),
        ({"num_states": "5"}, "num_states.*str"),
        ({"stream_size": 10**9}, "stream_size.*1000000000"),
        ({"initializer_scale": math.inf}, "initializer_scale.*inf"),
        ({"variant": "other"}, "variant.*'other'"),
        ({"combination_size": 0}, "combination_size.*0"),
        ({"largest_coefficient": 0.0}, "largest_coefficient.*0.0"),
        ({"trained_on": {"roles": {"fc": {"largest_weight": None}}}}, "fc.*largest_weight=None"),
        ({"trained_on": {"roles": ["fc"]}}, r"roles=\['fc'\]"),
        ({"trained_on": {"trajectories": [48]}}, r"trajectories=\[48\]"),
    ],
)
def test_wrong_config(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        KNOWNConfig(**fields)


def write_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_config_that_transformers_cannot_write_is_refused(known, tmp_path):
    known.save_pretrained(tmp_path)
    write_config(tmp_path, dtype="x")
    with pytest.raises(ValueError, match=r"config\.json.*not a config of KNOWN"):
        KNOWNModel.from_pretrained(tmp_path)


def test_only_safetensors_are_read(known, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    known.save_pretrained(tmp_path / "known")
    weights = tmp_path / "known/model.safetensors"
    for name in ("pytorch_model.bin", "adapter_model.bin", "shard.bin"):
        shutil.copy(weights, tmp_path / "known" / name)
    write_config(tmp_path / "known", transformers_weights="adapter_model.bin")
    with pytest.raises(ValueError, match=r"known has the key 'transformers_weights'"):
        KNOWNModel.from_pretrained(tmp_path / "known")
    write_config(tmp_path / "known", transformers_weights=None)
    (tmp_path / "known/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(ValueError, match=r"known has an adapter_config\.json"):
        KNOWNModel.from_pretrained(tmp_path / "known")
    (tmp_path / "known/adapter_config.json").unlink()
    weights.unlink()
    for index in (None, {"metadata": {}, "weight_map": dict.fromkeys(known.state_dict(), "shard.bin")}):
        if index is not None:
            (tmp_path / "known/model.safetensors.index.json").write_text(json.dumps(index))
        for load in (KNOWNModel.from_pretrained, AutoModel.from_pretrained):
            with pytest.raises(FileNotFoundError, match=r"known has no model\.safetensors"):
                load(tmp_path / "known", use_safetensors=False)


def test_sizes_are_compared_with_the_file_before_a_model_is_built(known, tmp_path, monkeypatch):
    known.save_pretrained(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("the model was built"))
    write_config(tmp_path, hidden_size=60_000)
    for load in (KNOWNModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"expand\.weight' of .*model\.safetensors is F32 .*60000"):
            load(tmp_path)
    write_config(tmp_path, hidden_size=2**40)
    with pytest.raises(ValueError, match=r"config\.json of .*hidden_size must be in \[1, 65536\], got 1099511627776"):
        KNOWNModel.from_pretrained(tmp_path)


def test_arguments_of_from_pretrained_still_work(known, tmp_path):
    known.save_pretrained(tmp_path / "a/b")
    loaded, info = KNOWNModel.from_pretrained(tmp_path / "a", subfolder="b", dtype="float16", output_loading_info=True)
    assert loaded.dtype == torch.float16 and not info["missing_keys"]
    assert KNOWNModel.from_pretrained(tmp_path / "a/b", leaky_slope=0.1).config.leaky_slope == 0.1
    config = KNOWNConfig.from_pretrained(tmp_path / "a/b")
    for given in (config, str(tmp_path / "a/b")):
        assert KNOWNModel.from_pretrained(tmp_path / "a/b", config=given).config.hidden_size == 64
    loaded = KNOWNModel.from_pretrained(None, config=config, state_dict=known.state_dict())
    assert all(torch.equal(tensor, known.state_dict()[name]) for name, tensor in loaded.state_dict().items())
