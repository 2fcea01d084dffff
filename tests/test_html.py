"""HTML of the reprs: which columns are numbers, and what is read from the left."""

from ktlab import html


def aligned(rows, *, pairs: bool = False) -> list[bool]:
    """Of each cell of the first row: whether it is set as a number, to the right."""
    made = html.pairs(dict(rows)) if pairs else html.table(rows)
    return ["class=n" in cell for cell in made.split("</tr>")[0].split("<td")[1:]]


def test_numbers_to_the_right_words_to_the_left():
    assert aligned([("a", "1.5 MiB"), ("b", "×2"), ("c", "")]) == [False, True]
    assert aligned([("2.13.0", 3), ("avx2 fma", 4)]) == [False, True], "words among the numbers"
    assert aligned([("", "none"), ("", "–")]) == [False, False], "nothing given"


def test_a_sentence_that_begins_with_a_number_may_wrap():
    sentence = "82.94 tokens/s in one place and 74.36 in another: nobody knows why"
    assert aligned([(sentence,)]) == [False]
    assert aligned([("89 % of read 13.4 GB/s", "8 of 64")]) == [False, True]


def test_what_an_interval_says_of_no_change_stands_below_the_number():
    found = html.table([("×1.0023 [0.9989, 1.0057] (no change inside)",), ("×1.1 ± 0.1",)])
    assert found.count("class=n") == 2, "a long remark makes no sentence of a number"
    assert '×1.0023 [0.9989, 1.0057]<br><span class="s">no change inside</span>' in found


def test_units_of_quantities():
    assert html.byte_unit(1536) == (1024, "KiB") and html.byte_size(1536) == "1.5 KiB"
    assert html.byte_unit(2**50) == (2**30, "GiB") and html.byte_size(1023) == "1023 B"
    assert html.decimal_unit(1.23e9, "B") == (1e9, "GB") and html.quantity(999.9) == "1 k"
    assert html.unbroken("1.5 ± 0.2 KiB") == "1.5\xa0±\xa00.2\xa0KiB"
    assert html.unbroken("1 ± 2 (no change inside)") == "1\xa0±\xa02 (no\xa0change\xa0inside)"


def test_pairs_are_read_from_the_left():
    assert aligned([("threads", 2), ("why", "named (packed)")], pairs=True) == [False, False]


def test_a_terminal_of_80_columns_gets_whole_lines_and_whole_quantities():
    line = "  kernel: " + "native avx512_vnni, packed, 2 threads; " * 2 + "33.1 MiB and more"
    shown = html.wrapped(f"short\n{line}").splitlines()
    assert shown[0] == "short" and max(map(len, shown)) <= 80
    assert shown[2].startswith("      ") and " ".join(" ".join(shown[1:]).split()) == line.strip()
    assert html.wrapped("x" * 73 + " 33.1 MiB").splitlines()[1] == "    33.1 MiB"
