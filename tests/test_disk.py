"""The disk lane reads the right bytes to the right place, whatever the layout, and settles whatever happens."""

import asyncio
import errno
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aspec.errors import ReadError
from aspec.io import disk
from aspec.io.disk import DiskLane, FileVersion, split
from aspec.io.disk_probe import probe_rate
from aspec.io.memory import HUGE_PAGE, PAGE, allocate, discard

SIZE = 3_000_017  # not a multiple of anything


@dataclass(frozen=True)
class Seg:
    file: str
    offset: int
    nbytes: int
    at: int


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    path = tmp_path_factory.mktemp("disk") / "blob"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture
async def lane():
    made = DiskLane(asyncio.get_running_loop(), num_threads=2, chunk_bytes=16 * PAGE)
    yield made
    made.close()


@st.composite
def layouts(draw):
    """Segments of the blob that follow one another in a buffer, congruent or not, sharing pages or not."""
    segments, at = [], 0
    for _ in range(draw(st.integers(1, 8))):
        offset = draw(st.integers(0, SIZE - 1))
        nbytes = draw(st.one_of(st.integers(1, 64), st.integers(1, 200_000)))
        nbytes = min(nbytes, SIZE - offset)
        at += draw(st.sampled_from([0, 0, 1, 63, PAGE, 9000]))
        if draw(st.booleans()):
            at += (offset - at) % PAGE
        segments.append((offset, nbytes, at))
        at += nbytes
    return segments, at


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_every_layout_lands_exactly(blob, layout):
    segments, end = layout
    content = blob.read_bytes()
    memory = allocate(end)
    memory.view[:] = b"\xab" * memory.nbytes
    reference = bytearray(memory.view)

    async def main():
        lane = DiskLane(asyncio.get_running_loop(), num_threads=2, chunk_bytes=8 * PAGE)
        done = await lane.read([Seg(str(blob), *s) for s in segments], memory.view)
        lane.close()
        return done

    done = asyncio.run(main())
    assert done.nbytes == sum(n for _, n, _ in segments)
    assert done.stop_s >= done.start_s
    for offset, nbytes, at in segments:
        reference[at : at + nbytes] = content[offset : offset + nbytes]
    for offset, nbytes, at in segments:
        assert memory.view[at : at + nbytes] == reference[at : at + nbytes], (offset, nbytes, at)
    memory.close()


def test_a_congruent_part_needs_one_chunk_per_chunk_size_and_no_bounce(blob):
    chunks = list(split([Seg(str(blob), 8 + PAGE, 100 * PAGE, 8)], 0, 200 * PAGE, 16 * PAGE))
    assert all(chunk.direct for chunk in chunks)
    assert len(chunks) == 7  # 100 pages and a skew, 16 at a time


def test_neighbours_in_a_page_are_bounced_at_the_edges_only(blob):
    segments = [Seg(str(blob), 100, 3 * PAGE, 100), Seg(str(blob), 7 * PAGE + 100, 3 * PAGE, 3 * PAGE + 100)]
    chunks = list(split(segments, 0, 7 * PAGE, 16 * PAGE))
    assert sum(chunk.nbytes for chunk in chunks if not chunk.direct) < 2 * PAGE
    assert sum(chunk.nbytes for chunk in chunks) == 6 * PAGE


@pytest.mark.parametrize("at", [-1, 10 * PAGE])
def test_a_segment_outside_the_buffer_is_refused(blob, at):
    with pytest.raises(ValueError, match="does not fit"):
        list(split([Seg(str(blob), 0, PAGE, at)], 0, 4 * PAGE, 16 * PAGE))


async def test_many_reads_at_once_all_land(blob, lane):
    content = blob.read_bytes()
    memories = [allocate(100_000) for _ in range(20)]
    offsets = [random.Random(i).randrange(SIZE - 90_000) for i in range(20)]
    reads = [lane.read([Seg(str(blob), o, 90_000, o % PAGE)], m.view) for o, m in zip(offsets, memories, strict=True)]
    await asyncio.gather(*reads)
    for offset, memory in zip(offsets, memories, strict=True):
        assert memory.view[offset % PAGE : offset % PAGE + 90_000] == content[offset : offset + 90_000]
        memory.close()


async def test_a_short_file_is_an_error_and_the_lane_lives_on(blob, lane, tmp_path):
    memory = allocate(100_000)
    short = tmp_path / "short"
    short.write_bytes(b"x" * 5000)
    with pytest.raises(ReadError, match=r"ends at byte 5000.*truncated"):
        await lane.read([Seg(str(short), 0, 50_000, 0)], memory.view)
    with pytest.raises(ReadError, match="cannot be opened"):
        await lane.read([Seg(str(tmp_path / "none"), 0, 10, 0)], memory.view)
    await lane.read([Seg(str(blob), 0, 50_000, 0)], memory.view)
    assert memory.view[:50_000] == blob.read_bytes()[:50_000]
    memory.close()


