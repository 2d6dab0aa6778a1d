"""A device without a GPU: streams are threads that run out of step, events behave as CUDA's do.

What is launched takes a seeded random time, so two streams agree on an order only where an event makes them. An
event that was never recorded counts as complete, waiting means the last recording at the time of the call, and
a failure sticks to the device. Launching outside of ``on`` and recording an event somebody waits for are errors.
"""

import contextlib
import queue
import random
import threading
import time

import torch

from aspec.io.pinned import PinnedMemory


class Mark:
    """One recording of an event."""

    def __init__(self):
        self.done = threading.Event()
        self.at_s = 0.0
        self.error = None


class FakeEvent:
    def __init__(self):
        self.mark = None

    def synchronize(self):
        if self.mark is None:
            return
        assert self.mark.done.wait(30), "an event was never reached"
        if self.mark.error is not None:
            raise self.mark.error


class FakeStream:
    """A thread that runs what is put into it, in order."""

    def __init__(self, name):
        self.queue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, name=f"aspec-fake-{name}", daemon=True)
        self.thread.start()

    def run(self):
        while (op := self.queue.get()) is not None:
            op()


class FakeDevice:
    """``fail_copy``: the n-th copy is refused. ``pace_s``: mean time of a launch; copies take ``copy_pace_s``."""

    def __init__(self, seed=0, pace_s=2e-4, copy_pace_s=2e-4, fail_copy=None, pinnable=True):
        self.seed, self.pace_s, self.copy_pace_s, self.fail_copy = seed, pace_s, copy_pace_s, fail_copy
        self.current = threading.local()
        self.streams = []
        self.num_events = self.num_copies = 0
        self.buffers = []
        self.host = PinnedMemory(lambda address, nbytes: pinnable, lambda address: None)
        self.error = None  # sticky, as on the device

    torch_device, peak_bytes, capture = torch.device("cpu"), None, None

    def create_capture(self):
        return self.capture() if self.capture else None

    def synchronize(self):
        pass

    def create_stream(self, priority):
        stream = FakeStream(len(self.streams))
        stream.random = random.Random(f"{self.seed} {len(self.streams)}")
        self.streams.append(stream)
        return stream

    def create_event(self):
        self.num_events += 1
        return FakeEvent()

    def record(self, event, stream):
        assert event.mark is None or event.mark.done.is_set(), "an event was recorded again before it completed"
        mark = event.mark = Mark()

        def fire():
            mark.at_s, mark.error = time.perf_counter(), self.error
            mark.done.set()

        stream.queue.put(fire)

    def wait_event(self, stream, event):
        if (mark := event.mark) is not None:
            stream.queue.put(mark.done.wait)

    @contextlib.contextmanager
    def on(self, stream):
        before = getattr(self.current, "stream", None)
        self.current.stream = stream
        try:
            yield
        finally:
            self.current.stream = before

    def launch(self, *steps, pace_s=None):
        """Put steps into this thread's current stream, with a random time between any two."""
        stream = getattr(self.current, "stream", None)
        assert stream is not None, "launched outside of a stream"

        def work():
            try:
                for step in steps:
                    if self.error is None:
                        time.sleep(stream.random.uniform(0, 2) * (pace_s or self.pace_s) / len(steps))
                        step()
            except BaseException as error:
                self.error = self.error or error

        stream.queue.put(work)

    def copy_async(self, target, source, stream):
        assert target.shape == source.shape
        self.num_copies += 1
        if self.num_copies == self.fail_copy:
            raise OSError("injected fault in a copy")
        half = len(target) // 2
        with self.on(stream):
            self.launch(
                lambda: target[:half].copy_(source[:half]),
                lambda: target[half:].copy_(source[half:]),
                pace_s=self.copy_pace_s,
            )

    def seconds_of(self, event):
        assert event.mark.done.is_set()
        return event.mark.at_s

    def allocate(self, nbytes):
        self.buffers.append(torch.zeros(nbytes, dtype=torch.uint8))
        return self.buffers[-1]

    def allocate_host(self, nbytes):
        return self.host.allocate(nbytes)

    def free_host(self, buffer):
        self.host.free(buffer)

    def free(self):
        for stream in self.streams:
            stream.queue.put(None)
        for stream in self.streams:
            stream.thread.join(30)
        self.streams, self.buffers = [], []
        self.host.close()


class EagerDevice(FakeDevice):
    """One on which torch's own operations run, at once: what was put into a stream before has then ended.

    Copies stay out of step with everything on other streams.
    """

    @contextlib.contextmanager
    def on(self, stream):
        reached = threading.Event()
        stream.queue.put(reached.set)
        assert reached.wait(30), "a stream never came to what is launched on it"
        with super().on(stream):
            yield
