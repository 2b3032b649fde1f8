"""What eviction saves on a model, before anything is started: bytes a request, requests at once, the gain from bytes.

    python -m vllm_defensive.planner --model DIR --memory 60GiB --context 32768 --output 1024 --keep 0.2

Arithmetic only: it uses the blocks that the scheduler would allocate (`packing.Region`) and knows nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_defensive.packing import OFFERED, Format, Packing
from vllm_defensive.settings.engine import AUTO, EvictionConfig, listed
from vllm_defensive_kernels.widths import PageShape

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40} | {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_FULL, _SLIDING = "full_attention", ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Model:
    """What decides the size of a model's KV cache. Only layers of full attention are evicted.

    full_layers, windowed_layers: attention layers that see the whole prefix, and those that see `window` tokens.
    token_bytes: keys and values of one token in one layer, on one GPU. positions: longest sequence, None if unknown.
    head_size, number_bytes: of a KV head, and of one of its numbers.
    """

    full_layers: int
    windowed_layers: int
    window: int
    token_bytes: int
    positions: int | None = None
    head_size: int = 128
    number_bytes: int = 2

    def bytes(self, full_tokens: int, seen_tokens: int) -> int:
        """KV cache of a request that holds `full_tokens` slots in full layers and has seen `seen_tokens` tokens."""
        windowed = min(self.window, seen_tokens) if self.windowed_layers else 0
        return self.token_bytes * (self.full_layers * full_tokens + self.windowed_layers * windowed)

    def served(self, max_tokens: int) -> Model:
        """The model on a server that takes no longer requests: if all layers have a window that these cannot outgrow,
        they are full attention there (`engine.spec`)."""
        if self.full_layers or self.window < max_tokens:
            return self
        return replace(self, full_layers=self.windowed_layers, windowed_layers=0)


@dataclass(frozen=True)
class Plan:
    """Bytes of one request on one GPU, and how many requests the memory holds.

    full, mean: at the end of its output, and half-way through it. prefill: at most, while the prompt is computed.
    at_once: requests that reach their end together, none preempted. at_once_mean: requests that are half-way through.
    kept: tokens of the prompt that are kept, on average over layers and heads.
    """

    prefill: int
    mean: int
    full: int
    memory: int
    kept: int = 0

    @property
    def at_once(self) -> int:
        return self._count(self.full)

    @property
    def at_once_mean(self) -> int:
        return self._count(self.mean)

    def _count(self, each: int) -> int:
        """The last one to come must find room for its prompt, and its packed blocks, beside all others."""
        peak = max(self.prefill, each)
        return 0 if peak > self.memory else 1 + (self.memory - peak) // each


def plan(
    model: Model, memory: int, context: int, output: int, eviction: EvictionConfig | None, block_size: int = 32
) -> Plan:
    """The plan of requests of `context` prompt tokens and `output` new ones in `memory` bytes of KV cache a GPU.

    eviction None: stock vLLM. Slots are counted in whole blocks; prefixes that requests share are not considered.
    """
    packed, kept = 0, context
    if eviction:
        region = eviction.region(context, 0, block_size)
        format = Format.of(
            eviction.meant_widths(eviction.policy), PageShape(block_size, model.head_size, model.number_bytes)
        )
        packed = eviction.budget_blocks(region, format=format)
        kept = Packing(region, (0,) * packed, format).kept_tokens if packed else context

    def slots(tokens: int, first: int) -> int:
        return (math.ceil(tokens / block_size) - first) * block_size

    def held(tokens: int) -> int:
        evicted = context // block_size if packed else 0
        return model.bytes(slots(tokens, evicted) + packed * block_size, tokens)

    prefill = model.bytes(slots(context, 0) + packed * block_size, context)
    return Plan(prefill, held(context + math.ceil(output / 2)), held(context + output), memory, kept)


def read_model(config: Mapping[str, Any], tp: int = 1, kv_dtype: str = "auto") -> Model:
    """The KV cache of a Hugging Face configuration. ValueError names what is missing or not supported."""
    text = config.get("text_config") or config
    if text.get("kv_lora_rank"):
        raise ValueError("--model: multi-head latent attention is not evicted")
    layers, heads = _number(text, "num_hidden_layers"), _number(text, "num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or _number(text, "hidden_size") // heads
    if tp < 1 or kv_heads % tp:
        raise ValueError(f"--tp {tp}: choose a divisor of the model's {kv_heads} KV heads, as `vllm serve` wants it")
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    name = str(dtype or "bfloat16").removeprefix("torch.") if kv_dtype == "auto" else kv_dtype
    if name not in _DTYPE_BYTES:
        raise ValueError(f"--kv-dtype {name}: choose one of {', '.join(_DTYPE_BYTES)}")
    window = text.get("sliding_window") or text.get("attention_chunk_size") or 0
    kinds = text.get("layer_types")
    if kinds is None:  # one kind for all layers: Mistral's old form, or Qwen2's with its switch
        windowed = bool(window) and text.get("use_sliding_window", True)
        kinds = [_SLIDING[0] if windowed else _FULL] * layers
    if any(kind in _SLIDING for kind in kinds) and not window:
        raise ValueError("--model: its configuration has layers with a window, but not the window's size")
    positions = text.get("max_position_embeddings")
    number_bytes = _DTYPE_BYTES[name]
    token_bytes = 2 * kv_heads // tp * head_dim * number_bytes
    windowed = sum(kind in _SLIDING for kind in kinds)
    return Model(kinds.count(_FULL), windowed, window, token_bytes, positions, head_dim, number_bytes)


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"--model: its configuration has no usable {name}")
    return value


def load_config(model: str) -> dict[str, Any]:
    """A folder's `config.json`, such a file, or the configuration of a model on the hub. ValueError: none there."""
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.exists():
            config = json.loads(file.read_text(encoding="utf-8"))
        else:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model}: no configuration there ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise ValueError(f"--model {model}: its configuration is not a JSON object")
    return config


