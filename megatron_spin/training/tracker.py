"""Which checkpoints a directory holds: ``iter_0000100/``, and the one that ``latest_checkpointed_iteration.txt`` names.

Whatever is killed at whatever moment, the tracker names a complete checkpoint. No torch.
"""

import contextlib
import shutil
from pathlib import Path

from megatron_spin.errors import CheckpointError
from megatron_spin.io import atomic_writer
from megatron_spin.log import logger

TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint_path(directory: Path, step: int) -> Path:
    """Directory of the checkpoint of ``step``, by Megatron's naming."""
    return directory / f"iter_{step:07d}"


def partial_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is while it is written."""
    return directory / f".{checkpoint_path(directory, step).name}.partial"


def _replaced_path(directory: Path, step: int) -> Path:
    """Where an older checkpoint of the same step is while a new one takes its place."""
    return directory / f".{checkpoint_path(directory, step).name}.replaced"


def latest_step(directory: Path) -> int | None:
    """The step that the tracker names, or None if there is no checkpoint yet.

    If a kill came while a checkpoint took the place of an older one, the older one is put back.

    Raises:
        CheckpointError: the tracker is not a number, or names a checkpoint that is not there.
    """
    tracker = directory / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(
            f"{tracker} holds {text!r}, not a step number: write the number of an iter_* directory beside it into it"
        )
    step = int(text)
    path = checkpoint_path(directory, step)
    if not path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            _replaced_path(directory, step).rename(path)
    if not path.is_dir():
        raise CheckpointError(f"{tracker} names step {text}, but {path} does not exist: restore it")
    return step


def make_partial(directory: Path, step: int) -> Path:
    """The empty directory that the checkpoint of ``step`` is written into."""
    partial = partial_path(directory, step)
    # NFS keeps a file that a killed writer still has open, as .nfs*: then the directory stays.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def publish(directory: Path, step: int, *, keep: int | None) -> None:
    """Renames the complete checkpoint of ``step`` into place, names it in the tracker, and removes old ones.

    Of the others, those of higher steps go: they belong to a training that was given up for an earlier step. Of the
    lower ones the newest stay.

    Args:
        keep: how many checkpoints stay, this one included; None keeps all, those of higher steps too.
    """
    final = checkpoint_path(directory, step)
    replaced = _replaced_path(directory, step)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)  # if a kill comes now, latest_step puts it back
    partial_path(directory, step).rename(final)
    with atomic_writer(directory / TRACKER) as file:
        file.write(str(step))
    shutil.rmtree(replaced, ignore_errors=True)
    if keep is None:
        return
    lower = []
    for path in sorted(directory.glob("iter_*")):
        number = path.name.removeprefix("iter_")
        if not path.is_dir() or not number.isdigit() or int(number) == step:
            continue
        if int(number) > step:
            _remove(path)
        else:
            lower.append(path)
    surplus = max(len(lower) - (keep - 1), 0)
    for path in lower[:surplus]:
        _remove(path)


def _remove(path: Path) -> None:
    """Removes an old checkpoint. One that stays is no reason to end a training, whose new checkpoint is complete."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        logger.warning(f"{path} could not be removed, perhaps because somebody reads it: the next save tries again")
