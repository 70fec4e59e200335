"""``data/manifest.json``: what is read is what was written, and files of earlier versions."""

import dataclasses
from pathlib import Path

import pytest

from megatron_spin.data.manifest import DataManifest
from megatron_spin.errors import RunDirError
from megatron_spin.io import read_json, write_json

MANIFEST = DataManifest(
    template="none",
    end_token="</s>",
    end_token_id=2,
    tokenizer="t",
    files={"data.path": "f"},
    identity="i",
    eval_identity="e",
    likelihood={"mix": {"identity": "m", "kept": 3}},
    counts={"read": 9, "kept": 8},
    eval_counts={"kept": 4},
)


def test_round_trip(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    assert DataManifest.load(tmp_path) == MANIFEST
    assert list(read_json(tmp_path / "manifest.json")) == [field.name for field in dataclasses.fields(MANIFEST)]


def test_earlier_versions_hashed_no_files_and_knew_no_likelihood(tmp_path: Path) -> None:
    values = dataclasses.asdict(MANIFEST)
    del values["files"], values["likelihood"]
    write_json(tmp_path / "manifest.json", values)
    assert DataManifest.load(tmp_path) == dataclasses.replace(MANIFEST, files={}, likelihood={})


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="an earlier phase has not run"):
        DataManifest.load(tmp_path)
    write_json(tmp_path / "manifest.json", {"template": "none"})
    with pytest.raises(RunDirError, match="has no end_token: another version"):
        DataManifest.load(tmp_path)
