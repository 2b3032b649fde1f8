"""The Python half of vLLM's CUDA wheel, which holds what the CPU wheel leaves out: fetched once, kept outside the tree.

Its compiled half needs a driver and is not unpacked; `pretend.py` stands in for the few operations that a test calls.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM = "0.32.0"


def cuda_vllm() -> Path:
    """Folder to put first on PYTHONPATH. Downloads 326 MB the first time, of which 90 MB are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-defensive"
    folder = cache / f"vllm-{VLLM}-cuda"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _find(cache) or _download(Path(scratch))
        unpacked = Path(scratch) / "python"
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not _is_compiled(name):
                    archive.extract(name, unpacked)
        try:
            unpacked.rename(folder)  # whole or not at all: an interrupted run leaves nothing that looks complete
        except OSError:
            assert folder.exists()  # another process was faster
    return folder


def _find(folder: Path) -> Path | None:
    """A wheel that somebody has put there by hand."""
    return next(folder.glob(f"vllm-{VLLM}-*.whl"), None)


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), f"vllm=={VLLM}"]
    subprocess.run(pip, check=True)
    wheel = _find(folder)
    assert wheel is not None, f"pip left no vLLM wheel in {folder}"
    return wheel


def _is_compiled(name: str) -> bool:
    return name.endswith(".so") or ".so." in name or name in ("vllm/vllm-rs",) or "/deep_gemm/include/" in name
