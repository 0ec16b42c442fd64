"""Objects with large tensors between processes: pickled once, their memory written to the pipe as it is.

Not through shared memory, as torch would do: that costs a file descriptor and a socket's round trip for each tensor,
and a tensor whose sender was killed is lost.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

Buffer = bytes | memoryview


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.contiguous().numpy(),)
        return NotImplemented


def pickled(value: object) -> list[Buffer]:
    """A value as the messages that `receive` reads; tensors must be on the CPU.

    Raises:
        Exception: whatever pickling raises; nothing has been sent then.
    """
    buffers: list[pickle.PickleBuffer] = []
    body = io.BytesIO()
    _Pickler(body, protocol=5, buffer_callback=buffers.append).dump(value)
    raw = [buffer.raw() for buffer in buffers]
    return [pickle.dumps([buffer.nbytes for buffer in raw]), body.getbuffer(), *raw]


def send(connection: Connection, messages: Sequence[Buffer]) -> None:
    """Send what `pickled` gave."""
    for message in messages:
        connection.send_bytes(message)


def receive(connection: Connection) -> Any:
    """The next value.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    sizes = pickle.loads(connection.recv_bytes())
    body = connection.recv_bytes()
    buffers = []
    for size in sizes:
        buffer = bytearray(size)
        connection.recv_bytes_into(buffer)
        buffers.append(buffer)
    return pickle.loads(body, buffers=buffers)
