"""The frame of every phase: it is checked, run and recorded in one way. No torch."""

import time
from collections.abc import Callable
from typing import Any, Protocol

from megatron_spin.config import Config
from megatron_spin.log import logger, open_run_log
from megatron_spin.parallel.collectives import on_rank_zero, raised_everywhere
from megatron_spin.processes import Ranks, world_size
from megatron_spin.run.directory import RunDir, Target, check_target
from megatron_spin.run.lock import PhaseLock
from megatron_spin.run.result import is_done


class Phase(Protocol):
    """What differs between phases. Every rank makes one and calls both methods, in this order."""

    def check(self) -> None:
        """Refuses what can be refused before anything is written; writes nothing itself. An error of one rank is
        raised on all.

        Raises:
            SpinError: something is missing, or cannot be done as configured.
        """

    def run(self) -> dict[str, Any]:
        """Does the work; returns what the record says of it, as plain data. That of rank 0 is recorded.

        Raises:
            SpinError: the work cannot be done, or a gate or guard refuses its outcome. The phase is not done.
        """


def carry_out(
    kind: str, config: Config, run_dir: RunDir, start: Callable[[], Phase], *, target: Target | None = None
) -> None:
    """Runs the phase ``KIND`` or ``KIND:LABEL`` of ``target``, unless it is done, and records it.

    ``start`` makes the phase. It is called only if there is something to do, since it imports what the phase needs.

    Raises:
        ConfigError: the configuration has no such target.
        RunDirError: the run directory belongs to another configuration, or another process carries out the phase.
        SpinError: as the phase raises.
    """
    name = kind if target is None else f"{kind}:{target.label}"
    if target is not None:
        check_target(config, target)
    ranks = _meet(config)
    on_rank_zero(ranks, lambda: run_dir.check(config))
    if on_rank_zero(ranks, lambda: is_done(config, run_dir, name)):
        logger.info(f"{name} is already done")
        return
    started = time.monotonic()
    # Lines of a run that does not exist yet are lost: a check that refuses leaves no directory behind.
    open_run_log(run_dir.log, phase=name)
    with raised_everywhere(ranks):
        phase = start()
        phase.check()
    with PhaseLock(run_dir.root, name) as lock:
        on_rank_zero(ranks, lock.take)
        if on_rank_zero(ranks, lambda: is_done(config, run_dir, name)):  # by the process that had the lock
            logger.info(f"{name} is already done")
            return
        on_rank_zero(ranks, lambda: run_dir.open(config))
        details = phase.run()
        seconds = time.monotonic() - started
        on_rank_zero(ranks, lambda: run_dir.mark_done(name, seconds=seconds, **details))
    logger.info(f"{name} finished in {seconds:.1f} s")


def _meet(config: Config) -> Ranks:
    """Brings the ranks of this phase together, before anything is decided; a single process needs nobody, nor torch."""
    if world_size() == 1:
        return Ranks(rank=0, world_size=1)
    from megatron_spin.parallel.setup import choose_device, join

    return join(config.parallel, choose_device(config.device, deterministic=config.training.deterministic))
