"""The report that people read: `report.json` as Markdown and as one HTML page that stands alone in its file.

The page has no script and asks no network; a content security policy in it forbids both. Names and sentences may come
from strangers: all text is escaped, in tables and in pictures.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ...markdown import clean, code, fenced, markdown, table
from ...plotting import adaptive_svg
from .comparison_report import REPORT_NAME, SCHEMA_VERSION
from .figures import Report, ReportFigure, forest_figure, forgetting_figure, landscape_figure, rates_figure
from .tables import (
    ReportTable,
    arms_table,
    chosen_table,
    controls_table,
    environment_table,
    landscape_table,
    limits,
    overview_table,
    result_table,
    validity,
    verdict,
)

HTML_NAME, MARKDOWN_NAME, FIGURES_NAME = "report.html", "report.md", "figures"


@dataclass(frozen=True)
class ReportFiles:
    """
    Attributes:
        html, markdown (`Path`): The page, and the same in Markdown.
        figures (`tuple[Path, ...]`): The pictures that the Markdown shows, SVG.
    """

    html: Path
    markdown: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class _Section:
    """One part of the report.

    Attributes:
        title (`str`): Heading.
        sentences (`Sequence[str]`): Paragraphs before tables and pictures.
        figures, tables: What it shows.
        is_folded (`bool`): Whether the page shows only the title until one asks.
        is_invalid (`bool`): Whether it shows nothing, which is said first.
    """

    title: str
    sentences: Sequence[str] = ()
    figures: Sequence[ReportFigure] = ()
    tables: Sequence[ReportTable] = ()
    is_folded: bool = False
    is_invalid: bool = False


def write_report(report: Report | str | Path, output_dir: str | Path, *, command: str | None = None) -> ReportFiles:
    """Writes `report.html`, `report.md` and the pictures of a comparison.

    Args:
        report (`Mapping`, `str` or `Path`): What stands in `report.json` , the file
            or its folder.
        output_dir (`str` or `Path`): Where to; made if it is not there.
        command (`str`, *optional*): The command that makes the comparison again; by default what the report has under
            `command`.

    Returns:
        [`ReportFiles`]: where they are.

    Raises:
        `ValueError`: for a report of a newer schema, or one that lacks what its schema asks for; names the key.
        `ImportError`: when matplotlib is missing.
    """
    report = read_report(report)
    folder = Path(output_dir)
    title, sections = _sections(report)
    command = command or report.get("command")
    texts = {f"{FIGURES_NAME}/{f.name}.svg": f.svg for section in sections for f in section.figures}
    texts[MARKDOWN_NAME] = _markdown(report, title, sections, command)
    texts[HTML_NAME] = _html(report, title, sections, command)
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    *figures, text_file, page = (folder / name for name in texts)
    return ReportFiles(page, text_file, tuple(figures))


def read_report(report: Report | str | Path) -> Report:
    """The content of a `report.json`, checked for its schema.

    Raises:
        `ValueError`: when it is no report, of a newer schema, or lacks a key.
    """
    if not isinstance(report, Mapping):
        path = Path(report)
        path = path / REPORT_NAME if path.is_dir() else path
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, Mapping):
            raise ValueError(f"{path} is no report: it holds a {type(report).__name__}, not an object")
    version = report.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(
            f"the report has schema version {version!r}, this know_hf reads versions up to {SCHEMA_VERSION}; update it"
        )
    if missing := [key for key in _KEYS if key not in report]:
        raise ValueError(f"the report has no {', no '.join(missing)}; was it written by another program?")
    if len(report["results"]) and "naive" not in report["arms"]:
        raise ValueError(f"the report has no arm naive, only {', '.join(report['arms'])}")
    return report


_SHOWS_NOTHING = "This part shows nothing, whatever its numbers are: naive does not beat what it started from."
_KEYS = (
    "name",
    "description",
    "created_with",
    "task",
    "seeds",
    "draws",
    "counted",
    "trials_per_rate",
    "warnings",
    "arms",
    "protocols",
    "results",
    "curves",
    "chosen",
    "states",
    "landscape",
    "seconds",
)


def _sections(report: Report) -> tuple[str, list[_Section]]:
    """Title and parts, in the order of the page."""
    sections = [_Section("All comparisons", tables=[overview_table(report)])] if report["results"] else []
    shown: set[str] = set()
    for number, result in enumerate(report["results"]):
        sentences = [result[key] for key in ("validity", "verdict", "verdict_on_methods", "sensitivity")]
        tables = [result_table(report, number), controls_table(report, number)]
        sections.append(
            _Section(
                _capital(result["what"]),
                [sentence for sentence in sentences if sentence],
                _present(forest_figure(report, number)),
                _present(*tables),
                is_folded=result["protocol"] in shown,
                is_invalid=result["valid"] is False,
            )
        )
        shown.add(result["protocol"])
    for protocol, facts in report["protocols"].items():
        picture, chosen = rates_figure(report, protocol), chosen_table(report, protocol)
        if picture or chosen:
            sections.append(_Section(f"Learning rates: {facts['what']}", (), _present(picture), _present(chosen)))
    if (picture := forgetting_figure(report)) is not None:
        sections.append(_Section("Forgetting", (), [picture]))
    if (picture := landscape_figure(report)) is not None:
        sections.append(_Section("Loss landscape", (), [picture], [landscape_table(report)]))
    sections.append(_Section("What was compared", (), (), [arms_table(report)]))
    return report["name"], sections


def _markdown(report: Report, title: str, sections: Sequence[_Section], command: str | None) -> str:
    parts = [f"# {markdown(title)}", f"**{markdown(verdict(report))}**", markdown(validity(report)[2])]
    parts += [f"**{markdown(text)}**" for text in report["warnings"]]
    parts += [markdown(report["description"]), markdown(_facts_sentence(report))]
    for section in sections:
        parts.append(f"## {markdown(section.title)}")
        parts += [f"**{_SHOWS_NOTHING}**"] if section.is_invalid else []
        parts += [markdown(sentence) for sentence in section.sentences]
        for figure in section.figures:
            alternative = markdown(figure.alternative)
            parts.append(f"![{alternative}]({FIGURES_NAME}/{figure.name}.svg)\n\n{markdown(figure.caption)}")
        parts += [_markdown_table(shown) for shown in section.tables]
    parts += ["## Limits", "\n".join(f"- {markdown(text)}" for text in limits(report)), "## How to make it again"]
    parts.append(fenced(command, "bash") if command else "The command was not recorded.")
    parts.append(markdown(_seeds_sentence(report)))
    if report["task"]:
        parts += ["The task:", fenced(_yaml(report["task"]), "yaml")]
    parts += ["The protocols:", fenced(_yaml(report["protocols"]), "yaml"), _markdown_table(environment_table(report))]
    return "\n\n".join(str(part) for part in parts if part) + "\n"


def _markdown_table(shown: ReportTable) -> str:
    rows = [[code(row[0]), *row[1:]] for row in shown.rows]
    marked = [
        [Markup("**%s**") % row[0] if str(names[0]) in shown.marked else row[0], *row[1:]]
        for row, names in zip(rows, shown.rows, strict=True)
    ]
    return f"{table([shown.head, *marked])}\n\n{markdown(shown.caption)}"


def _html(report: Report, title: str, sections: Sequence[_Section], command: str | None) -> str:
    status, words, sentence = validity(report)
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=title,
            description=report["description"],
            verdict=verdict(report),
            verdict_on_methods=report["results"][0]["verdict_on_methods"] if report["results"] else "",
            status=status,
            validity_words=words,
            validity=sentence,
            warnings=report["warnings"],
            facts=_facts_sentence(report),
            sections=sections,
            limits=limits(report),
            command=command,
            seeds=_seeds_sentence(report),
            task=_yaml(report["task"]) if report["task"] else None,
            protocols=_yaml(report["protocols"]),
            environment=environment_table(report),
            shows_nothing=_SHOWS_NOTHING,
        )
    )


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["block"] = _block
    made.filters["picture"] = _picture
    return made


def _visible(value: object) -> object:
    """What a template puts out, without characters that can't be seen or encoded."""
    if value is None:
        raise ValueError("the template of the report put out a value that is None; it must say what is not known")
    return value if hasattr(value, "__html__") else clean(value)


