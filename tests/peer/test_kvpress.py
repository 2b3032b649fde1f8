"""snapkv, adakv and criticalkv keep what NVIDIA's kvpress keeps.

kvpress wants an older transformers than ours, so it lives in an environment of its own, named by KVPRESS_PYTHON
(docs/quality.md says how to make one). Both sides see the same queries, keys and values; see `compare_kvpress.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("KVPRESS_PYTHON")
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="KVPRESS_PYTHON does not name an interpreter that has kvpress"),
]


@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_the_same_entries_are_kept(smollm2: Path, keep: float) -> None:
    done = subprocess.run(
        [str(PYTHON), "-m", "tests.peer.compare_kvpress", str(smollm2), "600", str(keep)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["theirs"] == found["ours"] == found["shared"], (name, found)
        assert found["heads_that_differ"] == 0, (name, found)
        if name == "snapkv":
            assert found["score_error"] < 1e-5  # float32 sums in another order
