import json
from dataclasses import replace

import pytest
import torch
from conftest import make_resnet
from transformers import LlamaConfig, LlamaForCausalLM

from know_hf import WeightTrajectory, predict_overflowed_weights
from know_hf.evaluation import NAIVE, ORACLE, RANDOM, Arm, ArmSources, known_arm, known_step_arms, make_arm, shrink_arm
from know_hf.evaluation.arm_weights import merge_task_singular_vectors
from know_hf.known.modeling_known import KNOWNConfig, KNOWNModel
from know_hf.predictors import Average, protocol, register_predictor

NAMES = (
    *("naive", "random", "pretrained", "oracle", "shuffled", "shrink", "average", "ema", "task-vector", "linear"),
    "trial-matched-naive",
    *("log", "lines", "task-singular-vectors", "compute-matched", "state-1", "state-4", "known-step-2"),
    "matched-shrink-step-2",
)
CONVOLUTION = "resnet.embedder.embedder.convolution.weight"
HEAD = "classifier.1.weight"
NORM = "resnet.embedder.embedder.normalization.weight"


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("known")
    KNOWNModel(KNOWNConfig()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sources(recorded, known, tmp_path_factory):
    return ArmSources(
        trajectory=WeightTrajectory(recorded),
        output_dir=tmp_path_factory.mktemp("arms"),
        batches=[{"pixel_values": torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))}],
        fresh_model=lambda: make_resnet(seed=11),
        oracle_model=lambda: make_resnet(seed=12),
        pretrained_model=lambda: make_resnet(seed=13),
        known=known,
    )


def weight(arm, sources, name=HEAD, setting=None):
    return arm.initial_model(sources, setting).state_dict()[name]


@pytest.mark.parametrize("name", NAMES)
def test_arms_by_name_survive_json(name):
    arm = make_arm(name)
    assert arm.name == name
    assert make_arm(json.loads(json.dumps(arm.to_dict()))) == arm


def test_roles_of_arms():
    roles = {name: make_arm(name).role for name in NAMES}
    assert {name for name, role in roles.items() if role == "reference"} == {
        *("naive", "random", "pretrained", "oracle", "shuffled")
    }
    assert [name for name, role in roles.items() if role == "method"] == ["known-step-2"]
    arms = (make_arm("trial-matched-naive"), make_arm("state-1"), shrink_arm(0.8))
    assert {arm.role for arm in (NAIVE, RANDOM, ORACLE)} == {"reference"}
    assert [arm.role for arm in (*arms, known_arm(1, 0.5))] == ["control"] * 3 + ["method"]
    assert [known_arm(steps, 0.5).name for steps in (1, 2, 3)] == ["known-x2", "known-x4", "known-x8"]
    assert known_arm(1, 1 / 3).name == "known-x3"


def test_arms_from_json_override_named_ones():
    arm = make_arm({"name": "half-lines", "predictor": "lines", "tuned": [{"alpha": 0.5, "beta": 0.5}], "steps": 2})
    assert (arm.kind, arm.predictor, arm.steps, arm.role) == ("predicted", "lines", 2, "control")
    assert arm.settings == ({"alpha": 0.5, "beta": 0.5},)
    harder = make_arm({"name": "shrink", "tuned": [{"factor": 0.1}]})
    assert harder.predictor == "shrink" and harder.settings == ({"factor": 0.1},)
    fixed = make_arm({"name": "shrink", "options": {"factor": 0.9}})
    assert fixed.settings == ({},) and fixed.options == {"factor": 0.9}, "a given option is not tuned"


