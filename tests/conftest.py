"""The environment of every test, and the models that they share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, so that it judges the change alone. `--hypothesis-profile random` looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("fixed")

# Set before anything imports torch or vLLM, and only where the caller has not chosen: these are read at import.
for name, value in {
    "HF_HUB_OFFLINE": "1",  # every model is a local folder; a typo must not turn into a download
    "OMP_NUM_THREADS": "1",  # in one process with pytest, vLLM's thread binding makes more threads ten times slower
    "NUMBA_NUM_THREADS": "1",  # else the first n-gram draft gives torch as many for what is left of the process
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every in-process engine of the machine shares the first core
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a share of the machine's memory
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # LLM() in this process: no start-up of a second one, and tests can look in
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DEFENSIVE_INTERNAL_POLICIES": "1",  # keep-all and random-uneven
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(autouse=True)
def no_command_line() -> Iterator[None]:
    """A parser of vLLM's makes this process a command, which ends where `LLM` would raise: for that test alone."""
    yield
    plugin = sys.modules.get("vllm_defensive.plugin")
    if plugin is not None:
        plugin._commands.clear()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct: 30 layers, 9 query and 3 KV heads of size 64, 8,192 positions (slow tests)."""
    from benchmarks.models import ensure_model

    return ensure_model("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama: 3 layers, 4 query and 2 KV heads of size 32, 4,096 positions, with a tokenizer."""
    from tests.tiny_model import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Gemma 3, with sliding-window and global layers."""
    from tests.tiny_model import write_tiny_gemma3

    return write_tiny_gemma3(tmp_path_factory.mktemp("gemma") / "tiny-gemma3")
