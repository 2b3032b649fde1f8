"""Two API servers in front of two engines: what `/metrics` and `GET /kv_eviction` say is what the clients were told."""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import Server
from tests.dashboard import check_against, panels
from tests.processes import environment

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

KEY = "sesame"
FLAGS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
    "--api-server-count", "2", "--data-parallel-size", "2", "--api-key", KEY, "--enable-scale-out",
    "--kv-eviction", "layer-defensivekv", "--kv-eviction-keep", "0.25", "--kv-eviction-min-tokens", "100",
)  # fmt: skip
N = 32  # tokens a block
PROMPT = [2 + 11 * i % 500 for i in range(700)]
STORY = "a lighthouse and its keeper " * 30