def test_a_registered_predictor_is_a_method(sources, monkeypatch):
    monkeypatch.setattr(protocol, "_PREDICTORS", dict(protocol._PREDICTORS))

    @register_predictor("plus-one-for-arms")
    class PlusOne:
        num_states = None

        def residual(self, history, role):
            return torch.ones(len(history))

    arm = make_arm("plus-one-for-arms")
    assert arm.role == "method"
    torch.testing.assert_close(weight(arm, sources), sources.trajectory.tensor(HEAD) + 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("average-7", "unknown arm 'average-7'"),
        ("state-0", "unknown arm 'state-0'"),
        ({"name": "x", "predictors": "log"}, "'predictors'.*'predictor'"),
        ({"predictor": "log"}, "needs a name"),
        ({"name": "x", "kind": "magic"}, "unknown kind 'magic'"),
    ],
)
def test_unknown_arms_are_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        make_arm(spec)


def test_the_predictor_of_an_arm_is_given_by_name():
    with pytest.raises(ValueError, match=r"arm 'x' must be a name, got Average\(\).*register_predictor"):
        Arm("x", "predicted", "", predictor=Average())


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        (NAIVE, lambda sources: sources.trajectory.load_model(0)),
        (make_arm("state-2"), lambda sources: sources.trajectory.load_model(2)),
        (RANDOM, lambda sources: sources.fresh_model()),
        (ORACLE, lambda sources: sources.oracle_model()),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_arms_without_prediction_only_change_batch_norm_statistics(sources, arm, expected):
    model = arm.initial_model(sources)
    for name, parameter in expected(sources).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    tracked = model.get_buffer("resnet.embedder.embedder.normalization.num_batches_tracked")
    assert int(tracked) == len(sources.batches)


def test_a_predicted_arm_is_the_prediction(sources, known, tmp_path):
    model = known_arm(2, ratio=0.5).initial_model(sources)
    expected = predict_overflowed_weights(
        sources.trajectory, known, 2, output_dir=tmp_path / "x", recalibrate_with=sources.batches
    ).load_model()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert (sources.output_dir / "known-x4" / "model.safetensors").exists()


def merged_moves(history, scale):
    return history[-1] + scale * merge_task_singular_vectors([history[k + 1] - history[k] for k in (3, 2, 1, 0)])


@pytest.mark.parametrize(
    ("arm", "setting", "names", "expected"),
    [
        (make_arm("shrink"), {"factor": 0.5}, [HEAD], lambda history: 0.5 * history[-1]),
        (make_arm("task-vector"), {"scale": -1.0}, [HEAD, CONVOLUTION, NORM], lambda history: history[0]),
        (make_arm("average"), None, [HEAD, NORM], lambda history: history.mean(dim=0)),
        (Arm("m", "matched_shrink", "", "shrink", {"factor": 0.7}), None, [HEAD], lambda history: 0.7 * history[-1]),
        (make_arm("task-singular-vectors"), {"scale": -0.5}, [HEAD], lambda history: merged_moves(history, -0.5)),
    ],
)
def test_weights_of_arms(sources, arm, setting, names, expected):
    state_dict = arm.initial_model(sources, setting).state_dict()
    for name in names:
        torch.testing.assert_close(state_dict[name], expected(sources.trajectory.history(name)), rtol=1e-4, atol=1e-6)


def test_a_matched_shrink_scales_each_tensor_as_the_prediction_does(sources, known, tmp_path):
    result = predict_overflowed_weights(sources.trajectory, known, 2, output_dir=tmp_path / "x")
    shrunk = make_arm("matched-shrink-step-2").initial_model(sources).state_dict()
    for name in (HEAD, CONVOLUTION, "classifier.1.bias"):
        history, predicted = sources.trajectory.history(name), result.load_model().state_dict()[name]
        residual, theta = predicted - history[-1], history[-1]
        factor = 1 + float((residual * theta).sum() / (theta * theta).sum())  # least squares: residual ~ theta
        torch.testing.assert_close(shrunk[name], factor * theta)
    assert torch.equal(shrunk[NORM], sources.trajectory.tensor(NORM))  # not predicted


