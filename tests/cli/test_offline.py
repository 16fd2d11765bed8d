"""Nothing is ever fetched: the suite runs in a process that no connection leaves; see `_no_network` in tests/conftest.py."""

from __future__ import annotations

import socket

import pytest


def test_a_connection_out_of_the_machine_would_fail_every_test() -> None:
    with pytest.raises(AssertionError, match=r"192\.0\.2\.1"), socket.socket() as out:  # an address that RFC 5737 keeps for documents
        out.connect(("192.0.2.1", 80))
    with pytest.raises(AssertionError, match=r"example\.org"):
        socket.getaddrinfo("example.org", 80)


def test_a_server_on_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