def _block(text: str) -> Markup:
    """Text of several lines."""
    lines = text.strip("\n").splitlines()
    return Markup("\n").join(escape("".join(c for c in line if c.isprintable())) for line in lines)


def _picture(figure: ReportFigure) -> Markup:
    svg = base64.b64encode(adaptive_svg(figure.svg).encode()).decode()
    width, height = (round(96 * float(inches)) for inches in figure.figure.get_size_inches())
    return Markup('<img src="data:image/svg+xml;base64,%s" width="%s" height="%s" alt="%s">') % (
        svg,
        width,
        height,
        clean(figure.alternative),
    )


def _facts_sentence(report: Report) -> str:
    trajectories, draws = len(report["seeds"]), report["draws"]
    return (
        f"{len(report['arms'])} arms; {_plural(trajectories, 'trajectory', 'trajectories')},"
        f" {_plural(draws, 'downstream draw')} of each; {_plural(report['trials_per_rate'], 'trial')} of every arm at"
        f" each learning rate; {_duration(report['seconds'])} of one process."
    )


def _seeds_sentence(report: Report) -> str:
    return f"Trajectory seeds: {', '.join(map(str, report['seeds']))}."


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml_dump(json.loads(json.dumps(content)), sort_keys=False)


def _present(*found: Any) -> list[Any]:
    return [one for one in found if one is not None]
