"""Do numbers and ranks read short and right?"""

import pytest

from meshweave.report.text import bytes_text, count_text, flops_text, listing, ranks_text, seconds_text


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (count_text, 0, "0"),
        (count_text, 8812, "8,812"),
        (count_text, 31_240, "31.2 K"),
        (count_text, 140_000, "0.14 M"),
        (count_text, 7_060_000_000, "7.06 B"),
        (count_text, 1.2e12, "1.20 T"),
        (bytes_text, 0, "0 B"),
        (bytes_text, 999, "999 B"),
        (bytes_text, 1000, "0.98 KiB"),
        (bytes_text, 1024 * 148, "148 KiB"),
        (bytes_text, 1.5 * 1024**2, "1.50 MiB"),
        (bytes_text, 64 * 1024**3, "64.0 GiB"),
        (bytes_text, 5000 * 1024**4, "5000 TiB"),
        (flops_text, 0, "0.00 MFLOP"),
        (flops_text, 2.1e9, "2.10 GFLOP"),
        (flops_text, 3.456e15, "3.46 PFLOP"),
        (seconds_text, 0.421, "0.42 s"),
        (seconds_text, 48.4, "48 s"),
        (seconds_text, 59.7, "60 s"),
        (seconds_text, 185, "3 min 05 s"),
        (seconds_text, 2 * 3600 + 11 * 60, "2 h 11 min"),
    ],
)
def test_a_number_reads_as_three_digits_and_a_unit(function, value, text):
    assert function(value) == text


def test_a_long_list_of_ranks_gives_way_in_the_middle():
    assert ranks_text(range(4096)) == "0-4095"
    assert ranks_text([0, 2, 4]) == "0,2,4"
    assert ranks_text(range(0, 512, 8)) == "0,8,…,504"


def test_a_listing_says_how_many_parts_are_left_out():
    assert listing(["a", "b", "c"], 3, ", ") == "a, b, c"
    assert listing(list("abcdefg"), 4, ", ") == "a, b, … 4 more …, g"
