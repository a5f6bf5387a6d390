"""Names from others cannot change a card."""

import re

import pytest
from doubles.card_fields import COMPARISON, FIXED, FIXED_CHECKPOINT, HOSTILE
from huggingface_hub import ModelCard

from know_hf import KNOWNConfig
from know_hf.cards import CheckpointCard, TrajectoryCard, known_card
from know_hf.cards.base import environment, source
from know_hf.markdown import code, fenced, markdown, python


@pytest.mark.parametrize(
    ("name", "shown", "on_hub"),
    [
        *((name, name, True) for name in ("bert-base-uncased", "me/model")),
        *((name, name.rpartition("/")[2], False) for name in ("me/folder", "/home/me/model", "./model", "a/b/c")),
        ("a" * 5000, "a" * 5000, False),
    ],
)
def test_source(name, shown, on_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me/folder").mkdir(parents=True)
    assert source(name, "v") == {"name": shown, "on_hub": on_hub, "revision": "v"}


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_do_not_change_a_card(name):
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable("table").enable("strikethrough")

    def structure(text):
        tokens = parser.parse(ModelCard(text).text)
        inline = [child for token in tokens if token.type == "inline" for child in token.children]
        html = {token.content for token in inline if token.type == "html_inline"}
        assert html <= {"<code>", "</code>"}
        links = [token.attrs["href"] for token in inline if token.type == "link_open"]
        assert all(re.fullmatch(r"[\w.%/~-]+", token.attrs["src"]) for token in inline if token.type == "image")
        marks = [token.type for token in inline if token.type in ("strong_open", "em_open", "s_open", "hardbreak")]
        assert not any("$$" in token.content.replace("\\$", "") for token in inline if token.type != "text")
        return [(token.type, token.tag, token.level) for token in tokens], links, marks

    def render(name):
        arms = {**COMPARISON["arms"], name: COMPARISON["arms"]["oracle"]}
        hostile = {"title": name, "base_model": source(f"{name}/./", name), "datasets": [source(f"{name}/./", name)]}
        hostile |= {"license": {"license": name}, "recorded_with": {name: name}, "picture": name}
        hostile |= {"adapter_type": name, "architecture": name, "schedule": {**FIXED["schedule"], "key_column": name}}
        hostile["states"] = [{**state, "metrics": {name: 1.0}} for state in FIXED["states"]]
        card = CheckpointCard(
            **FIXED_CHECKPOINT
            | hostile
            | {
                "predictor": {"name": name, "module": None, "options": {"x": name}, "known": None},
                "record_arguments": {"task": name, "model": name},
                "warnings": [name],
                "gate": {"metric": name, "scores": {name: 1.0}, "chosen": name, "sentence": name},
            }
        )
        comparison = {"what": name, "arms": arms, "verdict": name, "validity": name, "dataset": name}
        card.compare(comparison, name)
        opened = TrajectoryCard(**FIXED | hostile, roles=[], stored_once=0, bytes=0)
        about = {"title": name, "path": f"{name}/./", "description": name, "limits": [name], "commands": name}
        return str(card.render()), str(opened.render()), str(known_card(KNOWNConfig(), **about))

    for hostile, harmless in zip(render(name), render("x"), strict=True):
        hostile.encode("utf-8")
        assert str(ModelCard(hostile)) == hostile
        assert ModelCard(hostile).data.to_dict().keys() == ModelCard(harmless).data.to_dict().keys()
        assert structure(hostile) == structure(harmless)


@pytest.mark.parametrize("name", ["", *HOSTILE], ids=range(len(HOSTILE) + 1))
def test_code_of_any_name(name):
    namespace = {}
    exec(f"value = {python(name)}", namespace)
    assert namespace["value"] == name
    block = fenced(f"x\n{name}", "text")
    fence = re.match("`{3,}", block)[0]
    assert sum(line.lstrip().startswith(fence) for line in block.splitlines()) == 2


def test_values_in_markdown():
    text = "p = 0.05, [-1.8, +2.3] (eval_accuracy): Θ0 × 2 – 5% of 'a'"
    assert markdown(text) == text and code("model.layers.0.weight") == "`model.layers.0.weight`"
    assert markdown(code("a")) == "`a`" and markdown("-1.5") == "-1.5" and markdown("- a") == "&#45; a"
    with pytest.raises(ValueError, match="None"):
        environment().from_string("{{ x }}").render(x=None)
    with pytest.raises(Exception, match="'y' is undefined"):
        environment().from_string("{{ y }}").render(x=None)
