"""The state of torch's optimizers inside Megatron's: what Megatron cannot save, load or keep apart by itself."""

import functools
from collections.abc import Iterator

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer


def inner_optimizers(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    """The torch (or fused) optimizers inside Megatron's wrappers."""
    for part in optimizer_parts(optimizer):
        if part.optimizer is not None:
            yield part.optimizer


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron's optimizers inside its chain of several."""
    if isinstance(optimizer, ChainedOptimizer):
        return list(optimizer.chained_optimizers)
    return [optimizer]


def prime(optimizer: MegatronOptimizer) -> None:
    """Allocates the zero state of torch's optimizers: Megatron cannot save or load what only the first step creates."""
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            for param in group["params"]:
                if inner.state.get(param):
                    continue
                if isinstance(inner, torch.optim.Adam):  # AdamW is a subclass
                    zeros = {name: torch.zeros_like(param.data) for name in ("exp_avg", "exp_avg_sq")}
                    inner.state[param] = {"step": torch.tensor(0.0), **zeros}
                elif isinstance(inner, torch.optim.SGD) and group["momentum"]:
                    inner.state[param] = {"momentum_buffer": torch.zeros_like(param.data)}


def add_missing_init_state(optimizer: MegatronOptimizer) -> None:
    """Lets SGD load: Megatron gives it no function that allocates state, and calls one. :func:`prime` has done it."""
    for part in optimizer_parts(optimizer):
        if part.init_state_fn is None:
            part.init_state_fn = lambda *_: None


def keep_steps_apart(optimizer: MegatronOptimizer) -> None:
    """Lets a DistributedOptimizer load torch Adam's state.

    It saves ``step`` in the parameter groups, but looks for it among the loaded tensors of each parameter, too.
    """
    for part in optimizer_parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = functools.partial(_set_states_but_step, part)


def _set_states_but_step(
    part: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
) -> None:
    group, order = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    own_step = {"step": state["step"]} if "step" in state else {}
    DistributedOptimizer._set_main_param_and_optimizer_states(part, model_param, {**tensors, **own_step})


def unshare_steps(optimizer: MegatronOptimizer) -> None:
    """Gives each parameter a step tensor of its own.

    DistributedOptimizer.load_state_dict gives all parameters the same one, and Adam would advance it once per
    parameter.
    """
    for inner in inner_optimizers(optimizer):
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
