"""Layer specs and foreign packages that are refused."""

import sys
from pathlib import Path

import pytest

from megatron_spin.errors import DeviceError
from megatron_spin.parallel.kernels import check_layer_spec, refuse_wrong_apex
from tests.support.configs import build


def test_transformer_engine_is_refused_on_a_cpu() -> None:
    with pytest.raises(DeviceError, match="layer_spec=transformer_engine needs a GPU"):
        check_layer_spec(build(layer_spec="transformer_engine"), "cpu")
    check_layer_spec(build(), "cpu")


@pytest.mark.parametrize(
    ("module", "refused"), [("apex/__init__.py", True), ("apex.py", True), ("apex/normalization/__init__.py", False)]
)
def test_another_apex_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, refused: bool) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (tmp_path / "apex" / "__init__.py").touch() if path.parent != tmp_path else None
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    if refused:
        with pytest.raises(DeviceError, match=r"is not NVIDIA's .*pip uninstall apex"):
            refuse_wrong_apex()
    else:
        refuse_wrong_apex()
