"""The HTML page of a report, rendered from its Markdown.

The page is one file without scripts. Its content security policy forbids scripts and network requests. The Markdown
parser passes no HTML through, so that names from others remain text.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...extras import missing
from ...markdown import clean
from ...plotting import adaptive_svg
from .figures import ReportFigure

if TYPE_CHECKING:
    from markdown_it.token import Token

_TEMPLATE = "report.html"
_FIGURE = Markup(
    '<span class="figure" role="region" tabindex="0" aria-label="Figure">'
    '<img src="data:image/svg+xml;base64,{source}" width="{width}" height="{height}" alt="{alternative}"></span>'
)


@dataclass(frozen=True)
class ReportSection:
    """A heading with the Markdown below it. A folded section shows only its heading at first."""

    title: str
    body: str
    status: str = "unknown"  # "valid", "invalid" or "unknown": the colour of block quotes
    is_folded: bool = False


def html_page(header: ReportSection, sections: Sequence[ReportSection], figures: Mapping[str, ReportFigure]) -> str:
    """Render a report as one HTML file. `figures` maps the path of an image in the Markdown to its figure.

    Raises:
        `ImportError`: If markdown-it-py is not installed.
    """
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, **options)
    environment.filters["html"] = lambda body: Markup(_to_html(body, figures))
    environment.filters["clean"] = clean
    return environment.get_template(_TEMPLATE).render(header=header, sections=sections)


def _to_html(body: str, figures: Mapping[str, ReportFigure]) -> str:
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise missing("the report", "markdown-it-py", "compare") from error
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", _image)
    parser.add_render_rule("fence", _fence)
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")
    env = {"figures": figures}
    tokens = parser.parse(body, env)
    _add_header_scopes(tokens)
    return parser.renderer.render(tokens, parser.options, env)


def _add_header_scopes(tokens: Iterable["Token"]) -> None:
    """Make the first cell of each row a header, for screen readers."""
    is_first = False
    for token in tokens:
        if token.type == "th_open":
            token.attrSet("scope", "col")
        elif token.type == "tr_open":
            is_first = True
        elif token.type == "td_open" and is_first:
            token.tag = "th"
            token.attrSet("scope", "row")
        elif token.type == "td_close" and is_first:
            token.tag, is_first = "th", False


def _image(renderer: Any, tokens: Sequence["Token"], index: int, options: Any, env: Mapping[str, Any]) -> str:
    figure = env["figures"][tokens[index].attrs["src"]]
    width, height = (round(96 * float(inches)) for inches in figure.figure.get_size_inches())
    source = base64.b64encode(adaptive_svg(figure.svg).encode()).decode()
    return _FIGURE.format(source=source, width=width, height=height, alternative=clean(figure.alternative))


def _fence(renderer: Any, tokens: Sequence["Token"], index: int, options: Any, env: Mapping[str, Any]) -> str:
    return Markup('<pre tabindex="0"><code>%s</code></pre>\n') % tokens[index].content


def _table_open(renderer: Any, tokens: Sequence["Token"], index: int, options: Any, env: Mapping[str, Any]) -> str:
    """Open a scrollable region, labelled with the caption: the paragraph above the table."""
    caption = renderer.renderInlineAsText(tokens[index - 2].children, options, env)
    return Markup('<div class="scroll" role="region" tabindex="0" aria-label="%s">\n<table>\n') % caption
