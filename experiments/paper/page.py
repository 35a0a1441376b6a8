"""`report.html`: every table and figure of a results folder in one page that needs nothing else."""

import base64
import html
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from e2sad_jax._io import read_bytes, read_json, write_text
from experiments.paper import tables

# In this order, as far as they are there.
TABLES = (
    "table1", "table2", "table3", "study_second_step", "study_lam", "study_alpha", "study_labels", "models",
)  # fmt: skip
FIGURES = ("figure2", "figure3", "figure4")
PICTURE_BYTES = 64 * 2**20
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 90rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin: 3rem 0 .3rem; }
.setting { font-weight: 600; color: #8a3b00; margin: .2rem 0 .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; vertical-align: top; }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; max-width: 8rem; }
.name { text-align: left; }
.paper { display: block; color: #666; font-size: .76rem; }
.white { background: #fdf1d8; font-weight: 600; }
.apart { border-left: 2px solid #888; }
img { max-width: 100%; height: auto; }
nav a { display: inline-block; margin-right: 1rem; }
li, .about { font-size: .88rem; } .about { color: #555; overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; }
"""


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes report.html from the tables and figures in a folder, those of earlier goes included.

    Args:
      folder: `results/<scale>`.

    Returns:
      The page. A file that cannot be read is left out, and the page says so.
    """
    sections, links = [], []
    for name in (*TABLES[:-1], *FIGURES, TABLES[-1]):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            content = read_json(path)
            body = _figure(content, folder) if name in FIGURES else _table(content, folder / f"{name}.png")
            title = content["title"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{path.name} cannot be read ({type(error).__name__}: {error}) and is left out here"
            print(f"{path}: {why}", file=sys.stderr)
            sections.append(f"<section><p><strong>{_text(why)}.</strong></p></section>")
            continue
        kind, _, rest = title.partition(": ")
        links.append(f'<a href="#{name}">{_text(rest if kind == "Study" else kind)}</a>')
        sections.append(f'<section id="{name}"><h2>{_text(title)}</h2>{body}</section>')
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>e2SAD, reproduced: {_text(folder.name)} scale</title><style>{STYLE}</style></head><body>
<h1>e2SAD, reproduced: {_text(folder.name)} scale</h1>
<p>Tables and figures of &ldquo;Efficient two-step adversarial defense for deep neural networks&rdquo;, computed with
e2sad_jax, beside the paper&rsquo;s own numbers. Under each: seeds, command, hardware, date, versions and commit.</p>
<nav>{" ".join(links)}</nav>
{"".join(sections)}
</body></html>
"""
    path = folder / "report.html"
    write_text(path, text)
    return path


def _text(value: Any) -> str:
    """Escaped, with `code` set as code."""
    parts = html.escape(str(value)).split("`")
    if len(parts) % 2 == 0:  # not in pairs
        return "`".join(parts)
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _about(content: Mapping[str, Any]) -> str:
    return f'<p class="about">{_text(tables.origin(content["provenance"]))}</p>'


def _picture(path: pathlib.Path, alt: str) -> str:
    data = base64.b64encode(read_bytes(path, PICTURE_BYTES)).decode()
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def _table(table: Mapping[str, Any], picture: pathlib.Path) -> str:
    lines = [f'<p class="setting">{_text(table["setting"])}</p>']
    if picture.exists():
        lines.append(_picture(picture, table["title"]))
    names = table["names"]
    head = "".join(f"<th{_class(i, names, column)}>{_text(column)}</th>" for i, column in enumerate(table["header"]))
    lines.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>')
    for row in table["rows"]:
        cells = []
        for i, (cell, column) in enumerate(zip(row, table["header"], strict=True)):
            ours, beside = tables.text(cell, table["digits"])
            white = not isinstance(cell, str) and cell["white_box"]
            small = f'<span class="paper">{_text(beside)}</span>' if beside else ""
            cells.append(f"<td{_class(i, names, column, white)}>{_text(ours)}{small}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f"<li>{_text(note.replace('**', ''))}</li>" for note in table["notes"])
    lines.append(f"</tbody></table></div><ul>{notes}</ul>{_about(table)}")
    return "\n".join(lines)


def _class(place: int, names: int, column: str, white: bool = False) -> str:
    classes = ["name"] if place < names else []
    if column.startswith("PGD"):  # ours, not the paper's
        classes.append("apart")
    if column == tables.COST[0]:
        classes.append("apart")
    if white:
        classes.append("white")
    return f' class="{" ".join(classes)}"' if classes else ""


def _figure(figure: Mapping[str, Any], folder: pathlib.Path) -> str:
    numbers = figure["table"]
    head = "".join(f"<th>{_text(column)}</th>" for column in numbers["header"])
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in numbers["rows"])
    return (
        f'<p class="setting">{_text(figure["setting"])}</p>'
        f"{_picture(folder / pathlib.PurePath(figure['picture']).name, figure['title'])}<p>{_text(figure['caption'])}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{_about(figure)}'
    )
