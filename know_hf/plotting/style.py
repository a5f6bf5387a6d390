"""What all figures share: colours, the figure itself, and how it is written."""

import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, Color Universal Design, 2008: told apart with every kind of colour blindness.
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
INK, MUTED, GRID, BAND, PAPER = "#1b1b1d", "#5a5a60", "#d8d8dc", "#e9e9ec", "#fefefe"

ROLE_COLOURS = {"method": BLUE, "control": VERMILION, "reference": MUTED}
ROLE_MARKERS = {"method": "o", "control": "s", "reference": "D"}

_LONGEST_NAME = 32  # characters of a name
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

# What takes the place of each colour where the page around the figure is dark.
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
    """An empty figure, its size in inches; no pyplot, nothing global.

    Raises:
        `ImportError`: when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib, the extra 'plot': pip install 'know_hf[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def style_axes(axes: "Axes", title: str, x_label: str, y_label: str, grid: Literal["x", "y", "both"]) -> None:
    """Labels, and the colours that [`adaptive_svg`] knows: matplotlib's own black would stay black on a dark page."""
    axes.set_title(title.replace("$", r"\$"), color=INK, fontsize=11)
    axes.set_xlabel(x_label.replace("$", r"\$"), color=INK, fontsize=9.5)
    axes.set_ylabel(y_label.replace("$", r"\$"), color=INK, fontsize=9.5)
    axes.tick_params(which="both", colors=MUTED, length=2, labelsize=9)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GRID)


def plain(text: str) -> str:
    """Text as it stands, whoever wrote it: `$` is no mathematics, and what can't be seen or drawn is left out."""
    seen = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    cut = seen if len(seen) <= _LONGEST_NAME else seen[: _LONGEST_NAME - 1] + "…"
    return cut.replace("$", r"\$")


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a figure in the format of the path's suffix.

    Args:
        figure (`matplotlib.figure.Figure`): The figure.
        path (`str` or `Path`): Where it goes; folders are made.

    Returns:
        `Path`: the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(figure_svg(figure), encoding="utf-8")
    else:
        figure.savefig(path, dpi=150)
    return path


def figure_svg(figure: "Figure") -> str:
    """A figure as one `<svg>` element that refers to nothing outside of it; the same figure gives the same text."""
    import matplotlib

    buffer = io.StringIO()
    # ids that do not change from run to run; text as text, which any viewer can draw, search and read out
    settings: dict[Any, Any] = {"svg.hashsalt": "know_hf", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # of matplotlib's own font, which only measures here
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r"('DejaVu Sans', 'Bitstream Vera Sans'|'DejaVu Sans')[^;\"]*sans-serif", _FONTS, text)


def adaptive_svg(svg: str) -> str:
    """The `<svg>` of a figure, in light colours on dark where it is looked at with a dark colour scheme."""
    for number, colour in enumerate(_DARK):
        svg = svg.replace(colour, f"var(--c{number})")
    light = "".join(f"--c{number}:{colour};" for number, colour in enumerate(_DARK))
    dark = "".join(f"--c{number}:{colour};" for number, colour in enumerate(_DARK.values()))
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    end_of_tag = svg.index(">") + 1
    return svg[:end_of_tag] + style + svg[end_of_tag:]
