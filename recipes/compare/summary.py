"""Print the results of several comparisons side by side, one Markdown table per protocol; of one, a single table.

    python recipes/compare/summary.py outputs/mnist-halves outputs/letters
    python recipes/compare/summary.py know_hf/known/weights/known-base/comparisons.json --arms random oracle
    python recipes/compare/summary.py outputs/published --protocol tuned --arms known-step-2 --figure rates.svg

Rows are arms, columns are suites. Cells show the difference from naive with its 95% interval. An arrow marks a
significant difference after Holm's correction; random, pretrained, shuffled and oracle are not tested. Numbers of a
suite whose positive control failed are in brackets. `--output FILE` writes the data of the tables, such as
`comparisons.json` beside KNOWN weights, which their card reads. `--figure FILE` draws the scores of one comparison
against the learning rate. `--pages` also writes page and figures of each output folder again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    arguments = make_parser().parse_args()

    from know_hf.cards.suite_tables import condensed, protocols, side_by_side
    from know_hf.markdown import table

    reports = [report for path in arguments.reports for report in read(path)]
    if arguments.output is not None:
        lines = [json.dumps(condensed(report), ensure_ascii=False) for report in reports]
        arguments.output.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    if arguments.pages:
        from know_hf.evaluation.report.pages import write_report

        for folder in filter(Path.is_dir, arguments.reports):
            write_report(folder, folder)
    if arguments.figure is not None:
        draw(reports, arguments)
    names = protocols(reports) if arguments.protocol is None else [arguments.protocol]
    tables = [side_by_side(reports, name, arguments.measure, arguments.arms) for name in names]
    tables = [rows for rows in tables if len(rows[0]) > 1]
    if len(reports) == 1 and tables:
        tables = [joined(tables)]
    print("\n\n".join(map(table, tables)))


def joined(tables: list[list[list[str]]]) -> list[list[str]]:
    """Join the tables of one comparison: a column per protocol."""
    columns = [{row[0]: row[1] for row in rows[1:]} for rows in tables]
    names = dict.fromkeys(name for column in columns for name in column)
    heading = [tables[0][0][1], *(rows[0][0] for rows in tables)]
    return [heading, *([name, *(column.get(name, "") for column in columns)] for name in names)]


def read(path: Path) -> list[Any]:
    """Read the report in an output folder of `know-hf compare`, or the reports in a file.

    Raises:
        `SystemExit`: if there is none.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.exists():
        raise SystemExit(f"{file} does not exist; run: know-hf compare SUITE --output-dir {path}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); run know-hf compare again") from error
    return content if isinstance(content, list) else [content]


def draw(reports: list[Any], arguments: argparse.Namespace) -> None:
    """Draw the first measure against the learning rate, one panel per arm with naive behind it.

    Raises:
        `SystemExit`: if not one comparison is given, or it has no such protocol or arm.
    """
    from know_hf.evaluation.report.figures import rates_figure
    from know_hf.plotting import save_figure

    if len(reports) != 1 or "curves" not in reports[0]:
        raise SystemExit("--figure needs the output folder of one comparison")
    (report,) = reports
    protocol, shown = arguments.protocol or next(iter(report["protocols"])), arguments.arms or list(report["arms"])
    curves = [curve for curve in report["curves"] if curve["arm"] in ("naive", *shown)]
    figure = rates_figure({**report, "curves": curves}, protocol) if protocol in report["protocols"] else None
    if figure is None:
        raise SystemExit(
            f"{report['name']} has no learning rates of protocol {protocol!r} and arms {', '.join(shown)}"
        )
    save_figure(figure.figure, arguments.figure)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "reports",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="output folder of a comparison, report.json, or output of --output",
    )
    parser.add_argument("--measure", default="accuracy", choices=("accuracy", "loss"), help="default: accuracy")
    parser.add_argument("--protocol", help="only this protocol, such as few-shot, linear-probe or source")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these rows after naive")
    parser.add_argument("--pages", action="store_true", help="write report.html, report.md and figures again")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the data of the tables as JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw scores against the learning rate")
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    sys.exit(run_program("summary.py", main))
