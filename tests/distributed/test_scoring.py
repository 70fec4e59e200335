"""The check of the opponent's scores before the first step: what it measures, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spin.config import Config
from tests.support.ranks import make_policy, random_pairs, tiny_config
from tests.support.tiny import tiny_model
from tests.support.world import World

VOCABULARY = 99
BATCH = np.arange(8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(directory, vocabulary=VOCABULARY, tokenizer=False)
    return directory


@pytest.fixture(scope="module")
def pairs() -> list[Any]:
    return random_pairs(16, vocabulary=VOCABULARY)


def checked(config: Config, pairs: list[Any], *, shift: float = 0.0, ruin: bool = False) -> dict[str, Any] | str:
    """What the check says of the policy's own scores; of one score moved by ``shift``; of weights that are NaN."""
    policy = make_policy(config, pairs)
    import torch

    from megatron_spin.errors import GateError
    from megatron_spin.training.scoring import check_scores

    scores = policy.score()
    scores[3, 1] += shift
    if ruin:
        with torch.no_grad():
            next(policy.model[0].parameters()).fill_(float("nan"))
    try:
        found = check_scores(
            scores, policy.model, policy.batcher, BATCH, answers=("real", "generated"), dims=policy.dims
        )
    except GateError as error:
        return str(error)
    return {"tolerance": found.tolerance, "difference": found.difference, "largest": float(abs(scores).max())}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_own_scores_pass(world: Callable[[int], World], model: Path, pairs: list[Any], micro_batch_size: int) -> None:
    """The scoring pass cuts other batches than training's first: rounding alone separates the two."""
    config = tiny_config(model, training={"micro_batch_size": micro_batch_size})
    [found] = world(1).run(checked, config, pairs)
    assert found["difference"] <= found["tolerance"]
    assert found["tolerance"] < 1e-5 * found["largest"]


def test_a_score_that_is_off_is_named(world: Callable[[int], World], model: Path, pairs: list[Any]) -> None:
    [found] = world(1).run(checked, tiny_config(model), pairs, shift=0.01)
    assert "the opponent's score of pair 3 (generated) is" in found


@pytest.mark.parametrize("shift", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(
    world: Callable[[int], World], model: Path, pairs: list[Any], shift: float
) -> None:
    [found] = world(1).run(checked, tiny_config(model), pairs, shift=shift)
    assert "the opponent's score of pair 3 (generated) is" in found


def test_a_policy_that_gives_no_numbers_is_refused(
    world: Callable[[int], World], model: Path, pairs: list[Any]
) -> None:
    """Noise and tolerance are NaN here, with which every comparison is false."""
    [found] = world(1).run(checked, tiny_config(model), pairs, ruin=True)
    assert "which is the opponent, gives nan" in found
