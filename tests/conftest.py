"""Every test runs on one thread with a fixed seed; RECBLOCKS_HYPOTHESIS names the profile that draws the examples."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# "ci" repeats the same examples everywhere, so that a red run is red again; "fuzz" looks for new ones.
hypothesis.settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("fuzz", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("RECBLOCKS_HYPOTHESIS", "ci"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """What a kernel does not write into new memory is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow` tests run only where `-m slow` asks for them; `cuda` tests only where a GPU is."""
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: run by `nox -s slow`"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
