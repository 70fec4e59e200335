"""The conversion gate: the Hugging Face model must give the Megatron model's log-probs, token by token, before anyone uses it."""

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
from megatron_spin.hf.model import load_model
from megatron_spin.io import atomic_writer
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.pipeline import collect_token_logps, run_schedule

PROBE_FILE = "probe.safetensors"


@dataclasses.dataclass(frozen=True)
class Bound:
    """Largest absolute differences of a token's log-prob, in nats, that rounding explains."""

    mean: float
    largest: float

    def holds(self, differences: torch.Tensor) -> bool:
        """Whether ``differences`` [tokens] keep to it; not if one is infinite."""
        return (
            bool(differences.isfinite().all())
            and float(differences.mean()) <= self.mean
            and float(differences.max()) <= self.largest
        )


BOUNDS = {"fp32": Bound(mean=1e-4, largest=1e-4), "bf16": Bound(mean=0.02, largest=0.5)}
"""fp32: only the order of sums differs. bf16: two implementations round every activation differently (8 bits of mantissa), and a rare,
improbable token moves most; a wrongly mapped weight moves the mean by far more than 0.02."""
NOISE = 2.0
"""How much further than transformers' own bf16 the Megatron model's may be from fp32: of two roundings of one function neither is much worse
(SmolLM2-135M on random tokens: 0.060 nats a token on average, transformers 0.082). A fault smaller than the rounding is not seen in bf16."""
CEILING = Bound(mean=0.25, largest=5.0)
"""Where rounding alone moves a model further than this nothing can be told of it."""


@dataclasses.dataclass(frozen=True)
class ParitySample:
    """Sequences and the trainer's log-probs of their answers. Everything is aligned to ``input_ids``: position t speaks of token t."""

    input_ids: torch.Tensor
    """[n, s] int64: prompt, answer, padding."""
    response_mask: torch.Tensor
    """[n, s] int64: 1 on the answer's tokens."""
    token_logps: torch.Tensor
    """[n, s] fp32: log p(input_ids[t] | input_ids[:t]) in nats where ``response_mask`` is 1, else 0."""

    def save(self, path: Path) -> None:
        """Writes the sample as safetensors, whole or not at all."""
        with atomic_writer(path, "wb") as file:
            file.write(
                save({field.name: getattr(self, field.name).contiguous().cpu() for field in dataclasses.fields(self)})
            )

    @staticmethod
    def load(path: Path) -> "ParitySample":
        """Reads what :meth:`save` wrote.

        Raises:
            CheckpointError: the file is corrupted or lacks a tensor.
        """
        try:
            tensors = load_file(path)
            return ParitySample(**{field.name: tensors[field.name] for field in dataclasses.fields(ParitySample)})
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
    """Uniformly random tokens, the first of each sequence as its prompt; longer than a short sliding window, so that the window counts."""
    window = hf_config.get("sliding_window")
    if isinstance(window, int) and window < 1024:
        length = max(length, window + 32)
    length = min(length, hf_config.get("max_position_embeddings", length))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(hf_config["vocab_size"], (number, length), generator=generator).tolist()
    return [(row[:1], row[1:]) for row in tokens]


def parity_sample(
    model: Sequence[torch.nn.Module], sequences: Sequence[tuple[TokenIds, TokenIds]], *, dims: ParallelDims
) -> ParitySample:
    """Runs ``sequences`` through the Megatron model, one microbatch, and gives the sample on every rank; a collective.

    Args:
        model: this rank's chunks, its padded vocabulary masked (:func:`megatron_spin.models.vocabulary.mask_padding`).
        sequences: (prompt ids, response ids) each; at least one prompt token.
    """
    examples = [Example(prompt, (response,)) for prompt, response in sequences]
    batcher = Batcher(
        examples=examples,
        micro_batch_size=len(examples),
        alignment=dims.tp_size,
        dp_rank=0,
        dp_size=1,
        device=dims.device,
    )
    [batch] = batcher.microbatches(np.arange(len(examples)))
    results = run_schedule(collect_token_logps(), model, [batch], forward_only=True)
    # Labels are one token ahead of inputs; the sample speaks of the tokens themselves, so everything moves right by one.
    input_ids = torch.cat([batch.input_ids[:, :1], batch.labels], dim=1)
    response_mask = torch.nn.functional.pad(batch.response_mask.long(), (1, 0))
    logps = torch.zeros(input_ids.shape, dtype=torch.float32, device=dims.device)
    if results and dims.tp_rank == 0 and dims.dp_rank == 0:
        logps[:, 1:] = torch.where(batch.response_mask > 0, results[0], 0.0)
    dist.all_reduce(logps)  # one rank has them, the others add zeros
    return ParitySample(input_ids.cpu(), response_mask.cpu(), logps.cpu())


def check_parity(
    hf_dir: Path, sample: ParitySample, *, dtype: str, bound: Bound, device: torch.device, batch_size: int = 4
) -> Parity:
    """Compares ``sample`` with the transformers model in ``hf_dir``, run in ``dtype``.

    Where bf16 differs by more than ``bound``, the model may be one that rounding moves that much: transformers in fp32 then tells, and the
    sample may be as far from it as :data:`NOISE` times transformers in bf16 is.

    Raises:
        GateError: they differ by more than that; the message names the largest difference and where it is.
        CheckpointError: transformers cannot load ``hf_dir``.
    """
    sequences = sample.sequences()
    expected = sample.token_logps[sample.response_mask.bool()]

    def logps(dtype: str) -> torch.Tensor:
        return torch.cat(
            hf_token_logps(
                load_model(hf_dir, dtype=dtype, device=device), sequences, batch_size=batch_size, device=device
            )
        )

    found = logps(dtype)
    differences, between = _differences(found, expected), "and the Megatron model"
    parity = Parity(mean_difference=float(differences.mean()), largest_difference=float(differences.max()))
    if bound.holds(differences):
        return parity
    if dtype == "bf16" and bool(found.isfinite().all()):
        exact = logps("fp32")
        noise = _differences(found, exact)
        bound = Bound(min(NOISE * float(noise.mean()), CEILING.mean), min(NOISE * float(noise.max()), CEILING.largest))
        differences, between = _differences(exact, expected), "in fp32 and the Megatron model in bf16"
        if bound.holds(differences):
            return parity
    worst = int(differences.argmax())
    rows = [(row, position) for row, (_, answer) in enumerate(sequences) for position in range(len(answer))]
    row, position = rows[worst]
    raise GateError(
        f"the Hugging Face model {hf_dir} {between} differ by {float(differences.max()):.3g} nats a token (mean "
        f"{float(differences.mean()):.3g}; allowed {bound.largest:.3g}, mean {bound.mean:.3g}), most at answer token {position} of sequence {row}: "
        "weights or config.json were altered, or a model.transformer setting has no Hugging Face form"
    )


def _differences(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    difference = (left - right).abs()
    # NaN compares false with everything: it must count as the largest difference, not as none.
    return torch.where(difference.isnan(), torch.inf, difference)
