"""Renders chat templates on trial; runs as a process of its own, which ``template_trial`` starts, limits and ends.

The environment is that of transformers, as far as it decides what rendering costs. A request is a line with its size
in bytes, then JSON; the answer is a line: the number of characters, ``memory`` if they do not fit, or ``error`` if the
template refuses. Standard library and jinja2 only.
"""

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20  # of address space, beyond the interpreter's
PER_BYTE = 64  # more of it for each byte of a request: its JSON, its texts and what is made of them
CPU_S = 60  # of processor time per request, if the parent has gone


class Generation(Extension):
    """The tag with which templates mark the model's own text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The marked part, as if it were not marked."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment of a chat template."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals.update(raise_exception=_refuse, strftime_now=datetime.now().strftime)
    return made


def _tojson(value: Any, ensure_ascii: bool = False, **rest: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **rest)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _limit(used_bytes: int, request_bytes: int) -> None:
    """Limit this process for one request, where the system can."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    wanted = {
        resource.RLIMIT_AS: used_bytes + MEMORY_BYTES + PER_BYTE * request_bytes,
        resource.RLIMIT_CPU: int(usage.ru_utime + usage.ru_stime) + CPU_S,
    }
    for kind, most in wanted.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _address_space() -> int:
    """Bytes of address space in use; 0 if the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except OSError:
        return 1 << 30
    import resource

    return pages * resource.getpagesize()


def answer(body: bytes) -> str:
    """The answer to one request."""
    try:
        request = json.loads(body)
        return str(len(environment().from_string(request["template"]).render(**request["variables"])))
    except (MemoryError, RecursionError):  # where the stack is that of another process, the second may end that one
        return "memory"
    except Exception:  # the template is foreign code; transformers' own rendering will say what is wrong
        return "error"


def main() -> None:
    """Answer requests until the input ends."""
    used, source = _address_space(), sys.stdin.buffer
    print("ready", flush=True)
    while line := source.readline():
        _limit(used, int(line))
        print(answer(source.read(int(line))), flush=True)


if __name__ == "__main__":
    main()
