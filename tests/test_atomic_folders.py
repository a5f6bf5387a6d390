"""Folders that appear complete or not at all."""

from pathlib import Path

import pytest

from know_hf.checkpoint import atomic_folder


@pytest.fixture
def target(tmp_path) -> Path:
    """A folder with a file that must survive."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    return tmp_path / "out"


def unchanged(target: Path) -> bool:
    return list(target.parent.iterdir()) == [target] and (target / "mine").read_text() == "precious"


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
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


def test_a_folder_with_content_is_replaced_on_request_only(target, monkeypatch):
    rename = Path.rename

    def fail(path, target):
        if path.name == ".out.partial":
            raise OSError("planted")
        return rename(path, target)

    with pytest.raises(FileExistsError, match="overwrite=True"), atomic_folder(target):
        pass
    assert unchanged(target)
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError
    assert unchanged(target)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="planted"):
        patch.setattr(Path, "rename", fail)
        with atomic_folder(target, overwrite=True):
            pass
    assert unchanged(target)
    with atomic_folder(target, overwrite=True) as work:
        (work / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]


def test_two_writers_of_one_folder(tmp_path):
    with atomic_folder(tmp_path / "out") as first:
        (first / "a").write_text("1")
        with pytest.raises(BlockingIOError, match=r"another process .*/out"), atomic_folder(tmp_path / "out"):
            pass
        assert (first / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".out.partial").mkdir()  # left over from a crash
    with atomic_folder(tmp_path / "out", overwrite=True) as second:
        (second / "b").write_text("2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]


def test_inputs_are_not_replaced(tmp_path):
    source = tmp_path / "project" / "trajectory"
    source.mkdir(parents=True)
    for target in (source, source.parent):
        with pytest.raises(ValueError, match=r"trajectory.* replaced"), atomic_folder(target, True, [source]):
            pass
    with atomic_folder(source.parent / "enhanced", True, [source]):
        pass


def test_a_link_is_followed(tmp_path):
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
    with pytest.raises(OSError, match="mount point"), atomic_folder(tmp_path):
        raise AssertionError("the block must not run")
