"""SPIN steps at every layout against one process, and one process against an independent implementation with
transformers.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_spin.config import at_iteration
from megatron_spin.data.sampler import BatchSampler
from tests.support.ranks import TokenPair, first_gradients, losses, random_pairs, scores_of, tiny_config
from tests.support.tiny import tiny_model
from tests.support.world import Worlds

VOCABULARY = 99  # needs padding for every layout
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2": (2, {}),
    "tp2_sp": (2, {**TP2, "sequence_parallel": True}),
    "tp2_pp2": (4, {**TP2, **PP2}),
    "tp2_pp2_sp": (4, {**TP2, **PP2, "sequence_parallel": True}),
    "tp2_dp2": (4, TP2),
}
MODELS: dict[str, dict[str, Any]] = {
    "llama_tied": {"family": "llama", "tied": True, "kv_heads": 2, "heads": 4},
    "mistral_untied": {"family": "mistral", "tied": False, "sliding_window": 7, "kv_heads": 2, "heads": 4},
}
# Smooth in the gradient, so that rounding stays rounding; Adam proper divides rounding-only gradients by themselves.
GENTLE_ADAM = {"optimizer": "adam", "adam_eps": 1.0, "clip_grad": 1.0, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, settings in MODELS.items():
        tiny_model(directories[name], layers=2, vocabulary=VOCABULARY, tokenizer=False, **settings)
    return directories


@pytest.fixture(scope="module")
def pairs() -> list[TokenPair]:
    return random_pairs(24, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def scores(pairs: list[TokenPair]) -> np.ndarray:
    """An opponent that is not the policy, so that margins and gradients are of both signs."""
    lengths = np.array([[len(real), len(generated)] for _, real, generated in pairs], dtype=np.float32)
    return -5.5 * lengths + np.random.default_rng(1).normal(0, 3, lengths.shape).astype(np.float32)


def close(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative distance of two tensors."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def independent_step(
    hf: Path, pairs: list[TokenPair], scores: np.ndarray, indices: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of one SPIN batch with transformers and plain autograd, one unpadded sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)

    def logps(prompt: list[int], response: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + response])
        token_logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return token_logps[len(prompt) - 1 :].sum()

    total = torch.zeros(())
    for i in indices:
        prompt, real, generated = pairs[i]
        margin = 0.3 * ((logps(prompt, real) - float(scores[i, 0])) - (logps(prompt, generated) - float(scores[i, 1])))
        total = total + torch.log1p(torch.exp(-margin.double())).float() / len(indices)
    total.backward()
    return total.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_one_step_equals_an_independent_implementation(
    world: Worlds, models: dict[str, Path], pairs: list[TokenPair], scores: np.ndarray, name: str
) -> None:
    config = tiny_config(models[name])
    [(named, grads)] = world(1).run(first_gradients, config, pairs, scores)
    loss, expected = independent_step(models[name], pairs, scores, BatchSampler(len(pairs), 8, 0).batch(0))
    assert named["loss"] == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == expected.keys()
    worst = {tensor: close(grads[tensor], expected[tensor]) for tensor in expected}
    assert max(worst.values()) < 1e-5, worst


def test_the_likelihood_term_adds_the_real_answers_mean_over_tokens(
    world: Worlds, models: dict[str, Path], pairs: list[TokenPair], scores: np.ndarray
) -> None:
    """At weight 0 the very bits of the plain loss; else its value and gradient plus those of the mean over tokens, by
    transformers.
    """
    hf, weight, batch = models["llama_tied"], 0.7, BatchSampler(len(pairs), 8, 0).batch(0)
    plain, zero, weighted = (
        world(1).run(first_gradients, tiny_config(hf, spin=spin), pairs, scores)[0]
        for spin in ({}, {"sft_weight": 0.0}, {"sft_weight": weight})
    )
    assert zero[0] == plain[0] and all(np.array_equal(zero[1][name], plain[1][name]) for name in plain[1])
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    total = torch.zeros(())
    for prompt, real, _ in (pairs[i] for i in batch):
        logits = model(torch.tensor([prompt + real])).logits[0, len(prompt) - 1 : -1]
        total = total + weight * torch.nn.functional.cross_entropy(logits, torch.tensor(real)) / len(batch)
    total.backward()
    assert weighted[0]["loss"] == pytest.approx(plain[0]["loss"] + total.item(), rel=1e-6)
    expected = {name: plain[1][name] + parameter.grad.numpy() for name, parameter in model.named_parameters()}
    worst = {name: close(weighted[1][name], expected[name]) for name in expected}
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_layouts_equal_one_process(
    world: Worlds, models: dict[str, Path], pairs: list[TokenPair], scores: np.ndarray, name: str, layout: str
) -> None:
    size, parallel = LAYOUTS[layout]
    config, single = tiny_config(models[name], parallel=parallel), tiny_config(models[name])
    [(_, expected)] = world(1).run(first_gradients, single, pairs, scores)
    results = world(size).run(first_gradients, config, pairs, scores)
    worst = {tensor: close(results[0][1][tensor], expected[tensor]) for tensor in expected}
    assert max(worst.values()) < 1e-5, worst

    [reference] = world(1).run(losses, single, pairs, scores)
    # Margins and rewards are small differences of log-probs: they agree to 1e-6 of those, not of themselves.
    rounding = 1e-6 * at_iteration(config.spin.beta, 0) * float(abs(scores).max())
    for rows in world(size).run(losses, config, pairs, scores):  # every rank reports the same
        for row, wanted in zip(rows, reference, strict=True):
            for key in (
                "loss",
                "margin",
                "accuracy",
                "real_logps",
                "generated_logps",
                "real_reward",
                "generated_reward",
                "grad_norm",
            ):
                assert row[key] == pytest.approx(wanted[key], rel=1e-5, abs=max(1e-6, rounding)), (key, row["step"])
    assert len({row["loss"] for row in reference}) == 5, "the steps must change the loss, else this compares nothing"


@pytest.mark.parametrize("layout", ["dp2", "tp2_dp2", "tp2_pp2"])
def test_distributed_optimizer_equals_one_process(
    world: Worlds, models: dict[str, Path], pairs: list[TokenPair], scores: np.ndarray, layout: str
) -> None:
    size, parallel = LAYOUTS[layout]
    [reference] = world(1).run(losses, tiny_config(models["llama_tied"], optimizer=GENTLE_ADAM), pairs, scores)
    config = tiny_config(
        models["llama_tied"], parallel={**parallel, "use_distributed_optimizer": True}, optimizer=GENTLE_ADAM
    )
    rows = world(size).run(losses, config, pairs, scores)[0]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in reference], rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in reference], rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_do_not_depend_on_the_layout(
    world: Worlds, models: dict[str, Path], pairs: list[TokenPair], layout: str
) -> None:
    size, parallel = LAYOUTS[layout]
    name = "mistral_untied"
    [expected] = world(1).run(scores_of, tiny_config(models[name]), pairs)
    for scores in world(size).run(scores_of, tiny_config(models[name], parallel=parallel), pairs):
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
