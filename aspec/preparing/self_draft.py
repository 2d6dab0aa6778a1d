"""A copy of the target in 4 bits as its draft: made once, kept in the cache, found again by the target's identity.

Such a copy proposes what the target itself is likely to say, for models without a small sibling:
https://arxiv.org/abs/2509.18344 (SubSpec). The target verifies every proposal, so the text does not depend on it.
"""

from pathlib import Path

from aspec.errors import UserError, WriteError
from aspec.io.fetching.files import SIZES
from aspec.io.hub import CONFIG, known_as
from aspec.options import SELF_DRAFT, Progress, cache_folder
from aspec.preparing.identity import fingerprint
from aspec.preparing.prepare import Design, design, prepare, write_config

BITS = 4
FORM = 1  # of the copy: a new number when other bytes would be made of the same target


def self_draft(target: Path, progress: Progress, *, weights: bool = True) -> Path:
    """The folder of the target's copy; it is made if it is not in the cache. Blocks.

    ``weights``: False for a plan, for which the copy's configuration is enough. Raises UserError if the target has no
    plain weights, WriteError if the cache has no room.
    """
    folder = cache_folder() / "drafts" / f"{fingerprint(target)[:24]}-{FORM}"
    if (folder / CONFIG).is_file():
        return folder
    if weights and (target / SIZES).is_file():
        raise UserError(f"--draft {SELF_DRAFT}: the weights of {known_as(target)} are not here. Fetch the model first.")
    try:
        made = design(target, BITS)
    except UserError as error:
        raise UserError(
            f"--draft {SELF_DRAFT} makes a copy of the target in {BITS} bits, which is not possible: {error} Or give "
            f"another draft, or none."
        ) from error
    return _written(made, folder, progress) if weights else _outlined(made, folder)


def _written(made: Design, folder: Path, progress: Progress) -> Path:
    try:
        prepare(made, folder, lambda done, total: progress("draft", done, total))
    except WriteError as error:
        raise WriteError(f"--draft {SELF_DRAFT} makes a copy of the target in aspec's cache folder: {error}") from error
    return folder


def _outlined(made: Design, folder: Path) -> Path:
    """A folder with the configuration alone, beside the one that the copy will have."""
    outline = folder.with_name(f"{folder.name}.outline")
    outline.mkdir(parents=True, exist_ok=True)
    write_config(made, outline)
    return outline
