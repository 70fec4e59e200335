"""Guards between iterations: is the policy that was just trained fit to become the opponent? Pure, no torch.

:mod:`megatron_spin.config.guards` says what each guard measures and why its threshold is what it is. Here each guard is
one function of the same name that looks at what an iteration left. A difference must exceed its threshold by more than
two standard errors where they are known, so that noise does not trip a guard; a measure that is not a number always
trips it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from megatron_spin.config.guards import Action, GuardsConfig
from megatron_spin.data.pairs import PairsManifest
from megatron_spin.evaluation.record import Evaluation, Mean
from megatron_spin.run.step_metrics import StepMetrics

Outcome: TypeAlias = Literal["pass", "warn", "rollback", "stop"]
ORDER: tuple[Outcome, ...] = ("pass", "warn", "rollback", "stop")
"""Of several verdicts the last of these is the outcome: where one guard stops, only the user decides."""

LAST_SHARE = 0.1
"""Share of an iteration's steps, and at least ``STREAK`` of them, that count as the last steps."""
STREAK = 3
"""Consecutive steps that must agree before they tell something about the policy and not about one batch."""
WON_SHARE = 0.99
"""Share of different pairs that must be won from then on for an opponent to be beaten."""
NLL_FLOOR = 0.01
"""Nats per token (0.1: nats per answer) below which a likelihood is so good that its relative changes do not matter."""
STANDARD_ERRORS = 2.0
"""Standard errors by which a difference must exceed its threshold."""


class UnseenError(Exception):
    """A guard could not look: what it measures is not there. The message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Measures:
    """What one iteration left to look at."""

    beta: float
    """The iteration's ``spin.beta``."""
    steps: Sequence[StepMetrics]
    pairs: PairsManifest
    """Of the training pairs."""
    policy: Evaluation | None = None
    """What was measured of the iteration's policy; None if there is no evaluation."""
    opponent: Evaluation | None = None
    """What was measured of its opponent: the previous iteration, or the SFT model."""

    def evaluated(self, key: str) -> tuple[float, float]:
        """What ``eval.json`` has under ``key``, of the policy and of the opponent.

        Raises:
            UnseenError: one of the two has no such number.
        """
        policy, opponent = self._means(key)
        if policy.value is None or opponent.value is None:
            raise UnseenError(f"eval.json has no {key}")
        return float(policy.value), float(opponent.value)

    def errors(self, key: str) -> tuple[float, float]:
        """The standard errors of :meth:`evaluated`; 0 where they are not known. Raises as it does."""
        policy, opponent = self._means(key)
        return float(policy.error or 0.0), float(opponent.error or 0.0)

    def _means(self, key: str) -> tuple[Mean, Mean]:
        if self.policy is None or self.opponent is None:
            raise UnseenError("there is no evaluation: give evaluation.path or evaluation.held_out_fraction")
        return self.policy.measure(key), self.opponent.measure(key)

    def column(self, key: str) -> list[float]:
        """``key`` of every step.

        Raises:
            UnseenError: it is not reported.
        """
        values = []
        for row in self.steps:
            value = row.values.get(key)
            if value is None:
                raise UnseenError(f"metrics.jsonl has no {key}")
            values.append(float(value))
        if not values:
            raise UnseenError(f"metrics.jsonl has no {key}")
        return values


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a guard saw."""

    value: float | None
    """The measure, in the threshold's unit; None if the state it looks for was never reached."""
    tripped: bool
    said: str
    """The measure in words, with what it is compared to."""


@dataclasses.dataclass(frozen=True)
class ShareRise:
    """How far a share of the policy's answers rose above the opponent's."""

    kind: Literal["sampled", "greedy"]
    share: float
    opponent: float
    rise: float
    """Above the opponent's share, or above another share if that is greater."""
    noise: float
    """``STANDARD_ERRORS`` of the difference."""

    @property
    def excess(self) -> float:
        """What the threshold is compared with."""
        return self.rise - self.noise


def real_logps_fall(measures: Measures, threshold: float) -> Reading:
    rewards, margins = measures.column("real_reward"), measures.column("margin")
    real_logps = measures.column("real_logps")
    last = _last(len(rewards))
    changes = [reward / measures.beta for reward in rewards[last:]]
    # A reward is beta times policy minus opponent.
    opponents = [logps - change for logps, change in zip(real_logps[last:], changes, strict=True)]
    opponent, change = _mean(opponents), _mean(changes)
    base = max(-opponent, 10 * NLL_FLOOR)
    rise, noise = -change / base, STANDARD_ERRORS * _error(changes) / base
    margin = _mean(margins[last:])
    margin_rose = not margin <= margins[0]  # so that NaN did
    said = (
        f"log-probs of the real training answers went from {opponent:.4g} to {opponent + change:.4g} nats, "
        f"the margin to {margin:.3g}"
    )
    return Reading(rise, margin_rose and _exceeds(rise - noise, threshold), said)


def nll_rise(measures: Measures, threshold: float) -> Reading:
    nll, opponent = measures.evaluated("nll_per_token")
    errors = measures.errors("nll_per_token")
    base = max(opponent, NLL_FLOOR)
    rise, noise = (nll - opponent) / base, STANDARD_ERRORS * math.hypot(*errors) / base
    said = f"held-out NLL per token is {nll:.4f}, the opponent's {opponent:.4f} ({rise:+.0%})"
    return Reading(rise, _exceeds(rise - noise, threshold), said)


def end_of_answer(measures: Measures, threshold: float) -> Reading:
    worst = _worst(_share_rise(measures, "truncated_fraction"), _share_rise(measures, "truncated_fraction_greedy"))
    said = f"{worst.share:.1%} of {worst.kind} answers do not end, of the opponent's {worst.opponent:.1%}"
    return Reading(worst.rise, _exceeds(worst.excess, threshold), said)


