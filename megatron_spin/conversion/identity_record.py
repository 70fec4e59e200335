"""The identity of a Hugging Face directory, hashed once and kept with what tells that its files are still the same.

A file counts as unchanged if its size and its modification time are: a change that restores both is not seen.
"""

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_spin.conversion.identity import identities
from megatron_spin.errors import CheckpointError
from megatron_spin.hf.files import weight_files
from megatron_spin.io import write_json

SECONDS_TO_SETTLE = 2
"""After it, a file's time in whole seconds tells of every later change."""
RECORD = "identity.json"
"""The record of an export lies in its directory, that of the model that a run starts from in the run's ``base/``."""


def kept_identities(hf_dir: Path, dtypes: Collection[str], record: Path) -> dict[str, str]:
    """Identity of the model in ``hf_dir`` in each of ``dtypes``; hashed only if ``record`` does not have it.

    Nothing but the files' sizes and times is read if ``record`` holds the identities of these very files. Otherwise
    they are hashed in one pass, and ``record`` is written.

    Raises:
        CheckpointError: the directory has no readable safetensors, or they change while they are read.
    """
    before = file_states(hf_dir, record)
    kept = _read(record)
    known: dict[str, str] = kept["identities"] if kept.get("files") == before else {}
    missing = [dtype for dtype in dtypes if dtype not in known]
    if missing:
        known = {**known, **identities(hf_dir, missing)}
        keep_identities(hf_dir, known, record, before=before)
    return {dtype: known[dtype] for dtype in dtypes}


def keep_identities(hf_dir: Path, known: Mapping[str, str], record: Path, *, before: Mapping[str, list[int]]) -> None:
    """Writes ``record``: ``known`` are the identities of the files in ``hf_dir`` by dtype.

    Args:
        before: the files' :func:`file_states` before they were read.

    Raises:
        CheckpointError: they have changed since.
    """
    if file_states(hf_dir, record) != before:
        raise CheckpointError(f"the weights in {hf_dir} changed while they were read: wait for whoever writes them")
    times = [moment for _, moment in before.values()]
    # Where times have whole seconds only, a file can change once more within the second and look the same.
    is_coarse = all(moment % 10**9 == 0 for moment in times)
    if is_coarse and time.time_ns() - max(times) < SECONDS_TO_SETTLE * 10**9:
        return
    write_json(record, {"files": dict(before), "identities": dict(known)})


def file_states(hf_dir: Path, record: Path) -> dict[str, list[int]]:
    """Size and modification time in ns of each file that the identity depends on.

    By name; a record that lies elsewhere names the whole path, since another model may have files of the same size and,
    where a tool sets it, of the same time.
    """
    found = {}
    for name in ("config.json", *weight_files(hf_dir)):
        path = hf_dir / name
        try:
            status = path.stat()
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: copy or export the model again") from None
        key = name if record.parent == hf_dir else str(path.resolve())
        found[key] = [status.st_size, status.st_mtime_ns]
    return found


def _read(record: Path) -> dict[str, Any]:
    """What :func:`keep_identities` wrote; nothing if there is no such file or it is damaged."""
    try:
        kept = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) and isinstance(kept.get("identities"), dict) else {}
