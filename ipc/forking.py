"""What a supervisor and a fork server say to each other over a socket pair of whole packets.

The fork server says READY once it can fork. An order is the environment of a new worker, sent with
three descriptors: those that the worker reads and writes messages on, and its output. The answer
is the new process's id as text, or NOBODY's.
"""

import os
from collections.abc import Mapping

import msgspec

READY = b"ready"
NOBODY = b"0"
MAX_ORDER_BYTES = 2**20
MAX_ANSWER_BYTES = 100
DESCRIPTORS = 3


def encode_order(environ: Mapping[str, str]) -> bytes:
    """Names and values are the bytes that the system has, which need not be text."""
    return msgspec.msgpack.encode({os.fsencode(k): os.fsencode(v) for k, v in environ.items()})


def decode_order(order: bytes) -> dict[str, str]:
    """Raises msgspec.DecodeError."""
    given = msgspec.msgpack.decode(order, type=dict[bytes, bytes])
    return {os.fsdecode(name): os.fsdecode(value) for name, value in given.items()}
