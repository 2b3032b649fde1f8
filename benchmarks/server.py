"""A vLLM server as a child process, for what has to be seen over HTTP: started, asked for metrics, and stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from prometheus_client.parser import text_string_to_metric_families


def commit() -> str:
    """The commit of this repository that is checked out; empty if that cannot be known."""
    root, command = Path(__file__).parents[1], ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return ""


class Server:
    """`vllm serve MODEL ARGS` on a free port of this machine, as a context manager.

    log: the file that takes its output. seconds: how long it may take to answer. Raises RuntimeError, with the end of
    the log, if it ends or is not ready in time.
    """

    def __init__(self, model: Path | str, args: Sequence[str], log: Path, seconds: float = 300) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--host", "127.0.0.1",
            "--port", str(self.port), *args,
        ]  # fmt: skip
        self._log, self._seconds = log, seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        with self._log.open("wb") as log:
            # A session of its own, so that stopping it reaches the engine process as well.
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """Of the process that was started; API servers and engines may be its children."""
        assert self._process is not None
        return self._process.pid

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self._process.returncode}:\n{self.log_tail()}")
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise RuntimeError(f"the server was not ready after {self._seconds:.0f} s:\n{self.log_tail()}")

    def _stop(self) -> None:
        assert self._process is not None
        for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            if self._process.poll() is not None:
                break
            os.killpg(self._process.pid, number)
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue

    def log_tail(self, lines: int = 25) -> str:
        """The last lines of the server's output."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def metric(self, name: str, label: str | None = None) -> float:
        """The sum over its labels of a metric's samples on `/metrics`, or the value of one label as a number.

        Raises KeyError if there is no such sample.
        """
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
        if not samples:
            raise KeyError(f"no metric {name}")
        return float(samples[0].labels[label]) if label is not None else sum(s.value for s in samples)
