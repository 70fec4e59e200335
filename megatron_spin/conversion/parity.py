"""The conversion gate: a Hugging Face model must give the Megatron model's log-probs, token by token, before use."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from megatron_spin.conversion.records import Parity
from megatron_spin.data.batcher import Batcher, Example
from megatron_spin.errors import CheckpointError, GateError
from megatron_spin.hf.logps import TokenIds, hf_token_logps
from megatron_spin.hf.model import streamed_model
from megatron_spin.io import atomic_writer
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.pipeline import collect_token_logps, run_schedule

PROBE_FILE = "probe.safetensors"
"""Where the trainer leaves its :class:`ParitySample` in the checkpoint directory."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """Largest absolute differences of a token's log-prob, in nats, that rounding explains."""

    mean: float
    largest: float

    def holds(self, differences: torch.Tensor) -> bool:
        """Whether ``differences`` [tokens] are within the bound; never if one is infinite."""
        return (
            bool(differences.isfinite().all())
            and float(differences.mean()) <= self.mean
            and float(differences.max()) <= self.largest
        )


BOUNDS = {"fp32": Bound(mean=1e-4, largest=1e-4), "bf16": Bound(mean=0.02, largest=0.5)}
"""fp32: only the order of sums differs. bf16: two implementations round every activation differently (8 bits of
mantissa), and a rare, improbable token moves most; a wrongly mapped weight moves the mean by far more than 0.02."""
NOISE = 2.0
"""The Megatron model in bf16 may be this many times as far from fp32 as transformers in bf16: of two roundings of the
same function neither is much worse (SmolLM2-135M on random tokens: 0.060 nats per token on average, transformers
0.082). A fault smaller than the rounding is not seen in bf16."""
CEILING = Bound(mean=0.25, largest=5.0)
"""Beyond this, rounding noise hides any real difference."""


@dataclasses.dataclass(frozen=True)
class ParitySample:
    """Sequences and the Megatron model's log-probs of their responses; in every tensor position t is about token t."""

    input_ids: torch.Tensor
    """[n, s] int64: prompt, response, padding."""
    response_mask: torch.Tensor
    """[n, s] int64: 1 on the response's tokens."""
    token_logps: torch.Tensor
    """[n, s] fp32: log p(input_ids[t] | input_ids[:t]) in nats where ``response_mask`` is 1, else 0."""

    def save(self, path: Path) -> None:
        """Writes the sample as safetensors, whole or not at all."""
        tensors = {
            "input_ids": self.input_ids.contiguous().cpu(),
            "response_mask": self.response_mask.contiguous().cpu(),
            "token_logps": self.token_logps.contiguous().cpu(),
        }
        with atomic_writer(path, "wb") as file:
            file.write(save(tensors))

    @staticmethod
    def load(path: Path) -> "ParitySample":
        """Reads what :meth:`save` wrote.

        Raises:
            CheckpointError: the file is corrupted or lacks a tensor.
        """
        try:
            tensors = load_file(path)
            return ParitySample(
                input_ids=tensors["input_ids"],
                response_mask=tensors["response_mask"],
                token_logps=tensors["token_logps"],
            )
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(
                f"{path} is no parity sample ({error}): delete it, then a random one is used"
            ) from None

    def sequences(self) -> list[tuple[TokenIds, TokenIds]]:
        """(prompt ids, response ids) of each row."""
        rows = []
        for tokens, mask in zip(self.input_ids, self.response_mask.bool(), strict=True):
            start = int(mask.int().argmax())
            rows.append((tokens[:start].tolist(), tokens[mask].tolist()))
        return rows


def random_sequences(
    hf_config: dict[str, Any], *, number: int = 4, length: int = 64, seed: int = 0
) -> list[tuple[TokenIds, TokenIds]]:
    """Uniformly random tokens; the first token of each sequence is its prompt.

    They are longer than a short sliding window, so that a wrong window is seen.
    """
    window = hf_config.get("sliding_window")
    if isinstance(window, int) and window < 1024:
        length = max(length, window + 32)
    length = min(length, hf_config.get("max_position_embeddings", length))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(hf_config["vocab_size"], (number, length), generator=generator).tolist()
    return [(row[:1], row[1:]) for row in tokens]


