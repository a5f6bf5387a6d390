"""Folders that appear complete or not at all."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_hf.checkpoint import atomic_folder, atomic_folders, check_output, locked_folder


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


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed twice"])
def replacing(request, monkeypatch) -> None:
    """Replaces folders in one step, which not every file system can, and in two."""
    if not request.param:
        monkeypatch.setattr(atomic_folders, "_exchange", lambda first, second: False)


def test_a_folder_with_content_is_replaced_on_request_only(target, replacing, monkeypatch):
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
        patch.setattr(atomic_folders, "_exchange", lambda first, second: False)
        with atomic_folder(target, overwrite=True):
            pass
    assert unchanged(target)
    with atomic_folder(target, overwrite=True) as work:
        (work / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("made", ["folder", "file", "link"])
def test_what_another_program_makes_meanwhile_is_kept(tmp_path, replacing, overwrite, made):
    target, other = tmp_path / "out", tmp_path / "other"
    with pytest.raises(FileExistsError, match="in the meantime"), atomic_folder(target, overwrite) as work:
        (work / "a").write_text("mine")
        (target if made == "folder" else other).mkdir()
        if made == "file":
            target.write_text("thesis")
        elif made == "link":
            target.symlink_to(other)
        else:
            (target / "thesis").write_text("thesis")
    assert not list(tmp_path.glob(".out*"))
    assert target.is_symlink() if made == "link" else (target / "thesis" if made == "folder" else target).read_text()


def test_a_file_added_meanwhile_is_kept_when_replacing(target, replacing):
    with pytest.raises(FileExistsError, match="in the meantime"), atomic_folder(target, overwrite=True):
        (target / "thesis").write_text("")
    assert sorted(path.name for path in target.iterdir()) == ["mine", "thesis"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("change", range(3))
def test_an_interrupt_leaves_the_old_or_the_new_folder(target, replacing, change):
    changes, events = 0, ("os.rename", "shutil.rmtree")

    def interrupt(event, args):
        nonlocal changes
        if is_on and event in events and str(target.parent) in str(args[0]):
            changes += 1
            if changes == change + 1:
                raise KeyboardInterrupt

    is_on = True
    sys.addaudithook(interrupt)
    with suppress(KeyboardInterrupt), atomic_folder(target, overwrite=True) as work:
        (work / "new").write_text("")
    is_on = False
    assert [path.name for path in target.iterdir()] in (["mine"], ["new"])
    with atomic_folder(target, overwrite=True) as work:
        (work / "newest").write_text("")
    assert [path.name for path in target.iterdir()] == ["newest"]
    assert list(target.parent.iterdir()) == [target]


def test_a_crash_between_two_renames_is_repaired(target):
    target.rename(old := target.with_name(".out.old"))
    target.with_name(".out.partial").mkdir()
    with pytest.raises(FileExistsError, match="overwrite"), atomic_folder(target):
        raise AssertionError("the block must not run")
    assert unchanged(target) and not old.exists()


def test_a_folder_that_is_read_is_not_replaced(target):
    with locked_folder(target, shared=True), locked_folder(target, shared=True):
        with pytest.raises(BlockingIOError, match="out"), atomic_folder(target, overwrite=True):
            pass
    assert unchanged(target)
    with atomic_folder(target, overwrite=True), pytest.raises(BlockingIOError), locked_folder(target, shared=True):
        pass


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "new" / "out") as work:
            save_file({"a": torch.zeros(1)}, work / "model.safetensors")
            (work / "sub").mkdir(0o700)
            (work / "sub" / "read-only").touch(0o400)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*")}
    assert modes == {"out": folder, "sub": folder, "model.safetensors": file, "read-only": file}


def test_an_unfinished_folder_is_resumed(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(target, resume=True) as work:
        (work / "a").write_text("1")
        with pytest.raises(BlockingIOError), atomic_folder(target, resume=True):
            pass
        raise RuntimeError
    with atomic_folder(target, resume=True) as work:
        assert (work / "a").read_text() == "1"
    with pytest.raises(FileExistsError, match="another folder"), atomic_folder(target, resume=True):
        pass
    assert list(tmp_path.iterdir()) == [target]


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
    (tmp_path / "link").symlink_to(source)
    for target in (source.parent, source, source / "sub", source / "a" / "b", tmp_path / "link"):
        with pytest.raises(ValueError, match=r"input .*trajectory"), atomic_folder(target, True, [source]):
            pass
    with atomic_folder(source.parent / "enhanced", True, [source, "someone/base", ""]):
        pass


def test_nothing_is_written_into_a_trajectory(tmp_path):
    (tmp_path / "trajectory").mkdir()
    (tmp_path / "trajectory/trajectory.json").touch()
    for name in ("state-0", "sub/out"):
        with pytest.raises(ValueError, match="inside the trajectory"):
            check_output(tmp_path / "trajectory" / name)
    check_output(tmp_path / "trajectory")
    check_output(tmp_path, [tmp_path / "trajectory"], replaces=False)


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


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_working_directory_is_entered_again(tmp_path, monkeypatch, replacing, overwrite):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with atomic_folder(Path("."), overwrite) as work:
        (work / "a").write_text("1")
    assert Path("a").read_text() == "1" and Path.cwd() == tmp_path / "out"


def test_a_file_is_no_folder_to_replace(tmp_path):
    (tmp_path / "thesis.txt").write_text("1")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"), atomic_folder(tmp_path / "thesis.txt", overwrite=True):
        raise AssertionError("the block must not run")
    assert (tmp_path / "thesis.txt").read_text() == "1"
