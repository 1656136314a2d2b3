"""The report page: what is on it, that it is safe and the same every time, and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from trl_cancel.diagnostics.reports.figures import COLOURS, as_svg, new_figure
from trl_cancel.diagnostics.reports.page import Page, visible


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
NASTY = "<script>alert('x')</script>&\""


def example(text="plain"):
    """A page with everything on it, and with one text everywhere."""
    page = Page(f"Title {text}", summary=f"Summary {text}", facts={"model": text, "rollouts": 1234, text: 0.12345})
    page.section(f"First {text}", text)
    figure, axes = new_figure()
    axes.plot([1, 2, 3], [1e-4, 1e-2, 1], label=f"line {text}")
    axes.axhline(0.5, color="black", linestyle="--")
    axes.set(yscale="log", title=text, xlabel="steps", ylabel="residual")
    axes.legend()
    page.figure("line", figure, caption=text, alt=text)
    figure, columns = new_figure(8, 3, columns=2)
    for axes in columns:
        axes.bar(["a", text], [1, 2], color=COLOURS["boosted"])
    page.figure("bars", figure, caption="Bars", alt="bars")
    page.section(f"Second {text}")
    page.table(["method", *(f"column {index} {text}" for index in range(9))], [[text, *range(9)]], caption=text)
    page.tokens([text, " and", "\n", " more"], [-0.2, 0.0, 0.1, float("nan")], caption=text)
    page.text(text)
    return page


class Elements(HTMLParser):
    """Elements and texts of a page, as a browser reads them."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def test_what_is_written(tmp_path):
    index = example().write(tmp_path / "new" / "folder")
    assert index == tmp_path / "new" / "folder" / "index.html"
    assert sorted(file.name for file in index.parent.iterdir()) == ["bars.png", "index.html", "line.png"]
    elements = Elements(index.read_text())
    anchors = [link for link in elements.attributes("href") if link in ("#first-plain", "#second-plain")]
    assert anchors == ["#first-plain", "#second-plain"]
    assert {"first-plain", "second-plain"} <= set(elements.attributes("id"))
    assert [tag for tag, _ in elements.tags].count("svg") == 2
    for expected in ("Title plain", "Summary plain", "rollouts", "1,234", "0.123", "⏎\n", "steps", "residual"):
        assert expected in elements.texts, expected


def test_pngs_are_light_and_sharp(tmp_path):
    from PIL import Image

    example().write(tmp_path)
    image = Image.open(tmp_path / "line.png").convert("RGB")
    assert image.size == (1280, 720)  # 6.4 x 3.6 inches at 200 dpi
    assert image.getpixel((2, 2)) == (255, 255, 255)


def test_the_same_page_twice(tmp_path):
    """No dates, no random identifiers: two runs can be compared by comparing files."""
    for folder in ("a", "b"):
        example().write(tmp_path / folder)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_identifiers_are_unique_and_found(tmp_path):
    source = example().write(tmp_path).read_text()
    ids = Elements(source).attributes("id")
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", source) + re.findall(r'href="#([^"]*)"', source)
    assert len(used) > 10
    assert set(used) <= set(ids)


def test_text_cannot_become_markup(tmp_path):
    source = example(NASTY).write(tmp_path).read_text()
    elements = Elements(source)
    assert not [tag for tag, _ in elements.tags if tag == "script"]
    assert source.count(html.escape(NASTY, quote=False)) + source.count(html.escape(NASTY)) > 3
    assert (
        len([attributes for _, attributes in elements.tags if any(name.startswith("on") for name in attributes)]) == 0
    )
    assert "default-src 'none'" in source


def test_nothing_is_loaded(tmp_path):
    source = example().write(tmp_path).read_text()
    assert "http:" not in source
    assert "https:" not in source
    elements = Elements(source)
    assert not elements.attributes("src")
    assert {link for link in elements.attributes("href") if not link.startswith("#")} == {"line.png", "bars.png"}


