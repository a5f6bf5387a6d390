"""The kernels of KNOWN against the model."""

import copy
import gc
import os
import sys
import weakref
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from know_hf.known import KNOWN_ROLES, KNOWNConfig, KNOWNModel, modeling_known
from know_hf.known.kernels import dispatch, prepare, residual

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
SHIPPED_KNOWN = Path(modeling_known.__file__).parent / "weights" / "known-base"
NAMES = ["folded", "cpu", "triton"]


def make_history(rows, weight=0.05, step=0.001, num_states=5):
    """Random walks that start at random weights of the given scale."""
    generator = torch.Generator().manual_seed(rows)
    steps = step * torch.randn(rows, num_states, generator=generator)
    steps[:, 0] = weight * torch.randn(rows, generator=generator)
    return steps.cumsum(dim=1)


def make_model(**sizes):
    """A model with random weights and biases."""
    torch.manual_seed(0)
    model = KNOWNModel(KNOWNConfig(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.02, 0.02)
    return model


@pytest.fixture(scope="module", params=["shipped", "random", "published"])
def known(request):
    if request.param == "shipped":
        return KNOWNModel.from_pretrained(SHIPPED_KNOWN)
    if request.param == "random":
        return make_model()
    if not (REFERENCE / "golden.npz").is_file():
        pytest.skip("needs the published weights")
    return KNOWNModel.from_keras(REFERENCE)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(params=NAMES)
def kernel(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("llvmlite")
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("set TRITON_INTERPRET=1, which is read when torch is imported, to run Triton's interpreter")
        cut_products_to_tf32(monkeypatch)
    return request.param


def cut_products_to_tf32(monkeypatch):
    """Drop the last 13 bits of float32 as tensor cores do and the interpreter does not."""
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def cut(handle):
        bits = torch.from_numpy(handle.data.copy()).view(torch.int32) & ~0x1FFF
        return interpreter.TensorHandle(bits.view(torch.float32).numpy(), handle.dtype)

    def create_dot(self, left, right, addend, precision, *others):
        if precision.name == "TF32":
            left, right = cut(left), cut(right)
        else:
            assert precision.name == "TF32x3"
        return multiply(self, left, right, addend, precision, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def eager(known, history, role):
    """The residual of the model, in float32 and in float64."""
    with torch.inference_mode():
        network = copy.deepcopy(known.networks[role]).double()
        exact = network(history.double(), history.diff(dim=1).double())
        return known(history=history, role=role).residual, exact


@pytest.mark.parametrize("role", KNOWN_ROLES)
def test_agrees_with_the_model(known, kernel, role):
    for weight, step, bound in (
        (0.05, 1e-2, 3e-7),
        (0.05, 1e-6, 3e-7),
        (0.05, 0.0, 3e-7),
        (1e-3, 1e-5, 5e-8),
        (1e-30, 1e-32, 2e-8),
        (1e-40, 1e-42, 2e-8),
        (0.3, 0.1, 1e-5 if kernel == "triton" else 2e-6),
    ):
        history = make_history(1000, weight, step)
        expected, exact = eager(known, history, role)
        actual = residual(known, history, role, kernel)
        assert actual.dtype == torch.float32 and actual.shape == (1000,)
        assert not actual.requires_grad and not actual.is_inference()
        assert (actual - expected).abs().max() <= bound
        if kernel != "triton":  # a few times the rounding of the model
            assert (actual - exact).abs().max() <= 4 * (expected - exact).abs().max() + 1e-8
            relative, of_model = (((value - exact) / exact).abs().quantile(0.9) for value in (actual, expected))
            assert relative <= 5 * of_model + 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in an untaken branch
@pytest.mark.parametrize("role", KNOWN_ROLES)
def test_weights_far_outside(known, kernel, role):
    history = make_history(1000, 1.0, 1.0)
    expected, exact = eager(known, history, role)
    bound = 1e-2 if kernel == "triton" else 8 * (expected - exact).abs().max()
    assert (residual(known, history, role, kernel) - exact).abs().max() <= bound


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("role", KNOWN_ROLES)
def test_overflow_gives_nan(known, kernel, role):
    for size in (3.0, 10.0, 30.0, 1e3, 1e10, 1e30, 3e38):
        history = make_history(500, size, size / 10)
        expected, _ = eager(known, history, role)
        actual = residual(known, history, role, kernel)
        assert (actual.isnan() & ~expected.isnan()).float().mean() <= 0.01
        if kernel == "triton":  # near the overflow of the exponential, its arguments differ by up to 1
            assert (expected.isnan() & ~actual.isnan()).float().mean() <= 0.01
        else:
            assert not (expected.isnan() & ~actual.isnan()).any()
            finite = ~actual.isnan()
            torch.testing.assert_close(actual[finite], expected[finite], atol=2e-2, rtol=0)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 63, 64, 65, 4097])
def test_rows(model, kernel, rows):
    history = make_history(rows)
    expected, _ = eager(model, history, "conv")
    torch.testing.assert_close(residual(model, history, "conv", kernel), expected, atol=1e-7, rtol=0)


def test_other_rows_do_not_change_a_row(model, kernel):
    history = make_history(5000)
    expected = residual(model, history, "bias", kernel)
    for start, end in ((0, 1), (1, 18), (77, 4200), (4090, 5000), (4999, 5000)):
        assert_same(residual(model, history[start:end], "bias", kernel), expected[start:end], kernel)
    assert_same(residual(model, history.flip(0), "bias", kernel), expected.flip(0), kernel)


def assert_same(actual, expected, kernel):
    """Bit for bit for machine code; torch and NumPy may sum the rows of a matrix product in different orders."""
    if kernel == "cpu":
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, atol=1e-7, rtol=0)


