"""Metrics that cannot be written end the training on all ranks."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_spin.config import Config
from tests.support.ranks import TokenPair, make_trainer, random_pairs, tiny_config
from tests.support.tiny import tiny_model
from tests.support.world import World

ROOM = 900
"""Bytes that a file may have: enough for two or three steps of metrics."""


def trained_without_room(config: Config, pairs: list[TokenPair], directory: Path) -> tuple[str, int]:
    """Trains with little room for metrics; what ends it, and how many steps were begun."""
    trainer = make_trainer(config, pairs, None, steps=9)
    from megatron_spin.training.metrics import MetricsWriter

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, limits[1]))
    begun = []
    take_step = trainer.step

    def noted_step(number: int, gate: Callable[[float], None] | None = None) -> dict[str, Any]:
        begun.append(number)
        row: dict[str, Any] = take_step(number, gate)
        return row

    trainer.step = noted_step
    writer = MetricsWriter(
        directory / "metrics.jsonl", directory / "tensorboard", step=0, total=9, label="t", ranks=trainer.dims
    )
    try:
        with writer:
            trainer.run(
                writer, checkpoints=directory, done=0, every=9, keep=1, resharding="data_parallel", state={}, gate=None
            )
    except OSError as error:
        return str(error), len(begun)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "trained", len(begun)


def test_a_row_that_cannot_be_written_ends_all_ranks_one_step_later(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    """Rank 0, which writes, is on the first pipeline stage here, and the values of a step come from the last."""
    model = tmp_path / "model"
    tiny_model(model, vocabulary=99, tokenizer=False)
    config = tiny_config(model, parallel={"pipeline_model_parallel_size": 2}, training={"objective": "sft"})
    first, second = world(2).run(trained_without_room, config, random_pairs(8, vocabulary=99), tmp_path)
    assert first == second
    error, begun = first
    assert "File too large" in error
    written = (tmp_path / "metrics.jsonl").read_bytes().count(b"\n")
    assert begun == written + 2 < 9
    assert not list(tmp_path.glob("iter_*"))
