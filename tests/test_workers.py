"""Rows spread over workers: whatever dies, hangs or comes late, each row is answered once, as without workers."""

import asyncio
import contextlib
import os
import random
import signal
import time
from dataclasses import replace

import psutil
import pytest
import typer

from aspec import __version__
from aspec.cli.batch_workers import absolute
from aspec.cli.flags.options import pool_of_workers
from aspec.cli.front import opening
from aspec.errors import BudgetError, DeviceError, UserError
from aspec.generation.params import SamplingParams
from aspec.options import EngineOptions
from aspec.planning.resolve import resolve
from aspec.serving.workers import engine_process, local
from aspec.serving.workers.crew import MOST_DEATHS, Crew
from aspec.serving.workers.leases import Leases
from aspec.serving.workers.local import MODULE, LocalPool, identity_of, share_of, visible_cards
from aspec.serving.workers.messages import (
    Answered,
    Drain,
    Drop,
    Failed,
    Job,
    Lease,
    Opened,
    Released,
    pack,
    unpack,
)
from aspec.serving.workers.pool import StartError
from tests.fork_server import ROOT, wait_until
from tests.test_batch import answers, batch, begun_like, command, made_pair, make_rows, num_rows_in, same_rows, write


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return made_pair(tmp_path_factory.mktemp("workers"), "llama")


# -- leases ----------------------------------------------------------------------------------------------------


def test_a_worker_holds_at_most_its_window_and_gets_the_next_row_for_an_answer():
    leases = Leases(range(9))
    assert leases.take(0, 2, 4) == [0, 1, 2, 3]
    assert leases.take(0, 2, 4) == []
    assert leases.answer(0, 2) == []
    assert leases.take(0, 2, 4) == [4]
    assert (leases.num_left, leases.num_leased) == (8, 4)


def test_rows_of_a_dead_worker_come_before_all_others_and_in_their_order():
    leases = Leases(range(9))
    leases.take(0, 1, 3)
    leases.take(1, 1, 2)
    assert leases.lose(0) == 3
    assert leases.take(1, 1, 7) == [0, 1, 2, 5, 6]
    assert leases.lose(7) == 0, "a worker that never held a row"


def test_an_idle_seat_takes_copies_of_the_rows_that_were_given_last_and_the_first_answer_counts():
    leases = Leases(range(6))
    leases.take(0, 2, 6)
    assert leases.take(1, 2, 6) == [5, 4], "no more than its seats"
    assert leases.answer(1, 5) == [0], "the other one is told to drop it"
    assert leases.answer(0, 5) is None
    assert leases.lose(0) == 4, "a row that another holds does not wait"
    assert leases.take(1, 2, 6) == [0, 1, 2, 3]
    assert leases.held(1) == (4, 0, 1, 2, 3)


def test_a_row_that_is_given_back_waits_again():
    leases = Leases(range(2))
    leases.take(0, 1, 2)
    leases.release(0, 1)
    leases.release(0, 1)
    assert (leases.num_left, leases.num_leased) == (2, 1)
    assert leases.take(1, 1, 1) == [1]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_dies_hangs_or_comes_late_every_row_is_answered_once(seed):
    noise = random.Random(seed)
    rows, workers = noise.randint(1, 60), noise.randint(1, 4)
    leases, counted, late = Leases(range(rows)), [], []
    hangs = {worker for worker in range(workers) if noise.random() < 0.3} - {0}
    for _ in range(100_000):
        if not leases.num_left:
            break
        worker, chance = noise.randrange(workers), noise.random()
        leases.take(worker, noise.randint(1, 3), noise.randint(1, 6))
        held = leases.held(worker)
        if chance < 0.05:
            late += [(worker, row) for row in held]
            leases.lose(worker)
        elif chance < 0.1 and late:
            worker, row = late.pop()
            if leases.answer(worker, row) is not None:
                counted.append(row)
        elif held and worker not in hangs:
            row = noise.choice(held)
            assert worker not in leases.answer(worker, row)
            counted.append(row)
    assert sorted(counted) == list(range(rows))
    assert (leases.num_left, leases.num_leased) == (0, 0)


