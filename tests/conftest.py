"""One thread and fixed seeds: every test draws the same numbers on every machine."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # which Triton reads when it is imported

# run by runtimes in environments of their own
collect_ignore = [f"integration/{name}_run.py" for name in ("llama_cpp", "openvino", "vllm")]

settings.register_profile("repo", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("repo")


@pytest.fixture(autouse=True)
def _reproducible():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
