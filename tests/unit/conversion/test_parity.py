"""The parity gate's parts that need no model: its bound, its sample on disk, its random sequences."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spin.errors import CheckpointError
from megatron_spin.parallel.setup import choose_device


@pytest.fixture(scope="module")
def parity() -> Any:
    choose_device("cpu")  # before Megatron is imported
    from megatron_spin.conversion import parity

    return parity


def test_a_bound_holds_up_to_its_mean_and_its_largest(parity: Any) -> None:
    bound = parity.Bound(mean=0.5, largest=1.0)
    assert bound.holds(torch.tensor([0.0, 1.0]))
    assert not bound.holds(torch.tensor([0.0, 0.0, 1.001])), "the largest"
    assert not bound.holds(torch.tensor([0.2, 1.0, 1.0])), "the mean"
    assert not parity.Bound(mean=float("inf"), largest=float("inf")).holds(torch.tensor([torch.inf]))


def test_a_sample_comes_back_from_its_file(parity: Any, tmp_path: Path) -> None:
    """Three prompts of 2, 1 and 3 tokens; the last row ends in padding."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 0]])
    sample = parity.ParitySample(torch.arange(15).reshape(3, 5), mask, torch.rand(3, 5) * mask)
    sample.save(tmp_path / parity.PROBE_FILE)
    loaded = parity.ParitySample.load(tmp_path / parity.PROBE_FILE)
    assert torch.equal(loaded.token_logps, sample.token_logps)
    assert loaded.sequences() == [([0, 1], [2, 3, 4]), ([5], [6, 7, 8, 9]), ([10, 11, 12], [13])]


def test_a_damaged_sample_is_named(parity: Any, tmp_path: Path) -> None:
    path = tmp_path / parity.PROBE_FILE
    path.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match=r"probe\.safetensors is no parity sample"):
        parity.ParitySample.load(path)


@pytest.mark.parametrize(
    ("hf_config", "length"),
    [
        ({}, 64),
        ({"sliding_window": 100}, 132),
        ({"sliding_window": 4096}, 64),
        ({"sliding_window": None, "max_position_embeddings": 48}, 48),
    ],
)
def test_random_sequences_are_longer_than_a_short_window(parity: Any, hf_config: dict[str, Any], length: int) -> None:
    sequences = parity.random_sequences({"vocab_size": 83, **hf_config})
    assert [len(prompt) for prompt, _ in sequences] == [1] * 4
    assert [len(response) for _, response in sequences] == [length - 1] * 4
    assert sequences == parity.random_sequences({"vocab_size": 83, **hf_config})


def test_the_place_of_a_token_is_its_sequence_and_position(parity: Any) -> None:
    sequences = [([1], [2, 3, 4]), ([5], []), ([6, 7], [8, 9])]
    assert [parity._place(sequences, index) for index in range(5)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
