"""Preparation of the data: what is kept, cut, held out and counted, and an error for each thing that is wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_spin.config import from_dict
from megatron_spin.data.preparation import prepare
from megatron_spin.data.rows import load_rows
from megatron_spin.errors import CheckpointError, ConfigError, DataError, SpinError
from megatron_spin.io import read_json
from megatron_spin.phases.prepare import counts_table
from tests.support.tiny import BOS, EOS, SPECIAL, VOCABULARY, sft_rows, tiny_model, tiny_tokenizer, write_jsonl

BOS_ID, EOS_ID = SPECIAL.index(BOS), SPECIAL.index(EOS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(directory)
    return directory


def raw(model: Path, path: Path | str, **data: Any) -> dict[str, Any]:
    return {
        "name": "t",
        "model": {"hf": str(model)},
        "data": {"path": str(path), "template": "none", "max_length": 32, **data},
        "generation": {"max_new_tokens": 6},
        "evaluation": {"held_out_fraction": 0.2, "num_prompts": None},
    }


def test_rows_limits_counts_and_split(model: Path, tmp_path: Path) -> None:
    rows = [
        *sft_rows(30),
        sft_rows(1)[0],  # a prompt that came before
        {"prompt": " ".join(["w1"] * 20), "response": "w2"},
        {"prompt": "w1", "response": f"w2 {EOS} w3"},
        {"prompt": "", "response": "w1"},
        {"prompt": "w1", "response": EOS},
    ]
    config = from_dict(raw(model, write_jsonl(tmp_path / "d.jsonl", rows)))
    prepared = prepare(config)
    counts = prepared.manifest.counts
    assert counts["dropped"] == {"empty_prompt": 1, "empty_answer": 1, "long_prompt": 1, "end_inside": 1}
    assert (counts["read"], counts["duplicates"], counts["held_out"] + counts["kept"]) == (35, 1, 31)
    assert counts["capped"] == sum(row.real_truncated for row in prepared.train + prepared.evaluation) > 0
    train, held = ({tuple(row.prompt_ids) for row in part} for part in (prepared.train, prepared.evaluation))
    assert not train & held
    assert len(held) == 6
    for row in prepared.train + prepared.evaluation:
        assert row.prompt_ids.count(BOS_ID) == 1
        assert row.prompt_ids[0] == BOS_ID
        assert len(row.real_ids) <= 6
        assert (row.real_ids[-1] == EOS_ID) is not row.real_truncated
        assert row.real_ids.count(EOS_ID) == (not row.real_truncated)
        assert len(rows[row.index]["response"].split()) + 1 == len(row.real_ids) or row.real_truncated
    assert prepare(config) == prepared


def test_files_for_their_likelihood_alone(model: Path, tmp_path: Path) -> None:
    files = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", sft_rows(9, seed=seed)))
        for name, seed in (("own", 1), ("other", 2))
    }
    config = raw(model, files["own"])
    config["evaluation"] |= {"likelihood": files, "num_prompts": 4}
    prepared = prepare(from_dict(config))
    assert {name: len(rows) for name, rows in prepared.likelihood.items()} == {"own": 4, "other": 4}
    assert prepared.manifest.likelihood["own"]["identity"] != prepared.manifest.likelihood["other"]["identity"]
    prepared.save(tmp_path)
    assert list(load_rows(tmp_path / "likelihood_other.arrow")) == prepared.likelihood["other"]
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "", "response": "w1"}))
    with pytest.raises(DataError, match=r"evaluation.likelihood.other=.* has no usable row"):
        prepare(from_dict(config))


def test_rows_with_long_answers_are_dropped_rather_than_cut(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", sft_rows(30))
    every = prepare(from_dict(raw(model, path)))
    short = prepare(from_dict(raw(model, path, max_answer_length=6)))
    capped, dropped = every.manifest.counts["capped"], short.manifest.counts["dropped"]
    assert dropped == {"long_answer": capped}
    assert capped > 0
    assert short.manifest.counts["capped"] == 0
    assert all(row.real_ids[-1] == EOS_ID for row in short.train + short.evaluation)
    with pytest.raises(DataError, match="30 answer longer than 1 tokens"):
        prepare(from_dict(raw(model, path, max_answer_length=1)))


def preferences(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": won["prompt"], "chosen": won["response"], "rejected": lost["response"]}
        for won, lost in zip(sft_rows(count), sft_rows(count, seed=5), strict=True)
    ]


def dpo(model: Path, path: Path, **generation: Any) -> dict[str, Any]:
    config = raw(model, path)
    config["generation"] |= generation
    return config | {"training": {"objective": "dpo"}}


def test_held_out_preferences_keep_their_rejected_answers(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", preferences(20))
    config = dpo(model, path, max_new_tokens=20)
    split = prepare(from_dict(config))
    assert len(split.rejected) == len(split.evaluation) == split.manifest.eval_counts["with_rejected"] == 4
    rows = [{**row, "response": "w1"} for row in preferences(20)]  # columns of another format, too
    config["evaluation"] = {"path": str(write_jsonl(tmp_path / "more.jsonl", rows)), "num_prompts": 7}
    given = prepare(from_dict(config))
    assert len(given.evaluation) == 7
    for row, lost in [
        *zip(split.evaluation, split.rejected, strict=True),
        *zip(given.evaluation, given.rejected, strict=True),
    ]:
        assert (row.index, row.prompt_ids) == (lost.index, lost.prompt_ids)
        written = preferences(20)[row.index]
        assert [len(side.real_ids) for side in (row, lost)] == [
            len(written[answer].split()) + 1 for answer in ("chosen", "rejected")
        ]
    given.save(tmp_path)
    assert list(load_rows(tmp_path / "eval_rejected.arrow")) == given.rejected

    config["evaluation"] = {"path": str(write_jsonl(tmp_path / "sft.jsonl", sft_rows(9)))}
    without = prepare(from_dict(config))
    assert without.evaluation
    assert not without.rejected
    without.save(tmp_path / "other")
    assert not (tmp_path / "other/eval_rejected.arrow").exists()


def test_rejected_answers_that_were_cut_can_be_left_out(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", preferences(20))
    keep, drop = (prepare(from_dict(dpo(model, path, truncated=truncated))) for truncated in ("keep", "drop"))
    assert keep.pairs is not None
    assert drop.pairs is not None
    cut = keep.pairs.counts["truncated"]
    assert 0 < cut < 16 == len(list(keep.pairs))
    assert drop.pairs.counts["dropped"] == cut
    assert len(list(drop.pairs)) == 16 - cut
    assert all(pair.finish_reason == "stop" for pair in drop.pairs)
    assert drop.train == keep.train
    assert "pairs left out" in counts_table(drop.manifest, from_dict(dpo(model, path)))


def test_held_out_answers_may_be_longer_than_those_trained_on(model: Path, tmp_path: Path) -> None:
    config = raw(model, write_jsonl(tmp_path / "d.jsonl", sft_rows(30)))
    capped = prepare(from_dict(config))
    config["evaluation"]["max_new_tokens"] = 20
    prepared = prepare(from_dict(config))
    assert prepared.train == capped.train
    assert [row.index for row in prepared.evaluation] == [row.index for row in capped.evaluation]
    assert any(row.real_truncated for row in prepared.train)
    assert not any(row.real_truncated for row in prepared.evaluation)


def test_draw_is_by_seed_and_nested(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", sft_rows(40))
    few, more, other = (
        prepare(from_dict(raw(model, path, num_prompts=n, seed=s))).train for n, s in ((5, 0), (10, 0), (10, 1))
    )
    assert few == more[:5]
    assert len(more) == 10
    assert more != other


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"end_token": "<eot>"}, DataError, "'<eot>' is not a token of the tokenizer"),
        (
            {"end_token": "<|end|>"},
            DataError,
            r"generation_config.json stops generation on eos_token_id=2: set data.end_token",
        ),
        ({"max_length": 512}, ConfigError, "exceeds the model's max_position_embeddings=256"),
        ({"max_prompt_length": 1}, DataError, "none of 20 rows is left to train on .20 prompt longer than 1 tokens"),
    ],
)
def test_refused(model: Path, tmp_path: Path, change: dict[str, Any], error: type[SpinError], message: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", sft_rows(20))
    with pytest.raises(error, match=message):
        prepare(from_dict(raw(model, path, **change)))


def test_model_that_lacks_parts(model: Path, tmp_path: Path) -> None:
    path, copy = write_jsonl(tmp_path / "d.jsonl", sft_rows(3)), tmp_path / "model"
    shutil.copytree(model, copy)
    config = read_json(copy / "config.json")
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY - 85}))
    with pytest.raises(DataError, match="is not below the model's vocab_size=15"):
        prepare(from_dict(raw(copy, path)))
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        prepare(from_dict(raw(copy, path)))
    (copy / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(copy, eos=False)
    with pytest.raises(DataError, match="the tokenizer has no EOS token"):
        prepare(from_dict(raw(copy, path)))
