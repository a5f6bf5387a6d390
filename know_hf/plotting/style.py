"""Colours, figure and file output shared by all plots."""

import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..extras import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, Color Universal Design, 2008: distinguishable with every kind of colour blindness
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
INK, MUTED, GRID, BAND, PAPER = "#1b1b1d", "#5a5a60", "#d8d8dc", "#e9e9ec", "#fefefe"

ROLE_COLOURS = {"method": BLUE, "control": VERMILION, "reference": MUTED}
ROLE_MARKERS = {"method": "o", "control": "s", "reference": "D"}

_LONGEST_NAME = 32  # characters
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

# counterpart of each colour on a dark page
_DARK = {
    BLUE: "#56b4e9",
    VERMILION: "#f0a35e",
    GREEN: "#2fc79b",
    INK: "#ececee",
    MUTED: "#a9a9b2",
    GRID: "#3d3f45",
    BAND: "#33353b",
    PAPER: "#17181b",
}


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, in inches; an `ImportError` says how to install matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("the figure", "matplotlib", "plot") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def legend(owner: Any, *handles_and_labels: Any, loc: str = "outside lower center", **options: Any) -> None:
    """Add a legend without a frame to a figure or axes."""
    owner.legend(*handles_and_labels, loc=loc, **{"frameon": False, "fontsize": 8.5, "labelcolor": INK, **options})


def style_axes(axes: "Axes", title: str, x_label: str, y_label: str, grid: Literal["x", "y", "both"]) -> None:
    """Set labels, and the colours that [`adaptive_svg`] replaces on a dark page."""
    for setter, text, size in (
        (axes.set_title, title, 11),
        (axes.set_xlabel, x_label, 9.5),
        (axes.set_ylabel, y_label, 9.5),
    ):
        setter(text.replace("$", r"\$"), color=INK, fontsize=size)
    axes.tick_params(which="both", colors=MUTED, length=2, labelsize=9)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GRID)


def plain(text: str) -> str:
    """Escape a name as literal text: no mathematics, no invisible characters, at most 32 characters."""
    seen = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    cut = seen if len(seen) <= _LONGEST_NAME else seen[: _LONGEST_NAME - 1] + "…"
    return cut.replace("$", r"\$")


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write a figure in the format of the path's suffix, create missing folders, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(figure_svg(figure), encoding="utf-8")
    else:
        figure.savefig(path, dpi=150)
    return path


def figure_svg(figure: "Figure") -> str:
    """Return a figure as one self-contained `<svg>` element, deterministic."""
    import matplotlib

    buffer = io.StringIO()
    # fixed ids; text as text, which viewers can search and read aloud
    settings: dict[Any, Any] = {"svg.hashsalt": "know_hf", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # matplotlib's font only measures the text here
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r"('DejaVu Sans', 'Bitstream Vera Sans'|'DejaVu Sans')[^;\"]*sans-serif", _FONTS, text)


def adaptive_svg(svg: str) -> str:
    """Return the `<svg>` with colours that follow the colour scheme of the page."""
    for number, colour in enumerate(_DARK):
        svg = svg.replace(colour, f"var(--c{number})")
    light, dark = ("".join(f"--c{n}:{c};" for n, c in enumerate(colours)) for colours in (_DARK, _DARK.values()))
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    end_of_tag = svg.index(">") + 1
    return svg[:end_of_tag] + style + svg[end_of_tag:]
