"""The user's guide, read as a program: each block is run, in order, against the server that was started last."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.models import ensure_model
from benchmarks.server import Server

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Small, so that the server starts at once; what the guide shows does not depend on them.
SERVER = ["--served-model-name", "MODEL", "--num-gpu-blocks-override", "400", "--max-num-seqs", "8", "--enforce-eager"]


def run(language: str, text: str, folder: Path) -> None:
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    # The environment's programs are found whether or not it is activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(600)  # servers, and every program of the guide
def test_every_block_of_the_guide_runs(tmp_path: Path) -> None:
    model = ensure_model()
    blocks = BLOCK.findall((ROOT / "docs" / "guide.md").read_text(encoding="utf-8"))
    served = [text for _, text in blocks if text.startswith("vllm serve MODEL")]
    assert len(served) >= 2 and len(blocks) > len(served)
    with ExitStack() as stack:
        port = None
        for number, (language, text) in enumerate(blocks):
            text = text.replace("FOLDER", str(tmp_path / "audit"))
            if text.startswith("vllm serve MODEL"):
                stack.close()
                arguments = shlex.split(text)[3:]
                server = stack.enter_context(Server(model, [*arguments, *SERVER], tmp_path / f"{number}.log"))
                port = server.port
                continue
            assert port is not None, "the guide asks before it serves"
            text = text.replace("localhost:8000", f"localhost:{port}").replace("--port 8000", f"--port {port}")
            # Programs that read a tokenizer want the folder; requests name the model as it is served.
            text = text.replace("--model MODEL", f"--model MODEL --tokenizer {model.resolve()}")
            text = text.replace("--tokenizer MODEL", f"--tokenizer {model.resolve()}")
            run(language, text, tmp_path)
    assert (tmp_path / "audit" / "eviction.html").stat().st_size > 10_000
