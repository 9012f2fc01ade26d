"""A relay between two TCP ports that delays and paces bytes, and counts them: a long wire on one machine.

It replaces `tc netem`, which needs a kernel module that not every machine has. Each direction has half of the
round trip's delay and its own bandwidth. TLS passes through it untouched.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress


class Wire:
    """Listens on a port of this machine and relays to another.

    Attributes:
        sent, received: bytes to the server and from it, TLS and HTTP headers included.
    """

    def __init__(self, host: str, port: int, round_trip: float = 0.0, bits_per_second: float = float("inf")) -> None:
        self._target = host, port
        self.round_trip, self.bits_per_second = round_trip, bits_per_second
        self.sent = self.received = 0
        self._free_at = {"up": 0.0, "down": 0.0}
        self.port = 0

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection(*self._target)
        pumps = self._pump(reader, target_writer, "up"), self._pump(target_reader, writer, "down")
        await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, direction: str) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(self._deliver(queue, target))
        while data := await source.read(2**16):
            if direction == "up":
                self.sent += len(data)
            else:
                self.received += len(data)
            begin = max(time.perf_counter(), self._free_at[direction])
            self._free_at[direction] = begin + 8 * len(data) / self.bits_per_second
            queue.put_nowait((self._free_at[direction] + self.round_trip / 2, data))
        queue.put_nowait((time.perf_counter() + self.round_trip / 2, b""))
        await delivering

    async def _deliver(self, queue: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while True:
                at, data = await queue.get()
                await asyncio.sleep(max(0.0, at - time.perf_counter()))
                if not data:
                    target.close()
                    return
                target.write(data)
                await target.drain()