def parse_bytes(text: str) -> int:
    """Bytes of a size: "60GiB" -> 64424509440. ValueError for anything else than a positive number and a unit."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"--memory {text}: choose a size such as 60GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def report(before: Plan, after: Plan) -> str:
    """The answer as a table, and the gain."""
    gib = 2**30
    rows = [("", "stock", "evicted")]
    for label, name in (
        ("a request at its end, GiB", "full"),
        ("half-way through its output, GiB", "mean"),
        ("while its prompt is computed, GiB", "prefill"),
    ):
        rows.append((label, f"{getattr(before, name) / gib:.3f}", f"{getattr(after, name) / gib:.3f}"))
    rows.append(("tokens of its prompt that it keeps", str(before.kept), str(after.kept)))
    rows.append(("requests at once, none preempted", str(before.at_once), str(after.at_once)))
    rows.append(("requests at once, half-way through", str(before.at_once_mean), str(after.at_once_mean)))
    lines = [f"{label:<36}{left:>10}{right:>10}" for label, left, right in rows]
    if before.at_once and after.at_once:
        lines.append(f"gain in requests at once: {after.at_once / before.at_once:.2f}x")
    lines.append(
        f"gain in decoding from bytes alone: {before.mean / after.mean:.2f}x at most, if reading the cache were all "
        "that decoding costs; weights and prefill lower it"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_defensive.planner", description=__doc__.splitlines()[0])
    default = EvictionConfig.model_fields
    parser.add_argument("--model", required=True, help="a model's folder, its config.json, or a name on the hub")
    parser.add_argument("--memory", required=True, help="for the KV cache, of one GPU: what the weights leave; 60GiB")
    parser.add_argument("--context", type=int, required=True, help="prompt tokens of a request")
    parser.add_argument("--output", type=int, required=True, help="new tokens of a request")
    parser.add_argument("--keep", type=float, default=default["keep"].default, help="as --kv-eviction-keep")
    parser.add_argument(
        "--widths",
        default="16",
        help=f"as --kv-eviction-widths: {listed((AUTO, *OFFERED))}; auto: a CPU server's with --kv-eviction auto; "
        "default: 16",
    )
    parser.add_argument("--window", type=int, default=default["window"].default, help="as --kv-eviction-window")
    parser.add_argument("--block-size", type=int, default=32, help="tokens a block")
    parser.add_argument("--kv-dtype", default="auto", help="of the KV cache; auto: the model's")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that share each layer")
    args = parser.parse_args(argv)
    try:
        for name in ("context", "output", "block_size"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: choose 1 or more")
        if args.widths not in (AUTO, *OFFERED):
            raise ValueError(f"--widths {args.widths}: choose one of {listed((AUTO, *OFFERED))}")
        memory = parse_bytes(args.memory)
        whole = read_model(load_config(args.model), args.tp, args.kv_dtype)
        model = whole.served(args.context + args.output)
        # Any policy: they differ in what they keep, not in how much.
        given = {"keep": args.keep, "widths": args.widths, "window": args.window}
        settings = {"policy": AUTO, "auto_widths": True, **given}
        eviction = EvictionConfig.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        print(f"--{problem['loc'][0]} {problem['input']}: {problem['msg']}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    before, after = (plan(model, memory, args.context, args.output, e, args.block_size) for e in (None, eviction))
    print(report(before, after))
    if model.positions is not None and args.context + args.output > model.positions:
        print(f"note: prompt and output are longer than this model's {model.positions} positions")
    if model != whole:
        print(f"note: all layers have a window of {model.window} tokens; choose no more for --max-model-len")
    elif not model.full_layers:
        print(f"note: all layers have a window of {model.window} tokens, which is too short: --kv-eviction is refused")
    if not before.at_once or not after.at_once:
        print("this memory does not hold one such request" + ("" if not before.at_once else " while it is evicted"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
