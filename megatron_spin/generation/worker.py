"""The child's side of an engine in a process of its own: JSON lines from stdin, JSON lines to stdout.

The process must end with its parent, however the parent ends: on Linux the kernel kills it, and on every system the end
of stdin stops it.

The first line in is the engine's settings, then one line per call: ``{prompts, max_tokens, temperature, top_p, seed}``.
The first line out is ``{"ready": true}``. A call is answered by any number of lines with ``finished`` (``[[index,
token_ids, reason], ...]``), ``progress`` (``[prompts finished, tokens generated]`` since the last such line) or both,
and by ``{"done": true}``. After ``{"error": "...", "kind": "config" | "device" | "checkpoint" | "failure"}`` the
process ends.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TextIO, TypeAlias

from megatron_spin.errors import CheckpointError, ConfigError, DeviceError
from megatron_spin.processes import die_with_parent

Message: TypeAlias = dict[str, Any]
Send: TypeAlias = Callable[[Message], None]
Answer: TypeAlias = Callable[[Message, Send], None]
"""Answers one call; everything but ``done``."""
KINDS: dict[str, type[ConfigError | DeviceError | CheckpointError]] = {
    "config": ConfigError,
    "device": DeviceError,
    "checkpoint": CheckpointError,
}
"""Errors that the parent raises again as what they are."""


def serve(start: Callable[[Message], Answer]) -> None:
    """Runs the engine that ``start`` makes of its settings, until the parent closes the channel; then ends the process.

    ``start`` and what it returns may raise the errors of :data:`KINDS`; any other is reported as a failure, and its
    traceback is in the log.
    """
    die_with_parent()
    # The channel takes over the real stdout. Engines and their libraries print to descriptor 1, which becomes the log.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: Message) -> None:
        channel.write(json.dumps(message, separators=(",", ":")) + "\n")
        channel.flush()

    requests: queue.Queue[str | None] = queue.Queue()
    idle = threading.Event()
    threading.Thread(target=_listen, args=(sys.stdin, requests, idle), daemon=True).start()
    try:
        _serve(start, requests, idle, send)
    except tuple(KINDS.values()) as error:
        kind = next(name for name, known in KINDS.items() if isinstance(error, known))
        send({"error": str(error), "kind": kind})
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        send({"error": f"{type(error).__name__}: {_root(error)}", "kind": "failure"})
    # Skips destructors: vLLM's may wait for its helper processes, which end with this process anyway.
    sys.stdout.flush()
    os._exit(0)


def _listen(stdin: TextIO, requests: "queue.Queue[str | None]", idle: threading.Event) -> None:
    for line in stdin:
        idle.clear()
        requests.put(line)
    if not idle.is_set():
        os._exit(1)  # the parent is gone or has given up: nobody reads the answers
    requests.put(None)


def _serve(
    start: Callable[[Message], Answer], requests: "queue.Queue[str | None]", idle: threading.Event, send: Send
) -> None:
    answer = start(json.loads(requests.get() or "{}"))
    send({"ready": True})
    while True:
        idle.set()
        line = requests.get()
        idle.clear()
        if line is None:
            return
        answer(json.loads(line), send)
        send({"done": True})


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
