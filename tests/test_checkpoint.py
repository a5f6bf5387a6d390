"""Reading and writing of safetensors checkpoints, and JSON files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_hf.checkpoint import (
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    TensorSpec,
    file_sha256,
    replace_tensors,
    write_json,
)

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c.count": torch.tensor(7),
}
EVERY_DTYPE = {
    **TENSORS,
    'ünï \\ "quoted"\n\x01': torch.rand(3, 2, dtype=torch.float64),
    "Z": torch.tensor([], dtype=torch.float16),
    "a.b": torch.rand(7).half(),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "f8": torch.ones(3).to(torch.float8_e4m3fn),
    "f8b": torch.ones(3).to(torch.float8_e5m2),
    "i16": torch.arange(3, dtype=torch.int16),
    "u64": torch.arange(3).to(torch.uint64),
    "c64": torch.ones(2, dtype=torch.complex64),
    "i32": torch.arange(3, dtype=torch.int32),
}


def specs(tensors=TENSORS):
    return {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write(folder: Path, max_shard_size: int = 10**6, tensors=TENSORS) -> None:
    writer = CheckpointWriter(folder, specs(tensors), max_shard_size)
    writer.create()
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def test_files_are_those_of_the_library(tmp_path):
    write(tmp_path, tensors=EVERY_DTYPE)
    save_file(EVERY_DTYPE, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "library").read_bytes()


@pytest.mark.parametrize(("max_shard_size", "num_files"), [(10**6, 1), (60, 4), (1, 14)])
def test_tensors_are_read_back_bit_for_bit(tmp_path, max_shard_size, num_files):
    write(tmp_path, max_shard_size, EVERY_DTYPE)
    assert len(list(tmp_path.iterdir())) == num_files + (num_files > 1)
    reader = CheckpointReader.from_folder(tmp_path)
    assert reader.names == sorted(EVERY_DTYPE)
    for name, tensor in EVERY_DTYPE.items():
        read = reader.tensor(name)
        assert (reader.shape(name), reader.dtype(name)) == (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        assert bytes(read.view(-1).view(torch.uint8)) == bytes(tensor.view(-1).view(torch.uint8))


def test_two_writers_fill_a_tensor_in_any_order(tmp_path):
    tensor = torch.rand(5, 7)
    writers = [CheckpointWriter(tmp_path, specs({"x": tensor})) for _ in range(2)]
    writers[0].create()
    for number, start in enumerate((30, 0, 20, 10)):
        writers[number % 2].write("x", tensor.flatten()[start : start + 10], start)
    with pytest.raises(RuntimeError, match="60 of 140 bytes"):
        writers[0].close()
    writers[0].close(sum(writer.bytes_written for writer in writers))
    reader = CheckpointReader.from_folder(tmp_path)
    assert torch.equal(reader.tensor("x"), tensor)
    assert torch.equal(reader.read("x", 3, 12), tensor.flatten()[3:12])
    assert reader.read("x", 35).shape == (0,)


def test_an_index_and_the_replacement_of_tensors(tmp_path):
    write(tmp_path, max_shard_size=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48 + 10 + 8, "total_parameters": 12 + 5 + 1}
    assert index["weight_map"]["a.weight"] == "model-00001-of-00002.safetensors"
    assert set(index["weight_map"]) == set(TENSORS)
    before = file_sha256(tmp_path / "model-00001-of-00002.safetensors")
    replace_tensors(tmp_path, {"c.count": torch.tensor(9)})
    reader = CheckpointReader.from_folder(tmp_path)
    assert reader.tensor("c.count").item() == 9
    assert torch.equal(reader.tensor("b.weight"), TENSORS["b.weight"])
    assert file_sha256(tmp_path / "model-00001-of-00002.safetensors") == before  # untouched


def test_an_empty_checkpoint_is_a_file(tmp_path):
    write(tmp_path, tensors={})
    assert CheckpointReader.from_folder(tmp_path).names == []


def test_dtypes_that_do_not_fit(tmp_path):
    with pytest.raises(CheckpointError, match=r"'x'.*torch\.complex128"):
        CheckpointWriter(tmp_path, {"x": TensorSpec(torch.complex128, torch.Size([1]))})
    writer = CheckpointWriter(tmp_path, specs())
    writer.create()
    with pytest.raises(TypeError, match=r"'b\.weight'.*torch\.bfloat16.*torch\.float32"):
        writer.write("b.weight", torch.ones(5))


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        CheckpointReader.from_folder(tmp_path)
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"in two files"):
        CheckpointReader([path, path])
    reader = CheckpointReader([path])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .* truncated"):
        CheckpointReader([path])
    path.write_bytes(b"")
    with pytest.raises(OSError, match=r"model\.safetensors ended at byte"):
        reader.tensor("a.weight")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"a": "b.safetensors", "c": "../d.safetensors"}}', r"'\.\./d\.safetensors'"),
        ('{"weight_map": {"a": "b.safetensors", "c": "pytorch_model.bin"}}', r"'pytorch_model\.bin'"),
        ('{"weight_map": {"a": 5}}', "names 5"),
        ('{"weight_map": {"a": ["b.safetensors"]}}', "not an index"),
        ('{"weight_map": ["a"]}', "not an index"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_invalid_index(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader.from_folder(tmp_path)


def test_json_is_written_completely_and_not_through_a_link(tmp_path):
    path = tmp_path / "x.json"
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / ".x.json.partial").symlink_to(tmp_path / "elsewhere")
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert (tmp_path / "elsewhere").read_text() == "precious"
