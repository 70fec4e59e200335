"""A user's own model provider gets the very same SPIN step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import first_gradients, losses, random_pairs, tiny_config
from tests.support.tiny import VOCABULARY, tiny_model
from tests.support.world import Worlds

PROVIDER = "examples.providers.plain_gpt:model_provider"


@pytest.mark.parametrize(
    ("size", "parallel"), [(1, {}), (2, {"tensor_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2})]
)
def test_plain_gpt_model_trains_as_ours_does(
    world: Worlds, tmp_path: Path, size: int, parallel: dict[str, Any]
) -> None:
    tiny_model(tmp_path, tied=True, tokenizer=False)
    pairs = random_pairs(16, vocabulary=VOCABULARY)
    scores = np.full((16, 2), -40.0, dtype=np.float32)
    ours = tiny_config(tmp_path)
    theirs = tiny_config(tmp_path, parallel=parallel, model={"provider": PROVIDER})
    [(_, expected)] = world(1).run(first_gradients, ours, pairs, scores)
    actual = world(size).run(first_gradients, theirs, pairs, scores)[0][1]
    for name, gradient in expected.items():
        assert np.linalg.norm(actual[name] - gradient) < 1e-5 * np.linalg.norm(gradient), name
    [reference] = world(1).run(losses, ours, pairs, scores)
    rows = world(size).run(losses, theirs, pairs, scores)[0]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in reference], rel=1e-5)
