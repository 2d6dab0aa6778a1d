"""What tells a checkpoint from others, without reading all of it."""

import hashlib
from pathlib import Path

from aspec.io.checkpoint import weight_files
from aspec.io.hub import SOURCE, WANTED

LARGE_BYTES = 64 << 20  # largest size of a small file, such as a tokenizer or a configuration
SAMPLE_BYTES = 1 << 16  # bytes that are hashed at the beginning, the middle and the end of a large file


def fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint's small files and of samples of its large files, in hexadecimal digits."""
    digest = hashlib.sha256()
    wanted = {path for pattern in WANTED for path in folder.glob(pattern) if path.is_file() and path.name != SOURCE}
    for path in sorted(wanted.union(weights := weight_files(folder)), key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            small = size <= LARGE_BYTES and path not in weights
            for start in (0,) if small else (0, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(LARGE_BYTES if small else SAMPLE_BYTES))
    return digest.hexdigest()
