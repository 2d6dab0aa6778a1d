"""Text of others on a screen of ours: only visible characters, wrapped to a width."""

from rich.cells import cell_len, chop_cells

# Control characters become visible signs. Joiners and variation selectors are dropped: terminals differ on their width.
_VISIBLE: dict[int, str | None] = {
    **{code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)},
    127: "␡",
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)), "�"),
    **dict.fromkeys((0x200B, 0x200D, 0x2060, 0xFEFF, *range(0xFE00, 0xFE10))),
}


def visible(line: str, encoding: str = "utf-8") -> str:
    """A line without characters that move the cursor or that the encoding lacks."""
    return line.replace("\n", " ").translate(_VISIBLE).expandtabs(4).encode(encoding, "replace").decode()


def tail(text: str, width: int, height: int, encoding: str = "utf-8") -> list[str]:
    """The last lines of a text, wrapped to a width, without characters that move the cursor."""
    lines: list[str] = []
    page = width * height
    text = text.replace("\r\n", "\n").removesuffix("\n")
    for line in reversed(text.rsplit("\n", height)[-height:] if page and text else ()):
        # A very long line loses whole pages, so that its breaks do not move while it grows.
        kept = line[max(0, len(line) // page - 1) * page :]
        lines = wrap(visible(kept, encoding), width) + lines
    return lines[max(0, len(lines) - height) :]


def wrap(text: str, width: int) -> list[str]:
    """Break one line to a width: after a space in the second half of the width, otherwise at the width."""
    lines = []
    while len(text) > width or cell_len(text) > width:
        fits = max(1, len((chop_cells(text[:width], width) or [text])[0]))  # only marks without width: no chunk
        space = text.rfind(" ", fits // 2, fits + 1)
        fits = space + 1 if space > 0 else fits
        lines.append(text[:fits].rstrip())
        text = text[fits:]
    return [*lines, text.rstrip()]
