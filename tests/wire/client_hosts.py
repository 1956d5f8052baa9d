"""Imported by the client scripts: notes in `hosts` which names of hosts the program looks up from now on."""

from __future__ import annotations

import socket

hosts: set[str] = set()
look_up = socket.getaddrinfo


def noted(host, *rest, **more):
    hosts.add(str(host))
    return look_up(host, *rest, **more)


socket.getaddrinfo = noted
