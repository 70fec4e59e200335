"""What log-probs of held-out answers tell: their likelihood, and how often the policy beats its opponent."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_spin.config import Config
from megatron_spin.data.rows import Row
from megatron_spin.evaluation.answers import EvaluatedModel
from megatron_spin.evaluation.metrics import margins, mean, nll_per_token
from megatron_spin.evaluation.record import LogpMeasures, Mean, OpponentMeasures
from megatron_spin.hf.logps import TokenIds, hf_token_logps
from megatron_spin.hf.model import choose_device, load_model, release_memory


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the policy is compared with on held-out pairs."""

    opponent: EvaluatedModel
    answers: Sequence[list[int]]
    """The answer that each real answer is compared with, as token ids."""
    beta: float


def measure_logps(
    config: Config,
    model: EvaluatedModel,
    rows: Sequence[Row],
    *,
    likelihood: Mapping[str, Sequence[Row]],
    comparison: Comparison | None,
) -> LogpMeasures:
    """Likelihood of the real answers of ``rows`` and of each file of ``likelihood``, and the comparison if any.

    Raises:
        CheckpointError: a model cannot be loaded.
    """
    held_out = _real_sequences(rows)
    if comparison is not None:
        for row, other in zip(rows, comparison.answers, strict=True):
            held_out.append((row.prompt_ids, other))
    batches = [held_out, *(_real_sequences(of_file) for of_file in likelihood.values())]
    policy, *policy_of_files = _summed_logps(config, model.hf, batches)
    by_file = {}
    for (name, of_file), logps in zip(likelihood.items(), policy_of_files, strict=True):
        by_file[name] = _nll(logps, of_file)
    opponent = None
    if comparison is not None:
        [opponent_logps] = _summed_logps(config, comparison.opponent.hf, [held_out])
        opponent = _compare(rows, comparison, policy, opponent_logps)
    return LogpMeasures(_nll(policy[: len(rows)], rows), by_file, opponent)


def _real_sequences(rows: Sequence[Row]) -> list[tuple[TokenIds, TokenIds]]:
    return [(row.prompt_ids, row.real_ids) for row in rows]


def _nll(logps: Sequence[float], rows: Sequence[Row]) -> Mean:
    return nll_per_token(logps, [len(row.real_ids) for row in rows])


def _compare(
    rows: Sequence[Row], comparison: Comparison, policy: Sequence[float], opponent: Sequence[float]
) -> OpponentMeasures:
    """``policy`` and ``opponent`` are the log-probs of all real answers, then of all others."""
    count = len(rows)
    pair_margins = margins(policy[:count], opponent[:count], policy[count:], opponent[count:], beta=comparison.beta)
    ties = [list(row.real_ids) == list(other) for row, other in zip(rows, comparison.answers, strict=True)]
    for i, tie in enumerate(ties):
        if tie:
            pair_margins[i] = 0.0  # rounding must not decide who wins a tie
    return OpponentMeasures(
        identity=comparison.opponent.identity,
        accuracy=mean([margin > 0 for margin in pair_margins]),
        ties=mean(ties).value,
        margin=mean(pair_margins),
    )


def _summed_logps(
    config: Config, hf: Path, batches: Sequence[Sequence[tuple[TokenIds, TokenIds]]]
) -> list[list[float]]:
    """Log-prob of each response under the model in ``hf``, in nats, for each list of (prompt, response).

    Each list is batched by itself, so that the same sequences share a batch whatever else is measured.
    """
    device = choose_device(config.device)
    model = load_model(hf, dtype=config.precision.export_dtype, device=device)
    sums = []
    for sequences in batches:
        logps = hf_token_logps(model, sequences, batch_size=config.evaluation.batch_size, device=device)
        sums.append([float(token_logps.double().sum()) for token_logps in logps])
    del model
    release_memory(device)
    return sums