def test_shuffled_keeps_only_the_values_of_each_tensor(sources):
    arm, model = make_arm("shuffled"), sources.trajectory.load_model(0)
    shuffled = arm.initial_model(sources)
    for name, parameter in model.named_parameters():
        moved = shuffled.get_parameter(name)
        assert torch.equal(moved.flatten().sort().values, parameter.flatten().sort().values)
    assert not torch.equal(shuffled.state_dict()[CONVOLUTION], model.state_dict()[CONVOLUTION])
    assert torch.equal(weight(arm, sources), weight(arm, sources))


def test_compute_matched_trains_theta_0_for_the_steps_of_the_later_states(sources):
    calls = []

    def train_further(model, steps):
        calls.append(steps)
        assert torch.equal(model.state_dict()[HEAD], sources.trajectory.tensor(HEAD))
        with torch.no_grad():
            model.get_parameter(HEAD).add_(1)
        return model

    trained = weight(make_arm("compute-matched"), replace(sources, train_further=train_further))
    assert calls == [[state.steps for state in sources.trajectory.states[1:]]] == [[8, 4, 2, 1]]
    assert torch.equal(trained, sources.trajectory.tensor(HEAD) + 1)


@pytest.mark.parametrize(
    ("arm", "missing", "error", "message"),
    [
        ("random", {"fresh_model": None}, ValueError, "arm 'random' needs fresh_model"),
        ("pretrained", {"pretrained_model": None}, ValueError, "arm 'pretrained' needs pretrained_model"),
        ("oracle", {"oracle_model": None}, ValueError, "arm 'oracle' needs oracle_model"),
        ("compute-matched", {}, ValueError, "arm 'compute-matched' needs train_further"),
        ("state-9", {}, ValueError, "arm 'state-9' needs state 9"),
        ("naive", {"batches": []}, ValueError, "training examples of the task's source"),
        ({"name": "shrink", "options": {"scale": 1.0}}, {}, TypeError, "shrink"),
    ],
)
def test_missing_sources_and_invalid_options_are_errors(sources, arm, missing, error, message):
    with pytest.raises(error, match=message):
        make_arm(arm).initial_model(replace(sources, **missing))


def test_known_weights_of_an_arm_override_those_of_the_comparison(sources, tmp_path):
    torch.manual_seed(5)
    KNOWNModel(KNOWNConfig()).save_pretrained(tmp_path / "other")
    own, matched = known_step_arms([1], name="published", known=str(tmp_path / "other"))
    assert (own.name, matched.name) == ("published-step-1", "matched-shrink-published-step-1")
    expected = predict_overflowed_weights(sources.trajectory, tmp_path / "other", output_dir=tmp_path / "x")
    torch.testing.assert_close(weight(own, sources), expected.load_model().state_dict()[HEAD])
    assert not torch.equal(weight(own, sources), weight(known_arm(1, 0.5), sources))
    assert matched.role == "control" and own.role == "method"


def test_merging_singular_vectors_by_hand():
    matrix = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merge_task_singular_vectors([matrix]), matrix, rtol=1e-4, atol=1e-5)  # one task
    one, two = torch.zeros(4, 6), torch.zeros(4, 6)  # no interference
    one[0, 0], one[1, 1], two[2, 2], two[3, 5] = 3.0, -1.0, 2.0, 0.5
    torch.testing.assert_close(merge_task_singular_vectors([one, two]), one + two)
    # U = [u u]: the nearest matrix with orthonormal columns has the columns (u ± w) / √2 for some unit w ⊥ u
    direction = torch.zeros(2, 2)
    direction[0, 0] = 1.0
    merged = merge_task_singular_vectors([direction, direction])
    torch.testing.assert_close(torch.linalg.svdvals(merged), torch.tensor([1.0, 1.0]))
    # only the largest directions of each task are kept
    large, small = torch.diag(torch.tensor([5.0, 4.0, 0.1, 0.2])), torch.diag(torch.tensor([0.1, 0.2, 3.0, 2.0]))
    expected = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
    torch.testing.assert_close(merge_task_singular_vectors([large, small]), expected)


