"""Token log-probs of answers under a transformers model. No Megatron: the other side of every parity check."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_spin.errors import DataError

TokenIds = Sequence[int]


@torch.inference_mode()
def hf_token_logps(
    model: Any, sequences: Sequence[tuple[TokenIds, TokenIds]], *, batch_size: int, device: torch.device | str
) -> list[torch.Tensor]:
    """log p(response token | all before) for each token of each response, in nats.

    Logits become log-probs in fp32, whatever the model's dtype. Sequences of similar length share a batch, padded on
    the right.

    Args:
        model: a transformers causal language model on ``device``.
        sequences: (prompt ids, response ids) each.
        batch_size: sequences per forward pass.

    Returns:
        One fp32 CPU tensor [response length] per sequence, in the order given.

    Raises:
        DataError: a prompt is empty, so that nothing predicts its first answer token.
    """
    if any(not len(prompt) for prompt, _ in sequences):
        raise DataError(
            "a prompt without tokens: nothing predicts its first answer token; prompts need at least one token"
        )
    results: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    by_length = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]) - len(sequences[i][1]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        length = max(len(sequences[i][0]) + len(sequences[i][1]) for i in batch)
        input_ids = torch.zeros(len(batch), length, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, i in enumerate(batch):
            tokens = [*sequences[i][0], *sequences[i][1]]
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
            attention_mask[row, : len(tokens)] = 1
        logits = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False).logits
        for row, i in enumerate(batch):
            prompt, response = sequences[i]
            # The logits at a position predict the next token. Only the answer's own become fp32, one sequence at a
            # time, so that the fp32 copy stays small.
            own = logits[row, len(prompt) - 1 : len(prompt) + len(response) - 1].float().log_softmax(dim=-1)
            tokens_of_answer = torch.tensor(list(response), dtype=torch.long, device=own.device)
            results[i] = own.gather(1, tokens_of_answer[:, None]).squeeze(1).cpu()
    return results
