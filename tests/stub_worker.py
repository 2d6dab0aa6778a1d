"""A worker without an engine, which starts at once: it speaks the frames and answers each lease with its line."""

import asyncio
import os
import sys

from aspec import __version__
from aspec.serving.workers.messages import Answered, Lease, Opened, frame, pack, read_frame, unpack


async def main():
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    def tell(message):
        sys.stdout.buffer.write(frame(pack(message)))
        sys.stdout.buffer.flush()

    tell((__version__, str(os.getpid())))
    await read_frame(reader)
    tell(Opened(2, 4, "a plan"))
    while (content := await read_frame(reader)) is not None:
        order = unpack(content)
        if not isinstance(order, Lease):
            continue
        if order.line == b"break":
            print("noise " * 20_000, file=sys.stderr)
            sys.exit("the last words")
        tell(Answered(order.row, order.line, False, 1, 1, 0))


if __name__ == "__main__":
    asyncio.run(main())
