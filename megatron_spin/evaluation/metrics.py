"""The measures of ``eval.json`` as pure functions of answers and log-probs. No torch.

A share over sampled answers is a mean over prompts of each prompt's own mean. Its standard error counts prompts, not
samples: answers to one prompt are not independent.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from megatron_spin.evaluation.record import AnswerMeasures, Mean, PatternMeasures

NGRAM = 4
"""Tokens in a row that must occur again to count as a repetition."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer, real or generated."""

    token_ids: list[int]
    """The response with its end token, if it ended."""
    text: str
    """The same decoded, without special tokens."""
    truncated: bool
    """Whether it was cut before its end token."""


def mean(values: Sequence[float]) -> Mean:
    """Mean of one number per prompt, and its standard error (None for fewer than two)."""
    count = len(values)
    if not count:
        return Mean(None, None)
    # fsum rounds once, so the mean does not depend on the order of the prompts.
    value = math.fsum(values) / count
    if count == 1:
        return Mean(value, None)
    variance = math.fsum((item - value) ** 2 for item in values) / (count - 1)
    return Mean(value, math.sqrt(variance / count))


def found(pattern: re.Pattern[str], text: str) -> str | None:
    """What the one group of ``pattern`` first finds in ``text``, stripped of white space; None if it finds nothing."""
    match = pattern.search(text)
    return match.group(1).strip() if match and match.group(1) is not None else None


def exact_match(real: Answer, generated: Answer, pattern: re.Pattern[str] | None) -> bool:
    """Whether ``pattern`` finds something and the same in both texts; without one, whether all token ids are equal."""
    if pattern is None:
        return real.token_ids == generated.token_ids
    answer = found(pattern, real.text)
    # A pattern that finds nothing in either text is no match.
    return answer is not None and answer == found(pattern, generated.text)


def share(samples: Sequence[Sequence[bool]]) -> Mean:
    """Share of true entries; ``samples`` has one sequence of K judgements per prompt."""
    return mean([sum(judgements) / len(judgements) for judgements in samples])


def repeated_fraction(answer: Answer) -> float:
    """Share of the answer's 4-grams of tokens that occur earlier in it: 0 without repetition, near 1 for a loop."""
    ids = [int(token) for token in answer.token_ids]
    ngrams = list(zip(*(ids[i:] for i in range(NGRAM)), strict=False))
    if not ngrams:
        return 0.0
    return 1 - len(set(ngrams)) / len(ngrams)


def measure_answers(
    real: Sequence[Answer],
    greedy: Sequence[Answer],
    sampled: Sequence[Sequence[Answer]],
    *,
    answer_pattern: re.Pattern[str] | None,
    patterns: Mapping[str, re.Pattern[str]],
) -> AnswerMeasures:
    """All that answers tell without log-probs.

    Args:
        real, greedy: one answer per prompt.
        sampled: K sampled answers to each prompt, in the order of ``real``.
    """
    matches, lengths, cut, repeated, identical = [], [], [], [], []
    for answer, samples in zip(real, sampled, strict=True):
        matches.append([exact_match(answer, sample, answer_pattern) for sample in samples])
        lengths.append(sum(len(sample.token_ids) for sample in samples) / len(samples))
        cut.append([sample.truncated for sample in samples])
        repeated.append(sum(map(repeated_fraction, samples)) / len(samples))
        identical.append([sample.token_ids == answer.token_ids for sample in samples])
    greedy_matches = []
    for answer, guess in zip(real, greedy, strict=True):
        greedy_matches.append(exact_match(answer, guess, answer_pattern))
    by_pattern = {}
    for name, pattern in patterns.items():
        by_pattern[name] = _measure_pattern(pattern, real, sampled, matches)
    return AnswerMeasures(
        exact_match_sampled=share(matches),
        exact_match_greedy=mean(greedy_matches),
        mean_response_tokens=mean(lengths).value,
        mean_real_tokens=mean([len(answer.token_ids) for answer in real]).value,
        truncated_fraction=share(cut).value,
        truncated_fraction_greedy=mean([answer.truncated for answer in greedy]).value,
        repeated_fraction=mean(repeated).value,
        repeated_fraction_greedy=mean([repeated_fraction(answer) for answer in greedy]).value,
        repeated_fraction_real=mean([repeated_fraction(answer) for answer in real]).value,
        identical_fraction=share(identical).value,
        patterns=by_pattern,
    )


def _measure_pattern(
    pattern: re.Pattern[str],
    real: Sequence[Answer],
    sampled: Sequence[Sequence[Answer]],
    matches: Sequence[Sequence[bool]],
) -> PatternMeasures:
    """How often ``pattern`` is found, and the exact match of all sampled answers with it and without it.

    ``matches`` has the exact match of each of ``sampled``.
    """
    marks = [[pattern.search(sample.text) is not None for sample in samples] for samples in sampled]
    right_with: list[bool] = []
    right_without: list[bool] = []
    for of_prompt, matches_of_prompt in zip(marks, matches, strict=True):
        for mark, right in zip(of_prompt, matches_of_prompt, strict=True):
            (right_with if mark else right_without).append(right)
    return PatternMeasures(
        sampled=share(marks).value,
        real=mean([pattern.search(answer.text) is not None for answer in real]).value,
        exact_match_with=mean(right_with).value,
        exact_match_without=mean(right_without).value,
    )


def nll_per_token(logps: Sequence[float], tokens: Sequence[int]) -> Mean:
    """Negative log-likelihood of the real answers over all their tokens, in nats per token.

    The error is the standard error of this ratio.

    Args:
        logps: summed log-prob of each real answer.
        tokens: number of tokens of each.
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
    policy_other: Sequence[float],
    opponent_other: Sequence[float],
    *,
    beta: float,
) -> list[float]:
    """The margin t of each pair, in nats.

    t = beta * [(log p_theta(y|x) - log p_opponent(y|x)) - (log p_theta(y'|x) - log p_opponent(y'|x))], where y is the
    real answer and y' the one that it is compared with.
    """
    result = []
    for real, real_opponent, other, other_opponent in zip(
        policy_real, opponent_real, policy_other, opponent_other, strict=True
    ):
        result.append(beta * ((real - real_opponent) - (other - other_opponent)))
    return result
