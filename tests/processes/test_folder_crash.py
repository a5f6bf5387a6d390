"""A process that dies at any change on disk leaves the old or the new folder, and the next one cleans up."""

import os
import signal
import sys

import pytest

from know_hf.checkpoint import atomic_folder, atomic_folders

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "ctypes.call_function", "shutil.rmtree"}


def replace(target, text, kill_at=None, signal_number=signal.SIGKILL):
    """Replace a folder in a fork that kills itself before a change; return whether it was killed."""
    if (child := os.fork()) == 0:
        changes = 0

        def hook(event, args):
            nonlocal changes
            if event in CHANGES or (event == "open" and str(args[0]).startswith(str(target.parent))):
                changes += 1
                if changes == kill_at:
                    os.kill(os.getpid(), signal_number)

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.addaudithook(hook)
        try:
            with atomic_folder(target, overwrite=True) as work:
                (work / "a").write_text(text)
                (work / "b").write_text(text)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal_number


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_death_at_any_change(tmp_path, monkeypatch, number, exchanges):
    if not exchanges:
        monkeypatch.setattr(atomic_folders, "_exchange", lambda first, second: False)
    target, kills, missing, old = tmp_path / "out", 0, 0, "0"
    assert not replace(target, old)
    while replace(target, str(kills + 1), kills + 1, number):
        kills += 1
        missing += not target.exists()
        if target.exists():
            texts = {(target / name).read_text() for name in ("a", "b")}
            assert texts in ({old}, {str(kills)})
        with pytest.raises(FileExistsError), atomic_folder(target):  # restores, and then refuses
            pass
        (old,) = {(target / name).read_text() for name in ("a", "b")}
    assert kills > 10 and missing == (0 if exchanges else 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
