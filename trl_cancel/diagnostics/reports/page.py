"""A report as one page that needs no network: figures, tables and coloured tokens, on light and dark screens."""

import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...texts import plain
from .figures import COLOURS, Figure, as_svg, make_plain


try:
    from jinja2 import Environment
    from markupsafe import Markup
except ImportError as error:
    raise ImportError(f"Pages need jinja2: pip install matplotlib jinja2 ({error}).") from error


Cell = str | int | float | None
MISSING = "—"
NUMBER = re.compile(r"[-+±≤≥<>]?\s?\d[\d.,]*(e[-+]?\d+)?\s?(%|[a-zµ]{1,3})?(\s?[\[(±].*)?", re.IGNORECASE)


class Page:
    """
    A report, put together in the order of the calls.

    Args:
        title (`str`):
            Title of the page.
        summary (`str`, *optional*):
            What the page shows, in a sentence or two.
        facts (`Mapping[str, str | int | float]`, *optional*):
            What it was made from: a small table at the top.

    Example:

    ```python
    from trl_cancel.diagnostics.reports.figures import new_figure
    from trl_cancel.diagnostics.reports.page import Page

    figure, axes = new_figure()
    axes.plot([0.4, 0.7])
    page = Page("Two steps")
    page.section("Reward", "It went up.")
    page.figure("reward", figure, caption="Mean reward by step.", alt="A line from 0.4 to 0.7")
    page.write("report")
    ```
    """

    def __init__(self, title: str, summary: str = "", facts: Mapping[str, Cell] | None = None):
        self.title = title
        self.summary = summary
        self.facts = {name: _cell(value) for name, value in (facts or {}).items()}
        self._parts: list[dict[str, Any]] = []
        self._figures: dict[str, Figure] = {}

    def section(self, title: str, text: str = "") -> None:
        """
        Starts a section, which the table of contents will list.

        Args:
            title (`str`):
                Its title.
            text (`str`, *optional*):
                What it shows and how to read it.
        """
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        if any(part.get("anchor") == anchor for part in self._parts):
            anchor += f"-{len(self._parts)}"
        self._add("section", title=title, text=text, anchor=anchor)

    def text(self, text: str) -> None:
        """
        Adds a paragraph.

        Args:
            text (`str`):
                Plain text.
        """
        self._add("text", text=text)

    def figure(self, name: str, figure: Figure, *, caption: str, alt: str) -> None:
        """
        Adds a figure.

        Args:
            name (`str`):
                Name of its PNG file, and of the figure on the page: letters, digits, `-` and `_`.
            figure (`matplotlib.figure.Figure`):
                The figure, best from [`~trl_cancel.diagnostics.reports.figures.new_figure`].
            caption (`str`):
                Text below it.
            alt (`str`):
                What it shows, for those who cannot see it.
        """
        if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
            raise ValueError(f"name={name!r}: must start with a letter and hold letters, digits, '-' and '_'.")
        if name in self._figures:
            raise ValueError(f"name={name!r}: the page has a figure of this name already.")
        make_plain(figure)
        self._figures[name] = figure
        self._add("figure", name=name, svg=Markup(as_svg(figure, name, alt)), caption=caption)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str = "") -> None:
        """
        Adds a table. Columns of numbers are aligned to the right, all but the first.

        Args:
            header (`Sequence[str]`):
                Names of the columns.
            rows (`Sequence[Sequence[str | int | float]]`):
                Cells by row. Floats are shown with three digits, `None` and `nan` as a dash.
            caption (`str`, *optional*):
                Text above it.
        """
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"row={list(row)!r}: has {len(row)} cells, the header has {len(header)}.")
        cells = [[_cell(value) for value in row] for row in rows]
        numeric = [column > 0 and any(NUMBER.fullmatch(row[column]) for row in cells) for column in range(len(header))]
        self._add("table", header=header, rows=cells, numeric=numeric, caption=caption)

    def tokens(
        self,
        tokens: Sequence[str],
        values: Sequence[float],
        caption: str,
        limit: float | None = None,
        legend: tuple[str, str] = ("suppressed", "boosted"),
        diverging: bool = True,
    ) -> None:
        """
        Adds a response whose tokens are coloured by a value: blue below 0 and orange above, the more the stronger.

        Args:
            tokens (`Sequence[str]`):
                Text of each token.
            values (`Sequence[float]`):
                Value of each token, shown when the pointer rests on it; `nan` leaves the token uncoloured.
            caption (`str`):
                Text above it.
            limit (`float`, *optional*):
                Magnitude that has the full colour, as has all beyond. The 95th percentile of the magnitudes if not
                given.
            legend (`tuple[str, str]`, *optional*, defaults to `("suppressed", "boosted")`):
                What values below and above 0 mean. For `diverging=False`, what 0 and the limit mean.
            diverging (`bool`, *optional*, defaults to `True`):
                Whether there are values of both signs. If not, the colour is orange alone.
        """
        if len(tokens) != len(values):
            raise ValueError(f"{len(tokens)} tokens have {len(values)} values; give one value a token.")
        if limit is not None and not 0 < limit < math.inf:
            raise ValueError(f"limit={limit}: must be positive and finite.")
        if not diverging and any(value < 0 for value in values):
            raise ValueError(f"diverging=False is for values of at least 0; the smallest is {min(values):.3g}.")
        limit = limit or _high_magnitude(values)
        self._add(
            "tokens",
            spans=[
                {"text": visible(token), "title": _cell(float(value)), "style": _shade(value, limit)}
                for token, value in zip(tokens, values, strict=True)
            ],
            caption=caption,
            legend=legend,
            ends=(f"≤ {-limit:.3g}" if diverging else "0", f"≥ {limit:.3g}"),
            ramp=[_shade(limit * (step / 3), limit) for step in range(-3 if diverging else 0, 4)],
        )

    def write(self, folder: str | Path) -> Path:
        """
        Writes `index.html` and a PNG file of each figure.

        Args:
            folder (`str` or `Path`):
                Where to; made if it is not there.

        Returns:
            `Path`: Of `index.html`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in self._figures.items():
            figure.savefig(folder / f"{name}.png", dpi=200, facecolor="white", metadata={"Software": None})
        index = folder / "index.html"
        index.write_text(self._html(), encoding="utf-8", errors="replace")
        return index

    def _html(self) -> str:
        source = files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_seen)
        template = environment.from_string(source)
        sections = [part for part in self._parts if part["kind"] == "section"]
        return template.render(
            title=self.title, summary=self.summary, facts=self.facts, sections=sections, parts=self._parts
        )

    def _add(self, kind: str, **content: Any) -> None:
        self._parts.append({"kind": kind, **content})


def visible(token: str) -> str:
    """
    A token's text with signs for what would not be seen: line breaks, control characters, spaces that stand alone.

    Args:
        token (`str`):
            Text of a token.

    Returns:
        `str`: The text to show.
    """
    if not token.strip(" "):
        return "␣" * len(token) or "∅"
    signs = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\n": "⏎\n", "\t": "⇥", "\x7f": "␡"}
    return "".join(signs.get(character, character) for character in token)


def _seen(value: Any) -> Any:
    """Texts with escapes for what a browser would not show, or would turn round."""
    return plain(value, lines=True) if isinstance(value, str) and not isinstance(value, Markup) else value


def _cell(value: Cell) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _high_magnitude(values: Sequence[float]) -> float:
    """The 95th percentile of the magnitudes, or the highest if that is 0, or 1."""
    magnitudes = sorted(abs(value) for value in values if math.isfinite(value)) or [0.0]
    return magnitudes[math.ceil(0.95 * len(magnitudes)) - 1] or magnitudes[-1] or 1.0


def _shade(value: float, limit: float) -> str:
    """Background of a token; its text keeps the page's colour, so even the full colour lets the page through."""
    strength = 0 if math.isnan(value) else min(abs(value) / limit, 1)
    if strength < 0.02:
        return ""
    red, green, blue = bytes.fromhex(COLOURS["boosted" if value > 0 else "suppressed"][1:])
    return f"background: rgba({red}, {green}, {blue}, {0.7 * strength:.2f})"
