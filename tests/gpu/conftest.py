"""Tests that are run on a GPU by make test-gpu, and by make test-long on the CPU.

So whoever first runs them on a GPU finds tests that have run before. Where they say "near" instead
of "equal", a GPU rounds in another way than a CPU.
"""

import os

import pytest
import torch

# For deterministic(): cuBLAS reads this once, when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ON_GPU = pytest.param("gpu", marks=pytest.mark.gpu)
ON_CPU = pytest.param("cpu", marks=pytest.mark.slow)


def pytest_collection_modifyitems(config, items):
    """Where there is one GPU, what needs two is left out: pytest then counts it as deselected."""
    if config.option.markexpr == "gpu" and torch.cuda.device_count() == 1:
        left_out = [item for item in items if item.get_closest_marker("two_gpus")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def gpu_is_there(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("PyTorch finds no GPU here", pytrace=False)


@pytest.fixture(params=[ON_GPU, ON_CPU])
def accelerator(request) -> str:
    """The flag --accelerator of the test."""
    return request.param


@pytest.fixture
def deterministic():
    """Sums in a fixed order, so that two trainings on a GPU can be equal to the last bit."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
