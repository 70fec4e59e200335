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


def cached(directories: list[Path], scores: np.ndarray | None, *, cut: int, any_cut: bool) -> list[Any] | str:
    """What each rank reads of a cache, seen by it in ``directories[rank]``, after ``scores`` are saved if given."""
    from megatron_spin.errors import SpinError
    from megatron_spin.processes import Ranks, rank, world_size
    from megatron_spin.training.scoring import ScoreCache

    cache = ScoreCache(directories[rank()], ("real", "generated"), {"opponent": "o"}, [8, cut, 8], {"device": "d"})
    ranks = Ranks(rank(), world_size())
    try:
        if scores is not None:
            cache.save(scores, ranks)
        found = cache.load(ranks, any_cut=any_cut)
    except (SpinError, OSError) as error:
        return str(error)
    return [] if found is None else found.tolist()


def test_rank_0_reads_and_writes_the_scores_of_all(world: Callable[[int], World], tmp_path: Path) -> None:
    """Rank 1 sees an older state of the directory."""
    seen = [tmp_path / "seen by 0", tmp_path / "seen by 1"]
    scores = np.array([[-1.5, -2.0], [-0.25, -9.0]], dtype=np.float32)
    assert world(2).run(cached, seen, None, cut=2, any_cut=False) == [[], []]
    assert world(2).run(cached, seen, scores, cut=2, any_cut=False) == [scores.tolist()] * 2
    assert not seen[1].exists()
    (seen[0] / "scores.safetensors").write_bytes(b"other")
    for refused in world(2).run(cached, seen, None, cut=2, any_cut=False):
        assert "were altered after scoring" in refused


def test_scores_that_cannot_be_written_stop_all_ranks(world: Callable[[int], World], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = world(2).run(cached, [tmp_path / "file"] * 2, np.zeros((2, 2), np.float32), cut=2, any_cut=False)
    assert refused[0] == refused[1]
    assert "file" in refused[0]


def test_a_training_that_continues_keeps_scores_of_another_microbatch(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    """One that begins scores anew, since the check of its first batch measures the noise of its own microbatches."""
    scores = np.zeros((2, 2), np.float32)
    world(1).run(cached, [tmp_path], scores, cut=2, any_cut=False)
    assert world(1).run(cached, [tmp_path], None, cut=4, any_cut=True) == [scores.tolist()]
    assert world(1).run(cached, [tmp_path], None, cut=4, any_cut=False) == [[]]
