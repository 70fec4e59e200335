"""``eval.json``: its keys and their order, and files of earlier versions."""

import json
from pathlib import Path

import pytest

from megatron_spin.errors import RunDirError
from megatron_spin.evaluation.record import (
    AnswerMeasures,
    Evaluation,
    LogpMeasures,
    Mean,
    OpponentMeasures,
    PatternMeasures,
)
from megatron_spin.io import write_json

ANSWERS = AnswerMeasures(
    exact_match_sampled=Mean(0.5, 0.1),
    exact_match_greedy=Mean(0.75, None),
    mean_response_tokens=20.5,
    mean_real_tokens=21.25,
    truncated_fraction=0.25,
    truncated_fraction_greedy=0.0,
    repeated_fraction=0.03,
    repeated_fraction_greedy=0.05,
    repeated_fraction_real=0.02,
    identical_fraction=0.125,
    patterns={"careless": PatternMeasures(sampled=0.4, real=0.2, exact_match_with=None, exact_match_without=0.5)},
)
OPPONENT = OpponentMeasures(identity="b" * 64, accuracy=Mean(0.9, 0.02), ties=0.05, margin=Mean(1.5, 0.3))
FIRST = ["model", "num_prompts", "nll_per_token", "nll_per_token_error", "opponent_accuracy", "likelihood"]
AGAINST_OPPONENT = [
    "opponent",
    "opponent_accuracy_error",
    "opponent_ties",
    "opponent_margin",
    "opponent_margin_error",
]
OF_ANSWERS = [
    "exact_match_sampled",
    "exact_match_sampled_error",
    "exact_match_greedy",
    "exact_match_greedy_error",
    "mean_response_tokens",
    "mean_real_tokens",
    "truncated_fraction",
    "truncated_fraction_greedy",
    "repeated_fraction",
    "repeated_fraction_greedy",
    "repeated_fraction_real",
    "identical_fraction",
    "patterns",
]
LAST = ["samples", "seconds"]


def evaluation(opponent: OpponentMeasures | None = OPPONENT) -> Evaluation:
    logps = LogpMeasures(Mean(0.5, 0.01), {"mix": Mean(0.25, None)}, opponent)
    return Evaluation("a" * 64, 12, logps, ANSWERS, samples=3, seconds=1.25)


def test_keys_in_their_order() -> None:
    values = evaluation().to_json()
    assert list(values) == [*FIRST, *AGAINST_OPPONENT, *OF_ANSWERS, *LAST]
    assert values["likelihood"] == {"mix": {"nll_per_token": 0.25, "nll_per_token_error": None}}
    assert list(values["patterns"]["careless"]) == ["sampled", "real", "exact_match_with", "exact_match_without"]


def test_a_model_without_an_opponent_has_only_its_null() -> None:
    values = evaluation(opponent=None).to_json()
    assert list(values) == [*FIRST, *OF_ANSWERS, *LAST]
    assert values["opponent_accuracy"] is None


@pytest.mark.parametrize("opponent", [OPPONENT, None])
def test_what_is_read_is_what_was_written(tmp_path: Path, opponent: OpponentMeasures | None) -> None:
    path = tmp_path / "eval.json"
    write_json(path, evaluation(opponent).to_json())
    assert Evaluation.load(path) == evaluation(opponent)


def test_a_measure_by_its_key() -> None:
    assert evaluation().measure("exact_match_sampled") == Mean(0.5, 0.1)
    assert evaluation().measure("opponent_accuracy") == Mean(0.9, 0.02)
    assert evaluation().measure("num_prompts") == Mean(12, None)
    assert evaluation().measure("no_such_key") == Mean(None, None)


def test_files_of_earlier_versions_lack_some_measures(tmp_path: Path) -> None:
    values = evaluation().to_json()
    for key in (
        "likelihood",
        "opponent_ties",
        "repeated_fraction",
        "repeated_fraction_greedy",
        "truncated_fraction_greedy",
    ):
        del values[key]
    del values["patterns"]["careless"]["exact_match_without"]
    (tmp_path / "eval.json").write_text(json.dumps(values))
    read = Evaluation.load(tmp_path / "eval.json")
    assert read.logps.likelihood == {}
    assert read.logps.opponent is not None
    assert read.logps.opponent.ties is None
    assert read.answers.repeated_fraction is None
    assert read.answers.patterns["careless"].exact_match_without is None
    assert read.answers.exact_match_sampled == Mean(0.5, 0.1)


@pytest.mark.parametrize("text", ["{}", "[]", "null"])
def test_a_file_that_holds_no_evaluation(tmp_path: Path, text: str) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(RunDirError, match="is no evaluation"):
        Evaluation.load(tmp_path / "eval.json")
