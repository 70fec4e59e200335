"""This process's place in the parallel layout."""

import dataclasses
from typing import TYPE_CHECKING

import torch

from megatron_spin.processes import Ranks

if TYPE_CHECKING:  # megatron.core must not be imported before the device is chosen
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclasses.dataclass(frozen=True)
class ParallelDims(Ranks):
    """Device, ranks and sizes of this process; passed to whoever needs it, keyword-only."""

    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    """Expert parallel ranks hold different experts of a layer and the same of everything else; they are data parallel
    ranks (and context parallel ranks), too."""
    ep_size: int
    expert_dp_rank: int
    """0 on the lowest rank of those that hold the same experts; without experts, of those that hold the same weights.
    """
    pg_collection: "ProcessGroupCollection"

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1
