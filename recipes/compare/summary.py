"""Prints the reports of several comparisons side by side, as one Markdown table for each protocol.

    python recipes/compare/summary.py outputs/mnist-halves outputs/fashion-resnet
    python recipes/compare/summary.py know_hf/known/weights/known-base/comparisons.json --arms random oracle

Rows are arms and columns suites. What stands there is the difference to naive with its 95 % interval, and an arrow
where it is significant after Holm's correction; random, pretrained, shuffled and oracle are not tested. Numbers of a
suite that could show nothing, by its own controls, are in brackets. `--output FILE` keeps what the tables need, to be
read again and to stand in the card of KNOWN weights (`comparisons.json` beside them).
"""

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    arguments = make_parser().parse_args()

    from know_hf.cards.suite_tables import condensed, protocols, side_by_side
    from know_hf.markdown import table

    reports = [report for path in arguments.reports for report in read(path)]
    if arguments.output is not None:
        kept = [json.dumps(condensed(report), ensure_ascii=False) for report in reports]
        arguments.output.write_text("[\n" + ",\n".join(kept) + "\n]\n", encoding="utf-8")
    names = protocols(reports) if arguments.protocol is None else [arguments.protocol]
    tables = [side_by_side(reports, name, arguments.measure, arguments.arms) for name in names]
    print("\n\n".join(table(rows) for rows in tables if len(rows[0]) > 1))


def read(path: Path) -> list[Any]:
    """The reports of a folder that `know-hf compare` wrote, or of a file.

    Raises:
        `SystemExit`: when there is none.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.exists():
        raise SystemExit(f"{file} does not exist: run know-hf compare SUITE --output-dir {path} to its end first")
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, list) else [content]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "reports", nargs="+", type=Path, metavar="DIR", help="of --output-dir; or a report.json, or what --output kept"
    )
    parser.add_argument("--measure", default="accuracy", choices=("accuracy", "loss"), help="accuracy by default")
    parser.add_argument("--protocol", help="only this one, such as few-shot, linear-probe or source")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these rows, beside naive")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to keep what the tables need, as JSON")
    return parser


if __name__ == "__main__":
    main()
