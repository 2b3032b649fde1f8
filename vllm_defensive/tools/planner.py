"""What eviction saves on a model, before anything is started: bytes a request, requests at once, the gain from bytes.

    python -m vllm_defensive.planner --model DIR --memory 60GiB --context 32768 --output 1024 --keep 0.2

With `--documents 1000 --zipf 1.0`, where packings outlive their request: how many documents stay, and how many
questions find theirs.

Arithmetic only: it uses the blocks that the scheduler would allocate (`packing.Region`) and knows nothing of speed.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from vllm_defensive.packing import MANY_BLOCKS, OFFERED, Format, Packing
from vllm_defensive.settings.engine import AUTO, EvictionConfig, listed
from vllm_defensive.tools.cache_size import Model, load_config, read_model
from vllm_defensive.tools.lru import hit_rate, zipf
from vllm_defensive_kernels.widths import PageShape

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40} | {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


@dataclass(frozen=True)
class Plan:
    """Bytes of one request on one GPU, and how many requests the memory holds.

    full: the most while it generates, which is at its end unless its answer is evicted. mean: half-way through its
    output. prefill: at most, while the prompt is computed, or while it is packed once more.
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
    packing = _packing(model, context, eviction, block_size)
    kept = packing.kept_tokens if packing else context

    def size(blocks: int, tokens: int) -> int:
        return model.bytes(blocks * block_size, tokens)

    if eviction is not None and eviction.again:
        format = _format(model, eviction, block_size)
        held, most, peak = _walk(eviction, format, context, output, block_size)
        return Plan(size(peak, context), size(held, context + output), size(most, context + output), memory, kept)
    packed = len(packing.blocks) if packing else 0
    evicted = context // block_size if packed else 0
    prefill, mean, full = (
        size(math.ceil(tokens / block_size) + packed - gone, tokens)
        for tokens, gone in ((context, 0), (context + math.ceil(output / 2), evicted), (context + output, evicted))
    )
    return Plan(prefill, mean, full, memory, kept)


def _walk(eviction: EvictionConfig, format: Format, context: int, output: int, block_size: int) -> tuple[int, int, int]:
    """Blocks of a request that is evicted more than once, from stop to stop: half-way through its output, at most while
    it generates, and at most with what it is packed into beside."""
    part = (eviction.prompt_interval or context) if eviction.prompts == "bounded" else context
    stops = [*range(part, context, part), context]
    if eviction.answers == "evict":
        stops += range(context + eviction.interval, context + output, eviction.interval)
    held = most = peak = packed = full = 0
    half = context + math.ceil(output / 2)
    middle: int | None = None
    for stop in [*stops, context + output]:
        if middle is None and stop >= half:
            middle = packed + math.ceil(half / block_size) - full
        held = packed + math.ceil(stop / block_size) - full
        region = eviction.region(stop, 0, block_size)
        whole = packed + region.full_blocks - full
        count = eviction.budget_blocks(region, format=format, held_blocks=whole) if stop in stops else 0
        most, peak = max(most, held if stop > context else 0), max(peak, held + count)
        packed, full = (count, region.full_blocks) if count else (packed, full)
    return middle or held, most, peak


def _format(model: Model, eviction: EvictionConfig, block_size: int) -> Format:
    """How requests are packed that say nothing of it."""
    meant = eviction.meant_widths_again if eviction.again else eviction.meant_widths
    return Format.of(meant(eviction.policy), PageShape(block_size, model.head_size, model.number_bytes))


def _packing(model: Model, stop: int, eviction: EvictionConfig | None, block_size: int) -> Packing | None:
    """What an eviction after so many tokens makes; None if nothing is gained by one."""
    if eviction is None:
        return None
    region, format = eviction.region(stop, 0, block_size), _format(model, eviction, block_size)
    packed = eviction.budget_blocks(region, format=format)
    return Packing(region, (0,) * packed, format) if packed else None


@dataclass(frozen=True)
class Documents:
    """Documents that stay ready to be asked about. each: bytes that one takes. held: how many find room."""

    each: int
    held: float


