"""``data/manifest.json``: what was prepared, for the phases that use it. No torch."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_spin.errors import RunDirError
from megatron_spin.io import read_json, write_json

NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class DataManifest:
    """The fields are the file's keys, in order."""

    template: str
    end_token: str
    end_token_id: int
    tokenizer: str
    """sha256 of the tokenizer's files."""
    files: dict[str, str]
    """sha256 of each data file, by its key in the configuration."""
    identity: str
    """Hash of the rows to train on."""
    eval_identity: str
    likelihood: dict[str, dict[str, Any]]
    """For each file of ``evaluation.likelihood`` the ``identity`` and the number of its rows, ``kept``."""
    counts: dict[str, Any]
    """Of ``data.path``, see :class:`megatron_spin.data.tokenization.Tokenized`.

    Besides, ``held_out`` and ``kept`` (prompts), ``tokens`` by kind, and for preferences the counts of the ``pairs``.
    """
    eval_counts: dict[str, Any]
    """The same of ``evaluation.path`` if it is given, ``kept``, ``with_rejected`` and ``prompts_also_trained_on``."""

    def save(self, directory: Path) -> None:
        """Writes ``manifest.json``."""
        write_json(directory / NAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, directory: Path) -> "DataManifest":
        """Reads ``manifest.json``; one of an earlier version may lack files of ``evaluation.likelihood`` and hashes.

        Raises:
            RunDirError: the data are not prepared, or another version prepared them.
        """
        path = directory / NAME
        values = {"files": {}, "likelihood": {}, **read_json(path)}
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise RunDirError(f"{path} has no {missing[0]}: another version prepared these data; use a new --run-dir")
        return cls(**{name: values[name] for name in names})
