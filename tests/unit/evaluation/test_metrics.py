"""Held-out metrics against hand-counted values."""

import math
import re

import pytest

from megatron_spin.evaluation.metrics import (
    Answer,
    exact_match,
    found,
    margins,
    mean,
    measure_answers,
    nll_per_token,
    repeated_fraction,
)
from megatron_spin.evaluation.record import PatternMeasures

ANSWER = re.compile(r"The answer is (-?\d+)")


def answer(text: str, *token_ids: int, truncated: bool = False) -> Answer:
    return Answer(list(token_ids), text, truncated)


def test_found_takes_the_group_without_white_space() -> None:
    assert found(re.compile(r"####(.*)"), "x #### 12 ") == "12"
    assert found(ANSWER, "First 5 + 6 = 11 . The answer is 11 .") == "11"
    assert found(ANSWER, "no answer") is None
    assert found(re.compile(r"yes|no(t)?"), "no") is None  # a group that takes no part in the match


def test_exact_match_by_pattern() -> None:
    real = answer("The answer is 15 .", 1, 2)
    assert exact_match(real, answer("I guess . The answer is 15 .", 9), ANSWER)
    assert not exact_match(real, answer("The answer is 16 .", 1, 2), ANSWER)
    assert not exact_match(real, answer("15", 1, 2), ANSWER)
    # A pattern that finds nothing in either must not count as agreement.
    assert not exact_match(answer("a", 1), answer("a", 1), ANSWER)


def test_exact_match_without_pattern_compares_token_ids() -> None:
    assert exact_match(answer("a", 1, 2), answer("b", 1, 2), None)
    assert not exact_match(answer("a", 1, 2), answer("a", 1), None)


def test_mean_and_its_error() -> None:
    assert mean([]).value is None
    assert mean([3.0]).error is None
    result = mean([1.0, 0.0, 1.0, 0.0])
    assert result.value == 0.5
    assert result.error == pytest.approx(math.sqrt((4 * 0.25 / 3) / 4))


def test_nll_is_over_tokens_not_over_answers() -> None:
    result = nll_per_token([-1.0, -9.0], [1, 3])
    assert result.value == pytest.approx(2.5)
    # residuals: 1 - 2.5 = -1.5 and 9 - 7.5 = 1.5
    assert result.error == pytest.approx(math.sqrt(2 * 1.5**2 * 2 / 1) / 4)
    assert nll_per_token([-2.0, -4.0], [1, 2]).error == pytest.approx(0.0)
    assert nll_per_token([], []).value is None


def test_margin_signs() -> None:
    assert margins([-1.0], [-2.0], [-5.0], [-3.0], beta=0.5) == [0.5 * (1.0 + 2.0)]
    assert margins([-1.0], [-2.0], [-1.0], [-2.0], beta=0.5) == [0.0]  # identical answers: neither wins


def test_repeated_fraction_counts_ngrams_that_came_before() -> None:
    assert repeated_fraction(answer("", 1, 2, 3)) == 0.0
    assert repeated_fraction(answer("", *range(20))) == 0.0
    assert repeated_fraction(answer("", *[5] * 20)) == 16 / 17
    assert repeated_fraction(answer("", *[1, 2, 3] * 4)) == pytest.approx(6 / 9)
    assert repeated_fraction(answer("", 1, 2, 3, 4, 9, 1, 2, 3, 4)) == pytest.approx(1 / 6)


def test_measure_answers() -> None:
    real = [answer("First . The answer is 1", 1, 2, 3), answer("The answer is 2", 4, 5)]
    greedy = [answer("The answer is 1", 1), answer("The answer is 3", 1)]
    sampled = [
        [real[0], answer("guess . The answer is 9", 7, 7, 7, 7, 7, truncated=True)],
        [answer("The answer is 2", 8, 8), answer("The answer is 2", 4, 5)],
    ]
    patterns = {"careful": re.compile("First"), "never": re.compile("xyz")}
    result = measure_answers(real, greedy, sampled, answer_pattern=ANSWER, patterns=patterns)
    assert result.exact_match_sampled.value == 0.75
    assert result.exact_match_greedy.value == 0.5
    assert result.mean_response_tokens == 3.0
    assert result.mean_real_tokens == 2.5
    assert result.truncated_fraction == 0.25
    assert result.identical_fraction == 0.5
    assert result.truncated_fraction_greedy == 0.0
    assert result.repeated_fraction_greedy == 0.0
    assert result.repeated_fraction_real == 0.0
    # One of the five sevens' two 4-grams is a repetition, in one of 2 x 2 answers.
    assert result.repeated_fraction == pytest.approx(0.5 / 4)
    careful = result.patterns["careful"]
    assert careful.exact_match_without == pytest.approx(2 / 3)
    assert result.patterns == {
        "careful": PatternMeasures(0.25, 0.5, exact_match_with=1.0, exact_match_without=careful.exact_match_without),
        "never": PatternMeasures(0.0, 0.0, exact_match_with=None, exact_match_without=0.75),
    }
