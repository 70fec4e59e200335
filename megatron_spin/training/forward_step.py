"""The training step's forward step: the loss of an objective, with an exact mean over the global batch.

The loss function returns ``(loss_sum, count, {name: [sum, count]})``. With ``calculate_per_token_loss`` Megatron
divides gradients by the sum of ``count`` over all microbatches and data parallel ranks: prompts, or what the
objective weighs by.
"""

import torch
from torch import Tensor

from megatron_spin.data.batcher import Microbatch
from megatron_spin.errors import ConfigError
from megatron_spin.parallel.pipeline import ForwardStep, forward_step
from megatron_spin.spin.objective import RESERVED_METRICS, AnswerLogps, Objective, Outcome

LossResult = tuple[Tensor, Tensor, dict[str, Tensor]]


def objective_forward_step(objective: Objective) -> ForwardStep:
    """The forward step of ``objective`` for any model with GPTModel's forward signature.

    Reports the sums and counts of the names in :func:`reported_names`.
    """

    def loss_func(batch: Microbatch, token_losses: Tensor) -> LossResult:
        logps = AnswerLogps(
            policy=-batch.sum_by_answer(token_losses),
            reference=batch.reference,
            lengths=batch.lengths,
            identical=batch.identical,
        )
        outcome = objective(logps)
        count = torch.tensor(len(batch.rows), dtype=torch.int, device=token_losses.device)
        if outcome.count is not None:
            count = outcome.count.sum().int()
        loss_sum = outcome.loss.sum()
        named = {"loss": torch.stack([loss_sum.detach().float(), count.float()])}
        for name, values in _reported(objective, logps, outcome).items():
            total = torch.tensor(float(values.numel()), device=values.device)
            named[name] = torch.stack([values.detach().float().sum(), total])
        return loss_sum, count, named

    return forward_step(loss_func)


def reported_names(objective: Objective) -> list[str]:
    """What the forward step of ``objective`` reports: the mean loss, its metrics, each answer's mean log-prob in nats.

    ``identical`` is the share of prompts whose generated answer equals the real one.

    Raises:
        ConfigError: a metric of the objective has the name of a column that every step has.
    """
    width = len(objective.answers)
    zeros = torch.zeros(1, width)
    # One prompt of zeros: the names are the same for any values, and a pipeline stage without results must know them.
    logps = AnswerLogps(
        policy=zeros,
        reference=zeros if objective.needs_reference else None,
        lengths=torch.ones(1, width),
        identical=torch.zeros(1, width, dtype=torch.bool),
    )
    outcome = objective(logps)
    reserved = {*RESERVED_METRICS, *(f"{answer}_logps" for answer in objective.answers)}
    for name in outcome.metrics:
        if name in reserved:
            raise ConfigError(
                f"objective {type(objective).__name__} reports a metric {name}, which every step has: "
                "give it another name"
            )
    return ["loss", *_reported(objective, logps, outcome)]


def _reported(objective: Objective, logps: AnswerLogps, outcome: Outcome) -> dict[str, Tensor]:
    """Values per prompt, [b] each, by name."""
    values = dict(outcome.metrics)
    for column, answer in enumerate(objective.answers):
        values[f"{answer}_logps"] = logps.policy[:, column]
        if answer == "generated":
            values["identical"] = logps.identical[:, column]
    return values
