"""Prompt and answer ids: BOS once, the end token once, the same ids whoever asks."""

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_spin.data import templates
from megatron_spin.data.templates import Template, decode, end_token_id, ends_inside, load_tokenizer, tokenizer_sha
from megatron_spin.errors import CheckpointError, DataError
from tests.support.tiny import BOS, END_OF_TURN, EOS, SPECIAL, tiny_tokenizer

BOS_ID, EOS_ID, TURN_ID = (SPECIAL.index(token) for token in (BOS, EOS, END_OF_TURN))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(path)
    return path


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, template: Template, prompt: str, system: str | None = None
) -> list[int]:
    [found] = templates.prompt_ids(tokenizer, template, [(prompt, system)])
    return found


def answer_ids(tokenizer: PreTrainedTokenizerFast, answer: str, end: int) -> list[int]:
    [found] = templates.answer_ids(tokenizer, [answer], end)
    return found


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_instruction_is_the_papers_template(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert prompt_ids(tokenizer, "instruction", "w1 w2") == [
        BOS_ID,
        *ids(tokenizer, "### Instruction: w1 w2 ### Response:"),
    ]
    assert prompt_ids(tokenizer, "instruction", "w1", "w9") == [
        BOS_ID,
        *ids(tokenizer, "### Instruction: w9 w1 ### Response:"),
    ]


def test_none_takes_the_prompt_as_it_stands(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert prompt_ids(tokenizer, "none", "w1 w2") == [BOS_ID, *ids(tokenizer, "w1 w2")]
    assert prompt_ids(tokenizer, "none", f"{BOS} w1") == [BOS_ID, *ids(tokenizer, "w1")], (
        "BOS that the text brings along comes once"
    )


def test_chat_has_bos_once_and_ends_where_the_answer_begins(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert prompt_ids(tokenizer, "chat", "w1") == [BOS_ID, *ids(tokenizer, f"user : w1 {END_OF_TURN} assistant :")]


def test_tokenizer_without_bos(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, bos=False)
    assert prompt_ids(tokenizer, "none", "w1") == ids(tokenizer, "w1")


def test_a_tokenizer_that_appends_eos_does_not_end_the_prompt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
    )
    assert tokenizer("w1")["input_ids"][-1] == EOS_ID
    assert prompt_ids(tokenizer, "none", "w1 w2") == [BOS_ID, *ids(tokenizer, "w1 w2")]


@pytest.mark.parametrize("text", ["w1 w2", f"w1 w2 {EOS}", f"w1 w2 {EOS} {EOS}"])
def test_answer_ends_with_the_end_token_exactly_once(directory: Path, text: str) -> None:
    tokenizer = load_tokenizer(directory)
    answer = answer_ids(tokenizer, text, EOS_ID)
    assert answer == [*ids(tokenizer, "w1 w2"), EOS_ID]
    assert not ends_inside(answer, EOS_ID)


def test_end_token_inside_an_answer_is_noticed(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert ends_inside(answer_ids(tokenizer, f"w1 {EOS} w2", EOS_ID), EOS_ID)


def test_end_token(directory: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert end_token_id(tokenizer, None) == EOS_ID
    assert end_token_id(tokenizer, END_OF_TURN) == TURN_ID
    with pytest.raises(DataError, match="'<eot>' is not a token"):
        end_token_id(tokenizer, "<eot>")
    with pytest.raises(DataError, match="has no EOS token"):
        end_token_id(tiny_tokenizer(tmp_path, eos=False), None)


def test_chat_without_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        prompt_ids(tiny_tokenizer(tmp_path, chat=False), "chat", "w1")


def test_chat_template_that_refuses(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"refuses a prompt .*no system role"):
        prompt_ids(tokenizer, "chat", "w1", "w2")


def test_missing_and_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    tiny_tokenizer(tmp_path)
    before = tokenizer_sha(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert tokenizer_sha(tmp_path) != before
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_an_answer_begins_as_a_model_goes_on_after_a_prompt() -> None:
    """SentencePiece tokenizers put a space before a text that stands alone; no model writes one there."""
    from tokenizers import Tokenizer, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = {token: i for i, token in enumerate(["<unk>", "</s>", "\n", "\u2581", "H", "i", "Hi", "\u2581Hi", ":"])}
    backend = Tokenizer(BPE(letters, [("H", "i"), ("\u2581", "Hi")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert tokenizer("Hi")["input_ids"] == [letters["\u2581Hi"]], (
        "the tokenizer must be one that prepends a space, else this compares nothing"
    )
    assert answer_ids(tokenizer, "Hi", letters["</s>"]) == [letters["Hi"], letters["</s>"]]


def test_decoded_texts_have_no_special_tokens(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert decode(tokenizer, [[BOS_ID, *ids(tokenizer, "w1 w2"), EOS_ID], [EOS_ID]]) == ["w1 w2", ""]
