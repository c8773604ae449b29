"""statsmodels collects garbage at each call of Holm: let it look at new objects alone."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _frozen() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()
