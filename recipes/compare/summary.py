"""Prints the reports of several comparisons side by side, as one Markdown table for each protocol.

    python recipes/compare/summary.py outputs/mnist-halves outputs/fashion-resnet
    python recipes/compare/summary.py outputs/*/ --measure loss

Rows are arms and columns suites. What stands there is the difference to naive with its 95 % interval, bold where it is
significant after Holm's correction. A suite that could show nothing, by its own controls, has its numbers in brackets.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]


def main() -> None:
    arguments = make_parser().parse_args()
    reports = [json.loads(read(folder)) for folder in arguments.folders]
    print("\n\n".join(tables(reports, arguments.measure)))


def read(folder: Path) -> str:
    """The text of a folder's report.

    Raises:
        `SystemExit`: when there is none.
    """
    path = folder / "report.json" if folder.is_dir() else folder
    if not path.exists():
        raise SystemExit(f"{path} does not exist: run know-hf compare SUITE --output-dir {folder} to its end first")
    return path.read_text(encoding="utf-8")


def tables(reports: Sequence[Mapping[str, Any]], measure: str = "accuracy") -> Iterator[str]:
    """One Markdown table for each protocol that any report has, arms in the order of the first report with them.

    Args:
        reports (sequence of mappings): Contents of `report.json`.
        measure (`str`, *optional*, defaults to `"accuracy"`): What is compared.
    """
    protocols = list(dict.fromkeys(name for report in reports for name in report["protocols"]))
    arms = list(dict.fromkeys(name for report in reports for name in report["arms"]))
    for protocol in protocols:
        found = [(report["name"], result(report, protocol, measure)) for report in reports]
        names = [name for name, column in found if column is not None]
        columns = [column for _, column in found if column is not None]
        if not columns:
            continue
        rows = [[protocol, *names], ["---"] + ["---:"] * len(columns)]
        rows += [
            ["could show a gain", *map(validity, columns)],
            ["naive", *(interval(column, column["arms"]["naive"], sign="") for column in columns)],
        ]
        for arm in arms:
            if arm != "naive" and any(arm in column["arms"] for column in columns):
                rows.append([arm, *(difference(column, arm) for column in columns)])
        yield "\n".join(f"| {' | '.join(row)} |" for row in rows)


def result(report: Mapping[str, Any], protocol: str, measure: str) -> Result | None:
    """What a report says of a protocol by a measure, if anything."""
    of_both = (r for r in report["results"] if r["protocol"] == protocol and r["measure"]["name"] == measure)
    return next(of_both, None)


def validity(column: Result) -> str:
    """Whether the controls of the design allow an answer."""
    if column["valid"] is None:
        return "not known"
    if not column["valid"]:
        return "no"
    return "yes" if column["headroom"] else "oracle no better"


def difference(column: Result, arm: str) -> str:
    """An arm minus naive."""
    if arm not in column["arms"]:
        return ""
    text = interval(column, column["arms"][arm]["minus_naive"], sign="+")
    if arm in (*column["better"], *column["worse"]):
        text = f"**{text}**"
    return f"({text})" if column["valid"] is False else text


def interval(column: Result, values: Mapping[str, Any], sign: str) -> str:
    """`mean [low, high]` in the units of tables."""
    scale, digits = column["measure"]["scale"], column["measure"]["digits"]
    mean, low, high = (f"{scale * value:{sign}.{digits}f}" for value in (values["mean"], *values["ci95"]))
    return f"{mean} [{low}, {high}]"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="of --output-dir, or a report.json")
    parser.add_argument("--measure", default="accuracy", choices=("accuracy", "loss"), help="accuracy by default")
    return parser


if __name__ == "__main__":
    main()
