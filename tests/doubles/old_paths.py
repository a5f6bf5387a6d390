"""Trajectories as 0.2 wrote them, with the path of the base model in manifest and configs."""

import json
from pathlib import Path
from typing import Any

from conftest import edit_manifest

from know_hf.trajectory.records import FileRecord


def record_path(folder: Path, path: str) -> None:
    """Enter the path of the base model into a trajectory of adapters."""

    def change(content: dict[str, Any]) -> None:
        content["base_model"] = path
        content["states"][0]["training"] = {"output": path}
        for record in [*content["files"], *(record for state in content["states"] for record in state["files"])]:
            config = folder / record["path"]
            if config.name == "adapter_config.json":
                adapter = json.loads(config.read_text())
                config.write_text(json.dumps({**adapter, "base_model_name_or_path": path}))
                record.update(vars(FileRecord.of(config, record["path"])))

    edit_manifest(folder, change)
