"""DPO from preference rows: the first step's loss and gradients against an independent implementation, tokenization
included.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spin.data.preparation import prepare
from megatron_spin.data.sampler import BatchSampler
from tests.distributed.test_parity import close
from tests.support.ranks import first_gradients, scores_of, tiny_config
from tests.support.tiny import sft_rows, tiny_model, write_jsonl
from tests.support.world import Worlds

BETA = 0.3


def preference_rows(count: int) -> list[dict[str, str]]:
    rejected = sft_rows(count, seed=5)
    return [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": lost["response"]}
        for row, lost in zip(sft_rows(count), rejected, strict=True)
    ]


def independent_dpo(
    policy_dir: Path, reference_dir: Path, rows: list[dict[str, str]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """-log sigmoid(beta (log pi(c)/pi(r) - log ref(c)/ref(r))), mean over ``rows``, with gradients; one unpadded
    sequence at a time.
    """
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (policy_dir, reference_dir)
    )
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)

    def logp(model: torch.nn.Module, prompt: str, answer: str) -> torch.Tensor:
        start = tokenizer(f"### Instruction: {prompt}\n\n### Response: ")["input_ids"]
        end = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(end)[:, None]).sum()

    total = torch.zeros(())
    for row in rows:
        chosen, rejected = (logp(policy, row["prompt"], row[key]) for key in ("chosen", "rejected"))
        with torch.no_grad():
            reference_ratio = logp(reference, row["prompt"], row["chosen"]) - logp(
                reference, row["prompt"], row["rejected"]
            )
        total = total - torch.nn.functional.logsigmoid(BETA * (chosen - rejected - reference_ratio)) / len(rows)
    total.backward()
    return total.item(), {name: parameter.grad for name, parameter in policy.named_parameters()}


def test_one_dpo_step_equals_an_independent_implementation(world: Worlds, tmp_path: Path) -> None:
    """The reference is another model than the policy here, so that margins of both signs count, not only their
    gradient at 0.
    """
    tiny_model(tmp_path / "policy")
    tiny_model(tmp_path / "reference", seed=1)
    rows = preference_rows(24)
    data = {"path": str(write_jsonl(tmp_path / "d.jsonl", rows)), "template": "instruction"}
    settings: dict[str, Any] = {"data": data, "training": {"objective": "dpo"}, "spin": {"beta": BETA}}
    config = tiny_config(tmp_path / "policy", **settings)
    prepared = prepare(config)
    assert prepared.pairs is not None
    indices = [pair.index for pair in prepared.pairs]
    assert indices == [row.index for row in prepared.train]
    pairs = [(pair.prompt_ids, pair.real_ids, pair.generated_ids) for pair in prepared.pairs]
    [scores] = world(1).run(scores_of, tiny_config(tmp_path / "reference", **settings), pairs)
    [(named, gradients)] = world(1).run(first_gradients, config, pairs, scores)

    batch = [rows[indices[i]] for i in BatchSampler(len(pairs), 8, 0).batch(0)]
    loss, expected = independent_dpo(tmp_path / "policy", tmp_path / "reference", batch)
    assert named["loss"] == pytest.approx(loss, rel=1e-5) and 0 < named["accuracy"] < 1
    worst = {name: close(gradients[name], gradient.numpy()) for name, gradient in expected.items()}
    assert max(worst.values()) < 1e-5 and gradients.keys() == expected.keys(), worst
