"""Lines that Megatron-Core logs at every start and save and that a user can do nothing about."""

import logging

SILENCED = {
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",  # said of any save
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",  # said of older checkpoints
}
"""Beginnings of messages, by logger; versions from 0.18 on have them."""


def quiet_megatron() -> None:
    """Drops the lines of :data:`SILENCED`, and no other; may be called before Megatron is imported, and again."""
    for name in SILENCED:
        logging.getLogger(name).addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(SILENCED[record.name])