async def test_a_file_system_without_direct_reads_is_served_through_the_cache(blob, lane, monkeypatch):
    real, refused = os.open, []

    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "no direct reads here")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    memory = allocate(100_000)
    await lane.read([Seg(str(blob), 5, 90_000, 5)], memory.view)
    assert refused == [str(blob)]
    assert memory.view[5:90_005] == blob.read_bytes()[5:90_005]
    memory.close()


async def test_a_device_that_refuses_late_is_served_too(blob, monkeypatch):
    real, refused = os.preadv, []

    def picky(fd, buffers, offset):
        if not refused:
            refused.append(fd)
            raise OSError(errno.EINVAL, "stricter alignment")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", picky)
    lane = DiskLane(asyncio.get_running_loop(), num_threads=1)
    memory = allocate(100_000)
    await lane.read([Seg(str(blob), 5, 90_000, 5)], memory.view)
    assert memory.view[5:90_005] == blob.read_bytes()[5:90_005]
    lane.close()
    memory.close()


async def test_short_reads_in_the_middle_go_on(blob, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][: 5 * PAGE]], offset))
    lane = DiskLane(asyncio.get_running_loop(), num_threads=1)
    memory = allocate(300_000)
    await lane.read([Seg(str(blob), 5, 290_000, 5)], memory.view)
    assert memory.view[5:290_005] == blob.read_bytes()[5:290_005]
    lane.close()
    memory.close()


async def test_urgent_reads_overtake(blob):
    lane = DiskLane(asyncio.get_running_loop(), num_threads=1, rate_bytes_per_s=4e6)
    memory = allocate(HUGE_PAGE)
    order = []

    async def read(name, priority, at):
        await lane.read([Seg(str(blob), 0, 100 * PAGE, at)], memory.view, priority)
        order.append(name)

    tasks = [asyncio.create_task(read(n, p, i * 100 * PAGE)) for i, (n, p) in enumerate([("a", 5), ("b", 5), ("c", 1)])]
    await asyncio.gather(*tasks)
    assert order.index("c") < order.index("b")
    lane.close()
    memory.close()


class Clock:
    """Stands still but where a limit is waited for."""

    now_s = 0.0

    def __call__(self):
        return self.now_s

    def wait_until(self, deadline_s, stopping):
        self.now_s = max(self.now_s, deadline_s)


async def test_a_rate_limit_is_kept(blob, monkeypatch):
    """In virtual time as it says; in real time, where a busy machine only makes it slower, no faster."""
    clock = Clock()
    lane = DiskLane(asyncio.get_running_loop(), rate_bytes_per_s=20e6, clock=clock)
    memory = allocate(SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(lane._limit, "wait_until", clock.wait_until)
        for _ in range(3):
            await lane.read([Seg(str(blob), 0, SIZE, 0)], memory.view)
    assert 0.95 * 20e6 < 3 * SIZE / clock.now_s < 1.15 * 20e6
    lane.close()
    memory.close()
    assert probe_rate([Seg(str(blob), 0, SIZE, 0)], 0.3, rate_bytes_per_s=20e6) < 1.25 * 20e6


async def test_closing_settles_what_is_in_flight(blob):
    lane = DiskLane(asyncio.get_running_loop(), num_threads=2, rate_bytes_per_s=1e6)
    memory = allocate(SIZE)
    pending = lane.read([Seg(str(blob), 0, SIZE, 0)], memory.view)
    await asyncio.sleep(0.05)
    lane.close()
    lane.close()
    assert not any(memory.view[SIZE - PAGE : SIZE]), "it does not wait for all that was asked for"
    pending.cancel()
    memory.close()


async def test_no_descriptor_is_left(blob):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    lane = DiskLane(asyncio.get_running_loop())
    memory = allocate(100_000)
    await lane.read([Seg(str(blob), 0, 100_000, 0)], memory.view)
    lane.close()
    memory.close()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_the_probe_reads_the_named_ranges(blob):
    rate = probe_rate([Seg(str(blob), 1000, SIZE - 1000, 0)], 0.1)
    assert rate > 1e6
    assert probe_rate([Seg(str(blob), 0, SIZE, 0)], 0.0) > 0.0, (
        "a busy machine may start its threads after the time is over"
    )
    with pytest.raises(ReadError):
        probe_rate([Seg("/nowhere", 0, 10, 0)], 0.1)


def test_memory_is_aligned_and_whole_pages():
    for nbytes in (1, PAGE, 3 * PAGE + 1, HUGE_PAGE + 1):
        memory = allocate(nbytes)
        assert memory.address % HUGE_PAGE == 0
        assert memory.nbytes % PAGE == 0
        assert memory.nbytes >= nbytes
        assert not any(memory.view[i] for i in range(0, memory.nbytes, PAGE))
        memory.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what its maps are")
def test_memory_is_private():
    """Linux as it is delivered gives no huge pages to memory that processes could share."""
    memory = allocate(HUGE_PAGE)
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, permissions, *_ = line.split()
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if first <= memory.address < last:
            assert permissions == "rw-p"
            break
    else:
        pytest.fail("the memory is in no map")
    memory.close()


def test_discarded_memory_reads_as_zeros():
    memory = allocate(2 * HUGE_PAGE)
    memory.view[:] = b"\1" * memory.nbytes
    discard(memory.view[PAGE + 1 : HUGE_PAGE + PAGE + 1])
    if sys.platform == "linux":
        assert not any(memory.view[2 * PAGE : HUGE_PAGE + PAGE])
    assert all(memory.view[at] == 1 for at in (0, PAGE, 2 * PAGE - 1, HUGE_PAGE + PAGE, 2 * HUGE_PAGE - 1))
    memory.close()


def test_the_module_names_no_compute_library():
    assert "torch" not in vars(disk)


# -- files that change -------------------------------------------------------------------------------------


def _rewrite(path):
    with path.open("r+b") as file:
        file.write(b"other")


def _touch(path):
    os.utime(path, ns=(0, 10**18 * 9))


def _append(path):
    with path.open("ab") as file:
        file.write(b"more")


def _replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    times = path.stat()
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))  # as tools that preserve times do
    other.rename(path)