# -- the driver, with workers that are played ------------------------------------------------------------------


class Played:
    """A worker that answers each lease by a script: the number of rows that it answers before it dies, or hangs."""

    def __init__(self, lives, rows, says):
        self.rows, self.says = rows, says
        self.out, self.got, self.closed = asyncio.Queue(), [], False
        self.tell((__version__, "node"))
        lives.append(self)

    def tell(self, message):
        self.out.put_nowait(message if message is None else pack(message))

    def send(self, content):
        order = unpack(content)
        self.got.append(order)
        match order:
            case Job() if self.says is not None:
                self.tell(self.says)
                self.tell(None)
            case Job():
                self.tell(Opened(2, 4, "a plan"))
            case Lease(row, line) if self.rows > 0:
                self.rows -= 1
                self.tell(Answered(row, b"%d %s\n" % (row, line), False, 1, 1, 0))
            case Lease() if self.rows == 0:
                self.tell(None)
            case Drain():
                for order in [one for one in self.got if isinstance(one, Lease)]:
                    self.tell(Released(order.row))

    async def receive(self):
        return await self.out.get()

    async def close(self):
        self.closed = True
        return "killed by SIGKILL"


FOREVER, HANGS = 10**9, -1


class Places:
    """A pool whose workers live by a script: ``lives[place]`` are the rows of each life; the last one repeats."""

    def __init__(self, *lives, says=None):
        self.lives, self.says, self.size, self.started = list(map(list, lives)), says, len(lives), []

    async def start(self, place):
        rows = self.lives[place].pop(0) if len(self.lives[place]) > 1 else self.lives[place][0]
        if rows is None:
            raise StartError("no such node")
        return Played(self.started, rows, self.says)


def play(pool, rows=20, drain_after=None, read=b"line %d".__mod__):
    """The lines that a job wrote, and what it noted."""
    written, notes = [], []

    async def main():
        drain = asyncio.Event()

        async def keep(answered):
            await asyncio.sleep(0)
            written.append(answered.line)
            if len(written) == drain_after:
                drain.set()

        job = Job(EngineOptions(), SamplingParams(), "", "m", 0)
        crew = Crew(pool, job, Leases(range(rows)), read, keep, notes.append, lambda: None)
        await crew.run(drain)

    try:
        with asyncio.Runner() as runner:
            runner.run(main())
    finally:
        assert all(worker.closed for worker in getattr(pool, "started", ())), "none is left behind"
    return sorted(written), notes


WHOLE = sorted(b"%d line %d\n" % (row, row) for row in range(20))


@pytest.mark.parametrize(
    "lives",
    [[[FOREVER]], [[FOREVER], [3, 0, 5, FOREVER]], [[FOREVER], [HANGS]], [[HANGS], [2, FOREVER], [None]], [[5, 5]]],
)
def test_every_row_is_written_once_whoever_dies_hangs_or_never_starts(lives):
    assert play(Places(*lives))[0] == WHOLE


def test_a_row_that_a_hanging_worker_holds_is_dropped_there():
    pool = Places([HANGS], [FOREVER])
    assert play(pool)[0] == WHOLE
    assert any(isinstance(order, Drop) for order in pool.started[0].got)


def test_workers_that_die_without_an_answer_are_started_a_bounded_number_of_times():
    pool = Places([0], [None])
    with pytest.raises(DeviceError, match=r"20 rows are left.*killed by SIGKILL.*run the same command again"):
        play(pool)
    assert len(pool.started) == MOST_DEATHS


