import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from know_hf.checkpoint import (
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    TensorSpec,
    atomic_folder,
    file_sha256,
    replace_tensors,
    write_json,
)

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c.count": torch.tensor(7),
}


def specs(tensors=TENSORS):
    return {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write(folder: Path, max_shard_size: int, tensors=TENSORS) -> None:
    writer = CheckpointWriter(folder, specs(tensors), max_shard_size)
    writer.create()
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


@pytest.mark.parametrize(("max_shard_size", "num_files"), [(10**6, 1), (60, 2), (1, 3)])
def test_tensors_come_back_bit_for_bit(tmp_path, max_shard_size, num_files):
    write(tmp_path, max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_files
    reader = CheckpointReader.from_folder(tmp_path)
    assert reader.names == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.tensor(name), tensor)
    assert not list(tmp_path.glob("*.partial"))


MANY = {
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


def test_the_file_is_that_of_the_library(tmp_path):
    write(tmp_path, 10**6, MANY)
    save_file(MANY, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    reader = CheckpointReader.from_folder(tmp_path)
    for name, tensor in load_file(tmp_path / "theirs").items():
        assert reader.dtype(name) == tensor.dtype
        assert reader.tensor(name).shape == tensor.shape
        assert bytes(reader.tensor(name).view(-1).view(torch.uint8)) == bytes(tensor.view(-1).view(torch.uint8))


def test_pieces_in_any_order_make_the_tensor(tmp_path):
    tensor = torch.rand(5, 7)
    writers = [CheckpointWriter(tmp_path, {"x": TensorSpec(tensor.dtype, tensor.shape)}) for _ in range(2)]
    writers[0].create()
    for number, start in enumerate((30, 0, 20, 10)):
        writers[number % 2].write("x", tensor.flatten()[start : start + 10], start)
    with pytest.raises(RuntimeError, match="60 of the 140 bytes"):
        writers[0].close()
    writers[0].close(sum(writer.bytes_written for writer in writers))
    reader = CheckpointReader.from_folder(tmp_path)
    assert torch.equal(reader.tensor("x"), tensor)
    assert torch.equal(reader.read("x", 3, 12), tensor.flatten()[3:12])
    assert reader.read("x", 35).shape == (0,)


def test_a_dtype_that_safetensors_does_not_have(tmp_path):
    with pytest.raises(CheckpointError, match=r"'x' has dtype torch\.complex128"):
        CheckpointWriter(tmp_path, {"x": TensorSpec(torch.complex128, torch.Size([1]))})


def test_a_piece_of_another_dtype_is_refused(tmp_path):
    writer = CheckpointWriter(tmp_path, specs())
    writer.create()
    with pytest.raises(TypeError, match=r"'b\.weight' is laid out as torch\.bfloat16, its piece is torch\.float32"):
        writer.write("b.weight", torch.ones(5))


def test_a_file_that_shrinks_while_it_is_open_is_named(tmp_path):
    write(tmp_path, 10**6)
    reader = CheckpointReader.from_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match=r"model\.safetensors ended at byte .* another program wrote"):
        reader.tensor("a.weight")


def test_the_index_names_shards_and_sizes(tmp_path):
    write(tmp_path, max_shard_size=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48 + 10 + 8, "total_parameters": 12 + 5 + 1}
    assert index["weight_map"]["a.weight"] == "model-00001-of-00002.safetensors"
    assert set(index["weight_map"]) == set(TENSORS)


def test_a_checkpoint_of_no_tensors_is_a_file(tmp_path):
    write(tmp_path, 10**6, {})
    assert CheckpointReader.from_folder(tmp_path).names == []


def test_replaced_tensors_leave_the_others(tmp_path):
    write(tmp_path, max_shard_size=60)
    before = file_sha256(tmp_path / "model-00001-of-00002.safetensors")
    replace_tensors(tmp_path, {"c.count": torch.tensor(9)})
    reader = CheckpointReader.from_folder(tmp_path)
    assert reader.tensor("c.count").item() == 9
    assert torch.equal(reader.tensor("b.weight"), TENSORS["b.weight"])
    assert file_sha256(tmp_path / "model-00001-of-00002.safetensors") == before


def test_a_truncated_file_is_named(tmp_path):
    write(tmp_path, 10**6)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read .* truncated"):
        CheckpointReader([path])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        CheckpointReader.from_folder(tmp_path)


def test_a_tensor_in_two_files_is_an_error(tmp_path):
    write(tmp_path, 10**6)
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"second file of the same"):
        CheckpointReader([path, path])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError, match="half-way"), atomic_folder(target) as work:
        (work / "a").write_text("1")
        raise RuntimeError("half-way")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as work:
        (work / "sub").mkdir()
        (work / "sub/a").write_text("2")
        assert not target.exists()
    assert (target / "sub/a").read_text() == "2"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_not_empty_is_kept(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite=True"), atomic_folder(target):
        pass
    assert (target / "mine").read_text() == "precious"
    with atomic_folder(target, overwrite=True) as work:
        (work / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]


def test_an_error_while_overwriting_keeps_the_old_folder(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("precious")
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError
    assert (target / "mine").read_text() == "precious"


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    with atomic_folder(tmp_path / "out") as first:
        (first / "a").write_text("1")
        with (
            pytest.raises(BlockingIOError, match=r"another process is writing .*/out; wait"),
            atomic_folder(first.parent / "out"),
        ):
            pass
        assert (first / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".out.partial").mkdir()  # left by a crash
    with atomic_folder(tmp_path / "out", overwrite=True) as second:
        (second / "b").write_text("2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]


def test_what_is_read_is_not_replaced(tmp_path):
    source = tmp_path / "project" / "trajectory"
    source.mkdir(parents=True)
    for target in (source, source.parent):
        with (
            pytest.raises(ValueError, match=r"holds .*trajectory, which is read"),
            atomic_folder(target, True, [source]),
        ):
            pass
    with atomic_folder(source.parent / "enhanced", True, [source]):
        pass


def test_a_link_leads_to_the_folder_that_is_replaced(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk)
    for _ in range(2):
        with atomic_folder(tmp_path / "out", overwrite=True) as work:
            (work / "a").write_text("1")
    assert (tmp_path / "out").is_symlink() and (disk / "a").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    with pytest.raises(OSError, match="is a mount point, which no folder can be renamed to"), atomic_folder(tmp_path):
        raise AssertionError("nothing is done")


def test_a_folder_that_can_not_be_replaced_after_all_is_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    rename = Path.rename

    def fails(path, target):
        if path.name == ".out.partial":
            raise OSError("planted")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="planted"), atomic_folder(tmp_path / "out", overwrite=True) as work:
        (work / "new").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_json_that_can_not_be_written_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_json_is_not_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / ".x.json.partial").symlink_to(tmp_path / "elsewhere")
    write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "elsewhere").read_text() == "precious"
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"a": "../b.safetensors"}}', r"names '\.\./b\.safetensors', which is not in its folder"),
        ('{"weight_map": ["a"]}', "is no index of shards"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader.from_folder(tmp_path)
