"""Self-contained HTML pages: text, tables and figures in one file that opens without a network."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
img{max-width:100%}table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;
border-bottom:1px solid #ddd}figcaption{color:#555}figure{margin:1rem 0}"""


class Section(NamedTuple):
    """A part of a page; empty fields are left out."""

    title: str
    sentences: Sequence[str] = ()
    rows: Sequence[Mapping[str, Any]] = ()  # a table, with the first row's keys as columns
    image: bytes = b""  # PNG
    caption: str = ""


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML; all text is escaped."""
    body = "".join(_section(section) for section in sections)
    name = html.escape(title)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
            f"<style>{STYLE}</style></head><body><h1>{name}</h1>{body}</body></html>\n")


def write(folder: Path, title: str, parts: Mapping[str, Section]) -> None:
    """Writes `index.html` and beside it the figures as PNG files, each under the name of its part."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        if part.image:
            (folder / f"{name}.png").write_bytes(part.image)
    (folder / "index.html").write_text(render(title, list(parts.values())))


def markdown(title: str, parts: Mapping[str, Section]) -> str:
    """The parts of a page as Markdown, with the figures that `write` put beside it."""
    lines = [f"# {title}"]
    for name, part in parts.items():
        lines += ["", f"## {part.title}", "", *(f"- {sentence}" for sentence in part.sentences)]
        if part.rows:
            lines += ["", *markdown_table([key.replace("_", " ") for key in part.rows[0]], (
                [_cell(value) for value in row.values()] for row in part.rows))]
        if part.image:
            lines += ["", f"![{part.caption}]({name}.png)", "", part.caption]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown.

    Example:
      >>> markdown_table(["model", "ms"], [["TARQ", "1.5"]])
      ['| model | ms |', '| --- | --- |', '| TARQ | 1.5 |']
    """
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.sentences:
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in section.sentences)
        parts.append(f"<ul>{items}</ul>")
    if section.rows:
        parts.append(_table(section.rows))
    if section.image:
        data = base64.b64encode(section.image).decode()
        caption = html.escape(section.caption)
        parts.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                     f"<figcaption>{caption}</figcaption></figure>")
    return "".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(key).replace('_', ' '))}</th>" for key in rows[0])
    cells = ("".join(f"<td>{html.escape(_cell(value))}</td>" for value in row.values()) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
