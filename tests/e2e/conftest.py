import shutil
from pathlib import Path

import pytest

from tests.support.runs import run_tool, tiny_yaml


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, run directory) of a tiny run that stands before train:0; made once, never written to again."""
    directory = tmp_path_factory.mktemp("generated")
    config, run = tiny_yaml(directory), directory / "run"
    run_tool("prepare.py", config, "--run-dir", run)
    run_tool(
        "import_hf.py", "--hf", directory / "model", "--checkpoint", run / "base", "--config", config, "--run-dir", run
    )
    run_tool("generate.py", config, "--run-dir", run, "--iteration", 0)
    return config, run


@pytest.fixture
def fresh(generated: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of :func:`generated` to train in."""
    config, run = generated
    shutil.copytree(run, tmp_path / "run")
    return config, tmp_path / "run"


@pytest.fixture(scope="session")
def trained(generated: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """:func:`generated` with train:0 done without interruption; never written to again."""
    config, run = generated
    copy = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(run, copy)
    run_tool("train.py", config, "--run-dir", copy, "--iteration", 0)
    return config, copy
