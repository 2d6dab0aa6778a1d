"""The threads of kernels: a team that takes its share piece by piece, so that a thread that is late holds nobody up.

A runtime for loops (OpenMP) gives every thread an equal share and waits for all. Beside other work the last one to be
scheduled then decides; and a thread that sleeps is woken for every product: some 75 microseconds on a virtual machine,
twice as long as the product of a small weight takes. Here the calling thread opens a job and begins at once; whoever
comes takes pieces from the same counter; and the caller waits only for threads that are inside when none is left.
Threads that find no job yield to any other thread for about a tenth of a millisecond, then they sleep.

There is one team in a process. A caller that finds it at work computes alone. Its threads never end, and they are no
threads of Python: they run nothing but kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from aspec.models.compiled.emit import I8, I32, I64, SHARE, VOID, Value, number

PIECES = 8  # of each thread: the last one keeps the others waiting for a sixteenth of a job's seconds on average
YIELDS = 300  # without a job before a thread sleeps
LINE, LOCK_BYTES = 8, 128  # numbers of a cache line; more than a lock of the system's library takes
OPEN = 1 << 32  # in GATE: a job is open; below it counts the threads inside

GATE, NUMBER, NEXT, PART, RECORD, COUNT, PIECE, GUESTS, SLEEPING, STARTED, BUSY = range(11)
"""Numbers of the team: GATE; the job's number; its next piece; what it computes, and of what, how much and in how many
pieces; the most threads beside the caller; threads that sleep, and that were started; whether somebody calls."""

_POINTER, _PART = I8.as_pointer(), ir.FunctionType(VOID, [I8.as_pointer(), I64, I64])


def team() -> str:
    """``aspec_share`` and ``prepare()``, which is called once, and again in a process that was forked."""
    return str(_Team().module)


class _Team:
    """The functions while they are written; ``builder`` writes at the end of the present one."""

    def __init__(self) -> None:
        self.module, self.builder = ir.Module(), ir.IRBuilder()
        self._numbers = self._memory(I64, (BUSY + 1) * LINE, "numbers")
        self._lock, self._alarm = (self._memory(I8, LOCK_BYTES, name) for name in ("lock", "alarm"))
        self._take = self._function("take", VOID)
        self._serve = self._function("serve", _POINTER, _POINTER)
        self._write_take()
        self._write_serve()
        self._write_prepare()
        self._write_share()

    def _memory(self, kind: Value, count: int, name: str) -> Value:
        memory = ir.GlobalVariable(self.module, ir.ArrayType(kind, count), name)
        memory.initializer, memory.align = ir.Constant(memory.value_type, None), 64
        return memory

    def _function(self, name: str, result: Value, *given: Value) -> Value:
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(result, given), name)

    def _begin(self, function: Value) -> None:
        self.builder.position_at_end(function.append_basic_block())

    # -- the functions ---------------------------------------------------------------------------------------

    def _write_take(self) -> None:
        """Compute pieces of the open job until none is left."""
        build = self.builder
        self._begin(self._take)
        part = build.inttoptr(self._load(PART), _PART.as_pointer())
        record, count, pieces = build.inttoptr(self._load(RECORD), _POINTER), self._load(COUNT), self._load(PIECE)
        with self._forever() as end:
            piece = self._add(NEXT, 1)
            with build.if_then(build.icmp_signed(">=", piece, pieces)):
                build.branch(end)
            bounds = (piece, build.add(piece, number(1)))
            build.call(part, [record, *(build.sdiv(build.mul(count, bound), pieces) for bound in bounds)])
        build.ret_void()

    def _write_serve(self) -> None:
        """What a thread of the team does for ever: wait for a job that it has not seen, help, leave."""
        build = self.builder
        self._begin(self._serve)
        seen, idle = build.alloca(I64), build.alloca(I64)
        build.store(number(0), seen)
        build.store(number(0), idle)
        with self._forever():
            gate = self._load(GATE)
            inside = build.and_(gate, number(OPEN - 1))
            room = build.icmp_signed("<", inside, self._load(GUESTS))
            with build.if_else(build.and_(self._is_new(gate, seen), room)) as (useful, useless):
                with useful:
                    entered = self._exchange(GATE, gate, build.add(gate, number(1)))
                    with build.if_then(entered):
                        build.store(self._load(NUMBER), seen)
                        build.call(self._take, [])
                        self._add(GATE, -1)
                        build.store(number(0), idle)
                with useless:
                    self._yield()
                    waited = build.add(build.load(idle), number(1))
                    build.store(waited, idle)
                    with build.if_then(build.icmp_signed(">", waited, number(YIELDS))):
                        self._sleep(seen)
                        build.store(number(0), idle)
        build.unreachable()

    def _sleep(self, seen: Value) -> None:
        """Sleep until there is a job that this thread has not seen: whoever opens one looks for sleepers after that."""
        build = self.builder
        self._system("pthread_mutex_lock", self._lock)
        self._add(SLEEPING, 1)
        with self._forever() as end:
            with build.if_then(self._is_new(self._load(GATE), seen)):
                build.branch(end)
            self._system("pthread_cond_wait", self._alarm, self._lock)
        self._add(SLEEPING, -1)
        self._system("pthread_mutex_unlock", self._lock)

    def _is_new(self, gate: Value, seen: Value) -> Value:
        """Whether a job is open, and another one than the last that this thread has entered."""
        build = self.builder
        other = build.icmp_signed("!=", self._load(NUMBER), build.load(seen))
        return build.and_(build.icmp_signed(">=", gate, number(OPEN)), other)

    def _write_prepare(self) -> None:
        build = self.builder
        self._begin(self._function("prepare", VOID))
        for at in range(BUSY + 1):
            self._store(at, number(0))
        nothing = ir.Constant(_POINTER, None)
        for name, memory in (("pthread_mutex_init", self._lock), ("pthread_cond_init", self._alarm)):
            self._system(name, memory, nothing)
        build.ret_void()

    def _write_share(self) -> None:
        """Open a job, have it computed, and close it; alone if the team is at work."""
        build = self.builder
        share = self._function(SHARE, VOID, _PART.as_pointer(), _POINTER, I64, I32)
        part, record, count, threads = share.args
        self._begin(share)
        guests = build.sub(build.sext(threads, I64), number(1))
        with build.if_else(self._exchange(BUSY, number(0), number(1)), likely=True) as (free, busy):
            with free:
                self._start(guests)
                pieces = build.mul(build.add(guests, number(1)), number(PIECES))
                pieces = build.select(build.icmp_signed("<", count, pieces), count, pieces)
                job = {PART: build.ptrtoint(part, I64), RECORD: build.ptrtoint(record, I64), COUNT: count}
                for at, value in {**job, PIECE: pieces, GUESTS: guests, NEXT: number(0)}.items():
                    self._store(at, value)
                self._add(NUMBER, 1)
                self._add(GATE, OPEN)
                with build.if_then(build.icmp_signed(">", self._load(SLEEPING), number(0))):
                    self._system("pthread_mutex_lock", self._lock)
                    self._system("pthread_cond_broadcast", self._alarm)
                    self._system("pthread_mutex_unlock", self._lock)
                build.call(self._take, [])
                self._add(GATE, -OPEN)
                with self._forever() as end:
                    with build.if_then(build.icmp_signed("==", self._load(GATE), number(0))):
                        build.branch(end)
                    self._yield()
                self._store(BUSY, number(0))
            with busy:
                build.call(part, [record, number(0), count])
        build.ret_void()

    def _start(self, wanted: Value) -> None:
        """Start threads until there are as many; as many as the system gives. Only one thread at a time calls it."""
        build = self.builder
        handle = build.alloca(I64)
        with self._forever() as end:
            with build.if_then(build.icmp_signed(">=", self._load(STARTED), wanted)):
                build.branch(end)
            nothing = ir.Constant(_POINTER, None)
            failed = self._system("pthread_create", handle, nothing, self._serve, nothing)
            with build.if_then(build.icmp_signed("!=", failed, I32(0))):
                build.branch(end)
            self._add(STARTED, 1)

    # -- pieces of code --------------------------------------------------------------------------------------

    def _at(self, place: int) -> Value:
        return self._numbers.gep([I32(0), I32(place * LINE)])

    def _load(self, place: int) -> Value:
        return self.builder.load_atomic(self._at(place), "seq_cst", 8)

    def _store(self, place: int, value: Value) -> None:
        self.builder.store_atomic(value, self._at(place), "seq_cst", 8)

    def _add(self, place: int, value: int) -> Value:
        """The number before ``value`` was added to it."""
        return self.builder.atomic_rmw("add", self._at(place), number(value), "seq_cst")

    def _exchange(self, place: int, expected: Value, value: Value) -> Value:
        """Whether the number was the expected one, and now is ``value``."""
        done = self.builder.cmpxchg(self._at(place), expected, value, "seq_cst", "seq_cst")
        return self.builder.extract_value(done, 1)

    def _system(self, name: str, *given: Value) -> Value:
        """Call a function of the system's library."""
        pointers = [self.builder.bitcast(own, _POINTER) for own in given]
        return self.builder.call(self._function(name, I32, *(_POINTER,) * len(given)), pointers)

    def _yield(self) -> None:
        self._system("sched_yield")

    @contextmanager
    def _forever(self) -> Iterator[Value]:
        """A loop that is left by a branch to what is given; what follows stands behind it."""
        build = self.builder
        body, end = (build.function.append_basic_block() for _ in range(2))
        build.branch(body)
        build.position_at_end(body)
        yield end
        build.branch(body)
        build.position_at_end(end)
