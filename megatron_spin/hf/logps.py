"""Token log-probs of responses under a transformers model: the other side of every parity check. No Megatron."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch

from megatron_spin.errors import DataError

TokenIds: TypeAlias = Sequence[int]

LOGITS_TOKENS = 1024
"""Tokens whose logits are in memory at a time: 1.3 GB in bf16, with their log-probs in fp32, for 128k words."""


@torch.inference_mode()
def hf_token_logps(
    model: Any, sequences: Sequence[tuple[TokenIds, TokenIds]], *, batch_size: int, device: torch.device | str
) -> list[torch.Tensor]:
    """log p(response token | all tokens before it) for each token of each response, in nats.

    Logits become log-probs in fp32, whatever the model's dtype. Sequences of similar length share a batch and are
    padded on the right. Logits are made of :data:`LOGITS_TOKENS` positions at a time: those of a whole batch would be
    larger than all else.

    Args:
        model: a transformers causal language model on ``device``.
        sequences: (prompt ids, response ids) pairs.
        batch_size: sequences per forward pass.

    Returns:
        One fp32 CPU tensor [response length] per sequence, in the given order.

    Raises:
        DataError: a prompt is empty, so nothing predicts the first token of its response.
    """
    if any(len(prompt) == 0 for prompt, _ in sequences):
        raise DataError(
            "a prompt without tokens: nothing predicts the first token of its answer; prompts need at least one token"
        )
    results: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    longest_first = sorted(range(len(sequences)), key=lambda i: -lengths[i])
    for start in range(0, len(sequences), batch_size):
        batch = longest_first[start : start + batch_size]
        length = lengths[batch[0]]
        input_ids = torch.zeros(len(batch), length, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, i in enumerate(batch):
            prompt, response = sequences[i]
            input_ids[row, : lengths[i]] = torch.tensor([*prompt, *response])
            attention_mask[row, : lengths[i]] = 1
        first = min(len(sequences[i][0]) for i in batch) - 1  # what a position computes is about the token behind it
        logps = _token_logps(model, input_ids.to(device), attention_mask.to(device), first=first).cpu()
        for row, i in enumerate(batch):
            results[i] = logps[row, len(sequences[i][0]) - 1 - first : lengths[i] - 1 - first]
    return results


def _token_logps(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, first: int) -> torch.Tensor:
    """[b, s - 1 - first] fp32: log p of the token behind each position from ``first`` on."""
    batch, length = input_ids.shape
    targets = input_ids[:, first + 1 :]
    logps = torch.zeros(targets.shape, dtype=torch.float32, device=input_ids.device)
    whole = "logits_to_keep" not in inspect.signature(model.forward).parameters
    step = length if whole else max(1, LOGITS_TOKENS // batch)
    with _body_runs_once(model):
        for start in range(0, targets.shape[1], step):
            end = min(start + step, targets.shape[1])
            chosen = {}
            if not whole:
                chosen["logits_to_keep"] = torch.arange(first + start, first + end, device=input_ids.device)
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **chosen).logits
            if whole:
                logits = logits[:, first:-1]
            own = logits.float().log_softmax(dim=-1)
            logps[:, start:end] = own.gather(2, targets[:, start:end, None]).squeeze(2)
    return logps


class _RunOnce(torch.nn.Module):
    """Runs ``body`` at its first call and gives that output to every later one."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body
        self._output: Any = None

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if self._output is None:
            self._output = self.body(*arguments, **named)
        return self._output


@contextlib.contextmanager
def _body_runs_once(model: Any) -> Iterator[None]:
    """Within the block all calls of ``model`` share the hidden states of the first: only the output layer runs anew.

    So everything that a family does to its logits stays the model's own affair.
    """
    name = model.base_model_prefix
    body = getattr(model, name)
    setattr(model, name, _RunOnce(body))
    try:
        yield
    finally:
        setattr(model, name, body)
