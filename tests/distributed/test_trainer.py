"""What a step of the trainer does in which order."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_spin.config import Config
from tests.support.ranks import make_trainer, random_pairs, tiny_config, weights
from tests.support.tiny import tiny_model
from tests.support.world import Worlds


def refused_step(config: Config, pairs: list[Any], scores: np.ndarray) -> tuple[list[float], bool, bool]:
    """The losses that the gate of the first step is asked about, whether its refusal ends the step, and whether it
    leaves the weights as they were.
    """
    from megatron_spin.errors import GateError

    trainer = make_trainer(config, pairs, scores)
    before, asked = weights(trainer, Path(config.model.hf)), []

    def gate(loss: float) -> None:
        asked.append(loss)
        raise GateError("refused")

    has_ended = False
    try:
        trainer.step(0, gate)
    except GateError:
        has_ended = True
    after = weights(trainer, Path(config.model.hf))
    return asked, has_ended, all(np.array_equal(after[name], value) for name, value in before.items())


def test_the_first_loss_is_checked_before_the_first_step(world: Worlds, tmp_path: Path) -> None:
    tiny_model(tmp_path, vocabulary=99, tokenizer=False)
    pairs, scores = random_pairs(8, vocabulary=99), np.full((8, 2), -40.0, dtype=np.float32)
    [(asked, has_ended, is_unchanged)] = world(1).run(refused_step, tiny_config(tmp_path), pairs, scores)
    assert len(asked) == 1
    assert has_ended
    assert is_unchanged
