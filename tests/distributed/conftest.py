from collections.abc import Callable, Iterator

import pytest

from tests.support.world import World, worlds


@pytest.fixture(scope="package")
def world() -> Iterator[Callable[[int], World]]:
    """One persistent gloo world a size, shared by all tests of this directory, and gone before the next ones are timed."""
    with worlds() as getter:
        yield getter
