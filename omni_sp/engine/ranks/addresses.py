"""This machine's addresses, as other machines see them."""

from __future__ import annotations

import socket


def address_towards(host: str, port: int) -> str:
    """This machine's address as ``host`` would see it. OSError or ValueError where there is no way there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing; asks the kernel which of its addresses would be the sender's.
        probe.connect((host, port))
        return str(probe.getsockname()[0])
