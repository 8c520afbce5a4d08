"""Orders to the fork server: an environment as bytes."""

import msgspec
import pytest

from ipc import forking


def test_an_environment_comes_back_as_it_was_also_what_is_no_text() -> None:
    environ = {"PATH": "/bin", "NAME": "ä", "RAW": b"\xff\xfe".decode("utf-8", "surrogateescape")}
    assert forking.decode_order(forking.encode_order(environ)) == environ


@pytest.mark.parametrize("order", [b"", b"\xc1", msgspec.msgpack.encode({"a": 1})])
def test_what_is_no_environment_is_refused(order: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        forking.decode_order(order)
