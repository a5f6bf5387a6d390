"""Pushing KNOWN weights, with the code that loads them where know_hf is not installed."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..cards import known_card
from ..cards.suite_tables import COMPARISONS_NAME
from ..checkpoint import CheckpointReader, write_json
from ..hub_client import Token
from ..known import configuration_known, modeling_known
from ..known.configuration_known import KNOWNConfig
from ..known.modeling_known import KNOWNModel
from .push import push_checkpoint
from .push_checks import check_push
from .repo_contents import CARD, architecture_of, is_weights

_RESULTS = "results.json"
_KEPT = ("config.json", _RESULTS, COMPARISONS_NAME, CARD)
_AUTO_MAP = {"AutoConfig": "configuration_known.KNOWNConfig", "AutoModel": "modeling_known.KNOWNModel"}


def push_known(
    model: KNOWNModel | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: Token = None,
) -> str:
    """Pushes KNOWN weights with their card in one commit.

    They are loaded with `KNOWNModel.from_pretrained(repo_id)`; with `AutoModel.from_pretrained(repo_id)` once
    `know_hf.KNOWNModel` has been imported; and where know_hf is not installed with
    `AutoModel.from_pretrained(repo_id, trust_remote_code=True)`, for which the two modules are pushed with them.

    Args:
        model ([`KNOWNModel`], `str` or `Path`): The weights, or their folder. The folder's `README.md` is the card;
            where there is none it is made from the config, `results.json` and `comparisons.json`.
        repo_id, private, revision, create_pr, commit_message, token: See [`push_checkpoint`].

    Returns:
        `str`: address of the commit, or of the pull request.

    Raises:
        `ValueError`: when the folder holds no KNOWN weights; or see [`push_checkpoint`].
        `HubError`: when it can't be pushed; says what to do.
    """
    with tempfile.TemporaryDirectory(prefix="know_hf-") as made:
        folder = Path(made)
        if isinstance(model, KNOWNModel):
            model.save_pretrained(folder)
        else:
            _copy(Path(model), folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", {**config, "auto_map": _AUTO_MAP})
        for module in (configuration_known, modeling_known):
            shutil.copy2(str(module.__file__), folder)
        if not (folder / CARD).exists():
            repo_id = check_push(
                repo_id,
                architecture=architecture_of(folder / "config.json"),
                private=private,
                revision=revision,
                create_pr=create_pr,
                token=token,
            )
            _write_card(folder, repo_id)
        return push_checkpoint(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Add KNOWN weights",
            token=token,
        )


def is_known(folder: Path) -> bool:
    """Whether a folder's `config.json` is one of KNOWN."""
    config = folder / "config.json"
    if not config.is_file():
        return False
    content = json.loads(config.read_text(encoding="utf-8"))
    return isinstance(content, dict) and content.get("model_type") == KNOWNConfig.model_type


def _copy(source: Path, folder: Path) -> None:
    if not is_known(source):
        raise ValueError(f"{source} holds no KNOWN weights; push a checkpoint with push_checkpoint")
    CheckpointReader.from_folder(source)  # finds weights that are missing or damaged
    for path in source.iterdir():  # a training leaves its checkpoints beside them
        name = path.name
        if path.is_file() and (is_weights(name) or name in _KEPT or name.endswith((".png", ".svg"))):
            shutil.copy2(path, folder)


def _write_card(folder: Path, repo_id: str) -> None:
    card = known_card(
        KNOWNConfig.from_pretrained(folder),
        _content(folder / _RESULTS),
        title=repo_id.split("/")[-1],
        path=repo_id,
        comparisons=_content(folder / COMPARISONS_NAME) or (),
    )
    (folder / CARD).write_text(str(card), encoding="utf-8")


def _content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
