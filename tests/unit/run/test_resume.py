"""Continuing a run with changed settings, or under other paths."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_spin.config import Config, from_dict, load_config, to_yaml
from megatron_spin.conversion.identity import identity
from megatron_spin.data.templates import tokenizer_sha
from megatron_spin.errors import RunDirError
from megatron_spin.hf.assets import CHECKPOINT_ASSETS, copy_assets
from megatron_spin.io import sha256, write_json
from megatron_spin.run.directory import RunDir
from megatron_spin.run.plan import Plan
from megatron_spin.run.preflight import check
from megatron_spin.run.resume import RECORD, made_phases
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two models, ``model`` and ``other``, of one tokenizer."""
    directory = tmp_path_factory.mktemp("models")
    tiny_model(directory / "model", layers=1, hidden=16, ffn=16)
    tiny_model(directory / "other", layers=1, hidden=16, ffn=16, seed=1)
    return directory


def raw_config(directory: Path, model: Path) -> dict[str, Any]:
    return {
        "name": "run",
        "device": "cpu",
        "model": {"hf": str(model)},
        "precision": {"dtype": "fp32"},
        "data": {"path": str(directory / "data.jsonl")},
        "evaluation": {
            "path": str(directory / "held_out.jsonl"),
            "likelihood": {"more": str(directory / "more.jsonl")},
        },
        "generation": {"engine": "hf"},
    }


@pytest.fixture
def raw(tmp_path: Path, models: Path) -> dict[str, Any]:
    for name in ("data", "held_out", "more"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "response": "a"}}\n')
    return raw_config(tmp_path, models / "model")


def prepared(directory: Path, raw: dict[str, Any]) -> RunDir:
    """A run of ``raw`` in which data were prepared and the model was imported."""
    config = from_dict(raw)
    run_dir = RunDir(directory / "run")
    run_dir.open(config)
    files = {key: sha256(Path(path)) for key, path in config.data_files.items()}
    write_json(run_dir.data / "manifest.json", {"tokenizer": tokenizer_sha(Path(config.model.hf)), "files": files})
    copy_assets(Path(config.model.hf), run_dir.base / CHECKPOINT_ASSETS)
    run_dir.mark_done("prepare", seconds=1.0)
    run_dir.mark_done("import", seconds=1.0, identity=identity(Path(config.model.hf), "fp32"), dtype="fp32")
    return run_dir


def changed(raw: dict[str, Any], section: str, **values: Any) -> Config:
    return from_dict({**raw, section: {**raw.get(section, {}), **values}})


def test_what_was_made_is_read_from_records_and_files(tmp_path: Path, raw: dict[str, Any]) -> None:
    run_dir = prepared(tmp_path, raw)
    assert made_phases(run_dir) == {"prepare", "import"}
    first, baseline = run_dir.target(iteration=0), run_dir.target(baseline="sft_continued")
    first.generated.mkdir(parents=True)
    (baseline.checkpoints / "hf").mkdir(parents=True)
    assert made_phases(run_dir) == {"prepare", "import"}  # nothing that either phase would take up
    (first.generated / "shard_00000.json").touch()
    (baseline.checkpoints / "iter_0000002").mkdir()
    assert made_phases(run_dir) == {"prepare", "import", "generate:0", "train:sft_continued"}
    run_dir.mark_done("evaluate:0", seconds=1.0)
    assert "evaluate:0" in made_phases(run_dir)


def test_a_harmless_change_is_taken_over_and_recorded(tmp_path: Path, raw: dict[str, Any]) -> None:
    run_dir = prepared(tmp_path, raw)
    run_dir.open(changed(raw, "training", learning_rate=[1e-3, 1e-4]))
    run_dir.open(changed(raw, "training", learning_rate=[1e-3, 1e-4]))  # nothing to record
    assert load_config(run_dir.config).training.learning_rate == [1e-3, 1e-4]
    [entry] = [json.loads(line) for line in (run_dir.root / RECORD).read_text().splitlines()]
    assert entry.pop("time").startswith("20")
    assert entry == {"key": "training.learning_rate", "old": 5e-7, "new": [1e-3, 1e-4]}


def test_a_contradiction_is_refused_by_name_and_changes_nothing(tmp_path: Path, raw: dict[str, Any]) -> None:
    run_dir = prepared(tmp_path, raw)
    run_dir.mark_done("train:0", seconds=1.0)
    (run_dir.root / "iteration_0").mkdir()
    before = run_dir.config.read_bytes()
    with pytest.raises(RunDirError) as caught:
        run_dir.open(changed(raw, "training", learning_rate=1e-3, checkpoint_every=7))
    message = str(caught.value)
    assert "belongs to a run with other values of training.learning_rate: restore them or choose another" in message
    assert "train:0 was made with training.learning_rate=5e-07, a list of values changes later iterations" in message
    assert run_dir.config.read_bytes() == before
    assert not (run_dir.root / RECORD).exists()


