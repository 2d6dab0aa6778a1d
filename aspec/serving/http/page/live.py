"""What the machine does, as events: the dashboard's snapshot, measured as the dashboard measures it.

All viewers share one measurement, which a thread makes: a busy second of lanes takes some milliseconds.
"""

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from aspec.io.loop.settling import in_thread, settle
from aspec.observe import timeline
from aspec.observe.frame import Window
from aspec.observe.snapshot import Snapshot
from aspec.serving.http.limits import Receive
from aspec.serving.http.service import Service, State
from aspec.serving.http.writing import EventWriter, Send, unless_left
from aspec.units import format_rate

NUM_CELLS = 80  # of a lane's strip
LEVELS = 8  # of a cell: its busy share in eighths
EVERY_S = 0.25  # between two events


class Live:
    """An ASGI application: a stream of events for each viewer; mutable: it keeps the latest measurement."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._measuring = asyncio.Lock()
        self._latest: dict[str, Any] = {}
        self._at_s = -EVERY_S  # of the latest measurement

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send events until the viewer leaves or the server stops. Raises Left."""
        await unless_left(receive, self._watch(EventWriter(send)))

    async def _watch(self, writer: EventWriter) -> None:
        await writer.begin()
        while self._service.state is not State.STOPPING:
            await writer.event(await self._measure())
            await asyncio.sleep(EVERY_S)
        await writer.end()

    async def _measure(self) -> dict[str, Any]:
        """The state now, or less than EVERY_S ago."""
        async with self._measuring:
            now_s = time.perf_counter()
            if now_s - self._at_s >= 0.9 * EVERY_S:
                service = self._service
                snapshot = service.monitor.snapshot(now_s)
                self._latest = await settle(in_thread(partial(measured, snapshot))) | self._server()
                self._at_s = now_s
            return self._latest

    def _server(self) -> dict[str, Any]:
        service = self._service
        ready = service.state is State.READY
        return {
            "state": service.state.value,
            "reason": service.reason,
            "model": service.names.known[0],
            "chats": ready and service.engine.tokenizer.has_chat_template,
            "open": service.num_open,
            "rows": service.engine.plan.num_rows if ready else 0,
        }


def measured(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot's figures as JSON values: shares from 0 to 1, cells in eighths, null before the first work."""
    window = Window.of(snapshot.lanes, snapshot.now_s, NUM_CELLS)
    lanes = [(*window.measure(view),) for view in snapshot.lanes]
    uses = [use for use, _ in lanes]
    hidden = timeline.hidden_share({use.lane: merged for use, merged in lanes})
    return {
        "stage": snapshot.stage,
        "done": snapshot.done,
        "total": snapshot.total,
        "tokens": snapshot.tokens,
        "tokens_per_s": snapshot.tokens_per_s,
        "tokens_per_pass": snapshot.tokens_per_pass,
        "seconds": window.cell_s * NUM_CELLS,
        "lanes": [_lane(use, window.shares(merged)) for use, merged in lanes],
        "bottleneck": timeline.bottleneck(uses) if uses else "",
        "hidden": hidden,
        "layers": list(snapshot.residency),
        "slots": [state.value for state, _ in snapshot.slots],
        "accepted": list(snapshot.accepted),
        "memory": snapshot.held,
    }


def _lane(use: timeline.LaneUse, shares: list[float | None]) -> Mapping[str, Any]:
    rate = use.busy_bytes_per_s
    cells = [None if share is None else _level(share) for share in shares]
    return {"name": str(use.lane), "share": use.share, "rate": format_rate(rate) if rate else "", "cells": cells}


def _level(share: float) -> int:
    return 0 if share <= 0 else max(1, min(LEVELS, round(share * LEVELS)))
