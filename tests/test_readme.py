"""The README is kept true: its Python imports names that exist, its commands parse, its files are there."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import pytest

import know_hf
from know_hf.cli import make_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("recipes/**/*.md")), *sorted(ROOT.glob("model_cards/*.md"))]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_is_valid_and_imports_names_that_exist(document):
    for block in blocks(document.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "know_hf":
                for name in node.names:
                    assert name.name in know_hf.__all__


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_of_know_hf_parse(document):
    for block in blocks(document.read_text(encoding="utf-8"), "bash"):
        for command in re.findall(r"know-hf ([^\n&]*)", block):
            make_parser().parse_args(shlex.split(command, comments=True))
        for name, arguments in re.findall(r"recipes/(record|predict)/\1\.py([^\n&]*)", block.replace("\\\n", " ")):
            make_parser().parse_args([name, *shlex.split(arguments, comments=True)])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(document):
    for path in re.findall(r"(?:recipes|know_hf|model_cards|tests)/[\w/.-]*\w", document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_tables_of_comparisons_are_those_that_their_commands_print(monkeypatch, capsys):
    found = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for block in blocks(text, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if (arguments := shlex.split(line))[:1] == ["python"] and "comparisons.json" in line:
                    monkeypatch.chdir(ROOT)
                    monkeypatch.setattr("sys.argv", arguments[1:])
                    with pytest.raises(SystemExit, match=r"^0$"):
                        runpy.run_path(arguments[1], run_name="__main__")
                    assert capsys.readouterr().out.strip() in text, f"{document}: {line}"
                    found += 1
    assert found


def test_the_readme_is_short_and_has_the_commands():
    assert len(README.splitlines()) <= 130
    for command in (
        'pip install -c constraints.txt ".[demo]"',
        "know-hf quickstart --output-dir outputs/quickstart",
        'pip install -c constraints.txt ".[test]" && pytest',
        "induce_forgetting(trainer, schedule, ",
    ):
        assert command in README