def test_preflight_and_phases_refuse_in_the_same_words(tmp_path: Path, raw: dict[str, Any]) -> None:
    run_dir = prepared(tmp_path, raw)
    config = changed(raw, "data", seed=9)
    plan = Plan(config, run_dir)
    with pytest.raises(RunDirError) as at_start:
        check(plan, plan.phases())
    with pytest.raises(RunDirError) as in_phase:
        run_dir.open(config)
    assert str(at_start.value) == str(in_phase.value)


def test_a_run_directory_that_is_a_file_is_refused(tmp_path: Path, raw: dict[str, Any]) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunDirError, match="is not a directory: choose another --run-dir"):
        RunDir(tmp_path / "run").open(from_dict(raw))


def test_a_run_and_its_files_may_move(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Everything is copied to another place, and the run is continued there under the new paths."""
    prepared(tmp_path, raw)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (*tmp_path.glob("*.jsonl"), tmp_path / "run"):
        shutil.move(path, moved)
    shutil.copytree(raw["model"]["hf"], moved / "model")
    run_dir = RunDir(moved / "run")
    config = from_dict(raw_config(moved, moved / "model"))
    run_dir.open(config)
    assert run_dir.config.read_text() == to_yaml(config)
    keys = [json.loads(line)["key"] for line in (run_dir.root / RECORD).read_text().splitlines()]
    assert keys == ["data.path", "evaluation.likelihood.more", "evaluation.path", "model.hf"]


def test_another_spelling_of_a_path_needs_no_hash(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = prepared(tmp_path, raw)
    (run_dir.data / "manifest.json").unlink()  # nothing to compare with
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    run_dir.open(changed(raw, "data", path="data.jsonl"))
    run_dir.open(changed(raw, "data", path=str(tmp_path / "link.jsonl")))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"path": "held_out.jsonl"}, r"data.path=held_out.jsonl is not the file that prepare read"),
        ("data", {"path": "none.jsonl"}, r"data.path=none.jsonl does not exist"),
        ("evaluation", {"path": "data.jsonl"}, r"evaluation.path=data.jsonl is not the file that prepare read"),
        ("evaluation", {"path": None}, r"prepare was made with evaluation.path=/"),
        ("model", {"hf": "other"}, r"model.hf=other holds other weights than the model that the run began with"),
        ("model", {"hf": "none"}, r"model.hf=none holds no config.json"),
    ],
)
def test_other_contents_are_refused(
    tmp_path: Path,
    raw: dict[str, Any],
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    values: dict[str, Any],
    message: str,
) -> None:
    run_dir = prepared(tmp_path, raw)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").symlink_to(models / "other")
    with pytest.raises(RunDirError, match=message):
        run_dir.open(changed(raw, section, **values))


def test_another_tokenizer_is_refused(tmp_path: Path, raw: dict[str, Any]) -> None:
    run_dir = prepared(tmp_path, raw)
    model = tmp_path / "model"
    shutil.copytree(raw["model"]["hf"], model)
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RunDirError, match="has another tokenizer than the one that prepare read"):
        run_dir.open(changed(raw, "model", hf=str(model)))


def test_the_same_weights_under_another_config_are_refused(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Training builds the model from config.json: another RoPE base with the same tensors is another function."""
    run_dir = prepared(tmp_path, raw)
    model = tmp_path / "model"
    shutil.copytree(raw["model"]["hf"], model)
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "0.0.0"}))
    run_dir.open(changed(raw, "model", hf=str(model)))
    path.write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    shutil.copytree(model, tmp_path / "again")
    with pytest.raises(RunDirError, match=r"has another config.json than .* \(rms_norm_eps\)"):
        run_dir.open(changed(raw, "model", hf=str(tmp_path / "again")))


def test_data_of_a_run_without_their_hashes_must_keep_their_path(tmp_path: Path, raw: dict[str, Any]) -> None:
    run_dir = prepared(tmp_path, raw)
    write_json(run_dir.data / "manifest.json", {"tokenizer": tokenizer_sha(Path(raw["model"]["hf"]))})
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "copy.jsonl")
    with pytest.raises(RunDirError, match=r"the run is older than the record of its data files, so data.path must"):
        run_dir.open(changed(raw, "data", path=str(tmp_path / "copy.jsonl")))


def test_before_prepare_another_path_is_simply_taken(tmp_path: Path, raw: dict[str, Any]) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.open(from_dict(raw))
    run_dir.open(changed(raw, "data", path=str(tmp_path / "held_out.jsonl")))
    assert load_config(run_dir.config).data.path == str(tmp_path / "held_out.jsonl")


def test_a_config_without_later_keys_continues(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Keys that did not exist when the run was started have their defaults."""
    run_dir = prepared(tmp_path, raw)
    text = run_dir.config.read_text()
    assert "  parameters: {}\n" in text
    run_dir.config.write_text(text.replace("  parameters: {}\n", ""))
    run_dir.open(from_dict(raw))
    assert not (run_dir.root / RECORD).exists()
