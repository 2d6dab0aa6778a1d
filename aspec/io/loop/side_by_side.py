"""Work on several threads at once, for measurements of what they cost one another."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

Work = Callable[[], object]


def side_by_side(works: Sequence[Work]) -> None:
    """Run every work on a thread of its own, all at the same time; raises the first error when all have ended."""
    with ThreadPoolExecutor(len(works), thread_name_prefix="aspec-beside") as pool:
        running = [pool.submit(work) for work in works]
    for one in running:
        one.result()
