"""Triton kernels run on a GPU where there is one, else in Triton's interpreter on the CPU."""

import importlib.util

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]

if HAS_TRITON and not torch.cuda.is_available():
    from support.triton_interpreter import mend_interpreter

    mend_interpreter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
