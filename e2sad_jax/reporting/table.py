"""One table for a terminal, a Markdown file and a CSV file."""

import csv
import dataclasses
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Self

WIDTH = 120  # columns of a terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under named columns, between a title and notes.

    A cell is shown as `str` shows it, None as an empty cell. A number therefore arrives formatted, or as itself where
    `csv` should hold it in full.

    Attributes:
      title: one line; empty for none.
      columns: the headings; a heading may break into lines by `\\n`, which only `text` shows.
      rows: each has one cell for each column.
      notes: sentences, in Markdown, shown below the table.
      labels: how many of the first columns are flush left; the others are flush right.
      footer: how many of the last rows a rule sets apart in `text`.

    Raises:
      ValueError: if a row has more or fewer cells than there are columns.
    """

    title: str = ""
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()
    labels: int = 1
    footer: int = 0

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {row!r} has {len(row)} cells for {len(self.columns)} columns; give one for each")

    @classmethod
    def of_records(cls, records: Sequence[Mapping[str, Any]], **attributes: Any) -> Self:
        """A table whose rows are mappings with the same names, in the order of the first.

        Args:
          records: at least one.
          **attributes: the other attributes of the table.

        Returns:
          The table.

        Raises:
          KeyError: if a record lacks a name of the first.
        """
        columns = list(records[0])
        return cls(columns=columns, rows=[[record[name] for name in columns] for record in records], **attributes)

    def text(self, width: int = WIDTH) -> str:
        """The table for a terminal, columns aligned.

        Args:
          width: columns of the terminal; notes are wrapped there, and a wider table gets narrower gaps.

        Returns:
          Lines without trailing spaces, no newline at the end.
        """
        broken = [heading.split("\n") for heading in self.columns]
        height = max(map(len, broken), default=1)
        head = [list(line) for line in zip(*([*lines, *[""] * (height - len(lines))] for lines in broken), strict=True)]
        body = [[_shown(cell) for cell in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*head, *body, strict=True)]
        gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= width else " "
        rule = "-" * (sum(widths) + len(gap) * (len(widths) - 1))

        def line(cells: Sequence[str]) -> str:
            sides = (
                c.ljust(w) if i < self.labels else c.rjust(w)
                for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            return gap.join(sides).rstrip()

        first = len(body) - self.footer
        lines = [*([self.title, ""] if self.title else []), *map(line, head), rule, *map(line, body[:first])]
        if self.footer:
            lines += [rule, *map(line, body[first:])]
        if self.notes:
            lines.append(rule)
            lines += [part for note in self.notes for part in textwrap.wrap(note, width, break_on_hyphens=False)]
        return "\n".join(lines)

    def markdown(self, level: int = 1) -> str:
        """The table in Markdown: title as a heading, rows between pipes, notes as a list.

        Args:
          level: of the heading; 0 makes the title a plain line that ends with a colon.

        Returns:
          Blocks with an empty line between them, and a newline at the end.
        """
        flush = ["---"] * self.labels + ["---:"] * (len(self.columns) - self.labels)
        cells = [[heading.replace("\n", " ").strip() for heading in self.columns], flush, *self.rows]
        blocks = ["\n".join("| " + " | ".join(map(_escaped, row)) + " |" for row in cells)]
        if self.title:
            blocks.insert(0, f"{'#' * level} {self.title}" if level else f"{self.title}:")
        if self.notes:
            blocks.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(blocks) + "\n"

    def html(self, level: int = 1) -> str:
        """The table in HTML: title as a heading, rows, notes as a list.

        Args:
          level: of the heading.
        """

        def row(tag: str, cells: Sequence[Any]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(_shown(cell))}</{tag}>" for cell in cells) + "</tr>"

        title = f"<h{level}>{html.escape(self.title)}</h{level}>\n" if self.title else ""
        head = row("th", [heading.replace("\n", " ").strip() for heading in self.columns])
        body = "\n".join(row("td", cells) for cells in self.rows)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"{title}<table>\n{head}\n{body}\n</table>" + (f"\n<ul>{notes}</ul>" if notes else "")

    def csv(self) -> str:
        """The columns and rows as comma-separated values, a line each, without title and notes."""
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow([heading.replace("\n", " ").strip() for heading in self.columns])
        writer.writerows(self.rows)
        return lines.getvalue()


def _shown(cell: Any) -> str:
    return "" if cell is None else str(cell)


def _escaped(cell: Any) -> str:
    """A cell in Markdown: a pipe does not end it, and an indented one stays so."""
    shown = _shown(cell)
    indent = len(shown) - len(shown.lstrip(" "))
    return "&emsp;" * (indent // 2) + shown.strip().replace("|", r"\|").replace("\n", " ")
