"""The training step's forward step: the loss of an objective, with an exact mean over the global batch.

The loss function returns ``(loss_sum, count, {name: [sum, count]})``. With ``calculate_per_token_loss`` Megatron
divides gradients by the sum of ``count`` over all microbatches and data parallel ranks: prompts, or what the
objective weighs by.
"""

import re
import traceback

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

    names = reported_names(objective)

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
        if list(named) != names:
            raise ConfigError(
                f"objective {type(objective).__name__} reports {', '.join(named)}, but when it was tried it reported "
                f"{', '.join(names)}: report the same metrics in every call"
            )
        return loss_sum, count, named

    return forward_step(loss_func)


def reported_names(objective: Objective) -> list[str]:
    """What the forward step of ``objective`` reports: the mean loss, its metrics, each answer's mean log-prob in nats.

    ``identical`` is the share of prompts whose generated answer equals the real one. The names are those of a trial
    with two prompts: a pipeline stage without results must know them, too.

    Raises:
        ConfigError: the trial fails or gives something that cannot be trained on, or a metric has the name of a column
            that every step has.
    """
    logps, outcome = _try(objective)
    reserved = {*RESERVED_METRICS, *(f"{answer}_logps" for answer in objective.answers)}
    for name in outcome.metrics:
        if name in reserved:
            raise ConfigError(
                f"objective {type(objective).__name__} reports a metric {name}, which every step has: "
                "give it another name"
            )
    return ["loss", *_reported(objective, logps, outcome)]


def _try(objective: Objective) -> tuple[AnswerLogps, Outcome]:
    """Calls ``objective`` for two prompts whose answers have one token of one nat, and checks what it gives."""
    shape = (2, len(objective.answers))
    scores = torch.full(shape, -1.0)
    logps = AnswerLogps(
        policy=scores.clone().requires_grad_(),
        reference=scores if objective.needs_reference else None,
        lengths=torch.ones(shape),
        identical=torch.zeros(shape, dtype=torch.bool),
    )
    name = type(objective).__name__
    try:
        outcome = objective(logps)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"objective {name} fails with {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        ) from error
    problem = _problem(outcome)
    if problem:
        raise ConfigError(f"objective {name} {problem}")
    return logps, outcome


def _problem(outcome: object) -> str | None:
    """Why nothing can be trained on what an objective gave for two prompts, or None."""
    if not isinstance(outcome, Outcome):
        return f"returns {type(outcome).__name__}: return an Outcome"
    loss, count = outcome.loss, outcome.count
    if not isinstance(loss, Tensor) or tuple(loss.shape) != (2,) or not loss.is_floating_point():
        return "gives no loss per prompt: Outcome.loss must be a floating point tensor of shape [b]"
    if not loss.requires_grad:
        return "gives a loss that does not depend on the policy's log-probs: nothing would be trained"
    if not bool(loss.isfinite().all()):
        return "gives a loss that is not finite where policy and reference are equal"
    if count is not None and (tuple(count.shape) != (2,) or count.is_floating_point()):
        return "gives no count per prompt: Outcome.count must be an integer tensor of shape [b], or None"
    for name, values in outcome.metrics.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
            return f"reports a metric {name!r}: a name has letters, digits and underscores"
        if not isinstance(values, Tensor) or tuple(values.shape) != (2,):
            return f"reports a metric {name} that is no tensor of shape [b]"
    return None


def _reported(objective: Objective, logps: AnswerLogps, outcome: Outcome) -> dict[str, Tensor]:
    """Values per prompt, [b] each, by name."""
    values = dict(outcome.metrics)
    for column, answer in enumerate(objective.answers):
        values[f"{answer}_logps"] = logps.policy[:, column]
        if answer == "generated":
            values["identical"] = logps.identical[:, column]
    return values
