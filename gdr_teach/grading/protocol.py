"""What crosses the border between the grader and a learner's process: a JSON header and raw array bytes.

    frame  =  header length (4 bytes, big-endian)  +  header (JSON object, UTF-8)  +  the arrays' bytes, in order

The header's "arrays" lists [dtype, shape] of what follows. Nothing is unpickled or evaluated. Every number a frame
claims is checked before memory is taken for it, because the other side may be hostile.
"""

import json
import math
import socket
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

HEADER_LIMIT = 2**22  # a whole notebook's cells fit; what a child sends is far smaller
PAYLOAD_LIMIT = 2**24
TICK = 0.05  # seconds between two looks at the clock and at what is watched
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool"
    ).split()
}

Frame = tuple[dict[str, Any], list[np.ndarray]]


class Garbled(Exception):
    """The other side sent something that is not a frame."""


class Ended(Exception):
    """The other side closed the channel."""


def pack(header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> bytes:
    """One frame. Raises: ValueError when an array's dtype cannot cross or the frame is over a limit."""
    listed, chunks = [], []
    for array in arrays:
        if array.dtype.name not in DTYPES:
            raise ValueError(f"an array of dtype {array.dtype} cannot be sent")
        listed.append([array.dtype.name, list(array.shape)])
        chunks.append(np.ascontiguousarray(array).astype(DTYPES[array.dtype.name]).tobytes())
    head = json.dumps({**header, "arrays": listed}).encode()
    if len(head) > HEADER_LIMIT or sum(map(len, chunks)) > PAYLOAD_LIMIT:
        raise ValueError("too large to be sent")
    return b"".join([struct.pack(">I", len(head)), head, *chunks])


def send(channel: socket.socket, header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Send one frame. Raises: ValueError as `pack`, OSError when the channel is gone."""
    channel.sendall(pack(header, arrays))


def receive(
    channel: socket.socket, deadline: float = math.inf, watch: Callable[[], None] | None = None
) -> Frame:
    """The next frame, waiting until time.monotonic() reaches the deadline; `watch` is called all the while.

    Raises: TimeoutError, Ended at the end of the channel, Garbled when what came is no frame, and what `watch` raises.
    """
    read = partial(_exactly, channel, deadline, watch)
    (length,) = struct.unpack(">I", read(4))
    if length > HEADER_LIMIT:
        raise Garbled(f"a header of {length} bytes")
    try:
        header = json.loads(read(length))
    except (ValueError, RecursionError) as error:
        raise Garbled("a header that is not JSON") from error
    if not isinstance(header, dict):
        raise Garbled("a header that is not an object")
    forms = [_form(entry) for entry in _list(header.pop("arrays", None))]
    if sum(dtype.itemsize * math.prod(shape) for dtype, shape in forms) > PAYLOAD_LIMIT:
        raise Garbled("more array bytes than allowed")
    arrays = []
    for dtype, shape in forms:
        raw = read(dtype.itemsize * math.prod(shape))
        try:
            arrays.append(np.frombuffer(raw, dtype=dtype).reshape(shape))
        except ValueError as error:  # sizes whose product is 0 and which numpy cannot hold
            raise Garbled("a bad shape") from error
    return header, arrays


def _list(value: Any) -> list:
    if not isinstance(value, list) or len(value) > 64:
        raise Garbled("a bad list of arrays")
    return value


def _form(entry: Any) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and shape an entry claims, believed only when each part is of the plain kind wanted."""
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
        raise Garbled("a bad array entry")
    name, shape = entry
    if name not in DTYPES:
        raise Garbled("an unknown dtype")
    if not (isinstance(shape, list) and len(shape) <= 8):
        raise Garbled("a bad shape")
    if not all(type(n) is int and 0 <= n <= PAYLOAD_LIMIT for n in shape):
        raise Garbled("a bad size in a shape")
    return DTYPES[name], tuple(shape)


def _exactly(
    channel: socket.socket, deadline: float, watch: Callable[[], None] | None, size: int
) -> bytes:
    parts = []
    while size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if watch:
            watch()
        channel.settimeout(min(left, TICK))
        try:
            part = channel.recv(min(size, 2**16))
        except TimeoutError:
            continue
        except OSError as error:
            raise Ended from error
        if not part:
            raise Ended
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
