"""``metrics.jsonl`` of a training that continues: no step twice, and what stays is as it was."""

from pathlib import Path

from megatron_spin.processes import Ranks
from megatron_spin.training.metrics import MetricsWriter, metrics_row


def write(path: Path, *, start: int, stop: int) -> None:
    """Steps ``start + 1`` to ``stop``, of a training that continues after step ``start``."""
    with MetricsWriter(path, path.parent / "tensorboard", step=start, total=9, label="t", ranks=Ranks(0, 1)) as writer:
        for step in range(start + 1, stop + 1):
            means = {"loss": 1 / step, "margin": float("nan"), "own_metric": 0.1 + step}
            row = metrics_row(step, means, grad_norm=0.3, learning_rate=1e-7, tokens=9, pairs=4, seconds=0.123456)
            writer.write(row)


def test_steps_that_are_done_again_are_dropped_and_the_others_stay_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, start=0, stop=4)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 5, "lo')  # a kill while step 5 was written
    write(path, start=2, stop=4)
    assert path.read_bytes() == whole
