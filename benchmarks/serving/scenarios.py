"""What is measured: models, pools, loads, and the servers that are compared."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import ensure_model

BLOCK_SIZE = 32
HEAVY = "kv-heavy"
BALANCED = "kv-heavy-balanced"
SMOLLM2 = "SmolLM2-135M"

# A decode step of an 8B model (16 GB of weights) on a GPU with 141 GB reads, with the pool full, about 110 GB of KV
# cache: seven bytes of cache for each byte of weights. Here weights are 37 MB (25 MB of them the tied embedding) and a
# token's KV is 16 KiB, so a pool of 16,384 tokens, 268 MB, has the same ratio, and a smaller pool a smaller one. Every
# KV head has one query head: on two cores a group would make attention compute-bound, which on a GPU it is not.
_HEAVY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# That one has too much work in a prefill: a core without matrix units computes some ten flops while it reads a byte, an
# H200 two hundred. There, with prompts of 32K and answers of 8K tokens, an 8B model needs 0.8 PFLOP, 1.3 s, for a
# prompt, and some 33 ms for a step over a full pool, which 23 requests share: a prefill takes a tenth of a request's
# time. So it does here (9 %), with prompts of 4,096 and answers of 1,024 tokens in a pool of four, by these changes:
# float32, in which a prefill took 8 % longer and a step of four long requests 59 %; half the hidden size; a vocabulary
# that is a quarter of the weights instead of two thirds (8B: an eighth).
_BALANCED_CONFIG = {**_HEAVY_CONFIG, "hidden_size": 128, "vocab_size": 8192, "torch_dtype": "float32"}
_DUMMIES: dict[str, dict[str, Any]] = {HEAVY: _HEAVY_CONFIG, BALANCED: _BALANCED_CONFIG}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Row:
    """A server of the comparison. room: tokens that a byte of its pool holds, in those of the model's own dtype."""

    name: str
    args: tuple[str, ...] = ()
    room: int = 1


def evicting(policy: str, keep: float, widths: str = "16") -> Row:
    row = Row(f"{policy} {keep:g}", ("--kv-eviction", policy, "--kv-eviction-keep", f"{keep:g}"))
    return row if widths == "16" else Row(f"{row.name} {widths}", (*row.args, "--kv-eviction-widths", widths))


def steady(policy: str, keep: float) -> Row:
    """`evicting`, where a request waits until all that run will fit to their ends."""
    row = evicting(policy, keep)
    return Row(f"{row.name} steady", (*row.args, "--kv-eviction-admission", "steady"))


STOCK = Row("stock")
FP8 = Row("stock, fp8 cache", ("--kv-cache-dtype", "fp8"), room=2)


