"""The border between the grader and a learner's process: what is sent arrives, and nothing else is believed."""

import json
import random
import socket
import struct
import time

import numpy as np
import pytest

from gdr_teach.grading.protocol import (
    DTYPES,
    HEADER_LIMIT,
    PAYLOAD_LIMIT,
    Ended,
    Garbled,
    pack,
    receive,
    send,
)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def answer_to(pair, raw: bytes):
    ours, theirs = pair
    theirs.sendall(raw)
    theirs.shutdown(socket.SHUT_WR)
    return receive(ours, time.monotonic() + 5)


def frame(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text


def test_what_is_sent_arrives(pair):
    arrays = [np.arange(6).reshape(2, 3).astype(dtype) for dtype in DTYPES]
    arrays += [np.zeros((0, 4), dtype=np.float32), np.float32(3).reshape(()), arrays[0].T]
    send(pair[1], {"kind": "x", "text": "β\ud800"}, arrays)
    header, received = receive(pair[0], time.monotonic() + 5)
    assert header == {"kind": "x", "text": "β\ud800"}
    for sent, got in zip(arrays, received, strict=True):
        assert sent.dtype == got.dtype
        np.testing.assert_array_equal(sent, got)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"arrays": [], "n": ' + b"1" * 10_000 + b"}",
        [],
        {},
        {"arrays": None},
        {"arrays": [["float32", [1]]] * 65},
        {"arrays": ["float32"]},
        {"arrays": [["object", [1]]]},
        {"arrays": [["O", [1]]]},
        {"arrays": [[["float32"], [1]]]},
        {"arrays": [["float32", 3]]},
        {"arrays": [["float32", [-1]]]},
        {"arrays": [["float32", [1.0]]]},
        {"arrays": [["float32", [True]]]},
        {"arrays": [["float32", [1] * 9]]},
        {"arrays": [["float32", [PAYLOAD_LIMIT, PAYLOAD_LIMIT]]]},
        {"arrays": [["float64", [0] + [PAYLOAD_LIMIT] * 7]]},
        {"arrays": [["float64", [PAYLOAD_LIMIT // 8]], ["float64", [1]]]},
    ],
)
def test_a_bad_header_is_garbled(pair, header):
    with pytest.raises(Garbled):
        answer_to(pair, frame(header) + bytes(100))


def test_a_long_header_is_refused_before_it_is_read(pair):
    with pytest.raises(Garbled):
        answer_to(pair, struct.pack(">I", HEADER_LIMIT + 1))


def test_the_end_of_the_channel_is_an_end(pair):
    whole = pack({"kind": "x"}, [np.zeros(4)])
    with pytest.raises(Ended):
        answer_to(pair, whole[:-1])


def test_silence_is_a_timeout_that_is_watched(pair):
    looks = []
    pair[1].sendall(b"\0")
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        receive(pair[0], began + 0.2, lambda: looks.append(1))
    assert 0.2 <= time.monotonic() - began < 1
    assert len(looks) >= 3


def test_no_broken_frame_gets_through_as_anything_else():
    """Flipped, cut and added bytes: the frame still parses, or is Garbled or Ended; nothing else comes out."""
    dice = random.Random(7)
    whole = pack({"kind": "result", "outputs": 1}, [np.arange(5, dtype=np.float32)])
    for _ in range(1000):
        raw = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        raw = raw[: dice.randint(0, len(raw))] if dice.random() < 0.3 else raw
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                header, arrays = answer_to((ours, theirs), bytes(raw))
            except (Garbled, Ended):
                continue
            assert isinstance(header, dict)
            assert all(array.nbytes <= len(raw) for array in arrays)


def test_what_cannot_cross_is_not_sent():
    with pytest.raises(ValueError, match="object"):
        pack({}, [np.array([object()])])
    with pytest.raises(ValueError, match="too large"):
        pack({}, [np.zeros(PAYLOAD_LIMIT + 1, dtype=np.uint8)])
