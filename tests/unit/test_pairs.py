"""Training pairs: what is kept, how it is counted, and that what is read is what was written."""

import pyarrow.parquet as pq
import pytest

from megatron_spin.data.pairs import Pair, build_pairs, load_pairs, previous_pairs, save_pairs
from megatron_spin.data.rows import Row, hash_rows, load_rows, save_rows
from megatron_spin.errors import DataError, RunDirError

GENERATED = [
    {"index": 4, "prompt_ids": [1, 5], "real_ids": [6, 2], "generated_ids": [7, 2], "finish_reason": "stop"},
    {"index": 0, "prompt_ids": [1], "real_ids": [6, 2], "generated_ids": [6, 2], "finish_reason": "stop"},
    {"index": 9, "prompt_ids": [1, 8], "real_ids": [6, 6], "generated_ids": [7, 7], "finish_reason": "length"},
]


def test_keep_and_drop_truncated_answers():
    kept = build_pairs(GENERATED, iteration=0, truncated="keep")
    assert [pair.index for pair in kept.pairs] == [4, 0, 9]
    assert kept.counts == {"own": 3, "previous": 0, "truncated": 1, "dropped": 0, "identical": 1}
    dropped = build_pairs(GENERATED, iteration=0, truncated="drop")
    assert [pair.index for pair in dropped.pairs] == [4, 0]
    assert dropped.counts == {"own": 2, "previous": 0, "truncated": 1, "dropped": 1, "identical": 1}


def test_none_left():
    with pytest.raises(DataError, match="none of the opponent's 1 answers ended"):
        build_pairs(GENERATED[2:], iteration=0, truncated="drop")


def test_previous_own_pairs_come_behind_and_only_once(tmp_path):
    """Iteration 2 reuses what iteration 1 generated, not what iteration 1 itself reused of iteration 0."""
    first = build_pairs(GENERATED, iteration=0, truncated="keep")
    second = build_pairs(GENERATED[:2], iteration=1, truncated="keep", previous=first.pairs)
    assert [pair.iteration for pair in second.pairs] == [1, 1, 0, 0, 0]
    assert second.counts["previous"] == 3
    save_pairs(tmp_path, second, opponent="o", data="d")
    previous = previous_pairs(tmp_path, iteration=1, data="d")
    assert [pair.iteration for pair in previous] == [1, 1]
    with pytest.raises(RunDirError, match="other data"):
        previous_pairs(tmp_path, iteration=1, data="e")


def test_round_trip_and_identity(tmp_path):
    built = build_pairs(GENERATED, iteration=3, truncated="keep")
    manifest = save_pairs(tmp_path, built, opponent="o", data="d")
    pairs, read = load_pairs(tmp_path)
    assert pairs == built.pairs == [Pair(iteration=3, **row) for row in GENERATED]
    assert read == manifest
    assert manifest["num_pairs"] == 3
    assert manifest["identity"] == hash_rows(built.pairs)


def test_tampered_pairs_are_refused(tmp_path):
    built = build_pairs(GENERATED, iteration=0, truncated="keep")
    save_pairs(tmp_path, built, opponent="o", data="d")
    table = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    table[2]["generated_ids"][1] += 1  # one token of one pair
    changed = type(built)([Pair(**row) for row in table], built.counts)
    manifest = (tmp_path / "manifest.json").read_text()
    save_pairs(tmp_path, changed, opponent="o", data="d")
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(RunDirError, match=r"is not what its manifest.json says"):
        load_pairs(tmp_path)


def test_rows_round_trip_and_damage(tmp_path):
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
