"""Load on a real `aspec serve`: many streams, a third of whose clients leave; then faults, then a signal.

python tools/load_server.py [--target T --draft D] [--seconds 120] [--hostile 2000] [-- flags of serve]

It starts a server process on a free port, asks every prompt alone, and then keeps so many streams open for so many
seconds. A random third of the clients leave after some pieces; a tenth read slowly. It prints errors, tokens that
differ from those of the prompt alone, the seconds of /health, the lag of the server's loop, the growth of its memory,
and tokens per second beside `aspec batch` on rows like these. Then come hostile requests, of which every one must get
a 4xx, and SIGTERM while streams run.
"""

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SEED = 7
PATH = "/v1/completions"
BESIDE = 100  # hostile requests beside one honest stream


@dataclass
class Tally:
    """What the clients saw; mutable, because it grows."""

    expected: dict[str, str] = field(default_factory=dict)  # the answer of every prompt alone
    counts: Counter[str] = field(default_factory=Counter)
    tokens_per_s: float = 0.0  # that the server generated, also for clients that left
    health_s: list[float] = field(default_factory=list)
    lag: dict[str, float] = field(default_factory=dict)  # timers of the server's loop that were at most so late
    rss: list[int] = field(default_factory=list)  # bytes of the server, once a second


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def head(method: str, path: str, body: bytes = b"", extra: str = "") -> bytes:
    fields = f"host: 127.0.0.1\r\nconnection: close\r\ncontent-length: {len(body)}\r\n{extra}"
    return f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode() + body


async def get(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head("GET", path))
        return await reader.read()
    finally:
        writer.close()


async def stream(port: int, body: dict, leave_after: int | None = None, pause_s: float = 0.0) -> tuple[str, int, str]:
    """The text of a streamed answer, its tokens, and how it ended: done, left, or an error."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    text, tokens, pieces = "", 0, 0
    try:
        data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        writer.write(head("POST", PATH, data))
        while line := await reader.readline():
            if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                return text, tokens, line.decode().strip()
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return text, tokens, "done"
            event = json.loads(line[6:])
            if "error" in event:
                return text, tokens, f"error {event['error']['code']}"
            if event["choices"]:
                text, pieces = text + event["choices"][0]["text"], pieces + 1
            else:
                tokens = event["usage"]["completion_tokens"]
            if leave_after is not None and pieces >= leave_after:
                return text, tokens, "left"
            await asyncio.sleep(pause_s)
        return text, tokens, "broke off"
    except OSError as error:
        return text, tokens, f"{type(error).__name__}"
    finally:
        writer.close()


async def client(port: int, bodies: list[dict], tally: Tally, until_s: float, share: float, seed: float) -> None:
    noise = random.Random(seed)
    while time.monotonic() < until_s:
        body = noise.choice(bodies)
        leave = noise.randint(1, 6) if noise.random() < share else None
        text, _, end = await stream(port, body, leave, 0.02 if noise.random() < 0.1 else 0.0)
        tally.counts[end] += 1
        alone = tally.expected[body["prompt"]]
        if not (alone == text if end == "done" else alone.startswith(text)):
            tally.counts["other tokens than alone"] += 1


async def watch(port: int, process: psutil.Process, tally: Tally) -> None:
    while True:
        begun_s = time.monotonic()
        await get(port, "/health")
        tally.health_s.append(time.monotonic() - begun_s)
        if len(tally.health_s) % 10 == 0:
            tally.rss.append(process.memory_info().rss)
        await asyncio.sleep(0.1)


async def load(port: int, process: psutil.Process, args: argparse.Namespace, bodies: list[dict]) -> Tally:
    tally = Tally()
    for body in bodies:
        text, _, end = await stream(port, body)
        assert end == "done", end
        tally.expected[body["prompt"]] = text
    until_s, noise = time.monotonic() + args.seconds, random.Random(SEED)
    watching = asyncio.create_task(watch(port, process, tally))
    seeds, before_lag = [noise.random() for _ in range(args.streams)], await lateness(port)
    begun_s, before = time.monotonic(), await generated(port)
    await asyncio.gather(*(client(port, bodies, tally, until_s, args.leave, one) for one in seeds))
    tally.tokens_per_s = (await generated(port) - before) / (time.monotonic() - begun_s)
    watching.cancel()
    tally.lag = {bound: count - before_lag[bound] for bound, count in (await lateness(port)).items()}
    return tally


async def lateness(port: int) -> dict[str, float]:
    """How many timers of the server's loop were at most so many seconds late."""
    lines = (await get(port, "/metrics")).decode().splitlines()
    found = [line.split('"')[1:] for line in lines if line.startswith("aspec_loop_lag_seconds_bucket")]
    return {bound: float(rest.split()[1]) for bound, rest in found}