def length(measures: Measures, threshold: float) -> Reading:
    tokens, opponent = measures.evaluated("mean_response_tokens")
    real, _ = measures.evaluated("mean_real_tokens")
    tiny = 1e-9  # answers of no tokens: a factor needs something to divide by
    factor = max(tokens / max(real, opponent, tiny), min(real, opponent) / max(tokens, tiny))
    said = f"sampled answers have {tokens:.1f} tokens, real ones {real:.1f}, the opponent's {opponent:.1f}"
    return Reading(factor, _exceeds(factor, threshold), said)


def repetition(measures: Measures, threshold: float) -> Reading:
    real, _ = measures.evaluated("repeated_fraction_real")
    worst = _worst(
        _share_rise(measures, "repeated_fraction", least=real),
        _share_rise(measures, "repeated_fraction_greedy", least=real),
    )
    said = (
        f"{worst.share:.1%} of the 4-grams of {worst.kind} answers are repetitions, of the opponent's "
        f"{worst.opponent:.1%}, of the real ones' {real:.1%}"
    )
    return Reading(worst.rise, _exceeds(worst.excess, threshold), said)


def converged(measures: Measures, threshold: float) -> Reading:
    identical, count = measures.pairs.counts["identical"], measures.pairs.num_pairs
    share = identical / count
    said = f"{identical} of {count} generated answers equal the real ones ({share:.1%})"
    return Reading(share, _exceeds(share, threshold), said)


def saturated(measures: Measures, threshold: float) -> Reading:
    accuracy, identical, pairs = (measures.column(key) for key in ("accuracy", "identical", "pairs"))
    numbers = measures.column("step")
    # Steps with nothing but equal pairs tell nothing.
    told = [i for i in range(len(numbers)) if identical[i] < 1]
    different = [1 - identical[i] for i in told]
    won = [accuracy[i] for i in told]
    # Half a pair of tolerance: the shares are rounded.
    won_all = [accuracy[i] > 1 - identical[i] - 0.5 / pairs[i] for i in told]
    for start in range(len(told) - STREAK + 1):
        if not all(won_all[start : start + STREAK]):
            continue
        if sum(won[start:]) >= WON_SHARE * sum(different[start:]):
            step = int(numbers[told[start]])
            said = f"from step {step} of {len(numbers)} on the policy won every pair"
            return Reading(step, step <= threshold, said)
    return Reading(None, False, f"in {len(numbers)} steps the policy never won every pair for good")


LOOKS: dict[str, Callable[[Measures, float], Reading]] = {
    "real_logps_fall": real_logps_fall,
    "nll_rise": nll_rise,
    "end_of_answer": end_of_answer,
    "length": length,
    "repetition": repetition,
    "converged": converged,
    "saturated": saturated,
}
"""The reading of each guard of :class:`GuardsConfig`; raises :class:`UnseenError` if what it measures is not there."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one guard found in an iteration."""

    guard: str
    action: Action
    threshold: float
    tripped: bool | None
    """None: it could not look."""
    value: float | None
    """The measure, in the threshold's unit."""
    said: str
    """The measure in words, or why it could not look."""

    @property
    def line(self) -> str:
        """For the user: what was measured, the threshold, what to do."""
        remedy = GuardsConfig().by_name()[self.guard].remedy
        return f"{self.said}; guards.{self.guard}.threshold is {self.threshold:g}: {remedy}"


def judge(guards: GuardsConfig, measures: Measures) -> list[Verdict]:
    """The verdict of every guard that is not ``off``, tripped or not."""
    verdicts = []
    for name, guard in guards.by_name().items():
        if guard.action == "off":
            continue
        try:
            reading = LOOKS[name](measures, guard.threshold)
        except UnseenError as missing:
            verdicts.append(Verdict(name, guard.action, guard.threshold, None, None, str(missing)))
            continue
        verdicts.append(Verdict(name, guard.action, guard.threshold, reading.tripped, reading.value, reading.said))
    return verdicts


def outcome(verdicts: Sequence[Verdict]) -> Outcome:
    """The gravest action of a guard that tripped."""
    tripped = {verdict.action for verdict in verdicts if verdict.tripped}
    return next((grave for grave in reversed(ORDER) if grave in tripped), "pass")


def _exceeds(value: float, threshold: float) -> bool:
    return not value <= threshold  # so that NaN does


def _last(count: int) -> int:
    """Index of the first of the last steps."""
    return max(0, count - max(STREAK, math.ceil(count * LAST_SHARE)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)  # sum, not math.fsum: that raises on inf


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value, whose error is not known."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    # A product, not a power: ** raises when it overflows.
    return math.sqrt(sum((value - mean) * (value - mean) for value in values) / (len(values) - 1) / len(values))


def _share_rise(measures: Measures, key: str, *, least: float = 0.0) -> ShareRise:
    """How far the share ``key`` rose above the greater of the opponent's and ``least``."""
    share, opponent = measures.evaluated(key)
    count, _ = measures.evaluated("num_prompts")
    # Of all quantities between 0 and 1, one that is 0 or 1 has the greatest variance, so this errs on the safe side.
    variance = sum(max(p * (1 - p), 0.0) for p in (share, opponent)) / max(count, 1)
    return ShareRise(
        kind="greedy" if key.endswith("_greedy") else "sampled",
        share=share,
        opponent=opponent,
        rise=share - max(opponent, least),
        noise=STANDARD_ERRORS * math.sqrt(variance),
    )


def _worst(*rises: ShareRise) -> ShareRise:
    """The rise with the greatest excess; one that is not a number is worse than all others."""
    return max(rises, key=lambda rise: math.inf if math.isnan(rise.excess) else rise.excess)
