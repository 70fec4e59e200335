"""What the README names exists, and every configuration under examples/ is one that the program takes."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_spin.config import from_dict, load_config
from scripts.update_readme import markers
from tests.support.runs import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_text_exist(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    named = set(
        re.findall(r"(?<![\w/])(?:tools|scripts|examples|benchmarks|megatron_spin|tests|docs)/[\w./-]*\w", text)
    )
    assert page != "README.md" or len(named) > 5
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def file_tree() -> list[str]:
    """Paths of the file tree in CONTRIBUTING.md, by its indentation."""
    tour = (REPOSITORY / "CONTRIBUTING.md").read_text().split("## A tour of the tree")[1].split("\n## ")[0]
    block = tour.split("```")[1]
    parents: dict[int, str] = {}
    paths = []
    for line in block.splitlines():
        match = re.match(r"^( *)(\S+)", line)
        if match is None:
            continue
        depth = len(match.group(1))
        parents = {indent: name for indent, name in parents.items() if indent < depth}
        path = "".join(parents.values()) + match.group(2)
        parents[depth] = match.group(2)
        paths.append(path)
    return paths


def test_the_file_tree_is_the_repositorys() -> None:
    paths = file_tree()
    assert len(paths) > 20
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    tools = {f"tools/{path.name}" for path in (REPOSITORY / "tools").iterdir() if path.suffix in (".py", ".sh")}
    assert tools <= set(paths), "a tool that the tree does not explain"
    packages = {f"megatron_spin/{path.parent.name}/" for path in (REPOSITORY / "megatron_spin").glob("*/__init__.py")}
    assert packages <= set(paths), "a package that the tree does not explain"


def test_the_first_table_has_at_most_six_columns() -> None:
    titles = next(line for line in README.splitlines() if line.startswith("|"))
    assert titles.count("|") - 1 <= 6


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", README, re.MULTILINE))
    assert {"quickstart", "test"} <= targets
    makefile = (REPOSITORY / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("page", PAGES)
def test_local_links_and_pictures_exist(page: str) -> None:
    path = REPOSITORY / page
    links = [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_index_has_every_page_once() -> None:
    index = (REPOSITORY / "docs/index.md").read_text()
    linked = re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", index, re.MULTILINE)
    pages = [path.name for path in (REPOSITORY / "docs").glob("*.md") if path.name != "index.md"]
    assert sorted(linked) == sorted(pages)


def test_the_configuration_shown_is_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        from_dict(yaml.safe_load(block.replace("5.0e-7", "0.0000005")))


CONFIGURATIONS = sorted(path for path in (REPOSITORY / "examples").rglob("*.yaml") if path.parent.name != "experiments")


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_examples_are_valid(path: Path) -> None:
    assert load_config(path).name


def test_markers_stand_once() -> None:
    experiments = (REPOSITORY / "docs/experiments.md").read_text()
    named = [(experiments, path.stem) for path in (REPOSITORY / "examples/experiments").glob("*.yaml")]
    smollm2 = (REPOSITORY / "examples/smollm2/README.md").read_text()
    quickstart = (REPOSITORY / "docs/quickstart.md").read_text()
    performance = (REPOSITORY / "docs/performance.md").read_text()
    named += [(README, "run"), (README, "claim"), (quickstart, "run"), (smollm2, "run")]
    named += [(performance, "speed"), (performance, "profile")]
    for text, name in named:
        for marker in markers(name):
            assert text.count(marker) == 1