def documents(
    model: Model,
    memory: int,
    context: int,
    output: int,
    running: int,
    eviction: EvictionConfig | None,
    block_size: int = 32,
) -> Documents:
    """Documents of `context` tokens that `memory` bytes hold beside so many running requests, each with `output` tokens
    behind its document.

    eviction None: stock vLLM, whose prefix cache keeps them whole, or their beginnings. Packings are there as a whole
    or not at all, and leave room for one document that is being read, by the last of these requests. ValueError names
    what is wrong.
    """
    if model.windowed_layers or model.recurrent_layers:
        raise ValueError(
            "--documents: not planned for models with sliding windows or recurrent layers, whose windows and states "
            "have to stay as well"
        )
    blocks, block_bytes = context // block_size, model.bytes(block_size, 0)
    if not blocks:
        raise ValueError(f"--context {context}: documents are shared in whole blocks; choose {block_size} or more")
    growth = math.ceil((context + output) / block_size) - blocks
    whole, end = blocks * block_bytes, growth * block_bytes
    packing = _packing(model, blocks * block_size, eviction, block_size)
    if packing is None:
        return Documents(whole, max(0.0, (memory - running * end) / whole))
    each = len(packing.blocks) * block_bytes
    return Documents(each, max(0, (memory - (running - 1) * end - max(whole, end)) // each))


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
        ("a request at its largest, GiB", "full"),
        ("half-way through its output, GiB", "mean"),
        ("while it is computed or packed, GiB", "prefill"),
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


def report_documents(before: Documents, after: Documents, count: int, exponent: float, running: int) -> str:
    """How many of so many documents stay, and how many questions find theirs, as a table."""
    shares = zipf(count, exponent)
    sides = (before, after)
    beside = "a running request" if running == 1 else f"{running} running requests"
    rows = [
        (f"{count} documents, Zipf {exponent:g}", ("stock", "evicted")),
        ("a document, GiB", [f"{side.each / 2**30:.3f}" for side in sides]),
        (f"that stay beside {beside}", [f"{min(side.held, count):.1f}".removesuffix(".0") for side in sides]),
        ("questions that find theirs", [f"{hit_rate(shares, side.held):.1%}" for side in sides]),
    ]
    return "\n".join(f"{label:<36}{left:>10}{right:>10}" for label, (left, right) in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_defensive.planner", description=__doc__.splitlines()[0])
    default = EvictionConfig.model_fields
    parser.add_argument("--model", required=True, help="a model's folder, its config.json, or a name on the hub")
    parser.add_argument("--memory", required=True, help="for the KV cache, of one GPU: what the weights leave; 60GiB")
    parser.add_argument("--context", type=int, required=True, help="prompt tokens of a request, or of a document")
    parser.add_argument(
        "--output", type=int, required=True, help="new tokens of a request; with --documents, of question and answer"
    )
    parser.add_argument("--keep", type=float, help="as --kv-eviction-keep")
    parser.add_argument(
        "--widths",
        default="16",
        help=f"as --kv-eviction-widths: {listed((AUTO, *OFFERED))}; auto: a CPU server's with --kv-eviction auto; "
        "default: 16",
    )
    for name, kind in (
        ("budget", int),
        ("answers", str),
        ("interval", int),
        ("prompts", str),
        ("prompt_interval", int),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default[name].default, help=f"as --kv-eviction-{flag[2:]}")
    parser.add_argument("--window", type=int, default=default["window"].default, help="as --kv-eviction-window")
    parser.add_argument("--block-size", type=int, default=32, help="tokens a block")
    parser.add_argument("--kv-dtype", default="auto", help="of the KV cache; auto: the model's")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that share each layer")
    parser.add_argument(
        "--documents", type=int, help="so many are asked about, again and again: how many questions find theirs"
    )
    parser.add_argument(
        "--zipf", type=float, default=1.0, help="the i-th is as popular as 1/i to this power; 0: all alike; default: 1"
    )
    parser.add_argument("--running", type=int, default=1, help="requests that run beside what waits; default: 1")
    args = parser.parse_args(argv)
    kept = None
    try:
        for name in ("context", "output", "block_size", "documents", "running"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: choose 1 or more")
        if args.widths not in (AUTO, *OFFERED):
            raise ValueError(f"--widths {args.widths}: choose one of {listed((AUTO, *OFFERED))}")
        if not 0 <= args.zipf < math.inf:
            raise ValueError(f"--zipf {args.zipf}: choose 0 or more")
        memory = parse_bytes(args.memory)
        whole = read_model(load_config(args.model), args.tp, args.kv_dtype)
        model = whole.served(args.context + args.output)
        # Any policy: they differ in what they keep, not in how much.
        names = ("keep", "widths", "window", "budget", "answers", "interval", "prompts", "prompt_interval")
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if args.budget is not None:
            given.setdefault("keep", 1.0)
        eviction = EvictionConfig.model_validate({"policy": AUTO, "auto_widths": True, **given})
        if eviction.again and args.widths not in (AUTO, *eviction.widths_again):
            of = listed((AUTO, *eviction.widths_again))
            raise ValueError(f"--widths {args.widths}: choose one of {of} with --answers evict or --prompts bounded")
        sizes, block = (args.context, args.output), model.block_tokens(args.block_size)
        before, after = (plan(model, memory, *sizes, e, block) for e in (None, eviction))
        if args.documents is not None:
            whole_ones, packings = (documents(model, memory, *sizes, args.running, e, block) for e in (None, eviction))
            kept = report_documents(whole_ones, packings, args.documents, args.zipf, args.running)
    except ValidationError as error:
        problem = error.errors()[0]
        print(f"--{problem['loc'][0]} {problem['input']}: {problem['msg']}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(report(before, after))
    if kept is not None:
        print(kept)
    if model.positions is not None and args.context + args.output > model.positions:
        print(f"note: prompt and output are longer than this model's {model.positions} positions")
    if model != whole:
        print(f"note: all layers have a window of {model.window} tokens; choose no more for --max-model-len")
    elif not model.full_layers:
        print(f"note: all layers have a window of {model.window} tokens, which is too short: --kv-eviction is refused")
    if model.state_bytes:
        print(f"note: a block has {block} tokens, as many as take what a state does of a recurrent layer")
        if args.context < MANY_BLOCKS * block:
            print(f"note: budgets are whole blocks; prompts below {MANY_BLOCKS * block} tokens gain little")
    if not before.at_once or not after.at_once:
        print("this memory does not hold one such request" + ("" if not before.at_once else " while it is evicted"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
