"""Words that wrap at the edge of a terminal while they arrive: text and a width in, the text to print out."""

from rich.cells import cell_len

CLOSING = frozenset(
    "、。，．：；？！）］｝」』】〉》〕…—,.:;?!)]}"
)  # never at the start of a line after a wide character
HARD_SPACES = frozenset("\u00a0\u202f\u2007\u2060")
TAB = 8
JOINER, EMOJI_STYLE = "\u200d", "\ufe0f"
TONES, FLAG_LETTERS = range(0x1F3FB, 0x1F400), range(0x1F1E6, 0x1F200)
CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "�")
CONTROL |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def visible(text: str) -> str:
    """A text without control characters, which a terminal would obey; only line breaks and tabs stay."""
    return text.translate(CONTROL)


class Wrapper:
    """Follows the cursor of one answer; mutable, because a piece continues the line of the piece before.

    A word is printed as it arrives. If it crosses the edge, it is erased and printed again on the next line. A line
    whose width is not known exactly (terminals draw joined emoji differently) breaks without erasing.
    """

    def __init__(self) -> None:
        self._columns = self._stops = 0  # columns of the terminal (0: unknown, nothing wraps); stops of the process
        self._column = 0  # cells of this line so far; at least as many as the terminal counts
        self._word, self._start = "", 0  # the word at the cursor, and the column of its first character
        self._before = ""  # the last character of the line
        self._exact = True  # the terminal counts as many cells as ``_column``
        self._lost = False  # the terminal was resized, or used by others, since the line began: no column is known

    def push(self, text: str, columns: int, stops: int = 0) -> str:
        """The text to print on a terminal of ``columns`` columns; ``stops``: how often the process was stopped."""
        self._lost |= (columns, stops) != (self._columns, self._stops) and self._column > 0
        self._columns, self._stops = columns, stops
        return "".join(map(self._place, visible(text))) if columns else visible(text)

    def _place(self, char: str) -> str:
        if char == "\n":
            return self._break_line()
        if char.isspace() and char not in HARD_SPACES:
            return self._place_space(char)
        cells, out = self._cells(char), ""
        if not self._joins(char):
            if char not in CLOSING and max(cells, cell_len(self._before)) > 1:
                self._word, self._start = "", self._column  # a line may begin here
            if self._column > 0 and self._column + cells > self._columns and not self._lost:
                out = self._wrap(cells)
            self._before = char
        self._word += char
        self._column += cells
        return out + char

    def _place_space(self, char: str) -> str:
        """A space at the edge is not printed: the line break of the next word takes its place."""
        if self._lost:
            return self._break_line()
        cells = TAB - self._column % TAB if char == "\t" else cell_len(char)
        fits = self._column + cells <= self._columns
        self._column = self._column + cells if fits else self._columns
        self._word, self._start = "", self._column
        return char if fits else ""

    def _wrap(self, cells: int) -> str:
        """Break the line before the word at the cursor, or inside the word if that cannot be."""
        word, start = self._word, self._start
        moves = self._exact and start > 0 and cell_len(word) + cells <= self._columns
        line_break = self._break_line()
        if not moves or not word:
            return line_break
        self._word, self._column = word, cell_len(word)
        return f"\x1b[{start + 1}G\x1b[K{line_break}{word}"

    def _break_line(self) -> str:
        self._column, self._word, self._start, self._before = 0, "", 0, ""
        self._exact, self._lost = True, False
        return "\n"

    def _joins(self, char: str) -> bool:
        """Whether a character is one with the character before, so that no line may begin with it."""
        pair = ord(char) in FLAG_LETTERS and self._before and ord(self._before) in FLAG_LETTERS
        return bool(pair or self._word.endswith(JOINER) or ord(char) in TONES or not cell_len(char))

    def _cells(self, char: str) -> int:
        """The most cells that a terminal gives a character; terminals differ in joined and modified characters."""
        wider = ord(char) in TONES or ord(char) in FLAG_LETTERS
        self._exact &= not wider and char not in (JOINER, EMOJI_STYLE)
        return 2 if wider else 1 if char == EMOJI_STYLE else cell_len(char)
