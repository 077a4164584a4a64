"""Sizes and tables as people read them."""

import pytest

from lib.report import size, table


@pytest.mark.parametrize("n, digits, text", [
    (0, 1, "0 B"), (999, 1, "999 B"), (999.5, 1, "1.0 kB"), (1536, 1, "1.5 kB"), (38_400_000, 1, "38.4 MB"), (999_400_000, 1, "999.4 MB"),
    (1_300_000_000, 1, "1.3 GB"), (1_045_096_000_000, 2, "1,045.10 GB"), (13_000_000, 2, "13.00 MB")])
def test_sizes(n, digits, text):
    assert size(n, digits) == text


def test_columns_stand_below_each_other():
    rows = [["run", "trained", "BLEU"], ["lora", "1,234", "-"], ["prefix, tied", "12", "55.0 ± 7.1"]]
    assert table(rows) == """\
run           trained        BLEU
lora            1,234           -
prefix, tied       12  55.0 ± 7.1"""
    assert table(rows[:2], markdown=True) == "| run | trained | BLEU |\n| --- | --- | --- |\n| lora | 1,234 | - |"


def test_no_line_ends_in_blanks():
    assert table([["part", "bytes"], ["a longer name", ""]]) == "part           bytes\na longer name"
