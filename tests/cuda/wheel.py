"""The Python half of vLLM's CUDA wheels, which hold what the CPU wheel leaves out: fetched once, kept outside the tree.

Their compiled half needs a driver and is not unpacked; `pretend.py` stands in for the few operations that a test calls.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def fetched(version: str) -> Path:
    """Where the release `version` lies once it has been fetched."""
    return _cache() / f"vllm-{version}-cuda"


def cuda_vllm(version: str) -> Path:
    """Folder to put first on PYTHONPATH, of the release `version`. Downloads 340 MB the first time; 90 MB are kept."""
    cache, folder = _cache(), fetched(version)
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _find(cache, version) or _download(Path(scratch), version)
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


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-defensive"


def _find(folder: Path, version: str) -> Path | None:
    """A wheel that somebody has put there by hand."""
    return next(folder.glob(f"vllm-{version}-*.whl"), None)


def _download(folder: Path, version: str) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), f"vllm=={version}"]
    subprocess.run(pip, check=True)
    wheel = _find(folder, version)
    assert wheel is not None, f"pip left no vLLM wheel in {folder}"
    return wheel


def _is_compiled(name: str) -> bool:
    return name.endswith(".so") or ".so." in name or name in ("vllm/vllm-rs",) or "/deep_gemm/include/" in name
