"""Token log-probs of responses under a transformers model: the other side of every parity check. No Megatron."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from megatron_spin.errors import DataError

TokenIds: TypeAlias = Sequence[int]


@torch.inference_mode()
def hf_token_logps(
    model: Any, sequences: Sequence[tuple[TokenIds, TokenIds]], *, batch_size: int, device: torch.device | str
) -> list[torch.Tensor]:
    """log p(response token | all tokens before it) for each token of each response, in nats.

    Logits become log-probs in fp32, whatever the model's dtype. Sequences of similar length share a batch and are
    padded on the right.

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
        logits = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False).logits
        for row, i in enumerate(batch):
            prompt, response = sequences[i]
            # The logits at a position predict the next token. Only those that predict the response become fp32, one
            # sequence at a time: [response length, vocabulary] is large.
            own = logits[row, len(prompt) - 1 : lengths[i] - 1].float().log_softmax(dim=-1)
            targets = torch.tensor(list(response), dtype=torch.long, device=own.device)
            results[i] = own.gather(1, targets[:, None]).squeeze(1).cpu()
    return results