def test_figures_take_the_colours_of_the_page():
    figure, axes = new_figure()
    axes.plot([0, 1], color="black", label="line")
    axes.plot([0, 1], color=COLOURS["suppressed"])
    axes.bar([0], [1], color="black")
    axes.text(0, 0, 'style="#000000"')
    axes.legend(facecolor="white")
    svg = as_svg(figure, "name", "what is seen")
    styles = " ".join(re.findall(r' style="([^"]*)"', svg))
    assert "#000000" not in styles
    assert "#ffffff" not in styles
    assert "var(--paper)" in styles
    assert "stroke: currentColor" in styles
    assert COLOURS["suppressed"] in styles
    assert svg.startswith('<svg viewBox="')
    assert 'fill="currentColor"' in svg[:300]  # for black bars and text, which matplotlib leaves without a colour
    assert 'aria-label="what is seen"' in svg[:300]
    assert "<style" not in svg
    assert 'style="#000000"' in html.unescape(svg)  # the text itself


def test_images_in_figures_are_kept():
    figure, axes = new_figure(2, 2)
    axes.imshow([[0, 1], [1, 0]])
    assert 'href="data:image/png;base64,' in as_svg(figure, "name", "")


def luminance(colour):
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("paper", ["#ffffff", "#111111"])
def test_contrast_of_the_colours(name, paper):
    """WCAG asks for 3:1 in graphics."""
    low, high = sorted([luminance(COLOURS[name]), luminance(paper)])
    assert (high + 0.05) / (low + 0.05) >= 3


@pytest.mark.parametrize(
    ("column", "right"),
    [
        ([1, 20000], True),
        ([0.123456, None], True),
        (["0.5 [0.3, 0.7]", "-1.2e-05"], True),
        (["82.4%", "—"], True),
        (["59 s", "not reached"], True),
        (["torn groups", "3 of the groups"], False),
        (["8-4+8=12", "a"], False),
        ([None, None], False),
    ],
)
def test_alignment(column, right, tmp_path):
    page = Page("t")
    page.table(["name", "column"], [["row", cell] for cell in column])
    source = page.write(tmp_path).read_text()
    assert ('class="number"' in source) == right
    assert source.count('scope="row"') == len(column)


def test_cells(tmp_path):
    page = Page("t")
    page.table(["a", "b", "c", "d", "e", "f"], [["row", 1234567, 0.0123456, float("nan"), None, True]])
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page.write(tmp_path).read_text())
    assert cells == ["1,234,567", "0.0123", "—", "—", "yes"]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", " the"),
        ("  ", "␣␣"),
        ("", "∅"),
        ("\n", "⏎\n"),
        ("a\r\n\tb", "a␍⏎\n⇥b"),
        ("\x00\x7f", "␀␡"),
        ("é🙂", "é🙂"),
    ],
)
def test_invisible_text_is_shown(token, shown):
    assert visible(token) == shown


def shades(page, tmp_path):
    """Colour and strength of each token."""
    source = page.write(tmp_path).read_text()
    block = re.search(r'<div class="tokens">(.*?)</div>', source, re.DOTALL)[1]
    spans = [dict(re.findall(r'(title|style)="(.*?)"', span)) for span in re.findall(r"<span(.*?)>", block)]
    return [
        (span["title"], *(re.findall(r"rgba\((\d+), .*, ([\d.]+)\)", span.get("style", "")) or [("", "0")])[0])
        for span in spans
    ]


def test_shades_of_tokens(tmp_path):
    page = Page("t")
    page.tokens(["a", "b", "c", "d", "e"], [-0.1, 0.05, 0.2, 0.0, float("nan")], "caption", limit=0.1)
    red = {name: str(int(COLOURS[name][1:3], 16)) for name in ("suppressed", "boosted")}
    assert shades(page, tmp_path) == [
        ("-0.1", red["suppressed"], "0.70"),
        ("0.05", red["boosted"], "0.35"),
        ("0.2", red["boosted"], "0.70"),
        ("0", "", "0"),
        ("—", "", "0"),
    ]
    source = (tmp_path / "index.html").read_text()
    assert "≤ -0.1 suppressed" in source
    assert "≥ 0.1 boosted" in source


