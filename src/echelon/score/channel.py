"""Messages between a process and its scoring child: pickles over a socket, with time limits.

``multiprocessing.Connection`` cannot give up on a write, and a stopped child does not read; a
large step would then block its sender for ever.
"""

from __future__ import annotations

import pickle
import select
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

HEADER = struct.Struct("!Q")


class Channel:
    """One end. Only one thread sends and only one receives at a time.

    Args:
        end: a connected stream socket; the channel closes it.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: object, timeout_s: float | None = None) -> None:
        """Send a message.

        Raises:
            TimeoutError: the other side did not read in time; the channel is of no more use.
            OSError: the other side has gone.
        """
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._end.settimeout(timeout_s)
        self._end.sendall(HEADER.pack(len(data)) + data)

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to read, or the end of it all, within a time."""
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s) * 1000))

    def receive_bytes(self, timeout_s: float | None = None) -> bytes:
        """The next message, still pickled; safe beside a thread that sends without a limit.

        Raises:
            EOFError: the other side has gone.
            TimeoutError: the rest of it did not come in time.
        """
        self._end.settimeout(timeout_s)
        (size,) = HEADER.unpack(self._read(HEADER.size))
        return bytes(self._read(size))

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message; see :meth:`receive_bytes`."""
        return pickle.loads(self.receive_bytes(timeout_s))  # noqa: S301 - from our own child

    def close(self) -> None:
        """Hang up; closing twice does nothing."""
        self._end.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            count = self._end.recv_into(view[got:])
            if count == 0:
                raise EOFError
            got += count
        return data
