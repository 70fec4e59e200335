"""Text to token ids and back. No torch.

One function builds the prompts of generation and of training, so that the two cannot differ.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_spin.errors import CheckpointError, DataError
from megatron_spin.hf.assets import tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["instruction", "chat", "none"]

INSTRUCTION = "### Instruction: {prompt}\n\n### Response: "
"""The paper's template."""

_NO_LIMIT = 10**12
"""For ``model_max_length``: lengths are checked row by row in data/tokenization.py, and a tokenizer only warns once."""


_PARALLELISM = "TOKENIZERS_PARALLELISM"
"""The tokenizers library reads it at each call."""
_OFF = "off"
"""What the library takes for false, and what users, who write ``false``, do not."""


def load_tokenizer(hf_dir: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local Hugging Face directory; never asks a hub.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # But for in_parallel. Left unset, the library warns whenever a process forks after it has used its threads.
    os.environ.setdefault(_PARALLELISM, _OFF)
    from transformers import AutoTokenizer  # here, not above: it takes seconds, for which --help must not wait

    if not tokenizer_files(hf_dir):
        raise CheckpointError(
            f"{hf_dir} holds no tokenizer (tokenizer.json or tokenizer.model): copy the model's tokenizer files there"
        )
    try:
        # False, not left out: transformers would ask on the terminal whether to run code that the directory brings.
        tokenizer = AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way on a damaged file
        problem = f"the tokenizer in {hf_dir} cannot be loaded ({type(error).__name__}: {error})"
        raise CheckpointError(f"{problem}: copy its files again") from None
    tokenizer.model_max_length = _NO_LIMIT
    return tokenizer


@contextlib.contextmanager
def in_parallel() -> Iterator[None]:
    """Lets the tokenizers library use its threads in the block, unless TOKENIZERS_PARALLELISM is set by the user.

    Afterwards they are off again: a process that forks would leave its child without them.
    """
    if os.environ.get(_PARALLELISM) != _OFF:
        yield
        return
    os.environ[_PARALLELISM] = "true"
    try:
        yield
    finally:
        os.environ[_PARALLELISM] = _OFF


def decode(tokenizer: "PreTrainedTokenizerBase", sequences: Iterable[Sequence[int]]) -> list[str]:
    """The text of each sequence of token ids, without special tokens."""
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in sequences]


def tokenizer_sha(hf_dir: Path) -> str:
    """sha256 over names and bytes of the tokenizer's files, hexadecimal."""
    digest = hashlib.sha256()
    for path in tokenizer_files(hf_dir):
        digest.update(f"{path.name}\t{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def end_token_id(tokenizer: "PreTrainedTokenizerBase", end_token: str | None) -> int:
    """Id of the token that ends an answer: ``end_token``, or the tokenizer's EOS where it is None.

    Raises:
        DataError: the tokenizer has no such token.
    """
    if end_token is None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no EOS token and data.end_token is null: set data.end_token to the token that ends "
                "an answer"
            )
        return int(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    if end_token not in vocabulary:
        eos = f", or null for its EOS {tokenizer.eos_token!r}" if tokenizer.eos_token else ""
        raise DataError(f"data.end_token={end_token!r} is not a token of the tokenizer: give one that is{eos}")
    return int(vocabulary[end_token])


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", template: Template, prompts: Sequence[tuple[str, str | None]]
) -> list[list[int]]:
    """Token ids of each prompt in ``template``, up to where the answer begins.

    BOS comes once, if the tokenizer or its chat template adds it. The chat template takes the system message as a
    message; the other templates put it before the prompt, with an empty line between.

    Args:
        prompts: (prompt, system message or None).

    Raises:
        DataError: ``chat`` and the tokenizer has no chat template, or its template refuses these messages.
    """
    if template == "chat":
        return _chat_ids(tokenizer, prompts)
    texts = []
    for prompt, system in prompts:
        text = prompt if system is None else f"{system}\n\n{prompt}"
        texts.append(INSTRUCTION.format(prompt=text) if template == "instruction" else text)
    return _with_leading_special_tokens(tokenizer, texts)


def answer_ids(tokenizer: "PreTrainedTokenizerBase", answers: Sequence[str], end: int) -> list[list[int]]:
    """Token ids of each answer as a model writes them after a prompt, then the end token exactly once.

    The end token comes once even if the text ends with it; it may still occur inside, see :func:`ends_inside`. No other
    special tokens are added.

    A SentencePiece tokenizer puts a space before a text on its own. A model that continues a prompt never writes that
    space, and the policy would learn to tell real from generated answers by it. So the answer is tokenized after a line
    break, whose own tokens are then removed.
    """
    [anchor] = _plain_ids(tokenizer, ["\n"])
    found = _plain_ids(tokenizer, [f"\n{answer}" for answer in answers])
    # These tokenizers merge the line break into the answer's first token.
    merged = [number for number, ids in enumerate(found) if ids[: len(anchor)] != anchor]
    found = [ids[len(anchor) :] for ids in found]
    for number, ids in zip(merged, _plain_ids(tokenizer, [answers[number] for number in merged]), strict=True):
        found[number] = ids
    for ids in found:
        while ids and ids[-1] == end:
            ids.pop()
        ids.append(end)
    return found


def ends_inside(ids: list[int], end: int) -> bool:
    """Whether the end token occurs before the last position: generation would have stopped there."""
    return end in ids[:-1]


def _plain_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without special tokens around it."""
    if not texts:
        return []
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _chat_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[tuple[str, str | None]]) -> list[list[int]]:
    if not tokenizer.chat_template:
        raise DataError(
            "data.template=chat, but the tokenizer has no chat template: use data.template=instruction or none"
        )
    conversations = []
    for prompt, system in prompts:
        messages = [{"role": "system", "content": system}] if system is not None else []
        conversations.append([*messages, {"role": "user", "content": prompt}])
    if not conversations:
        return []
    try:
        # The template itself writes BOS; apply_chat_template does not add a second one.
        found = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # jinja2 and the template's own raise_exception
        problem = f"the tokenizer's chat template refuses a prompt ({type(error).__name__}: {error})"
        raise DataError(f"{problem}: use another data.template") from None
    return [[int(token) for token in ids] for ids in found]


def _with_leading_special_tokens(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Each text with the special tokens that the tokenizer puts before it (BOS), without those after it (EOS, SEP)."""
    if not texts:
        return []
    if tokenizer.is_fast:
        # One pass instead of two: the mask tells the tokens that were added from those of the text.
        batch = tokenizer(
            list(texts), return_special_tokens_mask=True, return_attention_mask=False, return_token_type_ids=False
        )
        whole = batch["input_ids"]
        plain = []
        for ids, mask in zip(whole, batch["special_tokens_mask"], strict=True):
            plain.append([token for token, is_added in zip(ids, mask, strict=True) if not is_added])
    else:
        whole = tokenizer(list(texts))["input_ids"]
        plain = _plain_ids(tokenizer, texts)
    bos = tokenizer.bos_token_id
    return [_up_to_the_end_of(list(inner), list(ids), bos) for inner, ids in zip(plain, whole, strict=True)]


def _up_to_the_end_of(plain: list[int], full: list[int], bos: int | None) -> list[int]:
    """The start of ``full`` up to the end of ``plain`` within it, with BOS at most once."""
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            ids = full[: start + len(plain)]
            break
    else:
        raise DataError(
            "the tokenizer does not keep a prompt in one piece when it adds special tokens: such tokenizers are not "
            "supported"
        )
    # A prompt text that already begins with BOS would otherwise get it twice.
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
