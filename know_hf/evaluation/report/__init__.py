"""The report of a comparison as JSON, Markdown and HTML."""