async def generated(port: int) -> float:
    """The tokens that the server has generated."""
    lines = (await get(port, "/metrics")).decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("aspec_new_tokens_total "))


# -- faults ----------------------------------------------------------------------------------------------------


def hostile(noise: random.Random) -> bytes:
    """One request that no server should answer with more than an error."""
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    kind = noise.randrange(12)
    if kind == 0:
        return head("POST", PATH, body[: noise.randrange(len(body))])
    if kind == 1:
        depth = noise.choice([70, 5000, 100_000])
        return head("POST", PATH, b'{"prompt":' + b"[" * depth + b"]" * depth + b"}")
    if kind == 2:
        number = noise.choice(["1e999", "-1", "9" * 400, "1e-400", "NaN", "Infinity", "true", "[]", '"x"'])
        name = noise.choice(["max_tokens", "n", "top_p", "logprobs", "presence_penalty"])
        return head("POST", PATH, f'{{"prompt":"a","top_k":-7,"{name}":{number}}}'.encode())
    if kind == 3:
        value = noise.choice([None, 1, {}, [[]], [""], [-1], [1 << 70], [[1 << 70]], "", ["a", 1], {"a": "b"}])
        return head("POST", PATH, json.dumps({"prompt": value, "echo": noise.random() < 0.5}).encode())
    if kind == 4:
        return head("POST", "/v1/chat/completions", json.dumps({"messages": [{"role": noise.choice("abc")}]}).encode())
    if kind == 5:
        return head("POST", PATH, b" " * (9 << 20))
    if kind == 6:
        return bytes(noise.randrange(256) for _ in range(noise.randrange(1, 400))) + b"\r\n\r\n"
    if kind == 7:
        return head("POST", PATH, body, extra="x-long: " + "a" * 70_000 + "\r\n")
    if kind == 8:
        return head(noise.choice(["PUT", "DELETE", "PATCH", "GET"]), PATH)
    if kind == 9:
        return head("GET", "/" + "%2e%2e/" * noise.randrange(9) + "etc/passwd")
    if kind == 10:
        return head("POST", PATH, b'{"prompt":"a","prompt":"b"}') * noise.randrange(1, 4)  # and pipelined
    return head("POST", PATH, b'{"prompt":"\\ud800","max_tokens":1,"stop":[""]}')


async def attack(port: int, request: bytes, noise: random.Random) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        if noise.random() < 0.2:
            writer.write_eof()  # half closed
        answer = await asyncio.wait_for(reader.read(), 30)
        return answer[9:12].decode("latin-1") if answer else "closed"
    except OSError as error:
        return type(error).__name__
    finally:
        writer.close()


