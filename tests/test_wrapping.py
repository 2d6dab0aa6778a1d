"""Words that wrap at the edge of a terminal while they arrive: what a terminal shows of them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from aspec.cli.chat.wrapping import Wrapper, visible

MOVES = re.compile(r"\x1b\[(\d+)G|\x1b\[K|.", re.DOTALL)


class Screen:
    """The lines of a terminal without an end; a character beyond the edge goes to the next line, as terminals do."""

    def __init__(self, columns):
        self.columns, self.lines, self.column = columns, [[]], 0
        self.broken_by_itself = 0  # lines that the terminal broke

    def show(self, text):
        for move in MOVES.finditer(text):
            if move[1]:
                self.column = int(move[1]) - 1
            elif move[0] == "\x1b[K":
                del self.lines[-1][self.column :]
            elif move[0] == "\n":
                self.lines.append([])
                self.column = 0
            else:
                self.put(move[0])
        return self

    def put(self, char):
        cells = cell_len(char)
        if self.column + cells > self.columns and self.column:
            self.lines.append([])
            self.column = 0
            self.broken_by_itself += 1
        line = self.lines[-1]
        assert len(line) == self.column, "nothing is printed over text, or beside it"
        line += [char, *[""] * (cells - 1)] if cells else []
        self.column += cells

    @property
    def text(self):
        return ["".join(line).rstrip() for line in self.lines]


def shown(pieces, columns):
    wrapper = Wrapper()
    return Screen(columns).show("".join(wrapper.push(piece, columns) for piece in pieces))


def test_a_word_that_crosses_the_edge_moves_to_the_next_line():
    assert shown(["The sea is a va", "st place"], 14).text == ["The sea is a", "vast place"]
    assert shown(list("one two three"), 7).text == ["one two", "three"]
    assert shown(["12345 67890", "\nnext"], 5).text == ["12345", "67890", "next"], (
        "one break, not two, after a full line"
    )


def test_a_word_longer_than_a_line_breaks_at_the_edge():
    assert shown(["see https://example.org"], 10).text == ["see", "https://ex", "ample.org"]


def test_wide_characters_break_anywhere_but_before_punctuation_that_closes():
    assert shown(["漢字仮名交じり文。"], 8).text == ["漢字仮名", "交じり", "文。"]
    assert shown(["漢字a名"], 4).text == ["漢字", "a名"]
    assert shown(["漢字"], 1).text == ["漢", "字"], "a terminal narrower than a character"


@pytest.mark.parametrize("emoji", ["👩‍💻", "👍🏽", "🇩🇪", "❤️"])
def test_a_joined_emoji_is_never_cut(emoji):
    for before in range(12):
        out = Wrapper().push("x" * before + emoji + " and more text", 10)
        assert emoji in out
    assert "\x1b" not in Wrapper().push(f"{emoji} words here", 8), "its width is unknown: nothing is erased"


@given(
    st.lists(st.text(st.sampled_from("abc  \n漢。,é"), max_size=12), max_size=12),
    st.integers(2, 13),
)
def test_the_screen_depends_on_the_text_only_and_cuts_no_word_that_fits(pieces, columns):
    text = "".join(pieces)
    screen = shown(pieces, columns)
    assert screen.text == shown([text], columns).text == shown(list(text), columns).text
    assert screen.broken_by_itself == 0
    assert re.sub(r"\s", "", "".join(screen.text)) == re.sub(r"\s", "", text)
    words = " ".join(screen.text).split(" ")
    assert all(word in words for word in re.findall(r"(?<![^\s])[abc]+(?![^\s])", text) if len(word) <= columns)


def test_a_resized_terminal_begins_a_line_at_the_next_space():
    wrapper = Wrapper()
    assert wrapper.push("some words", 20) == "some words"
    assert wrapper.push("on and on", 10) == "on\nand on", "the column is not known: nothing is erased"
    assert Screen(10).show("and on" + wrapper.push(" further", 10)).text == ["and on", "further"]


def test_a_process_that_was_stopped_begins_a_line_at_the_next_space():
    wrapper = Wrapper()
    wrapper.push("some wo", 20)
    assert wrapper.push("rds on", 20, stops=1) == "rds\non"
    assert wrapper.push(" and on", 20, stops=1) == " and on"


def test_control_characters_do_not_reach_the_terminal():
    assert visible("a\x1b[2J\x07\x9bb\r\n\tc") == "a�[2J��b\n\tc"
    assert "\x1b" not in Wrapper().push("\x1b]52;c;YQ==\x07", 80)
    assert Wrapper().push("a\x1bb", 0) == "a�b", "a terminal that tells no width"
