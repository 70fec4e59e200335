"""Training pairs: what is kept, how it is counted, and that what is read is what was written."""

import dataclasses
from pathlib import Path

import pytest

from megatron_spin.data.pairs import Pair, build_pairs, load_pairs, previous_pairs, save_pairs
from megatron_spin.data.rows import Row, hash_rows, hash_values, load_rows, save_rows
from megatron_spin.errors import DataError, RunDirError
from megatron_spin.io import write_json

ANSWERS = ("real", "generated")


def generated(iteration: int) -> list[Pair]:
    """Three pairs: answers that differ, equal ones, and a generated answer that was cut."""
    return [
        Pair(4, iteration, [1, 5], ([6, 2], [7, 2]), "stop"),
        Pair(0, iteration, [1], ([6, 2], [6, 2]), "stop"),
        Pair(9, iteration, [1, 8], ([6, 6], [7, 7]), "length"),
    ]


def test_keep_and_drop_truncated_answers() -> None:
    kept = build_pairs(generated(0), truncated="keep")
    assert [pair.index for pair in kept.pairs] == [4, 0, 9]
    assert kept.counts == {"own": 3, "previous": 0, "truncated": 1, "dropped": 0, "identical": 1}
    dropped = build_pairs(generated(0), truncated="drop")
    assert [pair.index for pair in dropped.pairs] == [4, 0]
    assert dropped.counts == {"own": 2, "previous": 0, "truncated": 1, "dropped": 1, "identical": 1}


def test_none_left() -> None:
    with pytest.raises(DataError, match="none of the opponent's 1 answers ended"):
        build_pairs(generated(0)[2:], truncated="drop")


def test_previous_own_pairs_come_behind_and_only_once(tmp_path: Path) -> None:
    """Iteration 2 reuses what iteration 1 generated, not what iteration 1 itself reused of iteration 0."""
    first = build_pairs(generated(0), truncated="keep")
    second = build_pairs(generated(1)[:2], truncated="keep", previous=first.pairs)
    assert [pair.iteration for pair in second.pairs] == [1, 1, 0, 0, 0]
    assert second.counts["previous"] == 3
    save_pairs(tmp_path, second, answers=ANSWERS, opponent="o", data="d")
    previous = previous_pairs(tmp_path, iteration=1, data="d", answers=ANSWERS)
    assert [pair.iteration for pair in previous] == [1, 1]
    with pytest.raises(RunDirError, match="other data"):
        previous_pairs(tmp_path, iteration=1, data="e", answers=ANSWERS)


def test_round_trip_and_identity(tmp_path: Path) -> None:
    built = build_pairs(generated(3), truncated="keep")
    manifest = save_pairs(tmp_path, built, answers=ANSWERS, opponent="o", data="d")
    pairs, read = load_pairs(tmp_path)
    assert pairs == built.pairs == generated(3)
    assert read == manifest
    assert manifest.num_pairs == 3
    assert manifest.identity == hash_values(pair.values() for pair in built.pairs)


def test_tampered_pairs_are_refused(tmp_path: Path) -> None:
    built = build_pairs(generated(0), truncated="keep")
    save_pairs(tmp_path, built, answers=ANSWERS, opponent="o", data="d")
    pairs, _ = load_pairs(tmp_path)
    pairs[2].generated_ids[1] += 1  # one token of one pair
    changed = type(built)(pairs, built.counts)
    manifest = (tmp_path / "manifest.json").read_text()
    save_pairs(tmp_path, changed, answers=ANSWERS, opponent="o", data="d")
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(RunDirError, match=r"is not what its manifest.json says"):
        load_pairs(tmp_path)


def test_three_answers_make_the_round_trip(tmp_path: Path) -> None:
    answers = ("real", "generated", "initial")
    built = build_pairs([Pair(4, 1, [1, 5], ([6, 2], [7, 2], [8]), "stop")], truncated="keep")
    manifest = save_pairs(tmp_path, built, answers=answers, opponent="o", data="d")
    assert manifest.answers == answers
    assert load_pairs(tmp_path)[0] == built.pairs


def test_other_answers_than_the_objective_compares_are_refused(tmp_path: Path) -> None:
    """The columns of an objective that was edited since must not be taken for those of today."""
    save_pairs(tmp_path, build_pairs(generated(0), truncated="keep"), answers=ANSWERS, opponent="o", data="d")
    for other in (("real",), ("generated", "real"), ("real", "generated", "initial")):
        with pytest.raises(RunDirError, match="holds the answers real, generated, but the objective compares"):
            load_pairs(tmp_path, answers=other)
    with pytest.raises(RunDirError, match="the objective compares real, initial"):
        previous_pairs(tmp_path, iteration=0, data="d", answers=("real", "initial"))


@pytest.mark.parametrize("text", ["[]", '{"opponent": "o"}', '{"opponent": "o", "other": 1}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunDirError, match=r"manifest.json is damaged"):
        load_pairs(tmp_path)


def test_a_manifest_that_names_no_answers_has_two(tmp_path: Path) -> None:
    built = build_pairs(generated(0), truncated="keep")
    manifest = dataclasses.asdict(save_pairs(tmp_path, built, answers=ANSWERS, opponent="o", data="d"))
    del manifest["answers"]
    write_json(tmp_path / "manifest.json", manifest)
    assert load_pairs(tmp_path)[0] == built.pairs


def test_rows_round_trip_and_damage(tmp_path: Path) -> None:
    rows = [Row(3, [1, 2], [5, 2], False), Row(0, [1], [7], True)]
    path = tmp_path / "train.parquet"
    save_rows(path, rows)
    assert load_rows(path) == rows
    assert hash_rows(rows) != hash_rows(rows[::-1])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunDirError, match="damaged"):
        load_rows(path)
    with pytest.raises(RunDirError, match="missing"):
        load_rows(tmp_path / "none.parquet")
