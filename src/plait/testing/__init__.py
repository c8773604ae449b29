"""The contract tests, for any method that is registered with plait.

In a test file beside a method of your own:

    from my_method import MyConfig
    from plait.testing import contract_test

    test_contract = contract_test(MyConfig)

and pytest runs every check of the contract over it. Needs pytest: `pip install "plait[testing]"`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

try:
    import pytest
except ImportError as error:
    raise ImportError('plait.testing needs pytest. Run: pip install "plait[testing]"') from error

import torch

from plait.core import DeltaConfig

# So that a failing assert shows its values, as in a test file. Before these are imported.
pytest.register_assert_rewrite("plait.testing.checks", "plait.testing.helpers")

from plait.testing.case import Case  # noqa: E402
from plait.testing.checks import CHECKS  # noqa: E402
from plait.testing.processes import fresh_process, works_in_a_new_process  # noqa: E402

__all__ = ["CHECKS", "Case", "contract_test", "fresh_process"]


def contract_test(
    config: type[DeltaConfig], *variants: Mapping[str, Any], **facts: Any
) -> Callable[..., None]:
    """A test function with every check of the contract as a parameter.

    Assign it to a name that pytest collects. The checks take about 5 s for each variant, and as
    long again for the one that starts a new process for all of them. The check of quantised bases
    is skipped without bitsandbytes (`pip install "plait[quant]"`).

    Example:
        >>> import plait
        >>> from plait.testing import contract_test
        >>> test_contract = contract_test(plait.NolaConfig, {"num_basis_A": 40}, lr=5e-2)

    Args:
        config: the config class of a registered method.
        variants: options of the config, a mapping for each variant to test; none: the defaults.
        facts: fields of `Case` that hold for all variants, such as `lr` and `experts`.

    Raises:
        ValueError: no method is registered with this config class.
        TypeError: `facts` has a name that is not a field of `Case`.
    """
    if not config.key:
        raise ValueError(
            f"contract_test: {config.__name__} belongs to no method. Register the method first: "
            '@plait.register("my_method", MyConfig, paper="none").'
        )
    cases = [Case(config.key, options, **facts) for options in variants or ({},)]
    checks = [
        pytest.param(partial(check, case), id=f"{check.__name__}-{case}")
        for case in cases
        for check in CHECKS
    ]
    new_process = pytest.param(partial(works_in_a_new_process, cases), id="works_in_a_new_process")

    @pytest.mark.parametrize("check", [*checks, new_process])
    def test_contract(check: Callable[[], None]) -> None:
        with one_deterministic_thread():
            check()

    return test_contract


@contextmanager
def one_deterministic_thread() -> Iterator[None]:
    """Run torch on one thread, with algorithms that repeat their bits; restore both settings."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
