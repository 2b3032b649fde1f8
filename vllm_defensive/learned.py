"""A learned score's file: weights that foretell, for one model, what a repeated prompt would attend to.

`python -m vllm_defensive.learn MODEL` writes it. One safetensors file:

    weight_LHX   fp32 [L, H, 2*D + 1]   of the evictable layers, in their order, and all KV heads of the model: weights
                                        of a token's key before RoPE and of its value, and a constant (kernels:
                                        `learned.py`)

and as metadata the fields of `Facts`, as JSON under the name `facts`.

A file belongs to a model by the model's weight files (`fingerprint`): whoever fine-tunes a model has another one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vllm_defensive.compat.base import get_logger

logger = get_logger("kv_eviction")

VERSION = 1
"""Of the formula that the weights are for; grows when the same weights would mean another score."""
COMMAND = "python -m vllm_defensive.learn"
PACKAGED = Path(__file__).parent / "learned_scores"
_FORMATS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_SAMPLES, _SAMPLE_BYTES = 512, 4096


class Facts(BaseModel):
    """What a file says of itself."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    version: int
    fingerprint: str | None
    """Of the model's weight files; None if they were not found as files."""
    model: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
    """The name that it was learned under."""
    turned: list[bool]
    """Of each layer, whether RoPE turns its keys."""
    texts: list[str]
    """Where the texts came from."""
    tokens: int
    """How many tokens were learned from."""
    balance: Annotated[float, Field(gt=0)] = 1.0
    """What foretold attention is multiplied by, so that it competes with the window's on one scale."""
    r2: list[float]
    """Of each layer, the share of the logarithm's variance that is foretold on texts that were held back."""
    window_keep: float | None = None
    """The least ratio at which, joined with the window's score, it was found to lose next to nothing where the question
    is in the window. None: it was not tried, or loses more at any."""
    checks: dict[str, float] = {}
    """What was measured with it, by name."""


class LearnedScore(BaseModel):
    """A file's contents. weight_LHX: fp32, on the CPU."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    facts: Facts
    weight_LHX: Tensor

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        metadata = {"facts": self.facts.model_dump_json()}
        part.write_bytes(save({"weight_LHX": self.weight_LHX.contiguous()}, metadata))
        part.replace(path)


def load(path: str | os.PathLike[str]) -> LearnedScore:
    """Read a file. Raises ValueError, one line, if it is none, or of another version."""
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = Facts.model_validate_json((file.metadata() or {}).get("facts", ""))
            weight_LHX = file.get_tensor("weight_LHX")
    except (OSError, SafetensorError, ValidationError) as error:
        raise ValueError(f"{path}: no learned score ({_why(path, error)}); make one with {COMMAND} MODEL") from None
    if facts.version != VERSION:
        raise ValueError(
            f"{path}: of version {facts.version}, and this is {VERSION}; learn it anew with {COMMAND} MODEL"
        )
    wrong = weight_LHX.dim() != 3 or weight_LHX.dtype != torch.float32 or len(facts.turned) != len(weight_LHX)
    if wrong or not bool(weight_LHX.isfinite().all()):
        raise ValueError(f"{path}: no learned score (its weights are none); make one with {COMMAND} MODEL")
    return LearnedScore(facts=facts, weight_LHX=weight_LHX)


def _why(path: str | os.PathLike[str], error: Exception) -> str:
    """What is wrong with it, in a few words: libraries put it in theirs."""
    if not Path(path).exists():
        return "there is no such file"
    if Path(path).is_dir():
        return "a folder"
    return str(error).splitlines()[0] if isinstance(error, OSError) else "a file of another kind"


# -- which file belongs to a model ------------------------------------------------------------------------------------


def fingerprint(model: str, revision: str | None = None, cache: str | None = None) -> str | None:
    """Of a model's weight files: their sizes, and samples from all over them. 32 hex digits.

    model: a folder, or a name on the hub whose files are in the local cache (`cache`, or the hub's own). None: there
    are no files here to look at.
    """
    folder = _folder(model, revision, cache)
    files = next((found for pattern in _FORMATS if (found := sorted(folder.glob(pattern)))), []) if folder else []
    if not files:
        return None
    digest = hashlib.sha256()
    for sample in (sample for file in files for sample in _samples(file)):
        digest.update(sample)
    return digest.hexdigest()[:32]


def _folder(model: str, revision: str | None, cache: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", cache_dir=cache, revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _samples(path: Path) -> Iterator[bytes]:
    """The file's size, and pieces of it, close enough to meet every large matrix, all of which a training changes."""
    size = path.stat().st_size
    yield size.to_bytes(8)
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(i * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)


def path_for(fingerprint: str) -> Path:
    """Where a model's file belongs: in vLLM's cache folder, which people who run containers keep."""
    import vllm.envs as envs

    return Path(envs.VLLM_CACHE_ROOT) / "kv_eviction" / f"{fingerprint}.safetensors"


def find(of_model: str | None) -> tuple[str, LearnedScore] | None:
    """The file of a model, learned by the user or part of this package, and what is in it. None: there is none, or it
    cannot be used any more, which is said in a warning. of_model: `fingerprint`."""
    if of_model is None:
        return None
    for path in (path_for(of_model), PACKAGED / f"{of_model}.safetensors"):
        if path.is_file():
            try:
                return str(path), load(path)
            except ValueError as error:
                logger.warning("KV eviction goes on without: %s", error)
    return None


def check(score: LearnedScore, path: str, of_model: str | None) -> None:
    """Raises ValueError, one line, if a file is another model's. of_model: `fingerprint`."""
    if None not in (of_model, score.facts.fingerprint) and of_model != score.facts.fingerprint:
        way_out = f"leave it out if this model's own is found, or make it with {COMMAND} MODEL"
        raise ValueError(f"{path}: learned for {score.facts.model}, of other weights; {way_out}")


def check_shape(score: LearnedScore, path: str, layers: int, heads: int, size: int) -> None:
    """Raises ValueError, one line, unless the weights are for so many evictable layers, KV heads of the model, and
    numbers of a head."""
    wanted, found = (layers, heads, 2 * size + 1), tuple(score.weight_LHX.shape)
    if found != wanted:
        raise ValueError(
            f"{path}: learned for {score.facts.model}, whose layers, KV heads or head size are others ({found}, not "
            f"{wanted}); make this model's with {COMMAND} MODEL"
        )


def summary(score: LearnedScore, path: str) -> dict[str, Any]:
    """For people: which file, of which model, how good."""
    facts = score.facts
    r2 = round(sum(facts.r2) / len(facts.r2), 3) if facts.r2 else None
    of_all = {"path": path, "model": facts.model, "tokens": facts.tokens, "r2": r2, "window_keep": facts.window_keep}
    return {**of_all, "checks": dict(facts.checks)}
