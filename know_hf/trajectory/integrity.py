"""Whether the files of a trajectory on the disk are those that were recorded."""

from pathlib import Path

from ..checkpoint import file_sha256
from .manifest import Manifest, TrajectoryError, leads_outside


def check_local_files(manifest: Manifest, folder: Path, hashes: bool, part: int = 0, parts: int = 1) -> None:
    """Compares the files of a folder with what was recorded of them.

    Args:
        manifest ([`Manifest`]): What was recorded.
        folder (`Path`): The trajectory's folder.
        hashes (`bool`): Whether to read every file for its SHA-256, or to look at sizes only.
        part, parts (`int`, *optional*): Only every `parts`-th file from number `part` on, where several processes
            share the reading.

    Raises:
        `TrajectoryError`: when a file is missing, outside of the folder, or not the one recorded; names it and its
            state.
    """
    records = {r.path: (r, "the model's files") for r in manifest.files}
    records |= {r.path: (r, f"state {state.index}") for state in manifest.states for r in state.files}
    for record, owner in list(records.values())[part::parts]:
        path = folder / record.path
        if leads_outside(folder, path):
            raise TrajectoryError(f"{path} of {owner} is a link that leads outside of its folder; put a copy there")
        if not path.is_file():
            raise TrajectoryError(f"{path} of {owner} is missing; restore it from a copy or record it again")
        if path.stat().st_size != record.size:
            raise TrajectoryError(
                f"{path} of {owner} has {path.stat().st_size} bytes, {record.size} were recorded: it is truncated"
                " or was replaced; restore it from a copy or record it again"
            )
        if hashes and file_sha256(path) != record.sha256:
            raise TrajectoryError(
                f"{path} of {owner} is not the file that was recorded (its SHA-256 differs): it is damaged or was"
                " replaced; restore it from a copy or record it again"
            )
    if hashes:
        manifest.check_what_is_loaded(folder)
