"""The frame and the pieces of a page: contents, sections, tables, rows of a chart, pictures, figures in words. No script, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from PIL import Image

from engines.evaluation.charts import Series, text
from engines.evaluation.report.tiles import LARGEST_PX, PairTiles, Tile

ROWS_SHOWN = 30  # classes listed one by one; of more, the first and last of them
ROWS_LISTED = 1_000  # rows of a folded table; of more, the files have them all
ROWS_PRINTED = 60  # a folded table of more rows stays folded on paper
TILE_PX = 48  # of a small image, enlarged
DASH = "\N{EN DASH}"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading and an entry in the contents; `content` is HTML already, "" leaves the section out."""

    anchor: str
    title: str
    content: str
    short: str = ""  # its name in the contents, where the title is long


def page(title: str, header: str, sections: Iterable[Section], footer: str) -> str:
    """The whole document; `header` and `footer` are HTML already."""
    there = [section for section in sections if section.content]
    links = "".join(f'<li><a href="#{s.anchor}">{text(s.short or s.title)}</a></li>' for s in there)
    contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if len(there) > 2 else ""
    body = "\n".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title"><h2 id="{s.anchor}-title">{text(s.title)}</h2>{s.content}</section>'
        for s in there
    )
    style = resources.files("engines.evaluation.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{text(title)} \N{MIDDLE DOT} DiffRC</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>{header}{contents}</header>\n<main>\n{body}\n</main>\n<footer>{footer}</footer>\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------------------------------------------------ headings


def masthead(name: str, title: str, verdict: str, outcome: str = "", tiles: Sequence[str] = ()) -> str:
    """What the page begins with: whose it is, its question, the answer in a sentence (HTML already), and its figures."""
    listed = f'<ul class="tiles">{"".join(tiles)}</ul>' if tiles else ""
    return (
        f'<p class="brand"><b>DiffRC</b> \N{MIDDLE DOT} <bdi>{text(name)}</bdi></p><h1>{text(title)}</h1>'
        f'<p class="verdict {text(outcome)}">{verdict}</p>{listed}'
    )


def tile(label: str, figure: str, note: str, outcome: str = "") -> str:
    """One figure of the head of the page."""
    style = f' class="{text(outcome)}"' if outcome else ""
    return f'<li class="tile"><span>{text(label)}</span><b{style}>{text(figure)}</b><span>{text(note)}</span></li>'


def note(words: str) -> str:
    """Small print; escaped."""
    return f'<p class="note">{text(words)}</p>' if words else ""


def folded(summary: str, content: str, rows: int = 0) -> str:
    """What is opened by who wants it; printed open unless it is long. `content` is HTML already."""
    style = ' class="long"' if rows > ROWS_PRINTED else ""
    return f"<details{style}><summary>{text(summary)}</summary>{content}</details>"


# -------------------------------------------------------------------------------------------------------------- tables


def row(head: str, cells: Iterable[str], style: str = "") -> str:
    """A row of a table with its heading; `head` and `cells` are HTML already."""
    marked = f' class="{text(style)}"' if style else ""
    return f'<tr{marked}><th scope="row">{head}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def block(title: str, rows: str, columns: int) -> str:
    """Rows of a table under a heading of their own; `rows` is HTML already."""
    return f'<tbody><tr class="block"><th scope="rowgroup" colspan="{columns}">{text(title)}</th></tr>{rows}</tbody>'


def table(label: str, head: Sequence[str], body: str, style: str = "") -> str:
    """A table in a frame that scrolls where the screen is narrow.

    Args:
        label: what it holds, for screen readers.
        head: of its columns; the first is over the rows' headings.
        body: rows, or blocks of them; HTML already.
    """
    cells = "".join(f'<th scope="col">{text(cell)}</th>' if cell else "<td></td>" for cell in head)
    rows = body if body.startswith("<tbody") else f"<tbody>{body}</tbody>"
    shown = f"<thead><tr>{cells}</tr></thead>" if head else ""
    marked = f' class="{text(style)}"' if style else ""
    return (
        f'<div class="scroll" role="region" aria-label="{text(label)}" tabindex="0">'
        f'<table{marked} aria-label="{text(label)}">{shown}{rows}</table></div>'
    )


def listed(rows: Sequence[str], where: str) -> str:
    """The rows of a long table, as many as a page bears; the rest is named. They are HTML already."""
    left_out = len(rows) - ROWS_LISTED
    if left_out <= 0:
        return "".join(rows)
    more = f'<tr><th scope="row" colspan="99">{left_out:,} more in <code>{text(where)}</code></th></tr>'
    return "".join(rows[:ROWS_LISTED]) + more


# -------------------------------------------------------------------------------------------------------------- charts


def entry(label: str, mark: str, figure: str, group: str = "") -> str:
    """A row of a chart: label | mark | figure; `mark` and `figure` are HTML already."""
    dot = f'<i class="dot {text(group)}"></i>' if group else ""
    name = f'<div class="label" title="{text(label)}">{dot}<bdi>{text(label)}</bdi></div>'
    return f'<div class="entry">{name}<div class="mark">{mark}</div><div class="figure">{figure}</div></div>'


def entries(rows: str, axis: str = "", style: str = "") -> str:
    """Rows of a chart, under them their axis; all HTML already."""
    below = f'<div class="entry" aria-hidden="true"><div></div><div class="mark">{axis}</div><div></div></div>' if axis else ""
    return f'<div class="rows {text(style)}">{rows}{below}</div>'


def legend(items: Sequence[tuple[str, str, str]]) -> str:
    """Colors and what they mean: (style of the color, style of the entry, words)."""
    told = "".join(f'<li class="{text(extra)}"><i class="{text(style)}"></i>{text(words)}</li>' for style, extra, words in items)
    return f'<ul class="legend">{told}</ul>'


def curve_legend(series: Iterable[Series]) -> str:
    """Colors of curves."""
    return legend([(f"stroke {s.style}", "", s.name) for s in series])


# ------------------------------------------------------------------------------------------------------------ pictures


def picture(png: bytes, words: str, caption: str = "") -> str:
    """A PNG as wide as it is, which scrolls on a phone; it is described in words. Nothing where the bytes are no PNG."""
    width = png_width(png)
    if not width:
        return f'<p class="none">A picture that belongs here is damaged: {text(caption or words)}.</p>'
    image = f'<img alt="{text(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    frame = f'<div class="sheet" style="--w:{width}px" role="region" aria-label="{text(words)}" tabindex="0">{image}</div>'
    return f"<figure>{frame}{below}</figure>"


def gallery_frame(content: str, side_px: int) -> str:
    """Strips of images of one size, enlarged by a whole factor where they are small; `content` is HTML already."""
    scale = max(1, round(TILE_PX / side_px)) if side_px else 1
    shown = min(LARGEST_PX, side_px * scale) or TILE_PX
    sharp = " sharp" if 0 < side_px <= TILE_PX else ""
    return f'<div class="gallery{sharp}" style="--side:{shown}px">{content}</div>'


def strip(title: str, words: str, tiles: Sequence[Tile]) -> str:
    """A row of images, one to a screen reader, which `words` describe; "" where there are none."""
    shown = "".join(f"<span>{_img(tile)}<small>{text(tile.words)}</small></span>" if tile.words else _img(tile) for tile in tiles)
    told = "; ".join(dict.fromkeys(tile.words for tile in tiles if tile.words))
    return _strip(title, words + (f": {told}" if told else ""), shown) if tiles else ""


def pairs_strip(title: str, words: str, pairs: Sequence[PairTiles]) -> str:
    """A row of pairs, one to a screen reader, which `words` describe; generated images beside their nearest real ones, copies framed."""
    shown = ""
    for pair in pairs:
        style = "pair copy" if pair.generated.warns else "pair"
        shown += f'<span class="{style}">{_img(pair.generated)}{_img(pair.real)}<small>{text(pair.generated.words)}</small></span>'
    return _strip(title, f"{words}: {', '.join(pair.generated.words for pair in pairs)}", shown)


def _strip(title: str, words: str, content: str) -> str:
    images = f'<div class="images" role="img" aria-label="{text(words)}">{content}</div>'
    return f'<figure class="strip"><figcaption>{text(title)}</figcaption>{images}</figure>'


def _img(tile: Tile) -> str:
    return f'<img alt="" src="{text(tile.source)}">'


def png_width(png: bytes) -> int:
    """Width in px of a whole PNG, 0 of anything else."""
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            image.load()
            return image.width
    except Exception:  # the parsers of damaged pictures raise OSError, SyntaxError, ValueError and more
        return 0


# ---------------------------------------------------------------------------------------------------- figures in words


def signed(value: float, digits: int = 1) -> str:
    """+3.1, or with a true minus sign."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(found: Mapping[str, Any]) -> str:
    """The ends of an interval of a difference."""
    return f"{signed(found['low'])} to {signed(found['high'])}"


def significant(value: float, digits: int = 3) -> str:
    """A value with so many significant digits and no exponent down to 1e-4; a true minus sign."""
    return f"{value:,.{digits}g}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """1.4 s, 3 min 07 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: int, one: str, many: str = "") -> str:
    """ "1 class", "2 classes"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
