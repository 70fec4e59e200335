"""Generation with transformers: batched, with a KV cache, on a CPU or a GPU.

``model.generate`` draws from one random stream for the whole batch, so a prompt's answer would depend on the prompts
that share its batch. This loop gives every prompt its own random numbers, and finished rows leave the batch.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache

from megatron_spin.generation.engine import Completion, EngineSettings, Progress
from megatron_spin.hf.model import choose_device, load_model, release_memory


class HfSession(contextlib.AbstractContextManager["HfSession"]):
    """A model in this process, freed on exit; see :class:`megatron_spin.generation.engine.Session`."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._device = choose_device(settings.device)
        self._model = load_model(settings.hf_dir, dtype=settings.dtype, device=self._device)

    def __exit__(self, *_: object) -> None:
        del self._model
        release_memory(self._device)

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
        # Prompts of similar length share a batch: less padding.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self._settings.batch_size):
            batch = order[start : start + self._settings.batch_size]
            generators = None
            if temperature > 0:
                # One stream per prompt, by its position in the call: neither the batch size nor other prompts matter.
                generators = [np.random.Generator(np.random.PCG64([seed, i])) for i in batch]
            sampler = _Sampler(temperature=temperature, top_p=top_p, generators=generators)
            batch_prompts = [prompts[i] for i in batch]
            batch_caps = [max_new_tokens[i] for i in batch]
            answers = self._generate_batch(batch_prompts, batch_caps, sampler, progress)
            completions.update(zip(batch, answers, strict=True))
        return [completions[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], caps: Sequence[int], sampler: "_Sampler", progress: Progress | None
    ) -> list[Completion]:
        end = self._settings.end_token_id
        answers: list[list[int]] = [[] for _ in prompts]
        rows = np.arange(len(prompts))  # the prompt of each row of the tensors below
        tokens, mask = _left_padded(prompts, self._device)
        # With the config, layers with a sliding window keep no more than the window.
        cache = DynamicCache(config=self._model.config)
        while True:
            # [b, s]: positions count real tokens only, so padding shifts nothing.
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            output = self._model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            chosen = sampler.choose(output.logits[:, -1], rows)
            alive = np.ones(len(rows), dtype=bool)
            for position, (row, token) in enumerate(zip(rows.tolist(), chosen.tolist(), strict=True)):
                answers[row].append(token)
                alive[position] = token != end and len(answers[row]) < caps[row]
            if progress is not None:
                progress(int((~alive).sum()), len(rows))
            if not alive.any():
                break
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            tokens = chosen[:, None]
            if not alive.all():
                # Finished rows leave, so that the tail of long answers is not paid for by the whole batch.
                keep = torch.from_numpy(np.flatnonzero(alive)).to(self._device)
                cache.batch_select_indices(keep)
                tokens, mask, rows = tokens[keep], mask[keep], rows[alive]
        return [Completion(answer, "stop" if answer[-1] == end else "length") for answer in answers]


class _Sampler:
    """Chooses one token per row; each prompt of the batch draws from its own generator."""

    def __init__(self, *, temperature: float, top_p: float, generators: list[np.random.Generator] | None) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._generators = generators

    def choose(self, logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Token ids [b] for ``logits`` [b, v]; ``rows`` [b] are the generators to use; greedy without generators."""
        if self._generators is None:
            return logits.argmax(-1)
        # float64: a float32 cumulative sum over 100k tokens is off by more than the rarest tokens' probability.
        probabilities = torch.softmax(logits.double() / self._temperature, dim=-1)
        if self._top_p < 1:
            probabilities = _nucleus(probabilities, self._top_p)
        draws = [self._generators[row].random() for row in rows]
        uniform = torch.tensor(draws, dtype=torch.float64, device=logits.device)
        cumulative = probabilities.cumsum(-1)
        chosen = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
        # A draw close to 1 may land after the last token with any probability.
        last = logits.shape[1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
        return torch.minimum(chosen, last)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zeroes all but the likeliest tokens that together reach ``top_p`` (at least one); [b, v], not renormalised."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    # A token is kept while those before it have not reached top_p yet, so the likeliest one always is.
    beyond = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.scatter(-1, order, ordered.masked_fill(beyond, 0.0))


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [b, s] int64, padded on the left with id 0."""
    length = max(map(len, prompts))
    tokens = np.zeros((len(prompts), length), dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)
