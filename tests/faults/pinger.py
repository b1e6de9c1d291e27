"""Asks /ping again and again from a process of its own, so that the test's own work is not measured.

Arguments: port, seconds between two pings. A line [status, seconds] on stdout for each, until stdin ends, and for
one more then; the status is 0 where there was no answer.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time

LIMIT_S = 5.0


def main() -> None:
    """Pings until stdin ends, and once after that: who waited for a state of the service has that state told."""
    port, every_s = int(sys.argv[1]), float(sys.argv[2])
    over = False
    while not over:
        over = bool(select.select([sys.stdin], [], [], every_s)[0])
        began = time.monotonic()
        sys.stdout.write(json.dumps([_ping(port), time.monotonic() - began]) + "\n")
    sys.stdout.flush()


def _ping(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


if __name__ == "__main__":
    main()