def test_kernels_are_merged_as_matrices_and_vectors_averaged():
    generator = torch.Generator().manual_seed(0)
    kernels = [torch.randn(4, 3, 3, 3, generator=generator) for _ in range(2)]
    merged = merge_task_singular_vectors(kernels)
    expected = merge_task_singular_vectors([kernel.reshape(4, 27) for kernel in kernels])
    torch.testing.assert_close(merged, expected.reshape(4, 3, 3, 3))
    vectors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    torch.testing.assert_close(merge_task_singular_vectors(vectors), torch.tensor([2.0, 4.0]))
    narrow = [torch.ones(1, 5), 3 * torch.ones(1, 5)]  # fewer rows than tasks
    torch.testing.assert_close(merge_task_singular_vectors(narrow), 2 * torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"\(5000, 5000\) is too large"):
        merge_task_singular_vectors([torch.zeros(1).expand(5000, 5000)] * 2)


@pytest.mark.parametrize("name", ["naive", "random", "state-1", "average", "known-step-1", "task-singular-vectors"])
def test_arms_of_half_precision_recordings_are_float32(sources, tmp_path, name):
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    for state in range(5):
        trajectory.record(make_resnet(seed=20 + state).bfloat16(), num_examples=16 >> state, steps=1)
    model = make_arm(name).initial_model(replace(sources, trajectory=trajectory, output_dir=tmp_path / "arms"))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.int64}
    if name == "average":  # not rounded to the dtype of the states
        history = trajectory.history(HEAD)
        torch.testing.assert_close(model.state_dict()[HEAD], history.mean(0), rtol=1e-6, atol=1e-7)


def adapter_sources(folder, base, batches, **options):
    """Sources of two states of an adapter, whose weights differ by 0.1, and the adapted model of the second."""
    peft = pytest.importorskip("peft")
    model, trajectory = peft.get_peft_model(base(), peft.LoraConfig(**options)), WeightTrajectory.create(folder / "t")
    for state in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        trajectory.record(model, num_examples=8 - state, steps=1)
    return ArmSources(WeightTrajectory(folder / "t"), folder / "arms", batches, base_model=base), model.eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_adapters_of_tied_embeddings_are_merged_once(tmp_path):
    def base():
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
        layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, **layers, tie_word_embeddings=True, initializer_range=0.1)).eval()

    sources, model = adapter_sources(tmp_path, base, [], target_modules=["embed_tokens", "q_proj"])
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(make_arm("state-1").initial_model(sources)(tokens).logits, model(tokens).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_adapters_are_merged_into_their_base_model(tmp_path):
    def base():
        return make_resnet(seed=3)

    batches = [{"pixel_values": torch.randn(8, 1, 8, 8)}]
    options = {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}
    sources, _ = adapter_sources(tmp_path, base, batches, **options)
    for arm in (NAIVE, make_arm("average"), make_arm("shuffled")):
        model = arm.initial_model(sources)
        assert type(model) is type(base()) and not any("lora" in name for name, _ in model.named_parameters())
    states = [sources.trajectory.load_model(k, base_model=base()).merge_and_unload() for k in (0, 1)]
    expected = sum(state.get_parameter(HEAD) for state in states) / 2
    torch.testing.assert_close(weight(make_arm("average"), sources), expected)
    # factors of A and B would cancel in the merged weights
    convolution = weight(NAIVE, sources, CONVOLUTION)
    torch.testing.assert_close(weight(make_arm("rescale-0.5"), sources, CONVOLUTION), 0.5 * convolution)
    averaged = make_arm({"name": "average+rescale", "options": {"rescale": {"factor": 2.0}}})
    expected = 2 * weight(make_arm("average"), sources, CONVOLUTION)
    torch.testing.assert_close(weight(averaged, sources, CONVOLUTION), expected)
