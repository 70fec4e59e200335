"""Training pairs: what is kept, how it is counted, and that what is read is what was written."""

import dataclasses
from pathlib import Path

import pytest

from megatron_spin.data.pairs import BuiltPairs, Pair, PairsManifest, load_pairs, previous_pairs, save_pairs
from megatron_spin.data.rows import Row, hash_rows, load_rows, save_rows
from megatron_spin.errors import DataError, RunDirError
from megatron_spin.io import write_json
from tests.support.tables import hashed_line_by_line, to_parquet

ANSWERS = ("real", "generated")


def save(directory: Path, built: BuiltPairs) -> PairsManifest:
    return save_pairs(directory, built, answers=ANSWERS, opponent="o", data="d")


def generated(iteration: int) -> list[Pair]:
    """Three pairs: answers that differ, equal ones, and a generated answer that was cut."""
    return [
        Pair(4, iteration, [1, 5], ([6, 2], [7, 2]), "stop"),
        Pair(0, iteration, [1], ([6, 2], [6, 2]), "stop"),
        Pair(9, iteration, [1, 8], ([6, 6], [7, 7]), "length"),
    ]


def test_keep_and_drop_truncated_answers() -> None:
    kept = BuiltPairs(generated(0), truncated="keep")
    assert [pair.index for pair in kept] == [4, 0, 9]
    assert kept.counts == {"own": 3, "previous": 0, "truncated": 1, "dropped": 0, "identical": 1}
    dropped = BuiltPairs(generated(0), truncated="drop")
    assert [pair.index for pair in dropped] == [4, 0]
    assert dropped.counts == {"own": 2, "previous": 0, "truncated": 1, "dropped": 1, "identical": 1}


def test_none_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the opponent's 1 answers ended"):
        save(tmp_path, BuiltPairs(generated(0)[2:], truncated="drop"))
    assert list(tmp_path.iterdir()) == []


def test_previous_own_pairs_come_behind_and_only_once(tmp_path: Path) -> None:
    """Iteration 2 reuses what iteration 1 generated, not what iteration 1 itself reused of iteration 0."""
    first = BuiltPairs(generated(0), truncated="keep")
    second = BuiltPairs(generated(1)[:2], truncated="keep", previous=list(first))
    assert [pair.iteration for pair in second] == [1, 1, 0, 0, 0]
    assert second.counts["previous"] == 3
    save(tmp_path, second)
    previous = previous_pairs(tmp_path, iteration=1, data="d", answers=ANSWERS)
    assert list(previous) == generated(1)[:2]
    with pytest.raises(RunDirError, match="other data"):
        previous_pairs(tmp_path, iteration=1, data="e", answers=ANSWERS)


def test_round_trip_and_identity(tmp_path: Path) -> None:
    """The identity is that of every version before: a run of an earlier version continues."""
    manifest = save(tmp_path, BuiltPairs(iter(generated(3)), truncated="keep"))
    pairs, read = load_pairs(tmp_path)
    assert list(pairs) == generated(3)
    assert list(pairs[1:]) == generated(3)[1:]
    assert read == manifest
    assert manifest.num_pairs == 3
    assert manifest.identity == hashed_line_by_line([pair.values() for pair in generated(3)])


def test_pairs_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    save(tmp_path, BuiltPairs(generated(0), truncated="keep"))
    to_parquet(tmp_path / "pairs.arrow")
    assert list(load_pairs(tmp_path)[0]) == generated(0)
    save(tmp_path, BuiltPairs(generated(1), truncated="keep"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "pairs.arrow"]
    assert list(load_pairs(tmp_path)[0]) == generated(1)


@pytest.mark.parametrize("earlier", [False, True])
def test_tampered_pairs_are_refused(tmp_path: Path, earlier: bool) -> None:
    save(tmp_path, BuiltPairs(generated(0), truncated="keep"))
    manifest = (tmp_path / "manifest.json").read_text()
    pairs = list(load_pairs(tmp_path)[0])
    pairs[2].generated_ids[1] += 1  # one token of one pair
    save(tmp_path, BuiltPairs(pairs, truncated="keep"))
    (tmp_path / "manifest.json").write_text(manifest)
    if earlier:
        to_parquet(tmp_path / "pairs.arrow")
    with pytest.raises(RunDirError, match=r"is not what its manifest.json says"):
        load_pairs(tmp_path)


def test_three_answers_make_the_round_trip(tmp_path: Path) -> None:
    answers = ("real", "generated", "initial")
    pairs = [Pair(4, 1, [1, 5], ([6, 2], [7, 2], [8]), "stop")]
    manifest = save_pairs(tmp_path, BuiltPairs(pairs, truncated="keep"), answers=answers, opponent="o", data="d")
    assert manifest.answers == answers
    assert list(load_pairs(tmp_path)[0]) == pairs


def test_other_answers_than_the_objective_compares_are_refused(tmp_path: Path) -> None:
    """The columns of an objective that was edited since must not be taken for those of today."""
    save(tmp_path, BuiltPairs(generated(0), truncated="keep"))
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
    manifest = dataclasses.asdict(save(tmp_path, BuiltPairs(generated(0), truncated="keep")))
    del manifest["answers"]
    write_json(tmp_path / "manifest.json", manifest)
    assert list(load_pairs(tmp_path)[0]) == generated(0)


def test_rows_round_trip_and_damage(tmp_path: Path) -> None:
    rows = [Row(3, [1, 2], [5, 2], False), Row(0, [1], [7], True)]
    path = tmp_path / "train.arrow"
    save_rows(path, rows)
    assert list(load_rows(path)) == rows
    assert hash_rows(rows) == hashed_line_by_line([list(vars(row).values()) for row in rows])
    assert hash_rows(rows) != hash_rows(rows[::-1])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunDirError, match="damaged"):
        load_rows(path)
    with pytest.raises(RunDirError, match="missing"):
        load_rows(tmp_path / "none.arrow")
