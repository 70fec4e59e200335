"""The numbers of ``eval.json`` as pure functions of answers and log-probs. No torch.

A share over sampled answers is a mean over prompts of each prompt's own mean, so its standard error counts prompts, not samples: answers to
one prompt are not independent.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

NGRAM = 4
"""Tokens that must come again in a row to count as a repetition."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer, real or generated."""

    token_ids: list[int]
    """The response with its end token, if it ended."""
    text: str
    """The same decoded, without special tokens."""
    truncated: bool
    """Whether it was cut before its end token."""


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over prompts with its standard error; both None over no prompts."""

    value: float | None
    error: float | None


def mean(values: Sequence[float]) -> Mean:
    """Mean of one number a prompt and the standard error of it (None for fewer than two)."""
    count = len(values)
    if not count:
        return Mean(None, None)
    value = math.fsum(values) / count
    if count == 1:
        return Mean(value, None)
    variance = math.fsum((item - value) ** 2 for item in values) / (count - 1)
    return Mean(value, math.sqrt(variance / count))


def found(pattern: re.Pattern[str], text: str) -> str | None:
    """What the one group of ``pattern`` finds first in ``text``, without white space around it; None where it finds nothing."""
    match = pattern.search(text)
    return match.group(1).strip() if match and match.group(1) is not None else None


def exact_match(real: Answer, generated: Answer, pattern: re.Pattern[str] | None) -> bool:
    """Whether ``pattern`` finds the same in both texts (and finds something); without one, whether all token ids are equal."""
    if pattern is None:
        return real.token_ids == generated.token_ids
    answer = found(pattern, real.text)
    return answer is not None and answer == found(pattern, generated.text)


def share(samples: Sequence[Sequence[bool]]) -> Mean:
    """Share of true entries; ``samples`` has one sequence of K judgements a prompt."""
    return mean([sum(judgements) / len(judgements) for judgements in samples])


def repeated_fraction(answer: Answer) -> float:
    """Share of the answer's 4-grams of tokens that stood in it before: 0 for one that never repeats itself (or is shorter), near 1 for a loop."""
    ids = [int(token) for token in answer.token_ids]
    ngrams = list(zip(*(ids[i:] for i in range(NGRAM)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def sample_metrics(
    real: Sequence[Answer],
    greedy: Sequence[Answer],
    sampled: Sequence[Sequence[Answer]],
    *,
    answer_pattern: re.Pattern[str] | None,
    patterns: dict[str, re.Pattern[str]],
) -> dict[str, object]:
    """Everything that answers alone tell.

    Args:
        real, greedy: one answer a prompt.
        sampled: K sampled answers of each prompt, in the order of ``real``.
    """
    pairs = list(zip(real, sampled, strict=True))
    matches = share([[exact_match(answer, sample, answer_pattern) for sample in samples] for answer, samples in pairs])
    greedy_matches = mean(
        [exact_match(answer, guess, answer_pattern) for answer, guess in zip(real, greedy, strict=True)]
    )
    lengths = mean([sum(len(sample.token_ids) for sample in samples) / len(samples) for samples in sampled])
    return {
        "exact_match_sampled": matches.value,
        "exact_match_sampled_error": matches.error,
        "exact_match_greedy": greedy_matches.value,
        "exact_match_greedy_error": greedy_matches.error,
        "mean_response_tokens": lengths.value,
        "mean_real_tokens": mean([len(answer.token_ids) for answer in real]).value,
        "truncated_fraction": share([[sample.truncated for sample in samples] for samples in sampled]).value,
        "truncated_fraction_greedy": mean([answer.truncated for answer in greedy]).value,
        "repeated_fraction": mean([sum(map(repeated_fraction, samples)) / len(samples) for samples in sampled]).value,
        "repeated_fraction_greedy": mean([*map(repeated_fraction, greedy)]).value,
        "repeated_fraction_real": mean([*map(repeated_fraction, real)]).value,
        "identical_fraction": share(
            [[sample.token_ids == answer.token_ids for sample in samples] for answer, samples in pairs]
        ).value,
        "patterns": {
            name: _pattern_shares(pattern, real, sampled, answer_pattern) for name, pattern in patterns.items()
        },
    }


def _pattern_shares(
    pattern: re.Pattern[str],
    real: Sequence[Answer],
    sampled: Sequence[Sequence[Answer]],
    answer_pattern: re.Pattern[str] | None,
) -> dict[str, float | None]:
    """How often ``pattern`` is found, and the exact match among all sampled answers with it and without it (null where there are none)."""
    has = [[pattern.search(sample.text) is not None for sample in samples] for samples in sampled]
    judged = [
        (mark, exact_match(answer, sample, answer_pattern))
        for answer, samples, marks in zip(real, sampled, has, strict=True)
        for sample, mark in zip(samples, marks, strict=True)
    ]
    return {
        "sampled": share(has).value,
        "real": mean([pattern.search(answer.text) is not None for answer in real]).value,
        "exact_match_with": mean([right for mark, right in judged if mark]).value,
        "exact_match_without": mean([right for mark, right in judged if not mark]).value,
    }


def nll_per_token(logps: Sequence[float], tokens: Sequence[int]) -> Mean:
    """Negative log-likelihood of the real answers over all their tokens, in nats a token, with the standard error of that ratio.

    Args:
        logps: summed log-prob of each real answer.
        tokens: how many tokens each has.
    """
    total, count = sum(tokens), len(tokens)
    if not total:
        return Mean(None, None)
    value = -math.fsum(logps) / total
    if count == 1:
        return Mean(value, None)
    # Delta method for a ratio of sums: the residuals -logp - value * tokens have mean zero.
    residuals = math.fsum((-logp - value * length) ** 2 for logp, length in zip(logps, tokens, strict=True))
    return Mean(value, math.sqrt(residuals * count / (count - 1)) / total)


def margins(
    policy_real: Sequence[float],
    opponent_real: Sequence[float],
    policy_generated: Sequence[float],
    opponent_generated: Sequence[float],
    *,
    beta: float,
) -> list[float]:
    """t = beta * [(log p_theta(y|x) - log p_opponent(y|x)) - (log p_theta(y'|x) - log p_opponent(y'|x))] of each pair, in nats."""
    scores = zip(policy_real, opponent_real, policy_generated, opponent_generated, strict=True)
    return [
        beta * ((real - opponent) - (generated - opponent_gen)) for real, opponent, generated, opponent_gen in scores
    ]