def test_default_limit_is_robust_against_one_large_value(tmp_path):
    page = Page("t")
    page.tokens(["x"] * 100, [0.1] * 99 + [50.0], "caption", diverging=False, legend=("nothing", "much"))
    assert {strength for _, _, strength in shades(page, tmp_path)} == {"0.70"}
    assert "≥ 0.1 much" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [float("nan")], [0.0] * 99 + [1.0], [float("inf"), 1.0]])
def test_odd_values_of_tokens(values, tmp_path):
    page = Page("t")
    page.tokens(["x"] * len(values), values, "caption")
    assert len(shades(page, tmp_path)) == len(values)


def test_sections_of_the_same_name(tmp_path):
    page = Page("t")
    for title in ("Same", "Same", "⏎"):
        page.section(title)
    anchors = [link for link in Elements(page.write(tmp_path).read_text()).attributes("href") if link[0] == "#"]
    assert len(set(anchors)) == 3


MISTAKES = {
    "name": (lambda page, figure: page.figure("a b", figure, caption="", alt=""), "name='a b': must start with"),
    "path": (lambda page, figure: page.figure("../a", figure, caption="", alt=""), "must start with a letter"),
    "row": (lambda page, figure: page.table(["a", "b"], [["c"]]), "has 1 cells, the header has 2"),
    "tokens": (lambda page, figure: page.tokens(["a"], [], ""), "1 tokens have 0 values"),
    "limit": (lambda page, figure: page.tokens(["a"], [1.0], "", limit=0), "limit=0: must be positive"),
    "sign": (lambda page, figure: page.tokens(["a"], [-1.0], "", diverging=False), "the smallest is -1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call(Page("t"), new_figure()[0])


def test_a_name_twice():
    page, (figure, _) = Page("t"), new_figure()
    page.figure("same", figure, caption="", alt="")
    with pytest.raises(ValueError, match="a figure of this name already"):
        page.figure("same", figure, caption="", alt="")


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_the_extra(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import trl_cancel.diagnostics.reports.page"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"need {missing}" in run.stderr
    assert "pip install matplotlib jinja2" in run.stderr


def test_no_state_of_pyplot():
    code = "import sys, trl_cancel.diagnostics.reports.page; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


HARNESS = """
<!doctype html><title>harness</title>
<iframe id="page" style="width: {width}px; height: 600px; border: 0" srcdoc="{page}"></iframe>
<script>
document.getElementById("page").addEventListener("load", event => {{
  const view = event.target.contentWindow, root = view.document.documentElement;
  const style = query => view.getComputedStyle(view.document.querySelector(query));
  document.title = "loaded";
  document.body.dataset.seen = JSON.stringify({{
    width: view.innerWidth,
    content: root.scrollWidth,
    paper: style("body").backgroundColor,
    ink: style("svg text").fill,
    frame: style("svg [id$=patch_3] path").stroke,
    table: view.document.querySelector("table").scrollWidth,
    figure: style("svg").width,
    loaded: view.performance.getEntriesByType("resource").map(entry => entry.name),
  }});
}});
</script>
"""


def in_browser(source, tmp_path, width, scheme):
    """What a headless browser makes of a page, in a frame of some width and with a colour scheme, offline."""
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.format(width=width, page=html.escape(source)), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        harness.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen = re.search(r'data-seen="([^"]*)"', dom)
    assert seen, dom[-500:]
    return json.loads(html.unescape(seen[1]))


@pytest.mark.skipif(not BROWSER, reason="no Chromium to look at the page with")
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser(width, tmp_path):
    source = example("w" * 40).write(tmp_path).read_text()
    light, dark = (in_browser(source, tmp_path, width, scheme) for scheme in ("light", "dark"))
    for seen in (light, dark):
        assert seen["width"] == width
        assert seen["content"] <= width  # the wide table scrolls by itself
        assert seen["table"] > width
        assert seen["loaded"] == []
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(17, 17, 17)")
    assert (light["ink"], dark["ink"]) == ("rgb(27, 27, 27)", "rgb(230, 230, 230)")
    assert (light["frame"], dark["frame"]) == (light["ink"], dark["ink"])
    assert float(dark["figure"].removesuffix("px")) > 400  # not squeezed on a narrow screen: the labels stay readable
