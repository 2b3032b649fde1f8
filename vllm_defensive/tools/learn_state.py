"""What a learning has come to, beside the file that it is to write, so that the same command goes on from there.

A folder `FILE.part`: `state.json` with the texts and how many of them are done, and a file of sums of each rank, which
the workers write. The sums' names hold that number, so that what counts is what `state.json` says.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class State:
    """One learning's. signature: of all that the sums depend on; another one's state is not gone on from."""

    def __init__(self, out: Path, signature: str) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.part")
        self._signature = signature
        self._file = self.folder / "state.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until nobody else learns this file. Raises OSError if the folder cannot be made."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_there(self.folder / "lock", lock):
                    continue  # the one who had it is ready, and has removed it
                yield
                return
            finally:
                os.close(lock)

    def load(self) -> tuple[list[list[int]], int] | None:
        """(the texts, how many of them are done); None: there is nothing to go on from."""
        try:
            state = json.loads(self._file.read_text())
            texts, done = state["texts"], state["done"]
            there = not done or any(self.folder.glob(f"{Path(self.sums(done)).name}.*"))
            return (texts, done) if there and state["signature"] == self._signature else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def sums(self, done: int) -> str:
        """What the ranks' files of sums of so many texts begin with."""
        return str(self.folder / f"sums-{done}")

    def save(self, texts: list[list[int]], done: int) -> None:
        """From now on, go on from here; `sums(done)` is written. Raises OSError."""
        part = self.folder / "state.json.new"
        part.write_text(json.dumps({"signature": self._signature, "texts": texts, "done": done}))
        part.replace(self._file)
        for file in self.folder.glob("sums-*"):
            if not file.name.startswith(f"sums-{done}."):
                file.unlink()

    def remove(self) -> None:
        """The file is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_there(path: Path, lock: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False