def test_eager(model):
    history = make_history(5000)
    expected, _ = eager(model, history, "bias")
    actual = residual(model, history, "bias", "eager")
    torch.testing.assert_close(actual, expected, atol=1e-8, rtol=0)
    assert_same(residual(model, history[77:4200], "bias", "eager"), actual[77:4200], "eager")
    with torch.no_grad():
        changed = copy.deepcopy(model)
        prepared = prepare(changed, "bias", "eager")
        changed.networks["bias"].head.bias += 1
    assert not torch.equal(prepared(history), actual)


def test_strides(model, kernel):
    history = make_history(300)
    expected = residual(model, history, "fc", kernel)
    padded = torch.full((300, 12), torch.nan)
    padded[:, 1:11:2] = history
    for view in (history.T.contiguous().T, padded[:, 1:11:2], history.repeat_interleave(2, dim=0)[1::2]):
        assert not view.is_contiguous()
        assert torch.equal(residual(model, view, "fc", kernel), expected)
    repeated = history[:1].expand(300, 5)
    assert_same(residual(model, repeated, "fc", kernel), expected[:1].expand(300), kernel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(model, kernel, dtype):
    history = make_history(100).to(dtype)
    actual = residual(model, history, "conv", kernel)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, residual(model, history.float(), "conv", kernel))
    converted = copy.deepcopy(model).to(dtype)
    expected = copy.deepcopy(converted).float()(history=history.float(), role="conv").residual.detach()
    torch.testing.assert_close(residual(converted, history, "conv", kernel), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_states": 2, "hidden_size": 1, "bottleneck_size": 1, "stream_size": 1},
        {"num_states": 3, "bottleneck_size": 4},
        {"num_states": 7, "hidden_size": 33, "stream_size": 30},
        {"num_states": 16, "bottleneck_size": 16, "leaky_slope": 0.0},
    ],
)
def test_other_sizes(kernel, sizes):
    model = make_model(**sizes)
    history = make_history(130, num_states=sizes["num_states"])
    expected, _ = eager(model, history, "fc")
    torch.testing.assert_close(residual(model, history, "fc", kernel), expected, atol=1e-7, rtol=0)


def test_changed_weights_are_used(kernel):
    model = make_model()
    history = make_history(64)

    def check():
        actual = residual(model, history, "conv", kernel)
        expected, _ = eager(model, history, "conv")
        torch.testing.assert_close(actual, expected, atol=5e-7, rtol=0)
        return actual

    residuals = [check()]
    weight = model.networks["conv"].head.weight
    weight.data[0, 0] += 0.1
    residuals.append(check())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(history=history, role="conv", labels=torch.zeros(64)).loss.backward()
    optimizer.step()
    residuals.append(check())
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})
    residuals.append(check())
    model.bfloat16().float()
    residuals.append(check())
    assert all(not torch.equal(before, after) for before, after in pairwise(residuals))


def test_unchanged_weights_are_prepared_once(model, kernel, monkeypatch):
    calls = []
    monkeypatch.setattr(dispatch, "prepare", lambda *arguments: calls.append(arguments) or prepare(*arguments))
    fresh = copy.deepcopy(model)
    for role in ("conv", "fc", "conv", "fc"):
        residual(fresh, make_history(10), role, kernel)
    assert [role for _, role, _ in calls] == ["conv", "fc"]
    reference = weakref.ref(fresh)
    del fresh
    calls.clear()
    gc.collect()
    assert reference() is None


