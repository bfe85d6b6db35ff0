"""Tell whether two processes can see each other."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def process_space() -> str:
    """Return the host and the PID namespace of this process: equal for processes that see each other in /proc."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.exists() else ''}".strip()
