"""Token log-probs of a transformers model: the model's own, whatever part of the logits is in memory at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from megatron_spin.hf import logps
from megatron_spin.hf.logps import hf_token_logps
from megatron_spin.hf.model import load_model, streamed_model
from tests.support.mixtral import tiny_mixtral
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")
SEQUENCES = [([5, 6, 7], list(range(10, 50))), ([8], [9]), ([1, 2, 3, 4, 5, 6], list(range(60, 30, -1))), ([4], [])]
"""Answers of 40, 1, 30 and 0 tokens."""


def gemma(directory: Path) -> None:
    """A family that bends its logits behind the output layer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0, initializer_range=0.5)
    Gemma2ForCausalLM(config).save_pretrained(directory)


MODELS: dict[str, Callable[[Path], object]] = {
    "llama": lambda directory: tiny_model(directory, tied=False, tokenizer=False),
    "tied": lambda directory: tiny_model(directory, tokenizer=False),
    "gemma": gemma,
    "mixtral": tiny_mixtral,  # transformers merges the experts of its files
}


@pytest.fixture(params=MODELS)
def hf_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    MODELS[request.param](tmp_path)
    return tmp_path


def expected(hf_dir: Path) -> list[torch.Tensor]:
    """One unpadded sequence at a time, with all its logits."""
    model = AutoModelForCausalLM.from_pretrained(hf_dir).eval()
    found = []
    for prompt, response in SEQUENCES:
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            all_logps = model(ids).logits[0, :-1].log_softmax(-1)
        token_logps = all_logps.gather(1, ids[0, 1:, None])[:, 0]
        found.append(token_logps[len(prompt) - 1 :])
    return found


@pytest.mark.parametrize("tokens", [1, 7, 1024])
def test_chunks_of_positions_give_the_models_own_log_probs(
    hf_dir: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(logps, "LOGITS_TOKENS", tokens)
    model = load_model(hf_dir, dtype="fp32", device=CPU)
    sizes: list[int] = []
    output: torch.nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    output.register_forward_hook(lambda _module, _inputs, logits: sizes.append(logits[..., 0].numel()))
    found = hf_token_logps(model, SEQUENCES, batch_size=2, device=CPU)
    for own, other in zip(found, expected(hf_dir), strict=True):
        assert own.shape == other.shape
        torch.testing.assert_close(own, other, rtol=0, atol=3e-6)
    assert 0 < max(sizes) <= max(tokens, 2), "a batch of two sequences has two logits at least"


def test_a_streamed_model_is_the_loaded_one_and_holds_no_weights(hf_dir: Path) -> None:
    loaded = hf_token_logps(load_model(hf_dir, dtype="fp32", device=CPU), SEQUENCES, batch_size=4, device=CPU)
    with streamed_model(hf_dir, dtype="fp32", device=CPU) as model:
        live: list[int] = []
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(lambda *_: live.append(_live_weights(model)))
        streamed = hf_token_logps(model, SEQUENCES, batch_size=4, device=CPU)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert _live_weights(model) == 0
    for own, other in zip(streamed, loaded, strict=True):
        assert torch.equal(own, other)
    assert max(live) < total / 2


def _live_weights(model: torch.nn.Module) -> int:
    """Elements of the weights that are in memory."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.device.type != "meta")
