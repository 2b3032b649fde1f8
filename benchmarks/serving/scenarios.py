"""What is measured: models, pools, loads, and the servers that are compared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.serving.dummies import BALANCED, DUMMIES, HEAVY, MODELS, SMOLLM2
from benchmarks.serving.texts import Documents, chat_prompts

BLOCK_SIZE = 32


@dataclass(frozen=True)
class Row:
    """A server of the comparison. room: tokens that a byte of its pool holds, in those of the model's own dtype.
    optional: where it does not start, the others are compared without it."""

    name: str
    args: tuple[str, ...] = ()
    room: int = 1
    optional: bool = False

    @property
    def evicts(self) -> bool:
        return "--kv-eviction" in self.args


def evicting(policy: str, keep: float, widths: str = "16") -> Row:
    row = Row(f"{policy} {keep:g}", ("--kv-eviction", policy, "--kv-eviction-keep", f"{keep:g}"))
    return row if widths == "16" else Row(f"{row.name} {widths}", (*row.args, "--kv-eviction-widths", widths))


def steady(policy: str, keep: float) -> Row:
    """`evicting`, where a request waits until all that run will fit to their ends."""
    row = evicting(policy, keep)
    return Row(f"{row.name} steady", (*row.args, "--kv-eviction-admission", "steady"))


def late(policy: str, keep: float) -> Row:
    """`evicting`, where requests are evicted when memory is short, and not before."""
    row = evicting(policy, keep)
    return Row(f"{row.name} when full", (*row.args, "--kv-eviction-when", "full"))


def reusing(row: Row, reuse: str) -> Row:
    """An evicting row, where packings outlive their request."""
    return Row(f"{row.name} reuse {reuse}", (*row.args, "--kv-eviction-reuse", reuse))


def evicting_answers(policy: str, budget: int, interval: int) -> Row:
    """Requests keep so many tokens a head, and are evicted again each time that they have generated `interval` more."""
    flags = ("--kv-eviction-budget", str(budget), "--kv-eviction-answers", "evict")
    name = f"{policy} budget {budget} every {interval}"
    return Row(name, ("--kv-eviction", policy, *flags, "--kv-eviction-interval", str(interval)))


STOCK = Row("stock")
FP8 = Row("stock, fp8 cache", ("--kv-cache-dtype", "fp8"), room=2)


@dataclass(frozen=True)
class Scenario:
    """One load on one pool.

    prompt, output: tokens; pool: KV cache in multiples of one request; shared: leading tokens that all prompts have in
    common; concurrency: requests at once, all if None; turns: if not 0, the requests are chats of so many turns, the
    last of which has the prompt's length; offline: by `vllm bench throughput`, an engine in its own process on all
    cores, instead of a server; documents: what the requests are about, each of which a pool holds `pool` of, and beside
    them what runs; rounds: if not 0, the requests come so often, and the first time is told apart.
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
    documents: Documents | None = None
    rounds: int = 0

    @property
    def offered(self) -> int:
        """Requests at once, at most."""
        return min(self.requests, self.concurrency or self.requests)

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool; vLLM keeps one for itself, and a prompt comes out a few tokens longer than asked for."""
        # Rounded first, as a pool that was given in tokens is a share of no round number.
        blocks = int(round(self.pool * _blocks(self.prompt + self.output + 16), 6))
        if self.documents is not None:
            # A document counts with a question and its answer, which the prefix cache keeps as well: without room for
            # those it would lose the documents that a pool is said to hold.
            blocks += self.offered * _blocks(self.documents.question + self.output + 16)
        return blocks + 1

    @property
    def max_model_len(self) -> int:
        # What comes behind a document leaves a second look at it the room to repeat half of it at once.
        return self.prompt + self.output + 64 + (self.documents.tokens // 2 if self.documents is not None else 0)

    @property
    def asked_tokens(self) -> int | None:
        """Tokens of the documents that all questions are about, counted for each question; None: there are none."""
        return None if self.documents is None else self.requests * self.documents.tokens

    def extra_body(self, row: Row) -> dict[str, Any]:
        """What the row's requests say beside what all say."""
        if self.documents is None or not row.evicts:
            return {}
        return {"vllm_xargs": {"kv_eviction_boundary": self.documents.tokens}}

    def of_few(self) -> Scenario:
        """This load, of a few requests, to warm up."""
        if self.documents is not None:
            return replace(self, requests=2, documents=replace(self.documents, count=2, rounds=1), rounds=1)
        return replace(self, requests=max(2, self.turns))

    def engine_args(self, row: Row) -> list[str]:
        # Eager for every row: compiling takes a busy machine minutes a server, and attention, where these loads spend
        # their time, is a kernel that is not compiled.
        return [
            "--enforce-eager", "--block-size", str(BLOCK_SIZE),
            # By name, as vLLM's "auto" turns a float32 model into bfloat16.
            "--dtype", DUMMIES.get(self.model, {}).get("torch_dtype", "bfloat16"),
            "--num-gpu-blocks-override", str(row.room * (self.pool_blocks - 1) + 1),
            "--max-num-seqs", str(self.concurrency if self.offline and self.concurrency else 128),
            "--max-model-len", str(self.max_model_len), "--max-num-batched-tokens", "2048",
            *(("--load-format", "dummy") if self.model in DUMMIES else ()),
            *row.args,
        ]  # fmt: skip

    def load_args(self, script: Path, seed: int, output: int) -> list[str]:
        """Of `vllm bench`. script: a file that this writes if the prompts are none of its own. output: tokens."""
        common = ["--num-prompts", str(self.requests)]
        if not self.offline:
            common += ["--ignore-eos", "--temperature", "0"]
            common += ["--max-concurrency", str(self.concurrency)] if self.concurrency else []
        prompts = self._prompts(seed)
        if prompts:
            script.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
            return [
                "--dataset-name", "custom", "--dataset-path", str(script), "--custom-output-len", str(output),
                "--skip-chat-template", "--disable-shuffle", *common,
            ]  # fmt: skip
        return [
            "--dataset-name", "random", "--random-input-len", str(self.prompt - self.shared),
            "--random-prefix-len", str(self.shared), "--random-output-len", str(output), *common,
        ]  # fmt: skip

    def _prompts(self, seed: int) -> list[str]:
        if self.documents is not None:
            return self.documents.prompts(seed)
        return chat_prompts(self.requests // self.turns, self.turns, self.prompt, seed) if self.turns else []


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


ORDERS: dict[str, float | None] = {"round-robin": None, "zipf": 1.0}
"""In which documents are asked about: the exponent of Zipf's law, None in turn."""
DOCUMENT_ROWS = {
    "fp8": "stock vLLM with --kv-cache-dtype fp8, twice the tokens in the same bytes",
    "evict": "the policy at keep 0.2 in 16 bits (auto: in what it picks); requests name the document's end as "
    "boundary, and nothing outlives them",
    "reuse": "the same with --kv-eviction-reuse boundary",
    "narrow": "the same at keep 0.1 in k8v4",
}
"""Beside stock vLLM with its prefix cache."""


@dataclass(frozen=True)
class Sizes:
    """What the command line says of the presets `documents`, `chats` and `answers`.

    documents to rounds: as in `Documents`, tokens; answer: tokens; pools: documents that each holds, by default a
    quarter and all; orders, rows: of `ORDERS`, `DOCUMENT_ROWS`. Chats take model, policy and concurrency; answers take
    the model and the rest: requests, tokens that each generates and that the pool holds, tokens that a request keeps,
    and that it generates between two evictions.
    """

    model: str = HEAVY
    policy: str = "halokv"
    documents: int = 24
    document_tokens: int = 4096
    question_tokens: int = 64
    answer_tokens: int = 64
    rounds: int = 4
    concurrency: int = 4
    pools: tuple[int, ...] = ()
    orders: tuple[str, ...] = tuple(ORDERS)
    rows: tuple[str, ...] = tuple(DOCUMENT_ROWS)
    requests: int = 64
    generated_tokens: int = 4096
    pool_tokens: int = 16384
    budget: int = 512
    interval: int = 256

    def __post_init__(self) -> None:
        """Raises ValueError."""
        choices: tuple[tuple[str, Iterable[str], Iterable[str]], ...] = (
            ("--model", [self.model], MODELS),
            ("--orders", self.orders, ORDERS),
            ("--rows", self.rows, DOCUMENT_ROWS),
        )
        for flag, given, known in choices:
            if wrong := [name for name in given if name not in known]:
                raise ValueError(f"{flag} {','.join(wrong)}: choose from {', '.join(known)}")
        if min((self.answer_tokens, self.concurrency, *self.pools)) < 1:
            raise ValueError("--answer-tokens, --concurrency, --pools: choose 1 or more")
        if min(self.requests, self.generated_tokens, self.pool_tokens, self.budget, self.interval) < 1:
            raise ValueError("--requests, --generated-tokens, --pool-tokens, --budget, --interval: choose 1 or more")

    @property
    def told(self) -> str:
        """What is not as it is by default and that no name of a scenario says, for these names: records are found by
        them."""
        default = Sizes()
        names = ("model", "policy", "question_tokens", "answer_tokens", "concurrency")
        changed = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}
        return "".join(f", {name.replace('_', ' ')} {value}" for name, value in changed.items())


