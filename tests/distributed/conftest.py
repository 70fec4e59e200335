from collections.abc import Iterator

import pytest

from tests.support.world import Worlds, worlds


@pytest.fixture(scope="package")
def world() -> Iterator[Worlds]:
    """One persistent gloo world per size for all tests of this directory. It ends before other tests are timed."""
    with worlds() as getter:
        yield getter
