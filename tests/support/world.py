"""Gloo worlds that stay alive: processes that run one function after another as the ranks of a process group."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

TIMEOUT = 300
"""Seconds that a rank has for one call."""


class RankError(Exception):
    """A rank raised; the message holds its traceback."""


class World:
    """``size`` processes of one gloo group.

    A function that fails on any rank ends the world; the next call starts another.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT, **named: Any) -> list[Any]:
        """Runs ``function(*arguments, **named)`` on every rank and returns the results in the order of ranks.

        ``function`` must be at module level. Each rank has ``timeout`` seconds.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments, named))
        results, failure = [], None
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                failure = f"rank {rank} of {self.size} did not answer within {timeout:.0f} s"
                break
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "its process ended"
            if not ok:
                failure = f"rank {rank} of {self.size}: {value}"
                break  # the others may wait for it in a collective without end
            results.append(value)
        if failure is not None:
            self.close()
            raise RankError(failure)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, port), daemon=False)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)


Worlds: TypeAlias = Callable[[int], World]
"""Gives the world of a size; the type of the ``world`` fixtures."""


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    for call in itertools.count():
        try:
            function, arguments, named = pipe.recv()
        except EOFError:
            return
        try:
            # Each call has a group of its own: the groups of earlier layouts, with a thread each, must not pile up.
            dist.init_process_group("gloo", store=dist.PrefixStore(str(call), store), rank=rank, world_size=size)
            result = function(*arguments, **named)
            dist.barrier()
            _leave()
            pipe.send((True, result))
        except BaseException:
            with contextlib.suppress(BrokenPipeError):
                pipe.send((False, traceback.format_exc()))


def _leave() -> None:
    import torch.distributed as dist

    if "megatron.core" in sys.modules:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    gc.collect()  # models and optimizers hold groups in cycles; a group that outlives its peers spins in its thread
    dist.destroy_process_group()


@contextlib.contextmanager
def worlds() -> Iterator[Worlds]:
    """Yields a getter of worlds by size. Each starts on first use and ends with the block."""
    alive: dict[int, World] = {}
    try:
        yield lambda size: alive.setdefault(size, World(size))
    finally:
        for world in alive.values():
            world.close()
