"""Which of Megatron's log lines a user sees."""

import logging

import pytest

from megatron_spin.parallel.quiet import SILENCED, quiet_megatron


@pytest.mark.parametrize("name", SILENCED)
def test_only_the_lines_that_are_named_are_dropped(caplog: pytest.LogCaptureFixture, name: str) -> None:
    quiet_megatron()
    quiet_megatron()
    with caplog.at_level(logging.WARNING):
        logging.getLogger(name).warning(f"{SILENCED[name]} with use_distributed_optimizer=True.")
        logging.getLogger(name).warning("a bucket is empty")
    assert caplog.messages == ["a bucket is empty"]
