"""Other hosts refused: an audit hook under every socket that Python opens. It cannot be taken off again."""

from __future__ import annotations

import ipaddress
import socket
import sys
from typing import Any

_LOCAL_NAMES = {None, "", b"", "localhost", b"localhost", "localhost.localdomain"}


class NetworkRefused(PermissionError):
    """Something asked for another host. The tests do without the network, and so does the product unless something remote is named."""


def refuse_network() -> None:
    """Makes look-ups of other hosts, and connections or datagrams to them, raise NetworkRefused for the rest of this process."""
    own = {socket.gethostname(), socket.getfqdn()}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host: Any = arguments[0]
        elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            address: Any = arguments[1]
            if not isinstance(address, tuple):  # a path of this machine, or none
                return
            host = address[0]
        else:
            return
        if not is_local(host, own):
            raise NetworkRefused(f"{event} to {host!r}: tests may not use the network")

    sys.addaudithook(hook)


def is_local(host: Any, own: set[str] | None = None) -> bool:
    """Whether a host is this machine."""
    if host in _LOCAL_NAMES or host in (own or set()):
        return True
    try:
        address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
