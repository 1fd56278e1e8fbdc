"""Settings shared by all tests."""

import os

import torch
from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.load_profile("default")

if not torch.cuda.is_available():
    # Triton decides between its compiler and its interpreter when it is first imported, which other libraries do too.
    os.environ.setdefault("TRITON_INTERPRET", "1")
