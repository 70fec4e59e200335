"""The frame of a phase on several ranks: rank 0 decides and records, an error of one rank ends all."""

from pathlib import Path
from typing import Any

from megatron_spin.config import Config, from_dict
from megatron_spin.errors import DataError, SpinError
from megatron_spin.phases.frame import carry_out
from megatron_spin.run.directory import RunDir
from tests.support.world import Worlds


class Noted:
    """A phase that notes what is called; on rank 1 its check may fail."""

    def __init__(self, *, refuses: bool) -> None:
        self.refuses = refuses
        self.calls: list[str] = []

    def check(self) -> None:
        self.calls.append("check")
        if self.refuses:
            raise DataError("rank 1 cannot read the pairs: restore them")

    def run(self) -> dict[str, Any]:
        self.calls.append("run")
        return {"steps": 5}


def carried_out(config: Config, roots: list[Path], *, refuses: bool = False) -> list[str]:
    """What the frame calls on this rank, which sees the run directory ``roots[rank]``."""
    from megatron_spin.processes import rank

    run_dir = RunDir(roots[rank()])
    phase = Noted(refuses=refuses and rank() == 1)
    try:
        carry_out("train", config, run_dir, lambda: phase, target=run_dir.target(iteration=0))
    except SpinError as error:
        phase.calls.append(str(error))
    return phase.calls


def tiny() -> Config:
    return from_dict({"name": "n", "model": {"hf": "m"}, "data": {"path": "d"}, "device": "cpu"})


def test_only_rank_0_writes(world: Worlds, tmp_path: Path) -> None:
    roots = [tmp_path / "seen by 0", tmp_path / "seen by 1"]
    assert world(2).run(carried_out, tiny(), roots) == [["check", "run"]] * 2
    assert RunDir(roots[0]).is_done("train:0")
    assert not roots[1].exists()


def test_an_older_view_of_the_run_decides_nothing(world: Worlds, tmp_path: Path) -> None:
    """Rank 1's file system does not show yet that the phase is done."""
    roots = [tmp_path / "seen by 0", tmp_path / "seen by 1"]
    run_dir = RunDir(roots[0])
    run_dir.open(tiny())
    run_dir.mark_done("train:0", seconds=1.0)
    assert world(2).run(carried_out, tiny(), roots) == [[], []]


def test_an_error_of_one_rank_ends_all(world: Worlds, tmp_path: Path) -> None:
    roots = [tmp_path / "run", tmp_path / "run"]
    refused = ["check", "rank 1 cannot read the pairs: restore them"]
    assert world(2).run(carried_out, tiny(), roots, refuses=True) == [refused, refused]
    assert not roots[0].exists()
