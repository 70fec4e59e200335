"""A mixture of experts through its family alone: to Megatron and back at every layout, and its log-probs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_spin.conversion.identity import identity
from megatron_spin.models.families import families
from tests.support.mixtral import FAMILY, NUM_EXPERTS, lost_expert_error, roundtrip, tiny_mixtral, token_logps
from tests.support.roundtrip import assert_same_model
from tests.support.world import Worlds

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "ep2": (2, {"ep_size": 2}),
    "tp2_ep2": (4, {"tp_size": 2, "ep_size": 2}),
    "pp2_ep2": (4, {"pp_size": 2, "ep_size": 2}),
    "ep2_of_dp4": (4, {"ep_size": 2}),
}
"""(ranks, sizes) by name."""


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_roundtrip_is_bitwise_equal(
    world: Worlds, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setitem(families(), "mixtral", FAMILY)
    ranks, sizes = LAYOUTS[layout]
    results = world(ranks).run(roundtrip, mixtral, tmp_path / "out", **sizes)
    assert {found for found, _ in results} == {identity(mixtral, "fp32")}
    assert_same_model(tmp_path / "out", mixtral)
    num_local = NUM_EXPERTS // sizes["ep_size"]
    for _, names in results:
        experts = [name for name in names if "layers.0.mlp.experts" in name and "linear_fc1" in name]
        assert len(experts) == num_local, "each rank must hold its share of the experts, else this compares nothing"


def test_an_expert_that_one_rank_has_lost_is_named(world: Worlds, mixtral: Path, tmp_path: Path) -> None:
    errors = world(2).run(lost_expert_error, mixtral, tmp_path / "out")
    assert len(set(errors)) == 1
    assert "lacks expert 3 of layer 2" in errors[0]
    assert not list(tmp_path.iterdir())


def test_token_logps_equal_transformers(world: Worlds, mixtral: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 101, (3, 41))
    input_ids, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    [actual] = world(1).run(token_logps, mixtral, input_ids, labels)
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    with torch.no_grad():
        logps = model(torch.from_numpy(input_ids)).logits.log_softmax(-1)
    expected = logps.gather(-1, torch.from_numpy(labels)[..., None])[..., 0].numpy()
    assert np.linalg.norm(actual - expected) < 1e-5 * np.linalg.norm(expected)
