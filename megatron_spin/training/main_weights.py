"""The fp32 main weights of a policy in place of its parameters: what an iteration leaves to the next one.

A bf16 policy computes with rounded weights; the optimizer keeps the unrounded ones, whole for each parameter or, in
Megatron's DistributedOptimizer, each data parallel rank its own share. DDP's gradient buffer has the layout of the
parameters, is fp32 by default, and holds nothing of use between two steps. So the shares are gathered there: whoever
saves or loads the model within these blocks moves main weights, and no memory is needed. With gradients reduced in
bf16 a buffer of 4 bytes per parameter exists as long as the block. Megatron concatenates both halves of a gated MLP's
fc1 when it loads; its copies of these weights, in fp32, exist until the model has taken them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer

from megatron_spin.training.optimizer_state import optimizer_parts


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """A bucket of DDP, in fp32."""

    data: torch.Tensor
    """Flat: the parameters of the bucket, with padding."""
    shard: slice
    """This rank's share."""
    group: dist.ProcessGroup
    views: dict[torch.nn.Parameter, torch.Tensor] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def saving(model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> Iterator[None]:
    """Within the block the parameters of ``model`` are the main weights; a collective. Gradients are zero after it."""
    buckets = _buckets(model, optimizer)
    views = _views(buckets)
    for part in _distributed(optimizer):
        for parameter, span in _shares(part):
            views[parameter].view(-1)[span].copy_(_share(part, parameter))
    for bucket in buckets:
        dist.all_gather_into_tensor(bucket.data, bucket.data[bucket.shard], group=bucket.group)
    with _in_place_of_parameters(model, {**views, **_whole(optimizer)}):
        yield
    _zero_gradients(model, buckets)


@contextlib.contextmanager
def loading(model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> Iterator[None]:
    """Within the block the parameters of ``model`` take fp32 weights. After it the optimizer has them as main weights,
    the parameters hold them in their own dtype, and gradients are zero.
    """
    buckets = _buckets(model, optimizer)
    views = _views(buckets)
    weights = {**views, **_whole(optimizer)}
    with _in_place_of_parameters(model, weights):
        yield
    for parameter, weight in weights.items():
        parameter.data.copy_(weight)
    for part in _distributed(optimizer):
        for parameter, span in _shares(part):
            _set_share(part, parameter, views[parameter].view(-1)[span])
    _zero_gradients(model, buckets)


def _shares(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, slice]]:
    """Each parameter of which this rank has a share, and the place of the share in the flat parameter."""
    if part.config.use_precision_aware_optimizer:
        part.init_state_fn(part.optimizer, part.config)  # there its main weights are
    for parameter in part.model_param_group_index_map:
        span = part._get_model_param_range_map(parameter)["param"]
        yield parameter, slice(span.start, span.end)


def _share(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's share of a main weight, flat."""
    if part.config.use_precision_aware_optimizer:
        return part._get_main_param_and_optimizer_states(parameter)["param"]
    group, order = part.model_param_group_index_map[parameter]
    return part.optimizer.param_groups[group]["params"][order].data


def _set_share(part: DistributedOptimizer, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    if part.config.use_precision_aware_optimizer:
        part._set_main_param_and_optimizer_states(parameter, {"param": value})
    else:
        _share(part, parameter).copy_(value)


def _whole(optimizer: MegatronOptimizer) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The main weights that every data parallel rank has whole."""
    whole: dict[torch.nn.Parameter, torch.Tensor] = {}
    for part in optimizer_parts(optimizer):
        if isinstance(part, Float16OptimizerWithFloat16Params):
            for group, main_group in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
                whole |= {parameter: main.data for parameter, main in zip(group, main_group, strict=True)}
    return whole


def _distributed(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The parts with main weights that are shared out. Those of fp32 parameters are the parameters themselves."""
    parts = optimizer_parts(optimizer)
    return [part for part in parts if isinstance(part, DistributedOptimizer) and part.config.bf16]


def _buckets(model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> list[_Bucket]:
    """The buckets of all chunks in fp32, if a DistributedOptimizer shares out main weights."""
    if not _distributed(optimizer):
        return []
    buckets = []
    for chunk in model:
        ddp: Any = chunk  # DistributedDataParallel
        for buffer in ddp.buffers + ddp.expert_parallel_buffers:
            of_buffer = [_bucket(bucket.grad_data, buffer.data_parallel_group) for bucket in buffer.buckets]
            for parameter, (start, end, index) in buffer.param_index_map.items():
                offset = buffer.buckets[index].offset
                place = of_buffer[index].data[start - offset : end - offset]
                of_buffer[index].views[parameter] = place.view(parameter.shape)
            buckets += of_buffer
    return buckets


def _bucket(data: torch.Tensor, group: dist.ProcessGroup) -> _Bucket:
    if data.dtype != torch.float32:
        data = torch.empty_like(data, dtype=torch.float32)
    size = data.numel() // group.size()
    return _Bucket(data=data, shard=slice(size * group.rank(), size * (group.rank() + 1)), group=group)


def _views(buckets: Sequence[_Bucket]) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Each parameter's place in the buckets, in the parameter's shape."""
    views: dict[torch.nn.Parameter, torch.Tensor] = {}
    for bucket in buckets:
        views |= bucket.views
    return views


@contextlib.contextmanager
def _in_place_of_parameters(
    model: Sequence[torch.nn.Module], weights: dict[torch.nn.Parameter, torch.Tensor]
) -> Iterator[None]:
    """Lets the modules hold ``weights``.

    The parameters stay as they are: data of another dtype would cost them DDP's hooks, and they would never get a
    gradient again.
    """
    substitutes = {}
    for parameter, weight in weights.items():
        substitutes[parameter] = torch.nn.Parameter(weight, requires_grad=False)
        substitutes[parameter].__dict__.update(parameter.__dict__)  # Megatron's marks
    replaced = []
    try:
        for chunk in model:
            for module in chunk.modules():
                for name, own in module._parameters.items():
                    if own in substitutes:
                        module._parameters[name] = substitutes[own]
                        replaced.append((module, name, own))
        yield
    finally:
        for module, name, own in replaced:
            module._parameters[name] = own


def _zero_gradients(model: Sequence[torch.nn.Module], buckets: Sequence[_Bucket]) -> None:
    if buckets:
        for chunk in model:
            chunk.zero_grad_buffer()  # type: ignore[operator] # DistributedDataParallel
