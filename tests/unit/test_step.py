"""What the SPIN step reports, for token losses that are given."""

import pytest
import torch

from megatron_spin.data.batches import Example, collate
from megatron_spin.training.forward_step import spin_forward_step


class GivenLosses(torch.nn.Module):
    """A model whose token losses are one nat each, whatever it is given."""

    def forward(self, input_ids, position_ids, attention_mask, *, labels):
        return torch.ones_like(labels, dtype=torch.float32)


@pytest.mark.parametrize("noise", [-1e-6, 0.0, 1e-6])
def test_equal_answers_are_never_won(noise):
    """The opponent was scored in another batch: rounding may give the margin of equal answers either sign."""
    examples = [Example([3, 4], ([5, 6, 2], [5, 6, 2])), Example([3], ([5, 2], [5, 6, 2])), Example([3], ([5], [5, 0]))]
    scores = torch.tensor([[-3.0 + noise, -3.0], [-2.0, -2.9], [-1.0, -1.9]]).numpy()
    batch = collate(examples, length=8, device=torch.device("cpu"), opponent_logps=scores)
    output, loss_func = spin_forward_step(beta=0.5, loss="logistic")(iter([batch]), GivenLosses())
    _, count, named = loss_func(output)
    assert int(count) == 3
    # Margins: rounding; 0.05 of answers of which one has a token more; 0.05 of answers that differ by a token of id 0, which padding is, too.
    assert named["margin"].tolist() == pytest.approx([0.1, 3], abs=1e-5) and named["accuracy"].tolist() == [2.0, 3.0]
