"""A file operation of one rank fails: all ranks end, soon and with the same error, and the next run makes it good."""

import dataclasses
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_spin.config import load_config
from tests.support.file_faults import failing
from tests.support.runs import forget, metrics
from tests.support.world import RankError, World, worlds

OVERRIDES = ["training.steps=2", "training.checkpoint_every=1"]
UNSHARED = (
    "os.listdir iteration_0/checkpoints/.iter_0000001.partial",
    "os.listdir iteration_0/checkpoints/.iter_0000002.partial",
    "open iteration_0/checkpoints/.iter_0000001.partial/.metadata.tmp",
    "open iteration_0/checkpoints/.iter_0000002.partial/.metadata.tmp",
    "os.rename iteration_0/checkpoints/.iter_0000001.partial/.metadata.tmp",
    "os.rename iteration_0/checkpoints/.iter_0000002.partial/.metadata.tmp",
)
"""What rank 0 does within Megatron's save, between collectives of Megatron's own: there the others learn of a failure
from the end of its process (docs/limits.md), which a test's rank does not have.
"""
SECONDS = 100
"""That the ranks have for a training of two steps: within it none of them has waited for one that failed."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of the training on one rank."""

    error: str | None
    operations: list[str]
    """Its file operations in the run directory."""


def train(config_path: Path, run: Path, rank: int, operation: str | None) -> Outcome:
    """The training phase on this rank; ``operation`` of ``rank`` fails."""
    from megatron_spin import processes
    from megatron_spin.errors import SpinError
    from megatron_spin.phases.frame import Phase, carry_out
    from megatron_spin.run.directory import RunDir

    config = load_config(config_path, OVERRIDES)
    run_dir = RunDir(run)
    target = run_dir.target(iteration=0)

    def start() -> Phase:
        from megatron_spin.parallel.setup import choose_device

        choose_device(config.device)
        from megatron_spin.phases.train import Train

        return Train(config, run_dir, target)

    error = None
    with failing(run, operation if processes.rank() == rank else None) as faults:
        try:
            carry_out("train", config, run_dir, start, target=target)
        except (SpinError, OSError) as caught:
            error = f"{type(caught).__name__}: {caught}"
    return Outcome(error, list(faults.seen))


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """A training without faults: from where it starts, what its ranks do with files, and what it ends with."""

    config: Path
    starts: dict[str, Path]
    """Run directories: before the first step, and after the checkpoint of step 1."""
    operations: dict[str, list[list[str]]]
    """File operations of each rank, by start."""
    rows: list[dict[str, Any]]
    """Its metrics."""


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    with worlds() as world:
        yield world(2)


@pytest.fixture(scope="module")
def undisturbed(generated: tuple[Path, Path], two: World, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    config, before = generated
    directory = tmp_path_factory.mktemp("undisturbed")
    fresh = carry_out_in(directory / "fresh", before, two, config)
    halfway = directory / "halfway"
    shutil.copytree(directory / "fresh", halfway)
    checkpoints = halfway / "iteration_0/checkpoints"
    shutil.rmtree(checkpoints / "iter_0000002")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("1")
    forget(halfway, "train:0")
    resumed = carry_out_in(directory / "resumed", halfway, two, config)
    assert [outcome.error for outcome in fresh + resumed] == [None] * 4
    rows = metrics(directory / "fresh/iteration_0/metrics.jsonl")
    assert metrics(directory / "resumed/iteration_0/metrics.jsonl") == rows
    return Undisturbed(
        config=config,
        starts={"fresh": before, "resumed": halfway},
        operations={"fresh": _shared(fresh), "resumed": _shared(resumed)},
        rows=rows,
    )


def _shared(outcomes: list[Outcome]) -> list[list[str]]:
    """The operations of each rank whose failure all ranks must learn of."""
    return [[operation for operation in outcome.operations if operation not in UNSHARED] for outcome in outcomes]


def carry_out_in(
    run: Path, start: Path, two: World, config: Path, *, rank: int = 0, operation: str | None = None
) -> list[Outcome]:
    """Trains a copy of ``start`` in ``run``."""
    shutil.copytree(start, run)
    return two.run(train, config, run, rank, operation, timeout=SECONDS)


def check_fault(undisturbed: Undisturbed, two: World, run: Path, start: str, rank: int, operation: str) -> None:
    """The fault ends both ranks with one error, or neither; the next training then ends as the undisturbed one."""
    where = f"{start}, rank {rank}, {operation}"
    try:
        first, second = carry_out_in(
            run, undisturbed.starts[start], two, undisturbed.config, rank=rank, operation=operation
        )
        assert first.error == second.error, f"{where}: {first.error} | {second.error}"
        again = two.run(train, undisturbed.config, run, 0, None, timeout=SECONDS)
    except RankError as error:
        raise AssertionError(f"{where}: {error}") from None
    assert [outcome.error for outcome in again] == [None, None], where
    assert metrics(run / "iteration_0/metrics.jsonl") == undisturbed.rows, where
    shutil.rmtree(run)


STARTS_AND_RANKS = [("fresh", 0), ("fresh", 1), ("resumed", 0), ("resumed", 1)]


@pytest.mark.parametrize(("start", "rank"), STARTS_AND_RANKS)
def test_a_fault_anywhere_ends_all_ranks(
    undisturbed: Undisturbed, two: World, tmp_path: Path, start: str, rank: int
) -> None:
    operations = undisturbed.operations[start][rank]
    for operation in random.Random(0).sample(operations, min(4, len(operations))):
        check_fault(undisturbed, two, tmp_path / "run", start, rank, operation)
