"""What files need that survive a power failure or a full disk."""

import errno
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, no larger file allowed


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that new names in it survive a power failure."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
