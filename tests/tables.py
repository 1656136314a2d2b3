"""
What the README says of the methods, made of `trl_cancel/methods/`: `python -m tests.tables` writes it.

The first rows of a table, and what stands between comments such as `<!-- methods: names -->`. What the comparison of
the methods found is taken from the README, where `benchmarks/learning.py` writes it.
"""

import re
from dataclasses import fields
from pathlib import Path

from trl_cancel.methods import METHODS, NAMED


README = Path(__file__).parents[1] / "README.md"
PAPERS = "https://huggingface.co/papers"


def found(readme: str, name: str) -> str:
    """What the comparison found of a method, with the comments around it."""
    comment = f"<!-- gave: {name} -->"
    match = re.search(f"{re.escape(comment)}.*?<!-- / -->", readme)
    return match[0] if match else f"{comment}<!-- / -->"


def table(readme: str) -> str:
    """The rows of the methods in the table."""
    lines = []
    for method in METHODS:
        row = method.row
        default = next(setting.default for setting in fields(method.Settings) if setting.name == method.switch)
        shown = {True: "on", False: "off"}.get(default, default)
        gave = re.sub(r"\{(.+?)\}", lambda name: found(readme, name[1]), row.gave)
        source = f"[{row.paper}]({PAPERS}/{row.paper})" if row.paper else ""
        cells = [f"[`{method.switch}`]({row.page})", shown, row.does, row.when, row.costs, gave, source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def names(readme: str) -> str:
    """The names that `--method` takes."""
    return ", ".join(f"`{name}`" for name in NAMED)


def pages(readme: str) -> str:
    """The pages of the methods."""
    links = [f"[{method.row.title}]({method.row.page})" for method in METHODS]
    return f"- The methods, with equations, metrics and what departs from the papers: {', '.join(links)}"


# Where each part stands.
END = "<!-- methods: end -->"
PARTS = {
    table: ("(\\| Setting \\| Default [^\\n]*\\n\\| --- [^\\n]*\\n)", "(\\n\\| \\[`credits=)"),
    names: ("(<!-- methods: names -->)", f"({END})"),
    pages: ("(<!-- methods: pages -->\\n)", f"(\\n{END})"),
}


def rewritten(readme: str) -> str:
    """The README with these parts as the methods have them now."""
    for render, (start, end) in PARTS.items():
        place = re.search(f"{start}.*?{end}", readme, re.DOTALL)
        assert place, f"README.md has no place for the {render.__name__} of the methods"
        readme = f"{readme[: place.end(1)]}{render(readme)}{readme[place.start(2) :]}"
    return readme


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
