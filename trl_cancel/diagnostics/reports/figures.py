"""Figures that can be read on light and on dark pages: one style, and SVG that takes the page's colours."""

import io
from typing import Any
from xml.etree import ElementTree

from ...texts import plain


try:
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure
    from matplotlib.text import Text
except ImportError as error:
    raise ImportError(f"Figures need matplotlib: pip install matplotlib jinja2 ({error}).") from error


# Told apart with any colour vision, and by at least 3:1 from a white and from a nearly black page.
COLOURS = {
    "suppressed": "#2b83c6",
    "boosted": "#d55e00",
    "green": "#009e73",
    "purple": "#b5609a",
    "gold": "#a67c00",
    "neutral": "#808080",
}
INK, PAPER = "#000000", "#ffffff"  # black and white in a figure become the page's text colour and background

STYLE: Any = {
    "axes.prop_cycle": cycler(color=list(COLOURS.values())),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
}


def new_figure(width: float = 6.4, height: float = 3.6, columns: int = 1) -> tuple[Figure, Any]:
    """
    An empty figure in the style of the pages. Draw in [`COLOURS`]; what is black or white follows the page.

    Args:
        width, height (`float`, *optional*, defaults to `6.4` and `3.6`):
            Size in inches.
        columns (`int`, *optional*, defaults to `1`):
            Number of axes side by side.

    Returns:
        `tuple[Figure, Axes]`: The figure and its axes, an array of them for several columns.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(1, columns)


def make_plain(figure: Figure) -> None:
    """
    Writes escapes for characters that fonts and SVG do not have: control characters, halves of surrogate pairs.

    Args:
        figure (`matplotlib.figure.Figure`):
            The figure; changed in place.
    """
    for text in figure.findobj(Text):
        if (seen := _drawable(text.get_text())) != text.get_text():
            text.set_text(seen)
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_ticklabels()]  # which are made anew for each drawing
        if (seen_labels := [_drawable(label) for label in labels]) != labels:
            axis.set_ticks(axis.get_majorticklocs(), seen_labels)


def as_svg(figure: Figure, name: str, alt: str) -> str:
    """
    A figure as an SVG element for a page: the same text for the same figure, without identifiers that another figure
    of the page could have too.

    Args:
        figure (`matplotlib.figure.Figure`):
            The figure.
        name (`str`):
            Its name on the page, which starts every identifier.
        alt (`str`):
            What the figure shows, for those who cannot see it.

    Returns:
        `str`: The element.
    """
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=no_metadata)
    svg = ElementTree.fromstring(written.getvalue())
    for element in svg.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _for_page(_local(key), value, name) for key, value in element.attrib.items()}
    for definitions in svg.findall("defs"):  # the style sheet in it would hold for the whole page
        for sheet in definitions.findall("style"):
            definitions.remove(sheet)
    width = svg.attrib.pop("width")
    svg.attrib.pop("height")
    # Black is SVG's default, so matplotlib does not write it down.
    svg.attrib |= {
        "fill": "currentColor",
        "role": "img",
        "aria-label": plain(alt, lines=True),
        "style": f"--width: {width}",
    }
    return ElementTree.tostring(svg, encoding="unicode")


def _drawable(text: str) -> str:
    return plain(text, lines=True).expandtabs(4)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _for_page(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "style":
        value = value.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    if key == "href" and not value.startswith("#"):
        return value  # an image in the figure
    return value.replace("url(#", f"url(#{name}-") if key != "href" else f"#{name}-{value[1:]}"
