"""RMSProp, the paper's optimizer, in the place of Megatron's Adam.

Megatron has no RMSProp, and its DistributedOptimizer takes no optimizer but Adam. RMSProp as torch defines it is

    v <- alpha v + (1 - alpha) g^2,    theta <- theta - lr g / (sqrt(v) + eps),

which is Adam with betas (0, alpha) and without bias correction: so Megatron builds its Adam, shards it and saves it,
and only the rule of the step is another.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch.optim.rmsprop import rmsprop

ALPHA, EPS = 0.99, 1e-8
"""torch.optim.RMSprop's own defaults, under Megatron's names ``adam_beta2`` and ``adam_eps``."""
AS_ADAM: dict[str, Any] = {"optimizer": "adam", "adam_beta1": 0.0}
"""What Megatron is asked for in RMSProp's place."""


class RMSProp(torch.optim.AdamW):
    """torch's RMSProp, bit for bit, with the state that Megatron saves and shards of an Adam.

    ``exp_avg_sq`` is v; ``exp_avg`` stays zero (Megatron's checkpoints have a place for it, so it must be there);
    ``step`` only counts. Weight decay is AdamW's, theta <- theta (1 - lr decay), unless ``decoupled`` is false: then
    torch's RMSprop's, g <- g + decay theta.
    """

    def __init__(self, params: Any, *, decoupled: bool = True, **defaults: Any) -> None:
        super().__init__(params, **defaults)
        self.decoupled = decoupled

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; ``closure``, if given, computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[torch.Tensor] = []
            grads: list[torch.Tensor] = []
            squares: list[torch.Tensor] = []
            steps: list[torch.Tensor] = []
            self._init_group(group, params, grads, [], squares, [], steps)
            decay = group["weight_decay"]
            if self.decoupled and decay:
                for param in params:
                    param.mul_(1 - group["lr"] * decay)
            rmsprop(
                params,
                grads,
                squares,
                [],
                [],
                steps,
                foreach=group["foreach"],
                lr=group["lr"],
                alpha=group["betas"][1],
                eps=group["eps"],
                weight_decay=0.0 if self.decoupled else decay,
                momentum=0.0,
                centered=False,
            )
        return loss


def replace_adam(optimizer: MegatronOptimizer, config: OptimizerConfig) -> None:
    """Makes Megatron's freshly built Adams (see :data:`AS_ADAM`) RMSProps: the same parameter groups, another rule."""
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        adam = part.optimizer
        if adam is None:  # this rank trains nothing
            continue
        if isinstance(adam, torch.optim.Adam):
            part.optimizer = RMSProp([{"params": []}], decoupled=config.decoupled_weight_decay)
            # Not to its constructor: a shard of the DistributedOptimizer is a view, which torch takes for no parameter.
            part.optimizer.param_groups = adam.param_groups
        else:  # Transformer Engine's or apex's FusedAdam does it by itself
            for group in adam.param_groups:
                group["bias_correction"] = False
