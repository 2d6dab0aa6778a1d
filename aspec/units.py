"""Parse and format sizes and rates."""

import re

from aspec.errors import shown

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
}


def parse_bytes(text: str) -> int:
    """Parse ``8GiB``, ``512MiB``, ``2GB``, ``1.5g`` or plain bytes. Raises ValueError that names the expected form."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS or float(match[1]) <= 0:
        raise ValueError(f"expected a size such as 512MiB, 8GiB or 2GB, found '{shown(text)}'")
    return int(float(match[1]) * UNITS[match[2].lower()])


def parse_rate(text: str) -> float:
    """Parse ``1.0GB/s`` or ``800MB/s`` to bytes per second. Raises ValueError that names the expected form."""
    size, slash, per = text.strip().partition("/")
    if slash and per.strip() != "s":
        raise ValueError(f"expected a rate such as 1.0GB/s, found '{shown(text)}'")
    try:
        return float(parse_bytes(size))
    except ValueError:
        raise ValueError(f"expected a rate such as 1.0GB/s, found '{shown(text)}'") from None


def format_bytes(nbytes: float) -> str:
    """Format bytes in binary units: ``1.50 GiB``."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= scale:
            value = nbytes / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.2f} {unit}"
    return f"{nbytes:.0f} B"


def format_part(done: float, total: float) -> str:
    """Format bytes done of all: ``3.00 of 140 GiB``."""
    first, second = format_bytes(done), format_bytes(total)
    return f"{first.removesuffix(second[second.index(' ') :])} of {second}"


def format_rate(bytes_per_s: float) -> str:
    """Format bytes per second in decimal units: ``1.80 GB/s``, ``3.20 MB/s``."""
    value, unit = (bytes_per_s / 1e9, "GB/s") if bytes_per_s >= 1e8 or bytes_per_s == 0 else (bytes_per_s / 1e6, "MB/s")
    return f"{value:.{2 if value < 100 else 1}f} {unit}"
