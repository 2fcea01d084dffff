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


def test_pairs_are_read_from_the_left():
    assert aligned([("threads", 2), ("why", "named (packed)")], pairs=True) == [False, False]


def test_a_terminal_of_80_columns_gets_whole_lines_and_whole_quantities():
    line = "  kernel: " + "native avx512_vnni, packed, 2 threads; " * 2 + "33.1 MiB and more"
    shown = html.wrapped(f"short\n{line}").splitlines()
    assert shown[0] == "short" and max(map(len, shown)) <= 80
    assert shown[2].startswith("      ") and " ".join(" ".join(shown[1:]).split()) == line.strip()
    assert html.wrapped("x" * 73 + " 33.1 MiB").splitlines()[1] == "    33.1 MiB"
