"""What the training step reports, for token losses that are given."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spin.data.batcher import Batcher, Example, Microbatch
from megatron_spin.errors import ConfigError
from megatron_spin.spin.objective import AnswerLogps, Objective, Outcome
from megatron_spin.spin.pairwise import Spin
from megatron_spin.spin.sft import Sft
from megatron_spin.training.forward_step import objective_forward_step, reported_names


class GivenLosses(torch.nn.Module):
    """A model whose token losses are one nat each, whatever it is given."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: None, *, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.float32)


def step(objective: Objective, batch: Microbatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, count and reported values of one microbatch, as Megatron's schedules get them."""
    output, loss_func = objective_forward_step(objective)(iter([batch]), GivenLosses())
    reported: Any = loss_func(output)
    return reported  # a tuple; the schedules' other passes get another type


def batcher(examples: list[Example]) -> Batcher:
    return Batcher(
        examples, micro_batch_size=len(examples), alignment=8, dp_rank=0, dp_size=1, device=torch.device("cpu")
    )


@pytest.mark.parametrize("noise", [-1e-6, 0.0, 1e-6])
def test_equal_answers_are_never_won(noise: float) -> None:
    """The opponent was scored in another batch: rounding may give the margin of equal answers either sign."""
    examples = [Example([3, 4], ([5, 6, 2], [5, 6, 2])), Example([3], ([5, 2], [5, 6, 2])), Example([3], ([5], [5, 0]))]
    scores = torch.tensor([[-3.0 + noise, -3.0], [-2.0, -2.9], [-1.0, -1.9]]).numpy()
    [batch] = batcher(examples).microbatches(torch.arange(3).numpy(), scores)
    _, count, named = step(Spin(beta=0.5), batch)
    assert int(count) == 3
    # Margins: rounding for equal answers; 0.05 where one answer has a token more; 0.05 where they differ by a token of
    # id 0, which padding is, too.
    assert named["margin"].tolist() == pytest.approx([0.1, 3], abs=1e-5)
    assert named["accuracy"].tolist() == [2.0, 3.0]
    assert named["identical"].tolist() == [1.0, 3.0]
    assert set(named) == set(reported_names(Spin()))


def test_sft_is_the_mean_over_tokens() -> None:
    """One nat per token, whatever the number of sequences."""
    examples = [Example([3, 4], ([5, 6, 2],)), Example([3], ([5],))]
    [batch] = batcher(examples).microbatches(torch.arange(2).numpy())
    loss, count, named = step(Sft(), batch)
    assert loss.item() == 4.0
    assert count.item() == 4
    assert count.dtype == torch.int32  # Megatron adds it to an integer
    assert named["loss"].tolist() == [4.0, 4.0]
    assert named["real_logps"].tolist() == [-4.0, 2.0]
    assert set(named) == set(reported_names(Sft()))


@dataclasses.dataclass(frozen=True)
class Hidden(Spin):
    """Reports a metric under the name of a column that every step has."""

    name: str = "loss"

    def __call__(self, logps: AnswerLogps) -> Outcome:
        outcome = super().__call__(logps)
        return dataclasses.replace(outcome, metrics={self.name: outcome.loss})


@pytest.mark.parametrize("name", ["loss", "tokens", "grad_norm", "real_logps", "identical"])
def test_a_metric_does_not_replace_what_every_step_reports(name: str) -> None:
    """Before, the gate and the check for NaN looked at the metric in the loss's place."""
    with pytest.raises(ConfigError, match=f"Hidden reports a metric {name}, which every step has"):
        reported_names(Hidden(name=name))


@dataclasses.dataclass(frozen=True)
class Broken(Spin):
    """Goes wrong in a way that ``how`` names."""

    how: str = ""

    def __call__(self, logps: AnswerLogps) -> Outcome:
        outcome = super().__call__(logps)
        loss = outcome.loss
        if self.how == "raises":
            raise KeyError("nothing")
        if self.how == "exits":
            raise SystemExit(3)
        if self.how == "none":
            return None  # type: ignore[return-value]
        changes: dict[str, dict[str, Any]] = {
            "detached": {"loss": loss.detach()},
            "one number": {"loss": loss.mean()},
            "nan": {"loss": loss * math.nan},
            "whole": {"loss": loss.int()},
            "fraction": {"count": torch.full_like(loss, 0.5)},
            "name": {"metrics": {"a/../b": loss}},
            "value": {"metrics": {"extra": 3.0}},
        }
        return dataclasses.replace(outcome, **changes[self.how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"objective Broken fails with KeyError: 'nothing' \(.*test_forward_step\.py:\d+\)"),
        ("exits", r"fails with SystemExit: 3"),
        ("none", r"returns NoneType: return an Outcome"),
        ("detached", r"does not depend on the policy's log-probs: nothing would be trained"),
        ("one number", r"gives no loss per prompt"),
        ("nan", r"gives a loss that is not finite"),
        ("whole", r"gives no loss per prompt"),
        ("fraction", r"gives no count per prompt"),
        ("name", r"reports a metric 'a/\.\./b'"),
        ("value", r"reports a metric extra that is no tensor"),
    ],
)
def test_an_objective_that_cannot_be_trained_is_refused_before_anything_starts(how: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reported_names(Broken(how=how))


@dataclasses.dataclass(frozen=True)
class Forgetful(Spin):
    """Leaves its metrics out where there are three prompts."""

    def __call__(self, logps: AnswerLogps) -> Outcome:
        outcome = super().__call__(logps)
        return dataclasses.replace(outcome, metrics={}) if len(logps.policy) == 3 else outcome


def test_a_metric_that_is_missing_later_is_named() -> None:
    examples = [Example([3, 4], ([5, 2], [6, 2]))] * 3
    [batch] = batcher(examples).microbatches(torch.arange(3).numpy(), torch.zeros(3, 2).numpy())
    output, loss_func = objective_forward_step(Forgetful())(iter([batch]), GivenLosses())
    with pytest.raises(
        ConfigError, match=r"Forgetful reports loss, real_logps, .* but when it was tried it reported loss, margin"
    ):
        loss_func(output)
