"""The pieces of a page that stands alone: escaped text, tables, and plots as inline SVG; nothing is loaded."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "listed", "page", "paragraph", "preformatted", "section", "table"]

# Both color schemes; lines and letters of plots take the color of the text.
_STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --back: #ffffff; --line: #c9c9c9; --soft: #f3f3f3; --warn: #9a3b00 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --back: #161616; --line: #444444; --soft: #222222; --warn: #ffab70 }
}
body { color: var(--text); background: var(--back); font: 15px/1.5 system-ui, sans-serif;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
th.number, td.number { text-align: right }
tr.warn td { color: var(--warn); font-weight: 600 }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .8rem }
figure { margin: 1.6rem 0; overflow-x: auto } figcaption { font-weight: 600; position: sticky; left: 0 }
svg { width: 100%; min-width: 38rem; height: auto; fill: currentColor }
summary { cursor: pointer; margin: .5rem 0 }
@media print {
  body { max-width: none; margin: 0; padding: 0 }
  .scroll, figure { overflow: visible } pre { overflow: visible; white-space: pre-wrap; font-size: .6rem }
  th, td { white-space: normal } table { font-size: .75rem }
  tr, figure { break-inside: avoid } h2, figcaption { break-after: avoid }
  svg { min-width: 0; max-height: 22cm }
  details::details-content { content-visibility: visible; height: auto }
}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole HTML document."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</body>",
            "</html>",
            "",
        ]
    )


def section(title: str, parts: Iterable[str]) -> str:
    """A headline and what stands under it; nothing where nothing does."""
    inside = [part for part in parts if part]
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *inside, "</section>"]) if inside else ""


def paragraph(words: str) -> str:
    """
    >>> paragraph("a < b")
    '<p>a &lt; b</p>'
    """
    return f"<p>{escape(words)}</p>"


def listed(items: Iterable[str]) -> str:
    """A list of bullets; nothing of nothing."""
    found = [f"<li>{escape(item)}</li>" for item in items]
    return "\n".join(["<ul>", *found, "</ul>"]) if found else ""


def preformatted(words: str) -> str:
    """Text whose columns are kept."""
    return f"<pre>{escape(words)}</pre>"


def table(
    names: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Iterable[str] = (),
    warned: Iterable[int] = (),
    folded: str | None = None,
) -> str:
    """A table whose entries are text.

    Args:
        names: of the columns.
        rows: as many entries each; columns without any are left out.
        right: names of the columns whose entries end in line.
        warned: numbers of the rows that are to be seen.
        folded: what a reader clicks on to open it; None leaves it open.
    """
    rows = [tuple(row) for row in rows]
    kept = [i for i in range(len(names)) if i == 0 or any(row[i].strip() for row in rows)]
    ends, marks = set(right), set(warned)
    kinds = {i: ' class="number"' if names[i] in ends else "" for i in kept}
    head = "".join(f'<th scope="col"{kinds[i]}>{escape(names[i])}</th>' for i in kept)
    body = []
    for number, row in enumerate(rows):
        mark = ' class="warn"' if number in marks else ""
        body.append(f"<tr{mark}>" + "".join(f"<td{kinds[i]}>{escape(row[i])}</td>" for i in kept) + "</tr>")
    lines = [
        '<div class="scroll"><table>',
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
        *body,
        "</tbody></table></div>",
    ]
    if folded is not None:
        lines = ["<details>", f"<summary>{escape(folded)}</summary>", *lines, "</details>"]
    return "\n".join(lines)


def figure(plot: Figure, caption: str, number: int) -> str:
    """A plot as SVG in the page, its colors those of the page.

    Args:
        plot: of matplotlib.
        caption: what it shows; readers of the page aloud get it in the plot's place.
        number: of the plot in the page, so that no two elements have one name.
    """
    svg = _svg(plot, f"plot{number}-").replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f"<figure>\n<figcaption>{escape(caption)}</figcaption>\n{svg}\n</figure>"


def _svg(plot: Figure, prefix: str) -> str:
    """Inline SVG: no declarations, metadata or namespaces, which HTML has by itself; names begin with ``prefix``."""
    import matplotlib

    file = io.StringIO()
    # Letters stay letters, to be found and read; equal plots have equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        plot.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    return svg.replace("#000000", "currentColor")
