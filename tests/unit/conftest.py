from collections.abc import Iterator

import pytest

from megatron_spin import log
from megatron_spin.parallel.setup import choose_device

choose_device("cpu")  # before any module of these tests imports Megatron


@pytest.fixture
def narration(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The logger as a tool has it: on stdout and stderr, with a run log as soon as a phase is carried out."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")  # so that what the set-up adds to the environment goes, too
    before = log.logger.handlers[:], log.logger.level, log.logger.propagate
    log.setup()
    yield
    log.logger.handlers[:], log.logger.level, log.logger.propagate = before
