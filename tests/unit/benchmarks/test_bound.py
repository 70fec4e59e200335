"""The bound computes what transformers computes, with either layout: its speed is that of the same work."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import bound
from benchmarks.workload import Pair
from tests.support.tiny import VOCABULARY, tiny_model


def pairs() -> list[Pair]:
    """Five pairs of random tokens; the first has the shortest prompt and answers that there can be."""
    generator = random.Random(0)

    def ids(length: int) -> list[int]:
        return [generator.randrange(VOCABULARY) for _ in range(length)]

    lengths = [(1, 1, 1), (7, 3, 9), (4, 12, 2), (20, 5, 5), (3, 8, 8)]
    return [Pair(ids(prompt), ids(chosen), ids(rejected)) for prompt, chosen, rejected in lengths]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bound")
    tiny_model(path, tied=False, heads=4, kv_heads=2)
    return path


def reference_logps(model: Any) -> torch.Tensor:
    """Summed log-probs by transformers, one sequence at a time: all chosen answers, then all rejected ones."""
    sums = []
    for column in ("chosen_ids", "rejected_ids"):
        for pair in pairs():
            answer = getattr(pair, column)
            ids = torch.tensor([pair.prompt_ids + answer])
            logps = model(ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
            sums.append(logps.gather(1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("layout", bound.LAYOUTS)
def test_logps_and_gradients_are_those_of_transformers(directory: Path, layout: str) -> None:
    model = bound.Llama(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logps, expected = model(bound.LAYOUTS[layout](pairs())), reference_logps(theirs)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)

    reference = expected.detach() - torch.arange(float(len(expected)))
    bound.dpo_loss(logps, reference).backward()
    bound.dpo_loss(expected, reference).backward()
    compared: list[tuple[Any, Any]] = [
        (model.embedding, theirs.model.embed_tokens.weight),
        (model.norm, theirs.model.norm.weight),
        (model.head, theirs.lm_head.weight),
    ]
    for ours, layer in zip(model.layers, theirs.model.layers, strict=True):
        compared += [
            (ours.attention_norm, layer.input_layernorm.weight),
            (ours.projection, layer.self_attn.o_proj.weight),
            (ours.mlp_norm, layer.post_attention_layernorm.weight),
            (ours.down, layer.mlp.down_proj.weight),
        ]
        qkv = torch.cat([getattr(layer.self_attn, name).weight.grad for name in ("q_proj", "k_proj", "v_proj")])
        gate_up = torch.cat([layer.mlp.gate_proj.weight.grad, layer.mlp.up_proj.weight.grad])
        torch.testing.assert_close(ours.qkv.grad, qkv, rtol=0, atol=1e-5 * float(qkv.norm()))
        torch.testing.assert_close(ours.gate_up.grad, gate_up, rtol=0, atol=1e-5 * float(gate_up.norm()))
    for own, other in compared:
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-5 * float(other.grad.norm()))


def test_shared_prompts_are_computed_once() -> None:
    tokens = sum(pair.num_tokens for pair in pairs())
    prompts = sum(len(pair.prompt_ids) for pair in pairs())
    assert len(bound.pack(pairs()).ids) == tokens
    assert len(bound.pack_shared(pairs()).ids) == tokens - prompts