def _retarget(path):
    (target := path.with_name("target")).write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(target)


WRITTEN = {
    "rewritten": _rewrite,
    "appended to": _append,
    "touched": _touch,
    "cut": lambda path: os.truncate(path, SIZE // 2),
}
REPLACED = {"replaced": _replace, "retargeted": _retarget}


@pytest.mark.parametrize("change", [*WRITTEN.values(), *REPLACED.values()], ids=[*WRITTEN, *REPLACED])
@pytest.mark.parametrize("opened", [False, True])
async def test_a_file_that_has_changed_since_its_header_was_read_is_refused(blob, tmp_path, change, opened):
    path = tmp_path / "shard"
    path.write_bytes(blob.read_bytes())
    os.utime(path, ns=(0, 10**18))  # a change in the same tick of the file system's clock would be none
    lane = DiskLane(asyncio.get_running_loop(), num_threads=2, versions={str(path): FileVersion.of(path)})
    memory, late = allocate(SIZE), [Seg(str(path), SIZE - 9000, 9000, 0)]
    try:
        if opened:
            await lane.read([Seg(str(path), 0, 9000, 0)], memory.view)
        change(path)
        if opened and change in REPLACED.values():  # the open file is still the one of the header
            await lane.read(late, memory.view)
            assert bytes(memory.view[:9000]) == blob.read_bytes()[-9000:]
        else:
            with pytest.raises(ReadError, match="since aspec read its header"):
                await lane.read(late, memory.view)
    finally:
        lane.close()
        memory.close()


async def test_a_file_that_stays_as_it_was_is_read_for_ever(blob, tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(blob.read_bytes())
    lane = DiskLane(asyncio.get_running_loop(), versions={str(path): FileVersion.of(path)})
    memory = allocate(SIZE)
    try:
        for _ in range(3):
            path.chmod(0o400)  # neither a mode, nor a name, nor a reading changes what is stored
            os.link(path, tmp_path / "a second name")
            await lane.read([Seg(str(path), 0, SIZE, 0)], memory.view)
            (tmp_path / "a second name").unlink()
            assert bytes(memory.view[:SIZE]) == blob.read_bytes()
    finally:
        lane.close()
        memory.close()


async def test_a_file_that_is_gone_since_its_header_was_read_is_told(blob, tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(blob.read_bytes())
    lane, memory = DiskLane(asyncio.get_running_loop(), versions={str(path): FileVersion.of(path)}), allocate(9000)
    path.unlink()
    try:
        with pytest.raises(ReadError, match=r"cannot be opened: No such file .* when aspec read its header"):
            await lane.read([Seg(str(path), 0, 9000, 0)], memory.view)
    finally:
        lane.close()
        memory.close()
