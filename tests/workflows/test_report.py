"""Tables."""

from __future__ import annotations

from badge_peft.workflows.report import text_table


def test_columns_line_up() -> None:
    lines = text_table(["a", "bb"], [["long name", "1"], ["x", "1000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "long name     1"
