"""The resolver and the dialler of a process under test: names have the addresses that the test says, and an address is
dialled on loopback only, at the port that stands for it, or else at the canary.

They take the place of the socket module's own, below all production code, so that this is what runs unchanged.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

WORLD = "FAULTS_WORLD"  # the environment variable that carries it
SLOW_NAME = "slow.example"  # takes its time to be looked up
SLOW_S = 1.0


@dataclass(frozen=True)
class World:
    """What the network looks like from the process.

    Attributes:
        names: name -> addresses.
        dials: "address:port" -> port on loopback.
        ours: ports of 127.0.0.1 that may be dialled as they are.
        canary: the port on loopback, IPv4 and IPv6, that every other address leads to.
        record: file to which every look-up and every dialled address is written, one JSON list a line.
    """

    names: dict[str, list[str]]
    dials: dict[str, int]
    ours: list[int]
    canary: int
    record: str

    def text(self) -> str:
        """For the environment variable."""
        return json.dumps(asdict(self))


def install(world: World) -> None:
    """Replaces name look-up and connecting in this process."""
    look_up, connect, connect_ex = socket.getaddrinfo, socket.socket.connect, socket.socket.connect_ex

    def addresses(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name in world.names:
            _record(world, "look-up", name)
            time.sleep(SLOW_S if name == SLOW_NAME else 0)
            found: list[Any] = []
            for address in world.names[name]:
                found.extend(look_up(address, port, *args, **kwargs))
            return found
        if name is None or name == "localhost" or _is_numeric(name, look_up):
            return look_up(host, port, *args, **kwargs)
        _record(world, "look-up", name)
        raise socket.gaierror(socket.EAI_NONAME, "no such name on the test's network")

    def dialled(this: socket.socket, address: Any) -> Any:
        if this.family not in (socket.AF_INET, socket.AF_INET6):
            return address
        host, port = address[:2]
        if (host, port) in (("127.0.0.1", own) for own in world.ours):
            return address
        mapped = world.dials.get(f"{host}:{port}", world.canary)
        _record(world, "dial", host, port, "canary" if mapped == world.canary else "host")
        return ("127.0.0.1", mapped) if this.family == socket.AF_INET else ("::1", mapped, 0, 0)

    setattr(socket, "getaddrinfo", addresses)  # noqa: B010 - the types forbid the plain form
    setattr(socket.socket, "connect", lambda this, address: connect(this, dialled(this, address)))  # noqa: B010
    setattr(socket.socket, "connect_ex", lambda this, address: connect_ex(this, dialled(this, address)))  # noqa: B010


def _is_numeric(name: str, look_up: Any) -> bool:
    try:
        look_up(name, None, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return False
    return True


def _record(world: World, *what: object) -> None:
    descriptor = os.open(world.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, (json.dumps(what) + "\n").encode())
    finally:
        os.close(descriptor)
