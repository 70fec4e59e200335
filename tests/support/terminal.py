"""A terminal of one's own, to see what is drawn on it."""

import os


def drawn(screen: int) -> str:
    """What has been drawn on the terminal behind ``screen``, once nobody has its other end open."""
    parts = []
    while True:
        try:
            part = os.read(screen, 10_000)
        except OSError:  # how Linux reports that the other end is closed
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode()
