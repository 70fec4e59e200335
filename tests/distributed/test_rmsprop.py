"""RMSProp: torch's very own step, and the same bits after a resume. Fifty steps against a plain loop stand in
test_plain_loop.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.ranks import random_pairs, resumed_weights, tiny_config, trained_weights
from tests.support.tiny import tiny_model
from tests.support.world import Worlds

VOCABULARY = 99


def step_differences(*, decay: float, decoupled: bool, steps: int = 50) -> float:
    """Largest difference between our RMSProp and torch's over ``steps`` random gradients of every size."""
    from megatron_spin.parallel.setup import choose_device

    choose_device("cpu")
    from megatron_spin.training.rmsprop import RMSProp

    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, 60).view(3, 20).clone())] for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-2, "eps": 1e-6, "weight_decay": decay}
    rmsprop = RMSProp(ours, betas=(0.0, 0.9), decoupled=decoupled, **settings)
    torchs = torch.optim.RMSprop(theirs, alpha=0.9, **settings)
    for step in range(steps):
        ours[0].grad = torch.randn(3, 20, generator=generator) * 10.0 ** -(step % 9)
        theirs[0].grad = ours[0].grad.clone()
        rmsprop.step()
        torchs.step()
    return float((ours[0] - theirs[0]).detach().abs().max())


def test_the_step_is_torchs_bit_for_bit(world: Worlds) -> None:
    assert world(1).run(step_differences, decay=0.0, decoupled=True) == [0.0]
    assert world(1).run(step_differences, decay=0.1, decoupled=False) == [0.0]
    assert world(1).run(step_differences, decay=0.1, decoupled=True)[0] > 1e-3  # AdamW's decay is another


@pytest.mark.parametrize(
    ("ranks", "dtype"), [(1, "fp32"), (2, "fp32"), pytest.param(2, "bf16", marks=pytest.mark.slow)]
)
def test_resumed_equals_uninterrupted_bit_for_bit(world: Worlds, tmp_path: Path, ranks: int, dtype: str) -> None:
    tiny_model(tmp_path / "model", vocabulary=VOCABULARY, tokenizer=False)
    training: dict[str, Any] = {"learning_rate": 1e-4, "schedule": "linear", "optimizer": {"optimizer": "rmsprop"}}
    config = tiny_config(tmp_path / "model", precision={"dtype": dtype}, training=training)
    pairs = random_pairs(24, vocabulary=VOCABULARY)
    scores = np.full((24, 2), -40.0, dtype=np.float32)
    rows, expected = world(ranks).run(trained_weights, config, pairs, scores, steps=10)[0]
    resumed, actual = world(ranks).run(
        resumed_weights, config, pairs, scores, steps=10, stop=4, directory=tmp_path / "checkpoints"
    )[0]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]
    assert all(np.array_equal(actual[name], expected[name]) for name in expected) and actual.keys() == expected.keys()
    assert len({row["loss"] for row in rows}) == 10