def parity_sample(
    model: Sequence[torch.nn.Module],
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    *,
    alignment: int,
    dims: ParallelDims,
) -> ParitySample:
    """Runs ``sequences`` through the Megatron model as one microbatch; a collective with one result for every rank.

    Args:
        model: this rank's chunks, its padded vocabulary masked (:func:`megatron_spin.models.vocabulary.mask_padding`).
        sequences: (prompt ids, response ids) pairs; a prompt has at least one token.
        alignment: as the trainer's (:func:`megatron_spin.parallel.layout.alignment`).
    """
    examples = [Example(prompt, (response,)) for prompt, response in sequences]
    batcher = Batcher(
        examples=examples,
        micro_batch_size=len(examples),
        alignment=alignment,
        dp_rank=0,
        dp_size=1,
        device=dims.device,
    )
    [batch] = batcher.microbatches(np.arange(len(examples)))
    results = run_schedule(collect_token_logps(), model, [batch], forward_only=True)
    # Labels are one token ahead of inputs. The sample is about the tokens themselves, so everything moves right by one.
    input_ids = torch.cat([batch.input_ids[:, :1], batch.labels], dim=1)
    response_mask = torch.nn.functional.pad(batch.response_mask.long(), (1, 0))
    logps = torch.zeros(input_ids.shape, dtype=torch.float32, device=dims.device)
    if results and dims.tp_rank == 0 and dims.dp_rank == 0:
        logps[:, 1:] = torch.where(batch.response_mask > 0, results[0], 0.0)
    dist.all_reduce(logps)  # one rank holds them, the others add zeros
    return ParitySample(input_ids.cpu(), response_mask.cpu(), logps.cpu())


def check_parity(hf_dir: Path, sample: ParitySample, *, dtype: str, bound: Bound, device: torch.device) -> Parity:
    """Compares ``sample`` with the transformers model in ``hf_dir``, run in ``dtype``.

    If bf16 differs by more than ``bound``, rounding may move this model that much. transformers in fp32 then decides:
    the sample may be :data:`NOISE` times as far from it as transformers in bf16 is.

    Its weights are read layer by layer, once for all sequences, so that a model of any size can be compared while the
    Megatron model is in memory.

    Raises:
        GateError: they differ by more than that; the message names the largest difference and where it is.
        CheckpointError: transformers cannot load ``hf_dir``.
        DeviceError: ``device`` cannot hold even one layer.
    """
    sequences = sample.sequences()
    expected = sample.token_logps[sample.response_mask.bool()]

    def logps(dtype: str) -> torch.Tensor:
        with streamed_model(hf_dir, dtype=dtype, device=device) as model:
            return torch.cat(hf_token_logps(model, sequences, batch_size=len(sequences), device=device))

    found = logps(dtype)
    differences = _differences(found, expected)
    compared = "and the Megatron model"
    parity = Parity(mean_difference=float(differences.mean()), largest_difference=float(differences.max()))
    if bound.holds(differences):
        return parity
    if dtype == "bf16" and bool(found.isfinite().all()):
        exact = logps("fp32")
        noise = _differences(found, exact)
        bound = Bound(
            mean=min(NOISE * float(noise.mean()), CEILING.mean),
            largest=min(NOISE * float(noise.max()), CEILING.largest),
        )
        differences = _differences(exact, expected)
        compared = "in fp32 and the Megatron model in bf16"
        if bound.holds(differences):
            return parity
    row, position = _place(sequences, int(differences.argmax()))
    raise GateError(
        f"the Hugging Face model {hf_dir} {compared} differ by {float(differences.max()):.3g} nats per token (mean "
        f"{float(differences.mean()):.3g}; allowed {bound.largest:.3g}, mean {bound.mean:.3g}), most at answer token "
        f"{position} of sequence {row}: weights or config.json were altered, or a model.transformer setting has no "
        "Hugging Face form"
    )


def _place(sequences: Sequence[tuple[TokenIds, TokenIds]], index: int) -> tuple[int, int]:
    """(sequence, position in its response) of response token ``index``, counted over all sequences."""
    for row, (_, response) in enumerate(sequences):
        if index < len(response):
            return row, index
        index -= len(response)
    raise IndexError(index)


def _differences(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    difference = (left - right).abs()
    # NaN compares false with everything: it must count as the largest difference, not as none.
    return torch.where(difference.isnan(), torch.inf, difference)
