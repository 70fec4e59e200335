"""The forward step: what Megatron's schedules and Megatron-LM's ``pretrain()`` call for each microbatch.

A forward step takes ``(data_iterator, model)`` and returns the model's output and a loss function; the loss function returns
``(loss_sum, count, {name: [sum, count]})``, which with ``calculate_per_token_loss`` gives the exact mean over the global batch, whatever
the number of microbatches and data parallel ranks: ``count`` is pairs for SPIN and response tokens for SFT.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_spin.data.batches import Microbatch
from megatron_spin.spin.losses import PairLogps, likelihood_term, spin_loss

LossResult = tuple[Tensor, Tensor, dict[str, Tensor]]
ForwardStep = Callable[[Iterator[Microbatch], torch.nn.Module], tuple[Tensor, Callable[..., object]]]


def response_logps(token_losses: Tensor, response_mask: Tensor) -> Tensor:
    """Summed log-probs of response tokens, [n] fp32, from the model's ``-token_logps`` [n, s]."""
    # where, not a product: a padded position may hold an infinite loss, and 0 * inf is NaN
    return -torch.where(response_mask > 0, token_losses.float(), 0.0).sum(dim=1)


def _step(loss_func: Callable[..., object]) -> ForwardStep:
    """The forward step whose loss function is ``loss_func(batch, token_losses)``."""

    def forward_step(
        data_iterator: Iterator[Microbatch], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., object]]:
        batch = next(data_iterator)
        # Every attention here is causal and padding is on the right, so no position ever sees padding: no mask is needed.
        output: Tensor = model(batch.input_ids, batch.position_ids(), None, labels=batch.labels)
        return output, functools.partial(loss_func, batch)

    return forward_step


def spin_forward_step(*, beta: float, loss: str, sft_weight: float = 0.0) -> ForwardStep:
    """The forward step of the SPIN loss for any model with GPTModel's forward signature.

    ``sft_weight`` adds that much of the real answer's negative log-likelihood a token to each pair's loss; at 0 nothing is computed.

    The reported values are sums over pairs: ``loss``, ``margin`` (t), ``accuracy`` (t > 0, equal answers never), ``real_logps``,
    ``generated_logps`` (nats an answer), ``real_reward`` and ``generated_reward`` (beta times the log-ratio to the opponent).
    """

    def loss_func(batch: Microbatch, token_losses: Tensor) -> LossResult:
        if batch.opponent_logps is None:
            raise ValueError("a SPIN microbatch needs the opponent's log-probs")
        real, generated = response_logps(token_losses, batch.response_mask).chunk(2)
        logps = PairLogps(real, generated, *batch.opponent_logps.chunk(2))
        losses = spin_loss(logps, beta=beta, loss=loss)
        if sft_weight:
            tokens = batch.response_mask.chunk(2)[0].sum(dim=1)
            losses = losses + likelihood_term(real, tokens, weight=sft_weight)
        real_reward, generated_reward = logps.rewards(beta)
        margin = real_reward - generated_reward
        won = (margin > 0) & _differ(batch)
        named = {
            "loss": losses, "margin": margin, "accuracy": won.float(), "real_logps": real, "generated_logps": generated,
            "real_reward": real_reward, "generated_reward": generated_reward,
        }  # fmt: skip
        return (
            losses.sum(),
            _count(losses.numel(), losses),
            {name: _sum_and_count(value) for name, value in named.items()},
        )

    return _step(loss_func)


def sft_forward_step() -> ForwardStep:
    """The forward step of plain SFT: mean negative log-likelihood of the response tokens.

    Reports ``loss`` (sum over tokens) and ``real_logps`` (sum over answers).
    """

    def loss_func(batch: Microbatch, token_losses: Tensor) -> LossResult:
        logps = response_logps(token_losses, batch.response_mask)
        tokens = batch.response_mask.sum()
        named = {"loss": torch.stack([-logps.sum().detach(), tokens]), "real_logps": _sum_and_count(logps)}
        return -logps.sum(), tokens.to(torch.int), named

    return _step(loss_func)


def score_forward_step() -> ForwardStep:
    """The forward step of a scoring pass (``forward_only=True, collect_non_loss_data=True``): collects ``logps`` [n] of each microbatch."""

    def loss_func(batch: Microbatch, token_losses: Tensor, *, non_loss_data: bool) -> Tensor:
        assert non_loss_data
        return response_logps(token_losses, batch.response_mask)

    return _step(loss_func)


def probe_forward_step() -> ForwardStep:
    """Like :func:`score_forward_step`, but collects every token's log-prob, [n, s] fp32: what the export gate compares."""

    def loss_func(batch: Microbatch, token_losses: Tensor, *, non_loss_data: bool) -> Tensor:
        assert non_loss_data
        return -token_losses.float()

    return _step(loss_func)


def _differ(batch: Microbatch) -> Tensor:
    """Whether the two answers of each pair differ, [b] bool: of equal ones the margin is rounding, which must not count as won."""
    (real, generated), (real_mask, generated_mask) = batch.labels.chunk(2), batch.response_mask.chunk(2)
    return ((real != generated) | (real_mask != generated_mask)).any(dim=1)


def _count(number: int, like: Tensor) -> Tensor:
    return torch.tensor(number, dtype=torch.int, device=like.device)


def _sum_and_count(values: Tensor) -> Tensor:
    return torch.stack([values.detach().sum().float(), torch.tensor(float(values.numel()), device=values.device)])