def document_scenarios(sizes: Sizes) -> list[Scenario]:
    """A pool's scenarios follow one another: they have the same servers."""
    evict = evicting(sizes.policy, 0.2)
    rows = {
        "fp8": replace(FP8, optional=True),
        "evict": replace(evict, args=(*evict.args, "--kv-eviction-reuse", "off")),
        "reuse": reusing(evict, "boundary"),
        "narrow": reusing(evicting(sizes.policy, 0.1, "k8v4"), "boundary"),
    }
    made = []
    for pool in sizes.pools or (max(1, sizes.documents // 4), sizes.documents):
        # Where all documents fit as they are, neither fewer bits nor eviction without reuse has anything to gain.
        wanted = [name for name in rows if name in sizes.rows and (pool < sizes.documents or name == "reuse")]
        for order in sizes.orders:
            documents = Documents(
                sizes.documents, sizes.document_tokens, sizes.question_tokens, sizes.rounds, ORDERS[order]
            )
            made.append(
                Scenario(
                    f"{documents.count} documents of {documents.tokens:,}, {documents.rounds} rounds, "
                    f"{order.replace('-', ' ')}, a pool of {pool}{sizes.told}",
                    sizes.model, documents.tokens + documents.question, sizes.answer_tokens,
                    documents.count * documents.rounds, pool, (STOCK, *(rows[name] for name in wanted)),
                    concurrency=sizes.concurrency, documents=documents, rounds=documents.rounds,
                )
            )  # fmt: skip
    return made


def _chats(sizes: Sizes) -> Scenario:
    ours = evicting(sizes.policy, 0.2)
    return Scenario(
        f"20 chats of 5 turns, a pool of 5{sizes.told}", sizes.model, 3072, 64, 100, 5,
        (STOCK, ours, reusing(ours, "chat")), concurrency=sizes.concurrency, turns=5, rounds=5,
    )  # fmt: skip


def _answers(sizes: Sizes) -> Scenario:
    """Short prompts and answers that are much longer: what stock vLLM preempts, as all of them grow at once."""
    prompt = 128
    policy = "learnedkv" if sizes.model == SMOLLM2 else "streamingllm"  # dummies have no learned score
    told = "" if sizes.model == HEAVY else f", model {sizes.model}"
    return Scenario(
        f"{sizes.requests} answers of {sizes.generated_tokens:,}, a pool of {sizes.pool_tokens:,} tokens{told}",
        sizes.model, prompt, sizes.generated_tokens, sizes.requests,
        sizes.pool_tokens // BLOCK_SIZE / _blocks(prompt + sizes.generated_tokens + 16),
        (STOCK, evicting_answers(policy, sizes.budget, sizes.interval)),
    )  # fmt: skip


def scenarios(preset: str, sizes: Sizes = Sizes()) -> list[Scenario]:
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
        "when": [
            Scenario(
                "evicted at once, or late, a pool of 4", HEAVY, 1024, 192, 16, 4,
                (STOCK, *(row(policy, 0.2) for policy in ("halokv", "streamingllm") for row in (evicting, late))),
                offline=True,
            ),
            Scenario(
                "evicted late, an ample pool", HEAVY, 512, 64, 16, 10, (STOCK, late("halokv", 0.2)), concurrency=8,
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
        "documents": document_scenarios(sizes),
        "chats": [_chats(sizes)],
        "answers": [_answers(sizes)],
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
    "when",
    "widths",
    "lengths",
    "shared-offline",
    "shared",
    "short",
    "no-pressure",
    "smollm2",
    "documents",
    "chats",
    "answers",
)
