"""Objects with large tensors between processes: pickled once, their memory written to the pipe as it is.

Not through shared memory, as torch would do: that costs a file descriptor and a socket's round trip for each tensor,
and a tensor whose sender was killed is lost.
"""

from __future__ import annotations

import io
import pickle
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.contiguous().numpy(),)
        return NotImplemented


def send(connection: Connection, value: object) -> None:
    """Send a value; tensors must be on the CPU."""
    buffers: list[pickle.PickleBuffer] = []
    body = io.BytesIO()
    _Pickler(body, protocol=5, buffer_callback=buffers.append).dump(value)
    connection.send_bytes(pickle.dumps([buffer.raw().nbytes for buffer in buffers]))
    connection.send_bytes(body.getbuffer())
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


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
