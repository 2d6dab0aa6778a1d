"""A hub on this machine: the few endpoints that a snapshot needs, with counts of requests and of bytes."""

import contextlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = 1 << 16
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WANTED = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "merges.txt": b"a b",
    "chat_template.jinja": b"hello",
}
UNWANTED = {
    "README.md": b"#",
    "pytorch_model.bin": b"x",
    "pytorch_model.bin.index.json": b"{}",
    "model.gguf": b"x",
    "consolidated.safetensors": b"x",
    "original/model.safetensors": b"x",
    "onnx/config.json": b"{}",
}
REPOSITORIES = {
    "org/good": WANTED | UNWANTED,
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"},
    "org/nothing": {"README.md": b"#"},
}
REFUSED = {"org/gated": (403, "GatedRepo"), "org/missing": (404, "RepoNotFound"), "org/down": (500, "")}


class Hub(BaseHTTPRequestHandler):
    """The few endpoints a snapshot needs."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/").split("/")
        model = "/".join(path[2:4] if path[0] == "api" else path[:2])
        self.server.seen.append((self.path, self.headers.get("authorization")))
        if model in REFUSED:
            return self.answer(REFUSED[model][0], b"{}", {"X-Error-Code": REFUSED[model][1]})
        if model == "org/private" and self.headers.get("authorization") != "Bearer hf_secret":
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = REPOSITORIES.get(model) or self.server.repositories.get(model, WANTED)
        if "no-such-revision" in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path[0] != "api":
            body = files["/".join(path[4:])]
            if self.command == "HEAD" and self.server.claimed_bytes and path[-1].endswith(".safetensors"):
                return self.answer(
                    200, b"", {"ETag": '"a"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(self.server.claimed_bytes)}
                )
            named = {"ETag": f'"{hash(body) & 0xFFFFFFFF:040x}"', "X-Repo-Commit": COMMIT}
            begin, _, end = self.headers.get("range", "").removeprefix("bytes=").partition("-")
            if begin and self.server.knows_ranges:
                part = body[int(begin) : int(end) + 1]
                return self.answer(206, part, {**named, "Content-Range": f"bytes {begin}-{end}/{len(body)}"})
            return self.answer(200, body, named)
        if path[4:5] == ["tree"]:
            listing = [
                {"type": "file", "path": name, "size": len(body), "oid": f"{index:040x}"}
                for index, (name, body) in enumerate(files.items())
            ]
            return self.answer(200, json.dumps(listing).encode())
        return self.answer(200, json.dumps({"id": model, "sha": COMMIT, "siblings": []}).encode())

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for begin in range(0, len(body), CHUNK):
                self.wfile.write(body[begin : begin + CHUNK])
                self.server.served += len(body[begin : begin + CHUNK])
                if self.path.split("/")[-1] in self.server.slow_files or not self.server.slow_files:
                    self.server.pause.wait(self.server.pause_s)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve():
    """A running hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.served = [], 0  # requests; bytes of bodies
    server.repositories, server.knows_ranges, server.claimed_bytes = {}, True, None  # that a shard seems to have
    server.pause, server.pause_s = threading.Event(), 0.0  # seconds after each chunk, until the event
    server.slow_files = set()  # those that pause; all, if empty
    server.handle_error = lambda *_: None  # a client that leaves
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.pause.set()
    server.shutdown()
    thread.join()
    server.server_close()


def surroundings(home: Path, endpoint: str = "http://127.0.0.1:9", **environment: str) -> dict[str, str]:
    """The environment of a process that asks the hub."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "XDG_CACHE_HOME": str(home / "own"),
    }
    return plain | own | {"PYTHONPATH": str(Path(__file__).parents[1]), **environment}


def url(hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"
