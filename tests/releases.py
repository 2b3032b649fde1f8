"""The releases of vLLM that the set-up installs and the tests run on, read from setup.py: oldest first."""

from __future__ import annotations

import ast
import re
from pathlib import Path

_SETUP = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
_found = re.search(r"^VLLM = (\(.*\))", _SETUP, flags=re.MULTILINE)
assert _found, "setup.py does not define VLLM"

RELEASES: tuple[str, ...] = ast.literal_eval(_found[1])
CPU_RELEASE = RELEASES[0]
