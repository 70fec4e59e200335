"""Tokenization in batches gives the ids, and drops the rows, of tokenization one by one."""

import collections
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from megatron_spin.data.templates import INSTRUCTION, Template, answer_ids, in_parallel, prompt_ids
from megatron_spin.data.tokenization import Limits, tokenize
from tests.support.tiny import BOS, CHAT_TEMPLATE, EOS, tiny_tokenizer, write_jsonl

WORDS = ("self", "play", "fine", "tuning", "answer", "prompt", "über", "数学", "🙂", "1234", "\t", "  ")
AWKWARD = ("", " ", "\n", "\n\n x", "  two", "\r\n", "\x00", BOS, f"{BOS} {BOS}", EOS, f"a{EOS}", f"{EOS} b {EOS}{EOS}")
texts = st.text(max_size=12) | st.sampled_from(AWKWARD) | st.lists(st.sampled_from(WORDS)).map(" ".join)
KINDS = ("byte-level", "byte-level, EOS", "sentencepiece", "slow")


@functools.cache
def tokenizer_of(kind: str) -> Any:
    """A byte-level BPE with BOS, and with EOS, too; one that puts a space before each text; one without Rust."""
    if kind == "slow":
        return ByT5Tokenizer()
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "sentencepiece":
        alphabet = ["\u2581", "\n", *"abcdefghijklmnopqrstuvwxyz"]
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS) * 3, INSTRUCTION, "x\n\n"], trainer)
    ids = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    last = f" {EOS}" if kind == "byte-level, EOS" else ""
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A{last}", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_alone(tokenizer: Any, template: Template, prompt: str, system: str | None) -> list[int]:
    """The ids of one prompt: those of the text within those with special tokens, up to the end of the text."""
    if template == "chat":
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": prompt})
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    text = prompt if system is None else f"{system}\n\n{prompt}"
    text = INSTRUCTION.format(prompt=text) if template == "instruction" else text
    full, inner = list(tokenizer(text)["input_ids"]), plain(tokenizer, text)
    starts = range(len(full) - len(inner) + 1)
    start = next(start for start in starts if full[start : start + len(inner)] == inner)
    ids = full[: start + len(inner)]
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def answer_alone(tokenizer: Any, answer: str, end: int) -> list[int]:
    anchor, behind = plain(tokenizer, "\n"), plain(tokenizer, f"\n{answer}")
    ids = behind[len(anchor) :] if behind[: len(anchor)] == anchor else plain(tokenizer, answer)
    while ids and ids[-1] == end:
        ids.pop()
    return [*ids, end]


@pytest.mark.parametrize("kind", KINDS)
@given(prompts=st.lists(st.tuples(texts, st.none() | texts), max_size=6))
def test_prompts(kind: str, prompts: list[tuple[str, str | None]]) -> None:
    tokenizer = tokenizer_of(kind)
    templates: list[Template] = ["instruction", "none"]
    for template in [*templates, "chat"] if kind != "slow" else templates:
        expected = [prompt_alone(tokenizer, template, prompt, system) for prompt, system in prompts]
        with in_parallel():
            assert prompt_ids(tokenizer, template, prompts) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(answers=st.lists(texts, max_size=6))
def test_answers(kind: str, answers: list[str]) -> None:
    tokenizer = tokenizer_of(kind)
    end = tokenizer.eos_token_id
    with in_parallel():
        assert answer_ids(tokenizer, answers, end) == [answer_alone(tokenizer, answer, end) for answer in answers]


def test_rows_and_counts_of_a_file_are_those_of_its_rows(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte-level")
    rows = []
    for number, prompt in enumerate((*AWKWARD, *WORDS, "z" * 20)):
        for answer in AWKWARD[number % 3 :: 3]:
            rows.append({"prompt": prompt, "chosen": answer + WORDS[number % len(WORDS)], "rejected": answer or "no"})
    end = tokenizer.eos_token_id
    long = Limits(end=end, vocabulary=400, prompt=9, answer=6, total=12, whole_answer=None)
    short = Limits(end=end, vocabulary=400, prompt=5, answer=3, total=8, whole_answer=4)
    path = write_jsonl(tmp_path / "all.jsonl", rows)
    found = tokenize(path, tokenizer, {long, short}, template="none", rejected="needed")
    for limits in (long, short):
        together = found[limits]
        alone, rejected = [], []
        dropped: collections.Counter[str] = collections.Counter()
        for row in rows:
            path = write_jsonl(tmp_path / "one.jsonl", [row])
            one = tokenize(path, tokenizer, [limits], template="none", rejected="needed")[limits]
            alone += [(row.prompt_ids, row.real_ids, row.real_truncated) for row in one.rows]
            rejected += [row.real_ids for row in one.rejected.values()]
            dropped.update(one.counts["dropped"])
        assert [(row.prompt_ids, row.real_ids, row.real_truncated) for row in together.rows] == alone
        assert [row.real_ids for row in together.rejected.values()] == rejected
        assert together.counts["dropped"] == dropped
        assert len({*dropped} & {"long_prompt", "empty_answer", "empty_prompt", "end_inside"}) == 4


FORKS = """
import os, sys
from pathlib import Path
from megatron_spin.data.templates import answer_ids, in_parallel, load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]))
with in_parallel():
    before = answer_ids(tokenizer, ["w1 w2"] * 4000, 2)
child = os.fork()
if child == 0:
    os._exit(0 if answer_ids(tokenizer, ["w1 w2"] * 4000, 2) == before else 1)
assert os.waitpid(child, 0)[1] == 0
print(os.environ["TOKENIZERS_PARALLELISM"])
"""


@pytest.mark.parametrize("users", [None, "false"])
def test_a_process_may_fork_afterwards(tmp_path: Path, users: str | None) -> None:
    """Its child tokenizes, nothing warns, and what the user has set stays."""
    tiny_tokenizer(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment |= {} if users is None else {"TOKENIZERS_PARALLELISM": users}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.strip() == (users or "off")
    assert "fork" not in result.stderr
