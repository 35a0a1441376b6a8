"""One table, three ways to show it."""

import csv

import pytest

from e2sad_jax.reporting.table import Table


def test_text_is_aligned():
    table = Table(
        title="Cost", columns=["step", "ms per\nstep"], rows=[["a", 1.5], ["long", None]], notes=["One note."]
    )
    assert (
        table.text() == "Cost\n\nstep  ms per\n        step\n------------\na        1.5\nlong\n------------\nOne note."
    )


def test_a_rule_sets_the_footer_apart():
    lines = Table(columns=["a", "b"], rows=[["x", 1], ["y", 2], ["sum", 3]], footer=1).text().splitlines()
    assert lines == ["a    b", "------", "x    1", "y    2", "------", "sum  3"]


def test_a_wide_table_gets_narrow_gaps_and_notes_are_wrapped():
    table = Table(columns=["aaaa", "bbbb", "cccc"], rows=[["1", "2", "3"]], notes=["a word and another"])
    assert table.text(width=15).splitlines()[0] == "aaaa bbbb cccc"
    assert table.text(width=16).splitlines()[0] == "aaaa  bbbb  cccc"
    assert max(map(len, table.text(width=15).splitlines())) <= 15


def test_markdown():
    table = Table(
        title="Cost",
        columns=["step", "kind", "ms per\nstep"],
        rows=[["  a|b", "c", 2]],
        notes=["One.", "Two."],
        labels=2,
    )
    shown = "| step | kind | ms per step |\n| --- | --- | ---: |\n| &emsp;a\\|b | c | 2 |\n\n- One.\n- Two.\n"
    assert table.markdown() == "# Cost\n\n" + shown
    assert table.markdown(level=2) == "## Cost\n\n" + shown
    assert table.markdown(level=0) == "Cost:\n\n" + shown


def test_csv_holds_numbers_in_full():
    records = [{"name": "a, b", "value": 1 / 3}, {"value": None, "name": "c"}]
    lines = list(csv.reader(Table.of_records(records).csv().splitlines()))
    assert lines == [["name", "value"], ["a, b", str(1 / 3)], ["c", ""]]


def test_a_table_without_rows_is_its_head():
    assert Table(columns=["a", "b"], rows=[]).text() == "a  b\n----"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"has 1 cells for 2 columns"):
        Table(columns=["a", "b"], rows=[["x"]])
