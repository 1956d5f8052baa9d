"""What a test leaves open is an error, but for the connections of the SDK."""

from __future__ import annotations

import warnings

import pytest

SDK = [
    "unclosed transport <_SelectorSocketTransport fd=15 read=idle write=<idle, bufsize=0>>",
    "unclosed <socket.socket fd=21, family=2, type=1, proto=6, laddr=('127.0.0.1', 56798), raddr=('127.0.0.1', 56663)>",
]
OURS = [
    "unclosed file <_io.TextIOWrapper name='x' mode='r' encoding='UTF-8'>",
    "unclosed database in <sqlite3.Connection object at 0x7f>",
    "unclosed event loop <_UnixSelectorEventLoop running=False closed=False debug=False>",
    "unclosed <socket.socket fd=21, family=2, type=1, proto=0, laddr=('127.0.0.1', 8000)>",
]


def test_only_connections_of_a_client_may_be_left_to_the_garbage_collector() -> None:
    for message in SDK:
        warnings.warn(message, ResourceWarning, stacklevel=1)
    for message in OURS:
        with pytest.raises(ResourceWarning):
            warnings.warn(message, ResourceWarning, stacklevel=1)
