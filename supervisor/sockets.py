"""Listening sockets. `*` is one socket for IPv4 and one for IPv6, on the same port."""

import socket

from supervisor.settings import SettingsError

BACKLOG = 1024


def listen(host: str, port: int) -> list[socket.socket]:
    """Bound, listening sockets. Raises SettingsError when the address cannot be had."""
    try:
        return _everywhere(port) if host == "*" else [_on(host, port)]
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"cannot listen on HOST={host} PORT={port}: {reason}") from None


def _everywhere(port: int) -> list[socket.socket]:
    first = _bind(socket.AF_INET, "0.0.0.0", port)
    if not socket.has_ipv6:
        return [first]
    try:
        return [first, _bind(socket.AF_INET6, "::", port or first.getsockname()[1])]
    except OSError:  # a kernel without IPv6
        return [first]


def _on(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return _bind(family, str(address[0]), port)


def _bind(family: int, host: str, port: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)
        bound.setblocking(False)
    except BaseException:
        bound.close()
        raise
    return bound


def addresses(sockets: list[socket.socket]) -> list[str]:
    """Where to find the server, as URLs."""
    shown = []
    for bound in sockets:
        host, port = bound.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        shown.append(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    return shown
