"""Ports for servers that start seconds later.

A port that the system offers is one of those that it gives to any connection: by the time the server has
imported torch, a connection of a test beside it may have it. So these lie below them.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

_FIRST, _USUAL = 20_000, 32_768
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nothing is bound to, outside the range of outgoing connections."""
    end = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else _USUAL
    candidates = range(_FIRST, max(end, _FIRST + 1000))
    drawn = random.SystemRandom().sample(candidates, 100)  # workers may have the same seed
    found = [port for port in drawn if _is_free(port)][:count]
    assert len(found) == count, f"no {count} ports of 100 in {candidates} are free"
    return found
