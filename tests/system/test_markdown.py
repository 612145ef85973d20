"""Tables in Markdown."""

from system import markdown


def test_a_table_has_a_line_for_each_row():
    assert markdown.table(("setting", "value"), [("a.b", 1), ("c", None)]).splitlines() == [
        "| setting | value |",
        "|---|---|",
        "| a.b | 1 |",
        "| c | None |",
    ]


def test_cells_stay_cells():
    assert markdown.line(["a|b", "two\nlines"]) == "| a\\|b | two lines |"
