"""Several engines at a time, each in its own process on its own devices; work goes to whichever is free."""

import collections
import concurrent.futures
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_spin.generation.engine import EngineSettings, Session, open_session
from megatron_spin.generation.process_engine import ProcessSession

T = TypeVar("T")


def run_all(engines: Sequence[EngineSettings], tasks: Sequence[T], work: Callable[[Session, T], None]) -> None:
    """Starts ``engines`` and calls ``work`` once per task; with several engines from several threads.

    What a task yields must not depend on the engine that does it. The first error ends all engines at once; what
    ``work`` has finished by then stays.

    Raises:
        SpinError: as :func:`megatron_spin.generation.engine.open_session` and ``work``.
    """
    if len(engines) == 1:
        with open_session(engines[0]) as session:
            for task in tasks:
                work(session, task)
        return
    todo = collections.deque(tasks)

    def serve(session: ProcessSession) -> None:
        with session:
            while True:
                try:
                    task = todo.popleft()
                except IndexError:
                    return
                work(session, task)

    sessions = [ProcessSession(settings) for settings in engines]
    with concurrent.futures.ThreadPoolExecutor(len(sessions)) as threads:
        futures = [threads.submit(serve, session) for session in sessions]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            todo.clear()
            for session in sessions:
                session.kill()
            raise
