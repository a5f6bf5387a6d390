"""Print the results of several comparisons side by side, one Markdown table per protocol; of one, a single table.

    python recipes/compare/summary.py outputs/mnist-halves outputs/letters
    python recipes/compare/summary.py know_hf/known/weights/known-base/comparisons.json --arms random oracle
    python recipes/compare/summary.py outputs/published --protocol tuned --arms known-step-2 --figure rates.svg

Rows are arms, columns are suites. Cells show the difference from naive, or from another arm with `--minus ARM`, with
its 95% interval. An arrow marks a significant difference from naive after Holm's correction; random, pretrained,
shuffled and oracle are not tested. Numbers of a suite whose positive control failed are in brackets. `--mean` adds
the mean over the suites that have the arm and whose positive control did not fail; its interval follows from theirs.
`--mean only` prints the means of all protocols as one table. `--output FILE` writes the data of the tables, such as
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

    from know_hf.cards.suite_tables import protocols, side_by_side
    from know_hf.markdown import table

    reports = [report for path in arguments.reports for report in read(path)]
    write_files(reports, arguments)
    check_names(reports, arguments)
    names = protocols(reports) if arguments.protocol is None else [arguments.protocol]
    if arguments.minus is not None:
        reports = relative_to(reports, arguments.minus)
    tables = []
    for name in names:
        rows: Any = side_by_side(reports, name, arguments.measure, arguments.arms)
        if len(rows[0]) > 1:
            rows[2][0] = arguments.minus or "naive"
            tables.append(with_means(rows, reports, name, arguments.measure) if arguments.mean else rows)
    if not tables:
        raise ValueError("no report has such a table; --minus needs the values of each seed, which older files lack")
    if arguments.mean == "only":
        tables = [[[row[0], row[-1]] for row in rows if row[-1]] for rows in tables]
    if len(reports) == 1 or arguments.mean == "only":
        tables = [joined(tables)]
    print("\n\n".join(map(table, tables)))


def write_files(reports: list[Any], arguments: argparse.Namespace) -> None:
    """Write what `--output`, `--pages` and `--figure` ask for."""
    from know_hf.cards.suite_tables import condensed
    from know_hf.evaluation.report.pages import write_report

    if arguments.output is not None:
        lines = [json.dumps(condensed(report), ensure_ascii=False) for report in reports]
        arguments.output.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    for folder in filter(Path.is_dir, arguments.reports if arguments.pages else ()):
        write_report(folder, folder)
    if arguments.figure is not None:
        draw(reports, arguments)


def relative_to(reports: list[Any], arm: str) -> list[Any]:
    """Put an arm in the place of naive; results without it, or without the values of each seed, are left out."""
    from know_hf.evaluation.statistics import paired_difference

    def result_of(result: Any) -> Any:
        arms: dict[str, Any] = {"naive": result["arms"][arm]}
        for name, values in result["arms"].items():
            if name not in ("naive", arm):
                d = paired_difference(values["per_seed"], arms["naive"]["per_seed"])
                arms[name] = {**values, "minus_naive": {"mean": d.mean, "ci95": [d.low, d.high]}}
        return {**result, "arms": arms, "better": [], "worse": []}

    def has(result: Any) -> bool:
        return "per_seed" in result["arms"].get(arm, {})

    return [{**report, "results": [result_of(r) for r in report["results"] if has(r)]} for report in reports]


def check_names(reports: list[Any], arguments: argparse.Namespace) -> None:
    """Raise a `ValueError` for a protocol, measure or arm that no report has."""
    results = [result for report in reports for result in report["results"]]
    arms = {arm for result in results for arm in result["arms"]}
    wanted = {
        "--protocol": ([arguments.protocol], {result["protocol"] for result in results}),
        "--measure": ([arguments.measure], {result["measure"]["name"] for result in results}),
        "--arms": (arguments.arms or [], arms),
        "--minus": ([arguments.minus], arms),
    }
    for flag, (names, present) in wanted.items():
        if unknown := [name for name in names if name not in (None, *present)]:
            raise ValueError(f"{flag}: no report has {unknown[0]!r}; choose from {', '.join(sorted(present))}")


def with_means(rows: Any, reports: list[Any], protocol: str, measure: str) -> list[list[Any]]:
    """Add a column to a table: the mean difference from naive over suites of equal weight."""
    from know_hf.cards.suite_tables import estimate_text, positive_control
    from know_hf.evaluation.statistics import scipy_stats

    def mean_of(arm: str) -> str:
        means, variances, degrees, result = [], [], [], None
        for report in reports:
            for other in report["results"]:
                is_wanted = (other["protocol"], other["measure"]["name"]) == (protocol, measure)
                difference = other["arms"].get(arm, {}).get("minus_naive")
                if is_wanted and difference is not None and positive_control(other) != "failed":
                    counted = report["seeds"] if len(report["seeds"]) > 1 else range(report["draws"])
                    result, count = other, len(counted) - 1
                    half = (difference["ci95"][1] - difference["ci95"][0]) / 2
                    means.append(difference["mean"])
                    variances.append((half / scipy_stats().t.ppf(0.975, count)) ** 2)
                    degrees.append(count)
        if result is None or len(means) < 2:
            return ""
        total = sum(variances)  # its degrees of freedom after Welch and Satterthwaite
        freedom = total**2 / sum(v**2 / n for v, n in zip(variances, degrees, strict=True)) if total else 1
        half = scipy_stats().t.ppf(0.975, freedom) * total**0.5 / len(means)
        mean = sum(means) / len(means)
        values = {"mean": mean, "ci95": [mean - half, mean + half]}
        return f"{estimate_text(values, result['measure'], '+')} ({len(means)})"

    labels = {0: "mean (suites)", 1: "", 2: ""}  # heading, positive control, naive
    return [[*row, labels[i] if i in labels else mean_of(str(row[0]))] for i, row in enumerate(rows)]


def joined(tables: list[list[list[str]]]) -> list[list[str]]:
    """Join tables of one column: a column per protocol."""
    columns = [{row[0]: row[1] for row in rows[1:]} for rows in tables]
    names = dict.fromkeys(name for column in columns for name in column)
    heading = [tables[0][0][1], *(rows[0][0] for rows in tables)]
    return [heading, *([name, *(column.get(name, "") for column in columns)] for name in names)]


def read(path: Path) -> list[Any]:
    """Read the report in an output folder of `know-hf compare`, or the reports in a file.

    Raises:
        `SystemExit`: if there is no such file.
        `ValueError`: if it holds something else.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.exists():
        raise SystemExit(f"{file} does not exist; run: know-hf compare SUITE --output-dir {path}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); run know-hf compare again") from error
    reports = content if isinstance(content, list) else [content]
    if not all(isinstance(report, dict) and report.get("results") for report in reports):
        raise ValueError(f"{file} has no comparison of arms; give an output folder of know-hf compare SUITE")
    return reports


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
    parser.add_argument("--measure", default="accuracy", help="such as loss (default: accuracy)")
    parser.add_argument("--protocol", help="only this protocol, such as few-shot, linear-probe or source")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these rows after naive")
    parser.add_argument("--minus", metavar="ARM", help="show differences from this arm instead of naive, untested")
    means = "add the mean over the suites; only: show nothing else"
    parser.add_argument("--mean", nargs="?", const="column", choices=("column", "only"), help=means)
    parser.add_argument("--pages", action="store_true", help="write report.html, report.md and figures again")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the data of the tables as JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw scores against the learning rate")
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    sys.exit(run_program("summary.py", main))
