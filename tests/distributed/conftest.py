from collections.abc import Callable, Iterator

import pytest

from tests.support.world import World, worlds


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """One persistent gloo world a size, shared by all tests."""
    with worlds() as getter:
        yield getter
