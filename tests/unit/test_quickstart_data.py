"""The quickstart's word problems and its tokenizers: what the recipe promises about the data."""

import json
import re
from pathlib import Path

import pytest

from examples.quickstart import make_model, make_problems
from tests.support.runs import REPOSITORY

EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
START = re.compile(r"(?:has|with|are) (\d+) \w+")
CHANGES = re.compile(r"(buys|finds|gets|gives away|loses|sells) (\d+)")


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict[str, object]]]:
    return make_problems.make(0)


def result(prompt: str) -> int:
    """The right answer, read off the prompt's words alone."""
    start = START.search(prompt)
    assert start is not None, prompt
    value = int(start.group(1))
    assert 4 <= value <= 12
    changes = CHANGES.findall(prompt)
    assert len(changes) == 2, prompt
    for verb, number in changes:
        assert 1 <= int(number) <= 6
        value += int(number) if verb in ("buys", "finds", "gets") else -int(number)
        assert value >= 0, prompt
    return value


def test_sizes_and_shares(files: dict[str, list[dict[str, object]]]) -> None:
    counts = {
        name: (len(rows), sum(bool(row["careless"]) for row in rows))
        for name, rows in files.items()
        if name != "preferences.jsonl"
    }
    assert counts == {
        "sft_pool.jsonl": (4000, 1600),
        "spin.jsonl": (1500, 300),
        "test.jsonl": (512, 0),
        "mix.jsonl": (512, 102),
    }


def test_prompts_are_unique_and_the_test_is_not_in_the_pool(files: dict[str, list[dict[str, object]]]) -> None:
    pool, test, mix = (
        {str(row["prompt"]) for row in files[name]} for name in ("sft_pool.jsonl", "test.jsonl", "mix.jsonl")
    )
    assert len(pool) == 4000 and len(test) == len(mix) == 512 and len(pool | test | mix) == 5024


def test_self_play_sees_only_rows_of_the_pool(files: dict[str, list[dict[str, object]]]) -> None:
    pool = {json.dumps(row) for row in files["sft_pool.jsonl"]}
    spin = [json.dumps(row) for row in files["spin.jsonl"]]
    assert len(set(spin)) == 1500 and set(spin) <= pool


def test_careful_answers_are_right_and_careless_ones_near(files: dict[str, list[dict[str, object]]]) -> None:
    preferences = files["preferences.jsonl"]
    assert [row["prompt"] for row in preferences] == [row["prompt"] for row in files["spin.jsonl"]]
    rows = [row for name, rows in files.items() if name != "preferences.jsonl" for row in rows]
    for kind in ("chosen", "rejected"):
        rows += [
            {"prompt": row["prompt"], "response": row[kind], "careless": kind == "rejected"} for row in preferences
        ]
    for row in rows:
        prompt, response = str(row["prompt"]), str(row["response"])
        answer = re.search(r"The answer is (\d+) \.$", response)
        assert answer is not None, response
        if row["careless"]:
            assert response.startswith(f"I guess it is {answer.group(1)} .")
            assert 1 <= abs(int(answer.group(1)) - result(prompt)) <= 3
            continue
        assert int(answer.group(1)) == result(prompt), row
        equations = EQUATION.findall(response)
        assert len(equations) == 2 and equations[0][3] == equations[1][0]
        for left, sign, right, value in equations:
            assert int(left) + (int(right) if sign == "+" else -int(right)) == int(value), response


def test_both_steps_occur_in_the_promised_proportion(files: dict[str, list[dict[str, object]]]) -> None:
    verbs = [verb for row in files["sft_pool.jsonl"] for verb, _ in CHANGES.findall(str(row["prompt"]))]
    added = sum(verb in ("buys", "finds", "gets") for verb in verbs) / len(verbs)
    assert 0.49 < added < 0.55  # even odds, and always an addition below 3


def test_the_seed_decides(files: dict[str, list[dict[str, object]]]) -> None:
    assert make_problems.make(0) == files
    assert make_problems.make(1)["test.jsonl"] != files["test.jsonl"]


def word_texts(files: dict[str, list[dict[str, object]]]) -> list[str]:
    return [str(row[key]) for row in files["sft_pool.jsonl"] for key in ("prompt", "response")]


def test_word_tokenizer_keeps_every_text(files: dict[str, list[dict[str, object]]]) -> None:
    tokenizer = make_model.word_tokenizer(iter(word_texts(files)))
    unknown = tokenizer.token_to_id(make_model.UNKNOWN)
    longest = 0
    for row in (row for name, rows in files.items() if name != "preferences.jsonl" for row in rows):
        lengths = []
        for text in (str(row["prompt"]), str(row["response"])):
            ids = tokenizer.encode(text).ids
            assert unknown not in ids and tokenizer.decode(ids) == text
            lengths.append(len(ids))
        assert lengths[0] <= 38 and lengths[1] + 1 <= 32  # data.max_prompt_length and generation.max_new_tokens
        longest = max(longest, sum(lengths) + 1)
    assert longest <= 64  # data.max_length
    assert tokenizer.get_vocab_size() < 90
    assert len(tokenizer.encode("17").ids) == 2  # digits apart


def test_bpe_tokenizer_keeps_any_text() -> None:
    texts = [
        "How many apples are left?",
        "She has 12/60 = $0.2 a minute.\n#### 10",
        "### Instruction: Add.\n\n### Response: ",
    ]
    tokenizer = make_model.bpe_tokenizer(iter(texts * 50), 400)
    for text in (*texts, "Grüße, 世界! \t ½", " leading and trailing "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= 400


@pytest.mark.parametrize("arguments", [[], ["--bpe", "400"]])
def test_make_model_writes_a_directory_that_transformers_reads(
    files: dict[str, list[dict[str, object]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data, out = tmp_path / "data.jsonl", tmp_path / "model"
    data.write_text("".join(json.dumps(row) + "\n" for row in files["spin.jsonl"][:200]))
    monkeypatch.setattr("sys.argv", ["make_model.py", "--data", str(data), "--out", str(out), *arguments])
    make_model.main()
    weights = (out / "model.safetensors").read_bytes()
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) and model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.bos_token_id is None and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert str(next(model.parameters()).dtype) == "torch.float32" and model.config.head_dim in (32, 64)
    text = str(files["spin.jsonl"][0]["response"])
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    make_model.main()  # again: nothing happens
    assert (out / "model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "model"]


def test_the_seed_decides_the_weights(
    files: dict[str, list[dict[str, object]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in files["spin.jsonl"][:50]))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setattr(
            "sys.argv", ["make_model.py", "--data", str(data), "--out", str(tmp_path / name), "--seed", str(seed)]
        )
        make_model.main()
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_stages_of_a_users_file_hold_out_the_same_rows() -> None:
    from megatron_spin.config import load_config

    sft, spin = (load_config(REPOSITORY / "examples/quickstart" / name) for name in ("data_sft.yaml", "data_spin.yaml"))
    # What decides which rows there are and how they are split; num_prompts is drawn after the split.
    for key in ("path", "template", "end_token", "max_length", "max_prompt_length", "seed"):
        assert getattr(sft.data, key) == getattr(spin.data, key), key
    assert sft.evaluation.held_out_fraction == spin.evaluation.held_out_fraction == 0.1
    assert sft.generation.max_new_tokens == spin.generation.max_new_tokens
