"""The opponent's log-probs of every pair: computed once, cached, and checked before they are trusted.

The policy at step 0 is the opponent, so no second model is ever held: the very model that will be trained scores all pairs first, on the
path, in the shapes and in the precision of training.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from tqdm import tqdm

from megatron_spin.data.batches import Example, collate, microbatch_indices
from megatron_spin.errors import GateError
from megatron_spin.io import atomic_writer, read_json, sha256, write_json
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.pipeline import run_schedule, sum_over_ranks
from megatron_spin.spin.losses import loss_at_zero
from megatron_spin.training.forward_step import score_forward_step

FLOAT_NOISE = 2e-6
"""Relative rounding of an fp32 sum of log-probs: what the gate grants even where scoring twice showed no difference."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """How global batches are cut; the same for scoring and training."""

    global_batch_size: int
    micro_batch_size: int
    length: int


def score(
    model: Sequence[torch.nn.Module],
    examples: Sequence[Example],
    indices: np.ndarray,
    *,
    shape: BatchShape,
    dims: ParallelDims,
    progress: bool = False,
) -> np.ndarray:
    """Summed log-probs of the responses of ``examples[indices]``, [len(indices), r] float32, on every rank; a collective."""
    count, kinds = len(indices), len(examples[0].responses)
    fill = -count % shape.global_batch_size
    padded = np.concatenate([indices, np.full(fill, indices[0], dtype=indices.dtype)])
    scores = np.zeros((len(padded), kinds), dtype=np.float32)
    bar = tqdm(total=count, desc="scoring", unit="pair", disable=not (progress and dims.rank == 0))
    for start in range(0, len(padded), shape.global_batch_size):
        positions = np.arange(start, start + shape.global_batch_size)
        own = microbatch_indices(
            positions, micro_batch_size=shape.micro_batch_size, dp_rank=dims.dp_rank, dp_size=dims.dp_size
        )
        batches = [
            collate([examples[padded[i]] for i in part], length=shape.length, device=dims.device) for part in own
        ]
        collected = run_schedule(score_forward_step(), model, batches, forward_only=True)
        local = torch.zeros(shape.global_batch_size, kinds, device=dims.device)
        for part, logps in zip(own, collected, strict=False):  # the earlier pipeline stages collect nothing
            local[torch.from_numpy(part - start)] = logps.reshape(kinds, len(part)).T
        scores[positions] = sum_over_ranks(local, dims).cpu().numpy()
        bar.update(min(shape.global_batch_size, count - start))
    bar.close()
    return scores[:count]


@dataclasses.dataclass(frozen=True)
class ScoreCache:
    """``scores.safetensors`` and its manifest in an iteration's ``pairs/``, keyed by opponent, pairs and numerics."""

    directory: Path
    key: dict[str, Any]

    @property
    def file(self) -> Path:
        return self.directory / "scores.safetensors"

    @property
    def manifest(self) -> Path:
        return self.directory / "scores.json"

    def load(self) -> np.ndarray | None:
        """The scores, [N, 2] float32 (real, generated), or None where there are none for this key.

        Raises:
            GateError: the file is not the one that its manifest describes.
        """
        if not self.manifest.exists():
            return None
        manifest = read_json(self.manifest)
        if manifest["key"] != self.key:
            return None
        if not self.file.exists() or sha256(self.file) != manifest["sha256"]:
            raise GateError(
                f"opponent scores {self.file} were altered after scoring (SHA-256 differs): delete the file and run again to score anew"
            )
        tensors = safetensors.numpy.load_file(self.file)
        return np.stack([tensors["real_logps"], tensors["generated_logps"]], axis=1)

    def save(self, scores: np.ndarray) -> None:
        """Writes scores [N, 2], then the manifest that makes them count."""
        self.manifest.unlink(missing_ok=True)
        tensors = {
            "real_logps": np.ascontiguousarray(scores[:, 0]),
            "generated_logps": np.ascontiguousarray(scores[:, 1]),
        }
        with atomic_writer(self.file, "wb") as file:
            file.write(safetensors.numpy.save(tensors))
        write_json(self.manifest, {"key": self.key, "sha256": sha256(self.file), "num_pairs": len(scores)})


@dataclasses.dataclass(frozen=True)
class OpponentGate:
    """The policy is the opponent before step 1: what that permits the first batch to show."""

    tolerance: float
    """Nats by which a fresh score may differ from a cached one."""
    difference: float
    """Nats by which it did differ, at most."""
    real_nll: float
    """Mean over the first batch's pairs of the real answer's negative log-likelihood, nats a token."""

    def check_first_loss(self, value: float, *, beta: float, loss: str, sft_weight: float = 0.0) -> None:
        """The first batch's loss must be loss(0), within beta times the noise of the two answers of a pair.

        With ``sft_weight`` it must be that much of :attr:`real_nll` more, within the same noise of the real answers.

        Raises:
            GateError: it is not.
        """
        expected = loss_at_zero(loss) + sft_weight * self.real_nll
        allowed = (2 * beta + sft_weight) * self.tolerance + 1e-6 * expected
        if not abs(value - expected) <= allowed:
            likelihood = f" + {sft_weight:g} * {self.real_nll:.7f}" if sft_weight else ""
            raise GateError(
                f"the first loss is {value:.7f}, not {loss}(0){likelihood} = {expected:.7f} within {allowed:.1e}: "
                "scoring and training do not compute the same function; nothing was trained"
            )


def check_scores(
    cached: np.ndarray,
    model: Sequence[torch.nn.Module],
    examples: Sequence[Example],
    batch: np.ndarray,
    *,
    shape: BatchShape,
    dims: ParallelDims,
) -> OpponentGate:
    """Scores the first training batch twice more, in two orders: their difference is the noise, and the cache must agree within it.

    Args:
        cached: [N, r] scores of all examples.
        batch: example indices of the first training batch, in its order.

    Raises:
        GateError: a cached score is off by more than twice the noise plus fp32 rounding, naming the pair.
    """
    fresh = score(model, examples, batch, shape=shape, dims=dims)
    again = score(model, examples, batch[::-1], shape=shape, dims=dims)[::-1]
    noise = float(np.abs(fresh - again).max())
    tolerance = 2 * noise + FLOAT_NOISE * float(np.abs(fresh).max())
    difference = np.abs(fresh - cached[batch])
    worst = np.unravel_index(np.nanargmax(np.where(np.isfinite(difference), difference, np.inf)), difference.shape)
    if not np.isfinite(difference).all() or difference[worst] > tolerance:
        kind = ("real", "generated")[worst[1]]
        raise GateError(
            f"the opponent's score of pair {batch[worst[0]]} ({kind}) is {cached[batch][worst]:.6f}, but the policy at step 0, which is the "
            f"opponent, gives {fresh[worst]:.6f}; allowed difference {tolerance:.1e} nats: delete pairs/scores.* and run again, "
            "or find what changed the weights"
        )
    lengths = np.array([len(examples[i].responses[0]) for i in batch])
    return OpponentGate(tolerance, float(difference.max()), float(np.mean(-fresh[:, 0].astype(np.float64) / lengths)))
