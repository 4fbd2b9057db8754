"""Tables as text."""

from effad_core.evaluation.tables import layout

import pytest

ROWS = [["method", "%", "remark"], ["a", "100.0", "x"], ["", "", "longer than it"]]


def test_columns_are_as_wide_as_their_longest_cell():
    assert layout(ROWS, left=(0, 2)).splitlines() == [
        "method      %  remark",
        "a       100.0  x",
        "               longer than it",
    ]


def test_numbers_end_at_the_right():
    assert layout(ROWS).splitlines()[1] == "a       100.0               x"
    assert layout([["only"]]) == "only"


def test_rows_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        layout([["a", "b"], ["c"]])
