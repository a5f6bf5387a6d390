"""Results of single cells on disk: what is finished is not run again, and nothing of another run is mixed in."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import write_json


class CellStore:
    """A folder of a comparison with one JSON file a finished cell.

    Args:
        path (`str` or `Path`): The folder; made if it is not there.
        identity (`Mapping[str, Any]`): All that the results depend on, JSON values only; kept in `identity.json`.

    Raises:
        `ValueError`: when the folder holds results with another identity; names what differs.
        `FileExistsError`: when it holds something else.
    """

    IDENTITY_NAME = "identity.json"

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        wanted = json.loads(json.dumps(identity))  # as it reads back: lists for tuples
        kept = self.path / self.IDENTITY_NAME
        if kept.exists():
            found = json.loads(kept.read_text())
            for name in sorted(wanted.keys() | found.keys()):
                if found.get(name) != wanted.get(name):
                    raise ValueError(
                        f"{self.path} holds results with other {name}: {json.dumps(found.get(name))} there,"
                        f" {json.dumps(wanted.get(name))} now; give another output folder, or delete this one"
                    )
        elif self.path.exists() and any(self.path.iterdir()):
            raise FileExistsError(
                f"{self.path} is not empty and holds no {self.IDENTITY_NAME}; give an output folder of its own"
            )
        else:
            (self.path / "cells").mkdir(parents=True, exist_ok=True)
            write_json(kept, wanted)

    def read(self, cell: str) -> dict[str, Any] | None:
        """The result of a cell, or `None` when it is not finished."""
        path = self._file(cell)
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, cell: str, result: Mapping[str, Any]) -> None:
        """Enters the result of a finished cell, whole or not at all."""
        write_json(self._file(cell), result)

    def _file(self, cell: str) -> Path:
        return self.path / "cells" / f"{cell}.json"
