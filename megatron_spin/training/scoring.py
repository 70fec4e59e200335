"""The opponent's log-probs of every answer: computed once, cached, and checked before they are trusted.

The policy at step 0 is the opponent, so no second model is ever held: the model that will be trained scores all answers
first, on the path, in the layout and in the precision of training.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from megatron_spin.data.batcher import Batcher
from megatron_spin.errors import GateError
from megatron_spin.io import atomic_writer, read_json, sha256, write_json
from megatron_spin.log import Progress
from megatron_spin.parallel.collectives import on_rank_zero
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.pipeline import collect_logps, run_schedule, sum_over_ranks
from megatron_spin.processes import Ranks

FLOAT_NOISE = 2e-6
"""Relative rounding of an fp32 sum of log-probs: what the gate grants even where scoring twice showed no difference."""


def score(
    model: Sequence[torch.nn.Module],
    batcher: Batcher,
    indices: np.ndarray,
    *,
    batch_size: int,
    dims: ParallelDims,
    progress: bool = False,
) -> np.ndarray:
    """Summed log-probs of the answers of the examples ``indices``, in nats; a collective.

    Args:
        batch_size: examples per pass over all ranks, a multiple of micro-batch size times data parallel size.

    Returns:
        [len(indices), r] fp32, on every rank.
    """
    count = len(indices)
    fill = -count % batch_size
    padded = np.concatenate([indices, np.full(fill, indices[0], dtype=indices.dtype)])
    scores = np.zeros((len(padded), batcher.num_answers), dtype=np.float32)
    with Progress("scoring", total=count, unit="prompt", shown=progress and dims.rank == 0) as bar:
        for start in range(0, len(padded), batch_size):
            batches = batcher.microbatches(padded[start : start + batch_size])
            collected = run_schedule(collect_logps(), model, batches, forward_only=True)
            local = torch.zeros(batch_size, batcher.num_answers, device=dims.device)
            if collected:  # on the last pipeline stage
                for batch, logps in zip(batches, collected, strict=True):
                    local[torch.from_numpy(batch.rows)] = logps
            scores[start : start + batch_size] = sum_over_ranks(local, dims).cpu().numpy()
            bar.update(min(batch_size, count - start))
    return scores[:count]


@dataclasses.dataclass(frozen=True)
class ScoreCache:
    """``scores.safetensors`` and its manifest in an iteration's ``pairs/``, keyed by opponent, pairs and numerics.

    Rank 0 reads and writes for all ranks.
    """

    directory: Path
    answers: tuple[str, ...]
    """Names of the columns."""
    key: dict[str, Any]
    cut: list[int]
    """What decides which answers share a microbatch, and so the rounding of their scores."""
    stack: dict[str, Any]
    """Device, kernels and versions, on which the rounding depends as well."""

    @property
    def file(self) -> Path:
        return self.directory / "scores.safetensors"

    @property
    def manifest(self) -> Path:
        return self.directory / "scores.json"

    def load(self, ranks: Ranks, *, any_cut: bool) -> np.ndarray | None:
        """The scores, [N, r] fp32, or None if there are none for this key; a collective.

        Args:
            any_cut: scores of another cut or stack will do. A training that continues keeps those that its steps so
                far used. One that begins is checked against them, within a noise that this cut on this stack decides.

        Raises:
            GateError: the file is not the one that its manifest describes.
        """
        return on_rank_zero(ranks, lambda: self._read(any_cut))

    def _read(self, any_cut: bool) -> np.ndarray | None:
        if not self.manifest.exists():
            return None
        manifest = read_json(self.manifest)
        if manifest["key"] != self.key:
            return None
        if not any_cut and (manifest.get("cut"), manifest.get("stack")) != (self.cut, self.stack):
            return None
        if not self.file.exists() or sha256(self.file) != manifest["sha256"]:
            raise GateError(
                f"opponent scores {self.file} were altered after scoring (SHA-256 differs): "
                "delete the file and run again to score anew"
            )
        tensors = safetensors.numpy.load_file(self.file)
        columns = [tensors[f"{answer}_logps"] for answer in self.answers]
        return np.stack(columns, axis=1)

    def save(self, scores: np.ndarray, ranks: Ranks) -> None:
        """Writes scores [N, r], then the manifest that makes them count; a collective."""
        on_rank_zero(ranks, lambda: self._write(scores))

    def _write(self, scores: np.ndarray) -> None:
        self.manifest.unlink(missing_ok=True)
        tensors = {}
        for column, answer in enumerate(self.answers):
            tensors[f"{answer}_logps"] = np.ascontiguousarray(scores[:, column])
        with atomic_writer(self.file, "wb") as file:
            file.write(safetensors.numpy.save(tensors))
        digest = sha256(self.file)
        made_with = {"key": self.key, "cut": self.cut, "stack": self.stack}
        write_json(self.manifest, {**made_with, "sha256": digest, "num_pairs": len(scores)})


@dataclasses.dataclass(frozen=True)
class CheckedScores:
    """What scoring the first batch anew showed."""

    fresh: np.ndarray
    """[b, r] fp32: the policy's scores of the first batch."""
    tolerance: float
    """Nats by which a fresh score may differ from a cached one."""
    difference: float
    """Nats by which it did differ, at most."""


def check_scores(
    cached: np.ndarray | None,
    model: Sequence[torch.nn.Module],
    batcher: Batcher,
    batch: np.ndarray,
    *,
    answers: Sequence[str],
    dims: ParallelDims,
) -> CheckedScores:
    """Scores the first training batch twice more, in two cuts: their difference is the noise, and the cache must agree.

    The second cut has one prompt per microbatch and the reverse order, so its matrices and its padding differ, as
    those of the scoring pass do from training's.

    Args:
        cached: [N, r] scores of all examples; None if the objective needs none.
        batch: example indices of the first training batch, in its order.
        answers: names of the r columns.

    Raises:
        GateError: a cached score is off by more than twice the noise plus fp32 rounding; the message names the pair.
    """
    fresh = score(model, batcher, batch, batch_size=len(batch), dims=dims)
    other_cut = dataclasses.replace(batcher, micro_batch_size=1)
    again = score(model, other_cut, batch[::-1], batch_size=len(batch), dims=dims)[::-1]
    noise = float(np.abs(fresh - again).max())
    tolerance = 2 * noise + FLOAT_NOISE * float(np.abs(fresh).max())
    if cached is None:
        return CheckedScores(fresh, tolerance, difference=0.0)
    difference = np.abs(fresh - cached[batch])
    finite = np.where(np.isfinite(difference), difference, np.inf)
    worst = np.unravel_index(np.argmax(finite), finite.shape)
    # Written so that a tolerance of NaN refuses.
    if not finite[worst] <= tolerance:
        pair, answer = batch[worst[0]], answers[int(worst[1])]
        raise GateError(
            f"the opponent's score of pair {pair} ({answer}) is {cached[batch][worst]:.6f}, but the policy at step 0, "
            f"which is the opponent, gives {fresh[worst]:.6f}; allowed difference {tolerance:.1e} nats: "
            "delete pairs/scores.* and run again, or find what changed the weights"
        )
    return CheckedScores(fresh, tolerance, difference=float(finite[worst]))
