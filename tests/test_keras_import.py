"""Import of the published Keras weights."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from know_hf.known.configuration_known import KNOWNConfig
from know_hf.known.modeling_known import KNOWNModel

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
FILES = {"conv": "KNOWN_Conv.h5", "fc": "KNOWN_FC.h5", "bias": "KNOWN_Bias.h5"}
SHAPES = [
    *[(5, 64), (64, 8), (8, 64), (8, 64), (8, 64), (64, 32)],
    *[(4, 64), (64, 8), (8, 64), (8, 64), (8, 64), (64, 32)],
    (64, 1),
]


@pytest.mark.skipif(not (REFERENCE / "golden.npz").is_file(), reason="needs the published weights")
def test_agrees_with_the_original_program():
    known = KNOWNModel.from_keras(REFERENCE)
    assert not known.training
    with np.load(REFERENCE / "golden.npz") as golden, torch.inference_mode():
        history = torch.from_numpy(golden["W"])
        assert history.shape == (803, 5)
        for role, key in (("conv", "Conv"), ("fc", "FC"), ("bias", "Bias")):
            residual = known(history=history, role=role).residual
            assert np.abs(residual.numpy() - golden[key]).max() <= 5e-7


def test_agrees_with_an_independent_program(keras_folder):
    folder, weights = keras_folder
    known = KNOWNModel.from_keras(folder)
    history = np.random.default_rng(1).normal(scale=0.3, size=(50, 5)).astype(np.float32)
    with torch.inference_mode():
        for role in FILES:
            residual = known(history=torch.from_numpy(history), role=role).residual.numpy()
            np.testing.assert_allclose(residual, numpy_known(weights[role], history), atol=2e-6)


def test_missing_file_or_folder(keras_folder, tmp_path):
    folder, _ = keras_folder
    (folder / "KNOWN_FC.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"KNOWN_FC\.h5 not found"):
        KNOWNModel.from_keras(folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*KNOWN_Conv\.h5 not found"):
        KNOWNModel.from_keras(tmp_path / "nowhere")


def test_file_that_is_not_hdf5(keras_folder):
    folder, _ = keras_folder
    (folder / "KNOWN_Bias.h5").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"KNOWN_Bias\.h5 .*HDF5"):
        KNOWNModel.from_keras(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, r"KNOWN_FC\.h5 .*'dense_2/dense_2/kernel:0'"),
        (np.zeros((64, 8), np.float32), r"'dense_2/dense_2/kernel:0' of .*KNOWN_FC\.h5 .*float32 of shape \(64, 8\)"),
        (np.zeros((8, 64), np.int64), r"'dense_2/dense_2/kernel:0' of .*KNOWN_FC\.h5 .*int64"),
        (np.full((8, 64), np.nan, np.float32), r"'dense_2/dense_2/kernel:0' of .*KNOWN_FC\.h5 .*finite"),
    ],
    ids=["missing", "shape", "dtype", "not finite"],
)
def test_wrong_dataset(keras_folder, values, message):
    folder, _ = keras_folder
    with h5py.File(folder / "KNOWN_FC.h5", "a") as file:
        del file["dense_2/dense_2/kernel:0"]
        if values is not None:
            file["dense_2/dense_2/kernel:0"] = values
    with pytest.raises(ValueError, match=message):
        KNOWNModel.from_keras(folder)


def test_damaged_files_are_named(keras_folder):
    folder, _ = keras_folder
    path = folder / "KNOWN_FC.h5"
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(ValueError, match=r"KNOWN_FC\.h5 "):
        KNOWNModel.from_keras(folder)
    refused = 0
    for place in range(0, len(content), 701):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        try:
            KNOWNModel.from_keras(folder)
        except ValueError as error:
            assert "KNOWN_FC.h5" in str(error)
            refused += 1
    assert refused > 5


def test_config_of_another_size(keras_folder):
    folder, _ = keras_folder
    with pytest.raises(ValueError, match=r"'dense/dense/kernel:0'.*\(5, 64\).*\(3, 64\)"):
        KNOWNModel.from_keras(folder, KNOWNConfig(num_states=3))


@pytest.fixture
def keras_folder(tmp_path):
    """Folder with files in the published layout, and their arrays `{role: [(kernel, bias), …]}`."""
    rng = np.random.default_rng(0)
    weights = {}
    for role, name in FILES.items():
        weights[role] = [
            (rng.normal(scale=0.2, size=shape).astype("f4"), rng.normal(scale=0.1, size=shape[1]).astype("f4"))
            for shape in SHAPES
        ]
        with h5py.File(tmp_path / name, "w") as file:
            for number, (kernel, bias) in enumerate(weights[role]):
                layer = f"dense_{number}" if number else "dense"
                file[f"{layer}/{layer}/kernel:0"] = kernel
                file[f"{layer}/{layer}/bias:0"] = bias
    return tmp_path, weights


def numpy_known(layers, history):
    """The published formula in float64, in NumPy."""
    streams = []
    for inputs, first in ((history, 0), (np.diff(history, axis=1), 6)):
        expand, squeeze, shift, scale, exponent, contract = (
            lambda x, kernel=kernel, bias=bias: x.astype("f8") @ kernel + bias
            for kernel, bias in layers[first : first + 6]
        )
        x = expand(inputs)
        z = np.maximum(squeeze(x), 0)
        y = contract(shift(z) + scale(z) * np.exp(exponent(z) * x))
        streams.append(np.where(y > 0, y, 0.3 * y))
    kernel, bias = layers[12]
    return np.tanh(np.concatenate(streams, axis=1) @ kernel + bias)[:, 0]


def stored_outside(file, kind, name, outside):
    """Replaces a dataset by one whose values come from another file."""
    shape = file[name].shape
    del file[name]
    if kind == "external storage":
        file.create_dataset(name, shape, "f4", external=[(str(outside), 0, h5py.h5f.UNLIMITED)])
    elif kind == "virtual dataset":
        layout = h5py.VirtualLayout(shape, "f4")
        layout[:] = h5py.VirtualSource(str(outside), "values", shape)
        file.create_virtual_dataset(name, layout)
    elif kind == "external link":
        file[name] = h5py.ExternalLink(str(outside), "values")
    elif kind == "linked group":
        group = name.split("/")[0]
        del file[group]
        file[group] = h5py.ExternalLink(str(outside), "/")
    else:
        file[name] = h5py.SoftLink("/elsewhere")


@pytest.mark.parametrize("kind", ["external storage", "virtual dataset", "external link", "linked group", "soft link"])
def test_values_outside_the_file_are_refused(keras_folder, tmp_path, kind):
    folder, _ = keras_folder
    outside = tmp_path / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["values"] = file["dense_2/kernel:0"] = np.ones((8, 64), np.float32)
    with h5py.File(folder / "KNOWN_FC.h5", "a") as file:
        stored_outside(file, kind, "dense_2/dense_2/kernel:0", outside)
    with pytest.raises(ValueError, match=r"(dense_2|kernel:0)' of .*KNOWN_FC\.h5 is (a link|stored outside)"):
        KNOWNModel.from_keras(folder)


@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": (8, 8)}, {"chunks": (4096, 4096), "maxshape": (None, None), "compression": "gzip"}],
    ids=["not written", "no chunk written", "large chunk"],
)
def test_sizes_are_compared_with_the_file(keras_folder, options):
    folder, _ = keras_folder
    with h5py.File(folder / "KNOWN_FC.h5", "a") as file:
        del file["dense_2/dense_2/kernel:0"]
        dataset = file.create_dataset("dense_2/dense_2/kernel:0", (8, 64), "f4", **options)
        if "compression" in options:
            dataset[:] = 0.5
    with pytest.raises(ValueError, match=r"'dense_2/dense_2/kernel:0' of .*KNOWN_FC\.h5 needs .* bytes"):
        KNOWNModel.from_keras(folder)


def test_a_compressed_file_is_read(keras_folder):
    folder, weights = keras_folder
    with h5py.File(folder / "KNOWN_FC.h5", "a") as file:
        del file["dense/dense/kernel:0"]
        file.create_dataset("dense/dense/kernel:0", data=weights["fc"][0][0], compression="gzip")
    expand = KNOWNModel.from_keras(folder).networks["fc"].history_stream.expand
    assert torch.equal(expand.weight, torch.from_numpy(weights["fc"][0][0].T))
