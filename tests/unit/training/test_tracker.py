"""What the tracker names is a complete checkpoint, whatever is killed and whatever is removed."""

import errno
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from megatron_spin import log
from megatron_spin.errors import CheckpointError
from megatron_spin.training.tracker import TRACKER, checkpoint_path, latest_step, make_partial, publish

FORK = multiprocessing.get_context("fork")
KILLED = 9


def write(directory: Path, step: int, content: str, *, keep: int | None = None) -> None:
    """Writes a checkpoint of two files, as a save does."""
    partial = make_partial(directory, step)
    (partial / "common.pt").write_text(content)
    (partial / "__0_0.distcp").write_text(content)
    publish(directory, step, keep=keep)


def content(directory: Path) -> str:
    """What the tracker's checkpoint holds."""
    path = checkpoint_path(directory, latest_step(directory) or 0)
    [text] = {(path / name).read_text() for name in ("common.pt", "__0_0.distcp")}
    return text


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in directory.glob("iter_*"))


@pytest.mark.parametrize("keep", range(1, 7))
def test_the_newest_stay(tmp_path: Path, keep: int) -> None:
    written = []
    for step in range(1, 8):
        write(tmp_path, step, f"of {step}", keep=keep)
        written.append(step)
        assert steps(tmp_path) == written[-keep:]
        assert content(tmp_path) == f"of {step}"


def _write_beside_a_reader(directory: Path, step: int) -> None:
    """Writes a checkpoint, the only one to stay, while a file of the older ones cannot be removed."""

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.remove" and arguments[0] == "common.pt":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), "common.pt")

    sys.addaudithook(refuse)
    log.setup()
    write(directory, step, f"of {step}", keep=1)


@pytest.mark.parametrize("step", [2, 4], ids=["a higher step", "a lower step"])
def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_a_save(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], step: int
) -> None:
    write(tmp_path, 3, "of 3")
    process = FORK.Process(target=_write_beside_a_reader, args=(tmp_path, step))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert content(tmp_path) == f"of {step}"
    [line] = capfd.readouterr().err.splitlines()
    assert f"{tmp_path / 'iter_0000003'} could not be removed" in line
    write(tmp_path, 5, "of 5", keep=1)
    assert steps(tmp_path) == [5]


def test_a_training_that_went_back_drops_the_higher_steps_and_not_its_own(tmp_path: Path) -> None:
    """After the tracker was set to an older step by hand, the highest numbers are not the newest checkpoints."""
    for step in (400, 600, 800):
        write(tmp_path, step, f"first {step}")
    (tmp_path / TRACKER).write_text("400")
    write(tmp_path, 500, "second 500", keep=2)
    assert content(tmp_path) == "second 500"
    assert steps(tmp_path) == [400, 500]


def test_keep_none_keeps_all(tmp_path: Path) -> None:
    for step in (2, 1):
        write(tmp_path, step, f"of {step}")
    assert steps(tmp_path) == [1, 2]


def test_other_directories_stay(tmp_path: Path) -> None:
    (tmp_path / "iter_notes").mkdir()
    write(tmp_path, 1, "of 1", keep=1)
    assert (tmp_path / "iter_notes").is_dir()


def _killed_at(moment: int, directory: Path, step: int) -> None:
    """Writes a checkpoint again and dies just before the file operation number ``moment``."""
    count = 0

    def kill(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}:
            count += 1
            if count > moment:
                os._exit(KILLED)

    sys.addaudithook(kill)
    write(directory, step, "new", keep=2)
    os._exit(0)


@pytest.mark.parametrize("step", [2, 3], ids=["the same step again", "the next step"])
def test_a_kill_at_any_file_operation_leaves_a_complete_checkpoint(tmp_path: Path, step: int) -> None:
    found = []
    for moment in range(100):
        directory = tmp_path / str(moment)
        for earlier in (1, 2):
            write(directory, earlier, "old")
        process = FORK.Process(target=_killed_at, args=(moment, directory, step))
        process.start()
        process.join()
        found.append(content(directory))
        write(directory, step, "after the kill", keep=2)
        assert content(directory) == "after the kill"
        if process.exitcode == 0:
            break
        assert process.exitcode == KILLED
    assert found[0] == "old" and found[-1] == "new" and len(found) > 10


def test_a_tracker_that_names_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("7")
    with pytest.raises(CheckpointError, match=r"names step 7, but .*iter_0000007 does not exist: restore it"):
        latest_step(tmp_path)
