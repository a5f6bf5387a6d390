"""Reports of comparisons: `report.json` and the same as Markdown and HTML."""

from .comparison_report import ComparisonReport
from .pages import ReportFiles, read_report, write_report

__all__ = ["ComparisonReport", "ReportFiles", "read_report", "write_report"]