@pytest.mark.parametrize(("kind", "error"), [("BudgetError", BudgetError), ("CheckpointError", UserError)])
def test_a_worker_that_cannot_work_is_started_once_and_its_message_reaches_the_user(kind, error):
    pool = Places([FOREVER], says=Failed(kind, "too little memory here", final=True))
    with pytest.raises(error, match="too little memory here"):
        play(pool)
    assert len(pool.started) == 1


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("aspec.serving.workers.crew.__version__", "0.0.0")
    pool = Places([FOREVER])
    with pytest.raises(UserError, match=rf"node has aspec {__version__}, the driver 0\.0\.0"):
        play(pool)
    assert pool.started[0].got == []


def test_a_drained_job_ends_when_no_worker_holds_a_row():
    written, _ = play(Places([7, HANGS], [HANGS]), drain_after=7)
    assert len(written) == 7


# -- what is asked for -----------------------------------------------------------------------------------------


def test_workers_are_a_number_or_a_cluster():
    for text in ("1", "12", "auto", "ray://head:10001"):
        assert pool_of_workers(text) == text
    for text in ("0", "-1", "two", "", "http://head"):
        with pytest.raises(typer.BadParameter, match="number of processes"):
            pool_of_workers(text)


def test_without_ray_a_cluster_is_refused_before_anything_is_read(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    source = write(tmp_path / "in.jsonl", make_rows(2))
    result = batch(pair, source, tmp_path / "out.jsonl", "--workers", "auto")
    assert result.exit_code == 1
    assert "pip install 'aspec[ray]'" in result.stderr
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_workers_of_one_machine_divide_what_was_not_given(pair):
    resolved = resolve(EngineOptions(target=pair[0], device="cpu"))
    shared = share_of(resolved, 4, 0)
    assert shared.device_memory == resolved.budget_bytes // 4
    assert shared.threads == max(1, len(os.sched_getaffinity(0)) // 4)
    given = EngineOptions(target=pair[0], device="cpu", device_memory="4MiB", threads=3)
    assert share_of(resolve(given), 4, 0) == given


def test_a_worker_with_another_target_is_refused(pair):
    resolved = resolve(EngineOptions(target=pair[0], device="cpu"))
    job = Job(resolved.options, SamplingParams(), identity_of(resolved), "m", 0)
    assert engine_process._found(job).target == resolved.target
    with pytest.raises(UserError, match="another one than the driver's"):
        engine_process._found(replace(job, options=EngineOptions(target=pair[1], device="cpu")))


def test_paths_reach_workers_whole(pair, monkeypatch):
    monkeypatch.chdir(pair[0].parent)
    options = absolute(EngineOptions(target="target", draft="ngram"))
    assert (options.target, options.draft) == (str(pair[0]), "ngram")
    assert absolute(EngineOptions(target="org/name")).target == "org/name"


def test_workers_take_turns_on_the_cards_that_this_process_sees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_cards(0) == ()
    assert visible_cards(2) == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7")
    assert visible_cards(2) == ("5", "GPU-7")


# -- real processes that hold no engine ------------------------------------------------------------------------


@pytest.fixture
def stubs(monkeypatch):
    """Workers of this machine that start at once; those that are killed at their first row, by their number."""
    monkeypatch.setattr(local, "MODULE", "tests.stub_worker")
    monkeypatch.chdir(ROOT)
    return LocalPool(2, ())


def test_a_process_that_is_killed_loses_nothing_and_leaves_nothing(stubs):
    killed = {}

    def running():
        return [one.pid for one in psutil.Process().children() if "tests.stub_worker" in one.cmdline()]

    def read(row):
        if row in (0, 7) and row not in killed:
            killed[row] = min(set(running()) - set(killed.values()))  # the one before may not have ended yet
            os.kill(killed[row], signal.SIGKILL)
        return b"x" * 100_000

    written, notes = play(stubs, read=read)
    assert [len(line) for line in written] == [100_000] * 20
    assert len(set(killed.values())) == 2
    assert any("killed by SIGKILL" in note and "it is started again" in note for note in notes)
    assert not running()


def test_the_last_words_of_a_process_reach_the_user(stubs):
    with pytest.raises(DeviceError, match=r"exit code 1.*the last words"):
        play(stubs, read=lambda row: b"break")


# -- real processes --------------------------------------------------------------------------------------------


def engines():
    """The engine processes below this one, by their ids."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if MODULE in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def kill_until_done(server, args, output, total, kinds, actors=tuple, **more):
    """Kill workers, the driver or both, one after another, each time after some more rows; then let the job end."""
    noise, pid, log = random.Random(3), None, output.with_suffix(".log")
    for left, kind in zip(range(len(kinds), 0, -1), kinds, strict=True):
        pid = pid or server.start(args, log, **more)
        before = num_rows_in(output)
        wanted = before + noise.randint(1, max(1, (total - before) // (left + 1)))
        wait_until(lambda wanted=wanted: num_rows_in(output) >= min(wanted, total) and engines())
        time.sleep(noise.uniform(0, 0.5))
        victims = [noise.choice([*engines(), *actors()])] if kind != "driver" else []
        for victim in [*victims, *([pid] if kind != "worker" else [])]:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(victim, signal.SIGKILL)
        if kind != "worker":
            assert server.wait(pid) in (-signal.SIGKILL, 0), log.read_text()
            pid = None
    pid = pid or server.start(args, log, **more)
    assert server.wait(pid) == 0, log.read_text()
    wait_until(lambda: not engines())


def undisturbed(server, pair, tmp_path, count):
    """The flags of a job on workers, and the rows that it has to write."""
    source, quiet, output = write(tmp_path / "in.jsonl", make_rows(count)), tmp_path / "quiet.jsonl", tmp_path / "o"
    flags = ["--batch-size", 3]
    assert server.wait(server.start(command(pair, source, quiet, *flags), tmp_path / "quiet.log")) == 0
    begun_like(quiet, output)
    return quiet, output, command(pair, source, output, *flags, "--link-rate", "4MB/s", "--workers")


def test_a_job_on_a_worker_ends_with_the_rows_of_one_process(server, pair, tmp_path):
    """An interpreter that imports torch and transformers takes most of its time."""
    quiet, output, args = undisturbed(server, pair, tmp_path, 12)
    kill_until_done(server, [*args, "1"], output, 12, [])
    assert same_rows(quiet, output)


@pytest.mark.slow
def test_a_job_whose_worker_is_killed_goes_on_and_tells(server, pair, tmp_path):
    quiet, output, args = undisturbed(server, pair, tmp_path, 60)
    kill_until_done(server, [*args, "2"], output, 60, ["worker"])
    assert same_rows(quiet, output)
    assert "has ended (killed by SIGKILL)" in output.with_suffix(".log").read_text()


@pytest.mark.slow
def test_a_job_whose_workers_and_drivers_are_killed_ends_with_the_rows_of_one_process(server, pair, tmp_path):
    """The test on Ray kills more often."""
    quiet, output, args = undisturbed(server, pair, tmp_path, 120)
    kill_until_done(server, [*args, "2"], output, 120, ["driver", "worker", "both", "driver"])
    assert same_rows(quiet, output)


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster of two nodes on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'aspec[ray]'")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    made.add_node(**small)
    yield made.address
    made.shutdown()


def relays():
    """The processes of Ray's actors, by their ids."""
    return [one.pid for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::Relay")]


@pytest.mark.slow
def test_a_job_on_ray_whose_workers_and_drivers_are_killed_ends_with_the_rows_of_one_process(
    server, pair, tmp_path, cluster
):
    kills = 20
    quiet, output, args = undisturbed(server, pair, tmp_path, 20 * kills)
    kinds, environment = random.Random(7).choices(["worker", "driver", "both"], k=kills), {"RAY_ADDRESS": cluster}
    kill_until_done(server, [*args, "auto"], output, 20 * kills, kinds, relays, environment=environment)
    assert same_rows(quiet, output)
    assert len(answers(output)) == 20 * kills