@dataclass(frozen=True)
class Scenario:
    """One load on one pool.

    prompt, output: tokens; pool: KV cache in multiples of one request; shared: leading tokens that all prompts have in
    common; concurrency: requests at once, all if None; turns: if not 0, the requests are chats of so many turns, the
    last of which has the prompt's length; offline: by `vllm bench throughput`, an engine in its own process on all
    cores, instead of a server.
    """

    name: str
    model: str
    prompt: int
    output: int
    requests: int
    pool: float
    rows: tuple[Row, ...]
    shared: int = 0
    concurrency: int | None = None
    turns: int = 0
    offline: bool = False

    @property
    def offered(self) -> int:
        """Requests at once, at most."""
        return min(self.requests, self.concurrency or self.requests)

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool; vLLM keeps one for itself, and a prompt comes out a few tokens longer than asked for."""
        return int(self.pool * -(-(self.prompt + self.output + 16) // BLOCK_SIZE)) + 1

    def engine_args(self, row: Row) -> list[str]:
        # Eager for every row: compiling takes a busy machine minutes a server, and attention, where these loads spend
        # their time, is a kernel that is not compiled.
        return [
            "--enforce-eager", "--block-size", str(BLOCK_SIZE),
            # By name, as vLLM's "auto" turns a float32 model into bfloat16.
            "--dtype", _DUMMIES.get(self.model, {}).get("torch_dtype", "bfloat16"),
            "--num-gpu-blocks-override", str(row.room * (self.pool_blocks - 1) + 1),
            "--max-num-seqs", str(self.concurrency if self.offline and self.concurrency else 128),
            "--max-model-len", str(self.prompt + self.output + 64), "--max-num-batched-tokens", "2048",
            *(("--load-format", "dummy") if self.model in _DUMMIES else ()),
            *row.args,
        ]  # fmt: skip

    def load_args(self, chats: Path, seed: int, output: int) -> list[str]:
        """Of `vllm bench`. chats: a file that this writes if the requests are chats. output: tokens."""
        common = ["--num-prompts", str(self.requests)]
        if not self.offline:
            common += ["--ignore-eos", "--temperature", "0"]
            common += ["--max-concurrency", str(self.concurrency)] if self.concurrency else []
        if self.turns:
            prompts = chat_prompts(self.requests // self.turns, self.turns, self.prompt, seed)
            chats.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
            return [
                "--dataset-name", "custom", "--dataset-path", str(chats), "--custom-output-len", str(output),
                "--skip-chat-template", "--disable-shuffle", *common,
            ]  # fmt: skip
        return [
            "--dataset-name", "random", "--random-input-len", str(self.prompt - self.shared),
            "--random-prefix-len", str(self.shared), "--random-output-len", str(output), *common,
        ]  # fmt: skip


_TURN = 256  # tokens that an answer and the next question add to a chat
_WORDS = (
    " time",
    " year",
    " people",
    " way",
    " day",
    " man",
    " thing",
    " woman",
    " life",
    " child",
    " world",
    " school",
)


def chat_prompts(chats: int, turns: int, last: int, seed: int) -> list[str]:
    """Prompts of all chats' first turn, then of all their second, and so on; `last` words, each a token, in the last.

    Answers are part of the script, so that each row's server is sent the same.
    """
    draw = random.Random(seed)
    texts = ["".join(draw.choices(_WORDS, k=last)) for _ in range(chats)]
    words = [text.split(" ")[1:] for text in texts]
    lengths = [last - (turns - 1 - turn) * _TURN for turn in range(turns)]
    return [" " + " ".join(chat[:length]) for length in lengths for chat in words]


def scenarios(preset: str) -> list[Scenario]:
    """The scenarios of a preset. ValueError names the presets."""
    ours = evicting("halokv", 0.2)
    both = (STOCK, ours)
    presets = {
        "quick": [Scenario("quick", HEAVY, 1024, 64, 8, 2, both)],
        "pressure": [Scenario("pool of 4", HEAVY, 2048, 256, 24, 4, both)],
        "long-answers": [
            Scenario("long answers, pool of 4", HEAVY, 2048, 512, 20, 4, both),
            # Twenty are one wave of ours and two latecomers; with twice as many the ends weigh less.
            Scenario("long answers, 40 of them, pool of 4", HEAVY, 2048, 512, 40, 4, both),
        ],
        "balanced": [
            Scenario(
                "balanced, long prompts and answers", BALANCED, 4096, 1024, 32, 4, (*both, steady("halokv", 0.2)),
                offline=True,
            ),
        ],
        "pools": [
            # Not 1: a pool in which the longest prompt and its packed blocks do not fit is refused at start.
            Scenario(f"balanced, a pool of {n:g}", BALANCED, 2048, 256, requests, n, both, offline=True)
            for n, requests in ((1.25, 12), (2, 16), (4, 24), (8, 32), (16, 48))
        ],
        "concurrency": [
            Scenario(f"{n} at once", BALANCED, 2048, 256, max(4, 2 * n), 8, both, concurrency=n, offline=True)
            for n in (1, 4, 8, 16)
        ],
        "policies": [
            Scenario(
                "policies and ratios", HEAVY, 2048, 256, 16, 4,
                (
                    STOCK, FP8, *(evicting("halokv", keep) for keep in (0.5, 0.2, 0.1)),
                    evicting("layer-defensivekv", 0.2), evicting("snapkv", 0.2),
                ),
                offline=True,
            ),
        ],
        "widths": [
            Scenario(
                "pages of fewer bits", HEAVY, 2048, 256, 16, 4,
                (STOCK, evicting("halokv", 0.2), evicting("halokv", 0.2, "8,4"), evicting("halokv", 0.1, "k8v4")),
                offline=True,
            ),
        ],
        "lengths": [
            *(Scenario(f"prompts of {n}", BALANCED, n, 128, 12, 4, both, offline=True) for n in (1024, 2048, 4096)),
            Scenario("prompts of 8192", BALANCED, 8192, 128, 8, 4, both, offline=True),
            *(Scenario(f"answers of {n}", BALANCED, 2048, n, 12, 4, both, offline=True) for n in (32, 512)),
        ],
        "shared-offline": [
            Scenario(name, model, 2304, 128, 20, 6, both, shared=2048, offline=True)
            for name, model in (("one prefix of 2,048, offline", BALANCED), ("one prefix of 2,048, in bf16", HEAVY))
        ],
        "shared": [
            Scenario("one prefix of 2,048, 20 requests", HEAVY, 2304, 128, 20, 6, both, shared=2048),
            Scenario("chats of 5 turns", HEAVY, 3072, 64, 20, 8, both, concurrency=4, turns=5),
        ],
        "short": [
            # Over HTTP, as in the next preset, rounds differ by 15 %; an engine of its own repeats itself better.
            Scenario("short prompts, offline", BALANCED, 160, 128, 128, 160, both, concurrency=16, offline=True),
        ],
        "no-pressure": [
            Scenario("short prompts, ample pool", HEAVY, 160, 64, 64, 80, both, concurrency=8),
            Scenario("long prompts, ample pool, one at a time", HEAVY, 4096, 128, 6, 8, both, concurrency=1),
        ],
        "smollm2": [
            Scenario("SmolLM2, prompts of 4096", SMOLLM2, 4096, 128, 6, 3, both),
            Scenario("SmolLM2, prompts of 6144", SMOLLM2, 6144, 256, 8, 2, both, offline=True),
        ],
    }  # fmt: skip
    if preset not in presets:
        raise ValueError(f"--preset {preset}: choose from {', '.join(presets)}")
    return presets[preset]


PRESETS = (
    "quick",
    "pressure",
    "long-answers",
    "balanced",
    "pools",
    "concurrency",
    "policies",
    "widths",
    "lengths",
    "shared-offline",
    "shared",
    "short",
    "no-pressure",
    "smollm2",
)


def model_folder(name: str, folder: Path = Path(".models")) -> Path:
    """The model's folder, made if it is missing."""
    real = ensure_model()
    if name == SMOLLM2:
        return real
    target, config = folder / name, _DUMMIES[name]
    target.mkdir(parents=True, exist_ok=True)
    for file in _TOKENIZER:
        if (real / file).exists():
            shutil.copy(real / file, target / file)
    (target / "tokenizer.json").write_text(json.dumps(_cut_vocabulary(real / "tokenizer.json", config["vocab_size"])))
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def _cut_vocabulary(file: Path, size: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer with its first `size` tokens, and the merges that yield them."""
    tokenizer: dict[str, Any] = json.loads(file.read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < size}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    return tokenizer
