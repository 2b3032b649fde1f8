"""What is measured: models, pools, loads, and the servers that are compared."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import ensure_model

BLOCK_SIZE = 32
HEAVY = "kv-heavy"
SMOLLM2 = "SmolLM2-135M"

# A decode step of an 8B model (16 GB of weights) on a GPU with 141 GB reads, with the pool full, about 110 GB of KV
# cache: seven bytes of cache for each byte of weights. Here weights are 37 MB (25 MB of them the tied embedding) and a
# token's KV is 16 KiB, so a pool of 16,384 tokens, 268 MB, has the same ratio, and a smaller pool a smaller one. Every
# KV head has one query head: on two cores a group would make attention compute-bound, which on a GPU it is not.
_HEAVY_CONFIG = {
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
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Row:
    """A server of the comparison."""

    name: str
    args: tuple[str, ...] = ()


def evicting(policy: str, keep: float) -> Row:
    return Row(f"{policy} {keep:g}", ("--kv-eviction", policy, "--kv-eviction-keep", f"{keep:g}"))


STOCK = Row("stock")
FP8 = Row("stock, fp8 cache", ("--kv-cache-dtype", "fp8"))


@dataclass(frozen=True)
class Scenario:
    """One load on one pool.

    prompt, output: tokens; pool: KV cache in multiples of one request; shared: leading tokens that all prompts have in
    common; concurrency: requests at once, all if None; turns: if not 0, the requests are chats of so many turns, the
    last of which has the prompt's length.
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

    @property
    def offered(self) -> int:
        """Requests at once, at most."""
        return min(self.requests, self.concurrency or self.requests)

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool; vLLM keeps one for itself, and a prompt comes out a few tokens longer than asked for."""
        return int(self.pool * -(-(self.prompt + self.output + 16) // BLOCK_SIZE)) + 1

    def server_args(self, row: Row) -> list[str]:
        # Eager for every row: compiling takes a busy machine minutes a server, and attention, where these loads spend
        # their time, is a kernel that is not compiled.
        return [
            "--enforce-eager",
            "--served-model-name", "model", "--block-size", str(BLOCK_SIZE), "--dtype", "bfloat16",
            "--num-gpu-blocks-override", str(self.pool_blocks), "--max-num-seqs", "64",
            "--max-model-len", str(self.prompt + self.output + 64), "--max-num-batched-tokens", "2048",
            *(("--load-format", "dummy") if self.model == HEAVY else ()),
            *row.args,
        ]  # fmt: skip

    def load_args(self, chats: Path, seed: int, output: int) -> list[str]:
        """Of `vllm bench serve`. chats: a file that this writes if the requests are chats. output: tokens."""
        concurrency = ("--max-concurrency", str(self.concurrency)) if self.concurrency else ()
        common = ["--num-prompts", str(self.requests), "--ignore-eos", "--temperature", "0", *concurrency]
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
        "pressure": [
            Scenario(f"pool of {pool:g}", HEAVY, 2048, 256, requests, pool, both)
            for pool, requests in ((4, 24), (2, 16), (8, 24), (1, 16), (16, 40))
        ],
        "long-answers": [
            Scenario("long answers, pool of 4", HEAVY, 2048, 512, 20, 4, both),
            # Twenty are one wave of ours and two latecomers; with twice as many the ends weigh less.
            Scenario("long answers, 40 of them, pool of 4", HEAVY, 2048, 512, 40, 4, both),
        ],
        "concurrency": [
            Scenario(f"{n} at once", HEAVY, 2048, 256, max(4, min(2 * n, 24)), 4, both, concurrency=n)
            for n in (1, 4, 8, 16)
        ],
        "policies": [
            Scenario(
                "policies and ratios", HEAVY, 4096, 256, 12, 4,
                (
                    STOCK, FP8, *(evicting("halokv", keep) for keep in (0.5, 0.1)),
                    evicting("layer-defensivekv", 0.2), evicting("snapkv", 0.2),
                ),
            ),
        ],
        "lengths": [
            *(Scenario(f"prompts of {n}", HEAVY, n, 128, 12, 4, both) for n in (1024, 2048, 8192)),
            *(Scenario(f"outputs of {n}", HEAVY, 4096, n, 12, 4, both) for n in (32, 128, 512)),
        ],
        "shared": [
            Scenario("one prefix of 2,048, 20 requests", HEAVY, 2304, 128, 20, 6, both, shared=2048),
            Scenario("chats of 5 turns", HEAVY, 3072, 64, 20, 8, both, concurrency=4, turns=5),
        ],
        "no-pressure": [
            Scenario("short prompts, ample pool", HEAVY, 160, 64, 64, 80, both, concurrency=8),
            Scenario("long prompts, ample pool, one at a time", HEAVY, 4096, 128, 6, 8, both, concurrency=1),
        ],
        "smollm2": [
            Scenario(f"SmolLM2, prompts of {n}", SMOLLM2, n, 128, requests, 3, both)
            for n, requests in ((4096, 6), (6144, 4))
        ],
    }  # fmt: skip
    if preset not in presets:
        raise ValueError(f"--preset {preset}: choose from {', '.join(presets)}")
    return presets[preset]


PRESETS = (
    "quick",
    "pressure",
    "long-answers",
    "concurrency",
    "policies",
    "lengths",
    "shared",
    "no-pressure",
    "smollm2",
)


def model_folder(name: str, folder: Path = Path(".models")) -> Path:
    """The model's folder, made if it is missing."""
    real = ensure_model()
    if name == SMOLLM2:
        return real
    target = folder / HEAVY
    target.mkdir(parents=True, exist_ok=True)
    for file in _TOKENIZER:
        if (real / file).exists():
            shutil.copy(real / file, target / file)
    (target / "config.json").write_text(json.dumps(_HEAVY_CONFIG, indent=2))
    return target
