"""Generation with transformers: batched, with a KV cache, on a CPU or a GPU.

The loop is written out, since ``model.generate`` draws from one random stream for the whole batch: what a prompt is answered would depend
on which others share its batch. Here every prompt has random numbers of its own, and finished rows leave the batch.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from megatron_spin.errors import CheckpointError, DeviceError
from megatron_spin.generation.engine import Completion, EngineSettings, Progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class HfSession:
    """A model held in this process; see :class:`megatron_spin.generation.engine.Session`."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._device = _device(settings.device)
        transformers_logging.disable_progress_bar()
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                str(settings.hf_dir), dtype=DTYPES[settings.dtype], local_files_only=True, attn_implementation="sdpa"
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{settings.hf_dir} cannot be loaded by transformers ({error}): export or copy the model again"
            ) from None
        self._model = model.to(self._device).eval()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        top_p: float,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """See :meth:`megatron_spin.generation.engine.Session.generate`."""
        # Prompts of like length share a batch: less padding.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self._settings.batch_size):
            batch = order[start : start + self._settings.batch_size]
            uniforms = None if temperature == 0 else [np.random.Generator(np.random.PCG64([seed, i])) for i in batch]
            sampler = _Sampler(temperature=temperature, top_p=top_p, generators=uniforms)
            done = self._generate_batch(
                [prompts[i] for i in batch], [max_new_tokens[i] for i in batch], sampler, progress
            )
            completions.update(zip(batch, done, strict=True))
        return [completions[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], caps: Sequence[int], sampler: "_Sampler", progress: Progress | None
    ) -> list[Completion]:
        end = self._settings.end_token_id
        answers: list[list[int]] = [[] for _ in prompts]
        rows = np.arange(len(prompts))  # which prompt each row of the tensors below is
        tokens, mask = _left_padded(prompts, self._device)
        cache = DynamicCache(config=self._model.config)
        while True:
            # [b, s]: positions count real tokens only, so padding moves nothing
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            logits = self._model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chosen = sampler.choose(logits, rows)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                answers[row].append(token)
            alive = np.array([answers[row][-1] != end and len(answers[row]) < caps[int(row)] for row in rows])
            if progress is not None:
                progress(int((~alive).sum()), len(rows))
            if not alive.any():
                break
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            tokens = chosen[:, None]
            if not alive.all():
                keep = torch.from_numpy(np.flatnonzero(alive)).to(self._device)
                cache.batch_select_indices(keep)
                tokens, mask, rows = tokens[keep], mask[keep], rows[alive]
        return [Completion(answer, _reason(answer, end)) for answer in answers]


class _Sampler:
    """Chooses a token a row; each prompt of the batch draws from a generator of its own."""

    def __init__(self, *, temperature: float, top_p: float, generators: list[np.random.Generator] | None) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._generators = generators

    def choose(self, logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Token ids [b] for ``logits`` [b, v]; ``rows`` [b] says which generators to use; without generators the likeliest."""
        if self._generators is None:
            return logits.argmax(-1)
        # float64: a cumulative sum over 100k tokens in float32 is off by more than the rarest tokens weigh.
        probabilities = torch.softmax(logits.double() / self._temperature, dim=-1)
        if self._top_p < 1:
            probabilities = _nucleus(probabilities, self._top_p)
        uniform = torch.tensor(
            [self._generators[row].random() for row in rows], dtype=torch.float64, device=logits.device
        )
        cumulative = probabilities.cumsum(-1)
        chosen = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
        # A draw next to 1 may land behind the last token that has any probability.
        last = logits.shape[1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
        return torch.minimum(chosen, last)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zeroes all but the likeliest tokens that together reach ``top_p`` (at least one); [b, v], not renormalised."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.scatter(-1, order, ordered.masked_fill(beyond, 0.0))


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [b, s] int64, padding on the left with id 0."""
    length = max(map(len, prompts))
    tokens = np.zeros((len(prompts), length), dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def _reason(answer: Sequence[int], end: int) -> Literal["stop", "length"]:
    return "stop" if answer[-1] == end else "length"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "device=cuda, but torch sees no GPU: use device=cpu or auto, or install a CUDA build of torch"
        )
    return torch.device(name)
