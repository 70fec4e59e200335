"""A user's own function or class."""

from pathlib import Path

import pytest

from megatron_spin.config.named import is_name, load_named
from megatron_spin.errors import ConfigError


def test_names() -> None:
    assert is_name("package.module:Class")
    assert not any(is_name(text) for text in ("spin", "package.module", ":Class", "module:", ""))


def test_a_module_beside_the_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_the_user.py").write_text("def answer(): return 42\n")
    monkeypatch.chdir(tmp_path)
    assert load_named("beside_the_user:answer", key="some.key", kind="function")() == 42


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("answer", "some.key='answer' is not package.module:Class: name a class of a module that Python can import"),
        ("no_such_module:Class", "some.key='no_such_module:Class' cannot be imported"),
        ("json:Missing", "some.key='json:Missing': module json has no Missing"),
    ],
)
def test_what_cannot_be_found(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_named(name, key="some.key", kind="Class")
    assert message in str(caught.value)
