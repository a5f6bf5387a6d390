"""The report for people: `report.json` as Markdown with figures, and as one HTML file."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump

from ...checkpoint import read_json_object
from ...markdown import fenced, markdown, quantity
from .comparison_report import REPORT_NAME, SCHEMA_VERSION
from .figures import (
    Report,
    ReportFigure,
    budget_figure,
    budgets_of,
    forest_figure,
    forgetting_figure,
    landscape_figure,
    rates_figure,
)
from .html_page import ReportSection, html_page
from .tables import (
    ReportTable,
    arms_table,
    budget_table,
    choices_table,
    chosen_table,
    controls_table,
    costs_table,
    environment_table,
    landscape_table,
    limits,
    overview_table,
    result_table,
    validity,
    verdict,
)

HTML_NAME, MARKDOWN_NAME, FIGURES_NAME = "report.html", "report.md", "figures"
_REQUIRED = (
    *("name", "description", "created_with", "task", "seeds", "draws", "counted", "trials_per_rate", "warnings"),
    *("arms", "protocols", "results", "curves", "chosen", "states", "landscape", "seconds"),
)


@dataclass(frozen=True)
class ReportFiles:
    """Paths of the report in both formats and of the SVG files that the Markdown shows."""

    html: Path
    markdown: Path
    figures: tuple[Path, ...]


def write_report(report: Report | str | Path, output_dir: str | Path) -> ReportFiles:
    """Write `report.html`, `report.md` and the figures of a comparison.

    `report` is the content of `report.json`, the file or its folder.

    Raises:
        `ValueError`: if the report has a newer schema, lacks a key, or has a value of another kind.
        `ImportError`: if matplotlib or markdown-it-py is not installed.
    """
    content = read_report(report)
    try:
        texts = _texts(content)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(report, Mapping):
            raise
        raise ValueError(
            f"{report} has a value of another kind ({error!r:.200}); run know-hf compare again"
        ) from error
    folder = Path(output_dir)
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(text)
        os.replace(partial, path)
    *svg_files, markdown_file, html_file = (folder / name for name in texts)
    return ReportFiles(html_file, markdown_file, tuple(svg_files))


def read_report(report: Report | str | Path) -> Report:
    """Return the content of a `report.json` after a check of its schema.

    Raises:
        `ValueError`: If it is not a report, has a newer schema or lacks a key.
    """
    what = "the report"
    if not isinstance(report, Mapping):
        path = Path(report)
        path = path / REPORT_NAME if path.is_dir() else path
        what, report = str(path), read_json_object(path, "run know-hf compare again")
    version = report.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(
            f"{what} has schema version {version!r:.60}, readable are up to {SCHEMA_VERSION}; update know_hf"
        )
    if missing := [key for key in _REQUIRED if key not in report]:
        raise ValueError(f"{what} lacks the keys {', '.join(missing)}; run know-hf compare again")
    if report["results"] and "naive" not in report["arms"]:
        raise ValueError(f"{what} has no arm naive, only {', '.join(report['arms'])}; run naive as well")
    return report


def _texts(report: Report) -> dict[str, bytes]:
    """Return the texts of all files by path, in UTF-8, the figures first."""
    figures: dict[str, ReportFigure] = {}
    header = _header(report)
    sections = _sections(report, figures)
    texts = {path: figure.svg for path, figure in figures.items()}
    texts[MARKDOWN_NAME] = "\n".join(
        f"{'##' if number else '#'} {markdown(section.title)}\n\n{section.body}\n"
        for number, section in enumerate([header, *sections])
    )
    texts[HTML_NAME] = html_page(header, sections, figures)
    return {path: text.encode() for path, text in texts.items()}


def _header(report: Report) -> ReportSection:
    """Return the title, verdict, warnings and positive control."""
    status, sentence = validity(report)
    trajectories = quantity(len(report["seeds"]), "trajectory", "trajectories")
    draws, trials = quantity(report["draws"], "downstream draw"), quantity(report["trials_per_rate"], "tuning trial")
    size = (
        f"{len(report['arms'])} arms; {trajectories}, {draws} each; {trials} per arm and learning rate;"
        f" {_duration(report['seconds'])} on one process."
    )
    body = _joined(
        f"**{markdown(verdict(report))}**",
        *(f"**Warning:** {markdown(text)}" for text in report["warnings"] if text != sentence),
        f"> {markdown(sentence)}",
        *(markdown(result["verdict_on_methods"]) for result in report["results"][:1]),
        markdown(report["description"]),
        size,
    )
    return ReportSection(f"{report['name']}: does it help?", body, status)


def _sections(report: Report, figures: dict[str, ReportFigure]) -> list[ReportSection]:
    """Return the sections below the header, and add the figures that they show."""

    def show(figure: ReportFigure | None) -> str:
        if figure is None:
            return ""
        path = f"{FIGURES_NAME}/{figure.name}.svg"
        figures[path] = figure
        return f"![{markdown(figure.alternative)}]({path})\n\n{markdown(figure.caption)}"

    sections = [ReportSection("All comparisons", _text(overview_table(report)))] if report["results"] else []
    protocols: set[str] = set()
    for number, result in enumerate(report["results"]):
        failed, title = result["valid"] is False, result["what"][:1].upper() + result["what"][1:]
        # the header states the others of the first result
        keys = ("verdict", "validity", "verdict_on_methods", "sensitivity")[0 if number else -1 :]
        sentences = [result[key].removeprefix(f"{title}: ") for key in keys if result[key]]
        body = _joined(
            "> **The positive control failed: this section shows nothing.**" if failed else "",
            "\n".join(f"- {markdown(sentence)}" for sentence in sentences),
            show(forest_figure(report, number)),
            _text(result_table(report, number)),
            _text(controls_table(report, number)),
        )
        status, is_folded = "invalid" if failed else "unknown", result["protocol"] in protocols
        sections.append(ReportSection(title, body, status, is_folded))
        protocols.add(result["protocol"])
    bodies = {}
    for protocol, settings in report["protocols"].items():
        curves = _joined(show(rates_figure(report, protocol)), _text(chosen_table(report, protocol)))
        bodies[f"Learning rates: {settings['what']}"] = curves
        budget = budgets_of(report, protocol)
        bodies[f"Tuning budget: {settings['what']}"] = _joined(
            "" if budget is None else markdown(budget["sentence"]),
            show(budget_figure(report, protocol)),
            _text(budget_table(report, protocol)),
        )
    bodies["Forgetting"] = show(forgetting_figure(report))
    bodies["Loss landscape"] = _joined(show(landscape_figure(report)), _text(landscape_table(report)))
    bodies["Arms"] = _joined(*(_text(make(report)) for make in (arms_table, choices_table, costs_table)))
    bodies["Limits"] = "\n".join(f"- {markdown(sentence)}" for sentence in limits(report))
    bodies["How to reproduce"] = _joined(
        fenced(report["command"], "bash") if report.get("command") else "The command was not recorded.",
        f"Trajectory seeds: {', '.join(map(str, report['seeds']))}. `report.json` contains every number of this report"
        " and every trial.",
        _text(environment_table(report)),
    )
    sections += [ReportSection(title, body) for title, body in bodies.items() if body]
    details = {"Task": report["task"], "Protocols": report["protocols"]}
    sections += [ReportSection(title, _yaml(content), is_folded=True) for title, content in details.items() if content]
    return sections


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _text(table: ReportTable | None) -> str:
    return "" if table is None else table.markdown()


def _yaml(content: Mapping[str, Any]) -> str:
    return fenced(yaml_dump(json.loads(json.dumps(content)), sort_keys=False), "yaml")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
