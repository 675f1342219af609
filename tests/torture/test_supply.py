"""The short form of part `supply`, and the refusal of the network under which all tests run."""

from __future__ import annotations

import socket

import pytest

from tests.offline import NetworkRefused, is_local
from tools.torture import supply


def test_pins_have_hashes_and_licences_and_no_source_runs_a_download() -> None:
    outcome = supply.run(0, 5, offline=False)
    assert outcome.lost == []
    assert all(count > 10 for _, count in outcome.tried)


def test_tests_may_not_ask_other_hosts() -> None:
    with pytest.raises(NetworkRefused, match=r"getaddrinfo to 'pypi\.org'"):
        socket.create_connection(("pypi.org", 443), timeout=1)
    with socket.socket() as stream, pytest.raises(NetworkRefused, match=r"connect to '192\.0\.2\.1'"):
        stream.connect(("192.0.2.1", 80))
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams, pytest.raises(NetworkRefused, match=r"sendto to '192\.0\.2\.1'"):
        datagrams.sendto(b"x", ("192.0.2.1", 53))


def test_this_machine_may_be_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass
    assert is_local("::1") and is_local("localhost") and is_local(b"127.0.0.1") and not is_local("10.0.0.1") and not is_local("example.org")
