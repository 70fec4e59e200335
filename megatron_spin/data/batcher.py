"""The batch seam: how a global batch becomes this rank's microbatches.

Scoring, training, the export gate and the tests all ask the same :class:`Batcher`. How tokens are laid out is known
here and nowhere else: callers see :meth:`Microbatch.model_inputs` and :meth:`Microbatch.sum_by_answer`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from megatron_spin.hf.logps import TokenIds as TokenList

TokenIds: TypeAlias = TokenList | np.ndarray
"""Token ids as a list, or as a view of a memory-mapped file."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt with its r answers: the real one alone for SFT, the real one first for objectives that compare."""

    prompt_ids: TokenIds
    answers: tuple[TokenIds, ...]

    @property
    def lengths(self) -> list[int]:
        """Response tokens of each answer."""
        return [len(answer) for answer in self.answers]

    @property
    def identical(self) -> list[bool]:
        """Whether each answer equals the real one token for token."""
        return [np.array_equal(answer, self.answers[0]) for answer in self.answers]

    @property
    def num_tokens(self) -> int:
        """Real tokens of all its sequences; the prompt counts once per answer."""
        return len(self.prompt_ids) * len(self.answers) + sum(self.lengths)

    @property
    def longest(self) -> int:
        """Positions that its longest sequence needs: its tokens less one, because labels are shifted by one."""
        return len(self.prompt_ids) + max(self.lengths) - 1


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """b prompts with r answers each, as n = r * b right-padded sequences of one length s.

    The b real answers come first, then the b second answers in the same order, and so on.
    """

    rows: np.ndarray
    """[b]: the place of each prompt in the global batch that it was cut from."""
    num_answers: int
    """r"""
    input_ids: torch.Tensor
    """[n, s] int64"""
    labels: torch.Tensor
    """[n, s] int64: the next token at each position."""
    position_ids: torch.Tensor
    """[n, s] int64"""
    response_mask: torch.Tensor
    """[n, s] fp32: 1 where the label is a response token, 0 for prompt and padding."""
    identical: torch.Tensor
    """[b, r] bool: whether the answer equals the real one token for token."""
    reference: torch.Tensor | None = None
    """[b, r] fp32: the reference's summed log-probs of the answers; None while scoring or if none are needed."""

    @property
    def shape(self) -> tuple[int, int]:
        """(sequences, positions) that the model is given."""
        sequences, length = self.input_ids.shape
        return sequences, length

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of ``model.forward``, by GPTModel's names.

        There is no mask: every attention here is causal and padding is on the right, so no position ever sees padding.
        """
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": None,
            "labels": self.labels,
        }

    def sum_by_answer(self, token_values: torch.Tensor) -> torch.Tensor:
        """Sums the values of response tokens, [n, s] -> [b, r] fp32; other positions may hold anything, even
        infinity.
        """
        # where, not a product: a padded position may hold an infinite loss, and 0 * inf is NaN.
        sums = torch.where(self.response_mask > 0, token_values.float(), 0.0).sum(dim=1)
        return self._by_answer(sums)

    @property
    def lengths(self) -> torch.Tensor:
        """Response tokens of each answer, [b, r] fp32."""
        return self._by_answer(self.response_mask.sum(dim=1))

    def _by_answer(self, sums: torch.Tensor) -> torch.Tensor:
        """[n] -> [b, r]; the columns stay contiguous, so that sums over prompts round the same for any r."""
        return sums.view(self.num_answers, len(self.rows)).T


@dataclasses.dataclass(frozen=True)
class Batcher:
    """Cuts global batches into this data parallel rank's microbatches; the same cut for scoring and for training."""

    examples: Sequence[Example]
    micro_batch_size: int
    """Prompts per microbatch."""
    alignment: int
    """The length of a microbatch is rounded up to a multiple of this
    (:func:`megatron_spin.parallel.layout.alignment`).
    """
    dp_rank: int
    dp_size: int
    device: torch.device

    @property
    def num_answers(self) -> int:
        """r"""
        return len(self.examples[0].answers)

    def microbatches(self, indices: np.ndarray, reference: np.ndarray | None = None) -> list[Microbatch]:
        """This rank's microbatches of the global batch ``indices``: equally many on every rank.

        Prompts are sorted by their longest sequence, so that long ones do not pad short ones, and dealt to the ranks in
        turn, so that the n-th microbatches of all ranks take about the same time. The longest come first: what runs out
        of memory does so at once.

        Args:
            indices: example indices; their number is a multiple of ``micro_batch_size * dp_size``.
            reference: [N, r] fp32 reference log-probs of all examples, or None.
        """
        lengths = np.array([self.examples[index].longest for index in indices])
        longest_first = np.argsort(-lengths, kind="stable")
        groups = longest_first.reshape(-1, self.micro_batch_size)
        return [self._collate(rows, indices[rows], reference) for rows in groups[self.dp_rank :: self.dp_size]]

    def _collate(self, rows: np.ndarray, chosen: np.ndarray, reference: np.ndarray | None) -> Microbatch:
        """The microbatch of the examples ``chosen``, as long as its own longest sequence, rounded up to the
        alignment.
        """
        examples = [self.examples[index] for index in chosen]
        longest = max(example.longest for example in examples)
        length = -(-longest // self.alignment) * self.alignment
        sequences = []
        for column in range(self.num_answers):
            sequences += [(example.prompt_ids, example.answers[column]) for example in examples]
        # All integers in one array, and so in one copy to the device: the tokens, then where the response begins and
        # ends among the labels, then which answers are identical.
        packed = np.zeros((len(sequences), length + 1 + 3), dtype=np.int64)
        for row, (prompt, answer) in enumerate(sequences):
            end = len(prompt) + len(answer)
            packed[row, : len(prompt)] = prompt
            packed[row, len(prompt) : end] = answer
            packed[row, length + 1 : length + 3] = len(prompt) - 1, end - 1
        by_column = np.array([example.identical for example in examples]).T
        packed[:, length + 3] = by_column.reshape(-1)
        on_device = _to_device(packed, self.device)
        first, end_of_response, identical = on_device[:, length + 1 :].unbind(dim=1)
        positions = torch.arange(length, device=self.device)
        in_response = (positions >= first[:, None]) & (positions < end_of_response[:, None])
        own_reference = None
        if reference is not None:
            # Transposed twice: columns stay contiguous, as those of sum_by_answer.
            own_reference = _to_device(np.ascontiguousarray(reference[chosen].T), self.device).T
        return Microbatch(
            rows=rows,
            num_answers=self.num_answers,
            input_ids=on_device[:, :length].contiguous(),
            labels=on_device[:, 1 : length + 1].contiguous(),
            position_ids=positions.expand(len(sequences), length),
            response_mask=in_response.float(),
            identical=identical.bool().view(self.num_answers, len(rows)).T,
            reference=own_reference,
        )


def _to_device(host: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies ``host``; on CUDA from pinned memory and in the order of the device's work, so that nobody waits."""
    tensor = torch.from_numpy(host)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
