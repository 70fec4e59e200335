"""Shards: what a line holds, and that answers to other prompts are refused."""

import json
from pathlib import Path

import pytest

from megatron_spin.data.rows import Row
from megatron_spin.errors import RunDirError
from megatron_spin.generation.engine import Completion
from megatron_spin.generation.shards import GeneratedRow, Origin, ShardStore, plan_shards, shard_seed

ROWS = [Row(4, [1, 5], [6, 2], False), Row(0, [1], [6, 6], True), Row(9, [1, 8], [7, 2], False)]
ANSWERS = [Completion([7, 2], "stop"), Completion([7, 7], "length"), Completion([2], "stop")]


def test_lines_of_a_shard_keep_their_form(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, Origin(opponent="o", data="d", iteration=1, settings={"top_p": 1.0}))
    first, second = plan_shards(ROWS, shard_size=2, seed=0, iteration=1)
    store.write(first, ANSWERS[:2])
    store.write(second, ANSWERS[2:])
    assert (tmp_path / "shard_00000.jsonl").read_text() == (
        '{"index":4,"prompt_ids":[1,5],"real_ids":[6,2],"generated_ids":[7,2],"finish_reason":"stop"}\n'
        '{"index":0,"prompt_ids":[1],"real_ids":[6,6],"generated_ids":[7,7],"finish_reason":"length"}\n'
    )
    manifest = json.loads((tmp_path / "shard_00001.json").read_text())
    assert list(manifest) == ["opponent", "data", "iteration", "settings", "shard", "seed", "rows", "sha256"]
    assert store.is_done(first)
    assert store.is_done(second)
    assert list(store.read([first, second]))[2] == GeneratedRow(9, [1, 8], [7, 2], [2], "stop")


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, Origin(opponent="o", data="d", iteration=0, settings={}))
    [shard] = plan_shards(ROWS, shard_size=3, seed=0, iteration=0)
    store.write(shard, ANSWERS)
    [other] = plan_shards(ROWS[::-1], shard_size=3, seed=0, iteration=0)
    with pytest.raises(RunDirError, match="does not hold the answers to its prompts"):
        list(store.read([other]))


def test_seeds_differ_between_shards_and_iterations() -> None:
    seeds = {shard_seed(seed, iteration, number) for seed in (0, 1) for iteration in range(3) for number in range(50)}
    assert len(seeds) == 300
    assert max(seeds) < 2**31
