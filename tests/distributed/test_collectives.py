"""Decisions and errors that all ranks share."""

import datetime
import os
from typing import Any

import pytest

from megatron_spin.config import ParallelConfig
from megatron_spin.errors import RunDirError
from tests.support.world import Worlds


def decided(values: list[Any]) -> Any:
    """What rank 0 decides, each rank having another value; an exception in ``values`` is raised."""
    from megatron_spin.parallel.collectives import on_rank_zero
    from megatron_spin.parallel.setup import choose_device, initialize

    dims = initialize(ParallelConfig(), choose_device("cpu"))

    def decide() -> Any:
        value = values[dims.rank]
        if isinstance(value, Exception):
            raise value
        return value

    try:
        return on_rank_zero(dims, decide)
    except (RunDirError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def timeouts() -> list[datetime.timedelta]:
    """Timeouts of the tensor and the data parallel group."""
    from megatron_spin.parallel.setup import choose_device, initialize

    parallel = ParallelConfig(tensor_model_parallel_size=2, timeout=7)
    dims = initialize(parallel, choose_device("cpu"))
    return [_timeout(dims.pg_collection.tp), _timeout(dims.pg_collection.dp)]


def timeout_of_all() -> datetime.timedelta:
    """Timeout of the group that a process without torchrun makes for itself."""
    import torch.distributed as dist

    from megatron_spin.parallel.setup import choose_device, initialize

    dist.destroy_process_group()  # the world's own, which has torch's timeout
    del os.environ["WORLD_SIZE"]
    initialize(ParallelConfig(timeout=7), choose_device("cpu"))
    return _timeout(dist.group.WORLD)


def _timeout(group: Any) -> datetime.timedelta:
    import torch

    found: datetime.timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return found


def test_what_rank_zero_sees_counts(world: Worlds) -> None:
    assert world(2).run(decided, ["step 200", "step 100"]) == ["step 200", "step 200"]
    assert world(2).run(decided, [None, "step 100"]) == [None, None]


def test_an_error_of_rank_zero_is_everyones(world: Worlds) -> None:
    error = RunDirError("the tracker is damaged: restore it")
    assert world(2).run(decided, [error, "step 100"]) == [f"RunDirError: {error}"] * 2
    full = OSError(28, "No space left on device")
    assert world(2).run(decided, [full, None]) == [f"OSError: {full}"] * 2


def test_the_timeout_reaches_all_groups(world: Worlds) -> None:
    seven = datetime.timedelta(minutes=7)
    assert world(2).run(timeouts) == [[seven, seven]] * 2
    assert world(1).run(timeout_of_all) == [seven]


def shared_error(failing: str) -> str:
    """What each of two ranks is told if rank 1 fails at ``failing``, while rank 0 goes on to the next exchange."""
    from megatron_spin.parallel.collectives import gather_objects, on_rank_zero, raised_everywhere
    from megatron_spin.parallel.setup import choose_device, initialize

    dims = initialize(ParallelConfig(), choose_device("cpu"))

    def fail(place: str) -> None:
        if place == failing and dims.rank == 1:
            raise OSError(5, "Input/output error", place)

    try:
        with raised_everywhere(dims):
            fail("before a decision")
            on_rank_zero(dims, lambda: "step 100")
            fail("before an exchange")
            gather_objects(dims.rank, dims)
            with raised_everywhere(dims):
                fail("in an inner block")
            fail("at the end")
    except OSError as error:
        found = f"{error.strerror}: {error.filename}"
    else:
        found = "no error"
    return f"{found}, then {gather_objects(dims.rank, dims)}"  # the ranks are still together


@pytest.mark.parametrize(
    "failing", ["before a decision", "before an exchange", "in an inner block", "at the end", "nowhere"]
)
def test_an_error_meets_the_others_wherever_they_are(world: Worlds, failing: str) -> None:
    outcome = "no error" if failing == "nowhere" else f"Input/output error: {failing}"
    assert world(2).run(shared_error, failing) == [f"{outcome}, then [0, 1]"] * 2
