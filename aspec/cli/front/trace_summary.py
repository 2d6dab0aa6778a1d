"""What ``aspec trace FILE --summary`` does; it needs no torch, so it answers at once."""

import json
from collections.abc import Mapping
from pathlib import Path

from aspec.observe.chrome_trace import read_trace
from aspec.observe.summary import summarise
from aspec.observe.timeline import Timeline


def summarise_file(path: Path, as_json: bool) -> None:
    """Print the summary of a trace. Raises UserError if the file is not a trace."""
    print_summaries(read_trace(path), as_json)


def print_summaries(timelines: Mapping[str, Timeline], as_json: bool) -> None:
    """Print the summary of each timeline."""
    if as_json:
        print(json.dumps({name: summarise(timeline).as_dict() for name, timeline in timelines.items()}))
        return
    for name, timeline in timelines.items():
        print(f"{name}: {timeline.facts.get('target', '')}".rstrip(": "))
        for line in summarise(timeline).lines():
            print(f"  {line}".rstrip())