def test_prepared_kernel_keeps_its_weights(kernel):
    model = make_model()
    history = make_history(20)
    prepared = prepare(model, "bias", kernel)
    before = prepared(history)
    with torch.no_grad():
        model.networks["bias"].head.weight += 1
    assert torch.equal(prepared(history), before)


def test_threads_do_not_change_the_result(model):
    pytest.importorskip("llvmlite")
    history = make_history(50_001)
    single = residual(model, history, "conv", "cpu")
    torch.set_num_threads(3)
    try:
        assert torch.equal(residual(model, history, "conv", "cpu"), single)
    finally:
        torch.set_num_threads(1)


def test_vector_shapes(model, monkeypatch):
    llvm_network = pytest.importorskip("know_hf.known.kernels.llvm_network", exc_type=ImportError)
    x86, arm = "x86_64-unknown-linux-gnu", "arm64-apple-darwin24.1.0"
    history = make_history(101)
    expected, _ = eager(model, history, "conv")
    vector_shape = llvm_network.vector_shape
    try:
        for triple, features, shape in (
            (x86, {"avx": True, "avx512f": True}, (16, 4)),
            (x86, {"avx": True, "avx512f": False}, (8, 2)),
            (x86, {}, (4, 2)),
            (arm, {"neon": True}, (4, 4)),
        ):
            assert vector_shape(triple, features) == shape
            monkeypatch.setattr(llvm_network, "vector_shape", lambda *_, shape=shape: shape)
            llvm_network.compile_network.cache_clear()
            torch.testing.assert_close(prepare(model, "conv", "cpu")(history), expected, atol=1e-7, rtol=0)
    finally:
        llvm_network.compile_network.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["eager", "folded", "triton", "auto"])
def test_on_a_gpu(known, name):
    on_gpu = copy.deepcopy(known).cuda()
    for weight, step, bound in ((0.05, 1e-2, 3e-7), (0.05, 1e-6, 3e-7), (0.3, 0.1, 1e-5), (1.0, 1.0, 1e-2)):
        history = make_history(1000, weight, step)
        for role in KNOWN_ROLES:
            _, exact = eager(known, history, role)
            actual = residual(on_gpu, history.cuda(), role, name)
            assert actual.device.type == "cuda"
            assert (actual.cpu() - exact).abs().max() <= bound
            assert torch.equal(residual(on_gpu, history, role, name), actual.cpu())
            assert torch.equal(residual(on_gpu, history[77:400].cuda(), role, name), actual[77:400])


def test_auto_on_a_cpu(model, monkeypatch):
    """It is the LLVM network, or `folded` if llvmlite is missing or old."""
    pytest.importorskip("llvmlite")
    history = make_history(10)
    assert torch.equal(residual(model, history, "conv"), residual(model, history, "conv", "cpu"))
    folded = residual(model, history, "conv", "folded")
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_installed_version", lambda package: Version("0.44.0"))
        assert torch.equal(residual(model, history, "conv"), folded)
        with pytest.raises(ImportError, match=r"llvmlite 0\.45.*0\.44\.0"):
            residual(model, history, "conv", "cpu")
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert torch.equal(residual(model, history, "conv"), folded)


def test_kernels_that_cannot_run(model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"'fast'.*auto, eager, folded, cpu, triton"):
        prepare(model, "conv", "fast")
    with pytest.raises(ValueError, match=r"'triton'.*cpu.*model\.cuda\(\)"):
        prepare(model, "conv", "triton")
    with pytest.raises(ValueError, match=r"'cpu'.*meta.*model\.cpu\(\)"):
        prepare(copy.deepcopy(model).to("meta"), "conv", "cpu")


@pytest.mark.parametrize(
    ("cuda", "capability", "compiler", "message"),
    [
        (None, (9, 0), "gcc", "NVIDIA"),
        ("12.8", (7, 5), "gcc", "TF32"),
        ("12.8", (8, 0), "", "C compiler"),
        ("12.8", (8, 0), "gcc", None),
    ],
)
def test_gpus_without_the_triton_kernel(monkeypatch, cuda, capability, compiler, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(dispatch, "find_spec", lambda package: package)
    monkeypatch.setattr(dispatch.shutil, "which", lambda program: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        dispatch._check("triton", torch.device("cuda"))


def test_wrong_histories_and_roles(model):
    with pytest.raises(ValueError, match="'norm'"):
        prepare(model, "norm")
    with pytest.raises(ValueError, match="4 states"):
        residual(model, make_history(3, num_states=4), "conv")
