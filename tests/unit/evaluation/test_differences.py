"""What tells real and generated answers apart, on answers made to differ in known ways."""

import random
import zlib

import pytest

from megatron_spin.evaluation.differences import differences, phrases
from megatron_spin.evaluation.metrics import Answer
from megatron_spin.evaluation.record import Mean
from megatron_spin.report.diagnosis import Diagnosis, lines, verdict


def answers(texts: list[str], *, truncated: int = 0) -> list[Answer]:
    """Answers whose token ids are as many as their words and an end token; the first ``truncated`` ones have none."""
    return [
        Answer(
            [zlib.crc32(word.encode()) % 1000 for word in text.split()] + [1] * (i >= truncated), text, i < truncated
        )
        for i, text in enumerate(texts)
    ]


def sentences(seed: int, count: int, opening: float) -> list[str]:
    draw = random.Random(seed)
    return [
        ("I guess it is " if draw.random() < opening else "Then ") + " ".join(draw.choices("abcdefgh", k=6)) + f" {i} ."
        for i in range(count)
    ]


def test_phrases() -> None:
    assert phrases("It is 12 .") == {"It", "is", "0", ".", "It is", "is 0", "0 .", "It is 0", "is 0 ."}


def test_a_habit_of_the_model_is_found_and_nothing_else() -> None:
    found = differences(answers(sentences(0, 300, 0.2)), answers(sentences(1, 300, 0.4)))
    named = {phrase.text: phrase for phrase in found.phrases}
    habit = next(phrase for text, phrase in named.items() if text in "I guess it is")
    assert (
        habit.z < -3.5
        and habit.real == pytest.approx(0.2, abs=0.06)
        and habit.generated == pytest.approx(0.4, abs=0.06)
    )
    assert all(set(text.split()) & {"I", "guess", "it", "is", "Then"} for text in named), named


def test_two_samples_of_the_same_have_no_distinctive_phrase() -> None:
    for seed in range(5):
        found = differences(answers(sentences(10 + seed, 300, 0.3)), answers(sentences(20 + seed, 300, 0.3)))
        assert not found.phrases, seed


def test_lengths_ends_and_identity() -> None:
    real = answers(["a b c", "a b", "a", "a b c d"])
    generated = answers(["a b c", "a", "b b b", "a b c"], truncated=1)
    found = differences(real, generated)
    assert (found.length_real.value, found.length_generated.value) == (3.5, pytest.approx(3.25))
    assert found.length_difference.value == pytest.approx(0.25)
    assert (found.ended_real, found.ended_generated, found.identical) == (1.0, 0.75, 0.0)


def test_where_all_held_out_answers_are_equal_there_is_nothing_to_learn() -> None:
    same = answers(["a b"] * 4)
    assert (
        verdict(Diagnosis(differences(same, same), 10, 100, None, None, 1.0))[-1]
        == "No held-out pair has two different answers: there is nothing to learn."
    )


@pytest.mark.parametrize(
    ("accuracy", "error", "words"),
    [(0.55, 0.03, "no better than chance"), (0.7, 0.03, "carries over to other prompts.")],
)
def test_the_verdict_follows_the_measured_accuracy(accuracy: float, error: float, words: str) -> None:
    same = answers(["a b"] * 4)
    result = Diagnosis(differences(same, same), 10, 100, accuracy, error, 0.25)
    said = verdict(result)
    assert said[0].startswith("100.0% of the generated answers equal")
    assert words in said[1]
    assert said[2].startswith("No phrase")
    assert lines(result)[0] == ["tokens of an answer", "3.0", "3.0"]
    assert result.differences.length_difference == Mean(0.0, 0.0)
