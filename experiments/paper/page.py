"""`report.html`: every table and figure of a results folder in one page that needs no other file."""

import base64
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jinja2

from e2sad_jax._io import read_bytes, read_json, write_text
from experiments.paper import origin, tables

# In this order, as far as they are there.
SECTIONS = (
    *("table1", "table2", "table3", "study_second_step", "study_lam", "study_alpha", "study_labels"),
    *("figure2", "figure3", "figure4", "models"),
)
PICTURE_BYTES = 64 * 2**20
TEMPLATE = pathlib.Path(__file__).with_name("report.html.jinja")


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes report.html from all tables and figures in a folder.

    Args:
      folder: `results/<scale>`.

    Returns:
      The page. A file that cannot be read is left out, and the page says so.
    """
    sections = []
    for name in SECTIONS:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            content = read_json(path)
            sections.append(
                _figure(name, content, folder) if name.startswith("figure") else _table(name, content, folder)
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{path.name} cannot be read ({type(error).__name__}: {error}) and is left out"
            print(f"{path}: {why}", file=sys.stderr)
            sections.append({"error": why})
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, undefined=jinja2.StrictUndefined)
    path = folder / "report.html"
    write_text(path, template.render(scale=folder.name, sections=[{"error": "", "link": "", **s} for s in sections]))
    return path


def _section(name: str, content: Mapping[str, Any], picture: pathlib.Path | None, **more: Any) -> dict[str, Any]:
    kind, _, rest = content["title"].partition(": ")
    encoded = base64.b64encode(read_bytes(picture, PICTURE_BYTES)).decode() if picture else ""
    return {
        "name": name,
        "link": rest if kind == "Study" else kind,
        "title": content["title"],
        "setting": content["setting"],
        "picture": encoded,
        "about": origin.sentence(content["provenance"]),
        "caption": "",
        "notes": [],
        **more,
    }


def _table(name: str, table: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    header, rows = table["header"], []
    for row in table["rows"]:
        cells = []
        for i, (cell, column) in enumerate(zip(row, header, strict=True)):
            ours, reference = tables.text(cell, table["digits"])
            white = not isinstance(cell, str) and cell["white_box"]
            cells.append({"text": ours, "reference": reference, "kind": _kind(i < table["names"], column, white)})
        rows.append(cells)
    picture = folder / f"{name}.png"
    return _section(
        name,
        table,
        picture if picture.exists() else None,
        header=[{"text": column, "kind": _kind(i < table["names"], column)} for i, column in enumerate(header)],
        rows=rows,
        notes=[note.replace("**", "") for note in table["notes"]],
    )


def _kind(is_name: bool, column: str, white: bool = False) -> str:
    """The CSS classes of a cell; columns that are ours and not the paper's are set apart."""
    apart = column.startswith("PGD") or column == tables.COST[0]
    return " ".join(filter(None, ("name" if is_name else "", "apart" if apart else "", "white" if white else "")))


def _figure(name: str, figure: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    numbers = figure["table"]
    return _section(
        name,
        figure,
        folder / pathlib.PurePath(figure["picture"]).name,
        header=[{"text": column, "kind": ""} for column in numbers["header"]],
        rows=[[{"text": cell, "reference": "", "kind": ""} for cell in row] for row in numbers["rows"]],
        caption=figure["caption"],
    )
