"""What Megatron's optimizer does with parameter groups that its own scheduler would otherwise look after."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.ranks import random_pairs, tiny_config, trained_weights
from tests.support.tiny import tiny_model
from tests.support.world import Worlds

VOCABULARY = 99


@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd"])
def test_matrices_decay_and_norms_do_not(world: Worlds, tmp_path: Path, name: str) -> None:
    tiny_model(tmp_path / "model", vocabulary=VOCABULARY, tokenizer=False)
    pairs, scores = random_pairs(8, vocabulary=VOCABULARY), np.full((8, 2), -40.0, dtype=np.float32)
    trained = []
    for decay in (0.0, 0.5):
        config = tiny_config(
            tmp_path / "model", training={"optimizer": {"optimizer": name, "weight_decay": decay, "clip_grad": 0.0}}
        )
        trained.append(world(1).run(trained_weights, config, pairs, scores, steps=1)[0][1])
    without, decayed = trained
    for key, weights in without.items():
        assert np.array_equal(weights, decayed[key]) == (weights.ndim == 1), key
