"""Reports of comparisons: `report.json` and the same as Markdown and HTML."""