async def attacks(port: int, count: int, bodies: list[dict], expected: dict[str, str]) -> Counter[str]:
    """Hostile requests beside an honest stream, whose tokens must not change."""
    noise, seen = random.Random(SEED), Counter[str]()
    for number in range(0, count, BESIDE):
        ours = bodies[number // BESIDE % len(bodies)]
        honest = asyncio.create_task(stream(port, ours))
        seen.update(await asyncio.gather(*(attack(port, hostile(noise), noise) for _ in range(BESIDE))))
        text, _, end = await honest
        assert (text, end) == (expected[ours["prompt"]], "done"), end
    return seen


# -- the whole -------------------------------------------------------------------------------------------------


def batch_speed(args: argparse.Namespace, models: list[str], bodies: list[dict]) -> str:
    """The summary line of `aspec batch` on rows like those of the load."""
    with tempfile.TemporaryDirectory() as folder:
        source, noise = Path(folder, "in.jsonl"), random.Random(SEED)
        rows = [{"custom_id": str(i), "method": "POST", "url": PATH, "body": noise.choice(bodies)} for i in range(512)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, "-m", "aspec", "batch", "-i", str(source), "-o", f"{folder}/out.jsonl", *models]
        said = subprocess.run([*command, *args.rest], capture_output=True, text=True, check=True).stderr
    return next(line for line in said.splitlines() if " tokens in " in line)  # the others tell its progress


async def terminate(port: int, process: psutil.Popen, bodies: list[dict]) -> Counter[str]:
    """How streams end that run while the server is told to stop."""
    running = [asyncio.create_task(stream(port, {**body, "max_tokens": 120})) for body in bodies[:32]]
    await asyncio.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    return Counter(end for _, _, end in await asyncio.gather(*running))


async def wait_ready(port: int, process: psutil.Popen) -> None:
    while process.poll() is None:
        try:
            if b" 200 " in (await get(port, "/health"))[:20]:
                return
        except OSError:
            pass
        await asyncio.sleep(0.2)
    sys.exit("the server did not start")


def report(tally: Tally) -> None:
    ends = dict(tally.counts)
    print(f"{sum(tally.counts.values())} streams ended: {ends}; {tally.tokens_per_s:.1f} tokens/s")
    health = sorted(tally.health_s)
    print(
        f"/health: median {statistics.median(health) * 1e3:.1f} ms, p99 {health[int(0.99 * len(health))] * 1e3:.1f} ms"
    )
    total = tally.lag["+Inf"]
    p99 = next(bound for bound, count in tally.lag.items() if count >= 0.99 * total)
    shares = ", ".join(f"{100 * count / total:.2f} % <= {bound} s" for bound, count in tally.lag.items())
    print(f"loop lag: p99 at most {p99} s; {shares}")
    settled = tally.rss[len(tally.rss) // 4 :]
    if settled:
        change = 100 * (settled[-1] - settled[0]) / settled[0]
        print(f"server's memory: {settled[0] >> 20} MiB after a quarter of the time, then {change:+.2f} % to the end")


async def main() -> None:
    """Run everything once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--leave", type=float, default=1 / 3, help="share of the clients that leave")
    parser.add_argument("--hostile", type=int, default=2000)
    parser.add_argument("--no-batch", action="store_true", help="leave out the comparison with aspec batch")
    parser.add_argument("rest", nargs="*", help="further flags of serve and batch")
    args = parser.parse_args()
    models = [part for name in ("target", "draft") if (value := getattr(args, name)) for part in (f"--{name}", value)]
    noise = random.Random(SEED)
    words = [f"def f{number}(self, {'abcdef'[number % 6]}):" for number in range(24)]
    bodies = [{"prompt": word, "max_tokens": noise.randint(8, 64), "temperature": 0.7, "seed": 3} for word in words]
    port = free_port()
    command = [sys.executable, "-m", "aspec", "serve", "--port", str(port), "--stop-after", "5", *models, *args.rest]
    process = psutil.Popen([*command, "--max-queue", "200"])
    try:
        await wait_ready(port, process)
        tally = await load(port, process, args, bodies)
        report(tally)
        figures = (await get(port, "/metrics")).decode()
        print(
            "; ".join(line for line in figures.splitlines() if line.startswith(("aspec_answers", "aspec_tokens_per")))
        )
        if args.hostile:
            print(f"hostile requests: {dict(await attacks(port, args.hostile, bodies, tally.expected))}")
        print(f"streams at SIGTERM: {dict(await terminate(port, process, bodies))}; exit code {process.wait(120)}")
    finally:
        if process.is_running():
            process.kill()
    if not args.no_batch:
        print(batch_speed(args, models, bodies))


if __name__ == "__main__":
    asyncio.run(main())
