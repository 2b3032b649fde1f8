"""Random prompts of awkward shapes, and the calls that the tests share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.policy import naive
from vllm_defensive.policy import LayerScores, Policy, Selection, score_layer
from vllm_defensive.policy.budget import guarded, kept_fraction, reference_budget
from vllm_defensive.policy.selection import select_within
from vllm_defensive_kernels import formulas


@dataclass(frozen=True)
class Shape:
    """Sizes of one prompt; the id of a test shows them."""

    tokens: int
    heads: int = 2
    group: int = 3
    head_size: int = 16
    window: int = 32
    hidden: int = 24
    layers: int = 2

    def __str__(self) -> str:
        return f"S{self.tokens}-H{self.heads}-G{self.group}-D{self.head_size}-W{self.window}-L{self.layers}"


@dataclass
class LayerInputs:
    """What `score_layer` takes of one layer."""

    query_WQD: Tensor
    key_HSD: Tensor
    value_HSD: Tensor
    output_QDM: Tensor


SHAPES = [
    Shape(63, group=1, window=8),
    Shape(200, heads=3, group=3),
    Shape(131, heads=2, group=7, head_size=80, window=16),
    Shape(97, heads=1, group=4, window=5),
    Shape(33, heads=2, group=2, window=32),  # one token before the window
    Shape(37, heads=4, group=1, window=32, layers=3),
    Shape(70, heads=2, group=2, window=1, layers=3),  # one row of attention, which has no variance
]


def make_layers(
    shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 2.0
) -> list[LayerInputs]:
    """Random layers; a larger `spread` makes attention peakier, and each head's peaks differ in height."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    layers = []
    for _ in range(shape.layers):
        head_spread = spread * torch.linspace(0.5, 1.5, shape.heads)[:, None, None]
        queries = shape.heads * shape.group
        inputs = LayerInputs(
            normal(shape.window, queries, shape.head_size),
            normal(shape.heads, shape.tokens, shape.head_size) * head_spread,
            normal(shape.heads, shape.tokens, shape.head_size),
            normal(queries, shape.head_size, shape.hidden),
        )
        layers.append(LayerInputs(*(t.to(dtype) for t in vars(inputs).values())))
    return layers


def scale_of(shape: Shape) -> float:
    return shape.head_size**-0.5


def score(
    policy: Policy, shape: Shape, inputs: LayerInputs, *, layer: int = 0, keep_ratio: float = 0.4, **changes: object
) -> LayerScores:
    """`score_layer` over the whole prompt, unless `changes` say otherwise."""
    arguments: dict = {
        **vars(inputs),
        "factor_QDC": None,
        "scale": scale_of(shape),
        "keep_ratio": keep_ratio,
        "evictable": (0, shape.tokens),
        **changes,
    }
    if policy.reconstructs or policy.learned:
        arguments |= {"echo_HS": echoed(inputs.key_HSD), "window": shape.window}
    if policy.accumulates:
        softmax = {name: arguments[name] for name in ("cap", "void_Q") if name in arguments}
        arguments |= {"mass_HS": accumulated(inputs, arguments["scale"], **softmax), "window": shape.window}
    return score_layer(policy, layer=layer, **arguments)


def echoed(key_HSD: Tensor) -> Tensor:
    """What a second pass might have seen: any numbers of the size of attention. fp32 [H, S]."""
    return key_HSD.square().sum(dim=-1) / key_HSD.square().sum(dim=-1).sum(dim=-1, keepdim=True)


def accumulated(inputs: LayerInputs, scale: float, cap: float = 0.0, void_Q: Tensor | None = None) -> Tensor:
    """What the last queries, the only ones that `inputs` has, pay to each token: fp32 `[H, S]`."""
    mass_HS = torch.zeros(inputs.key_HSD.shape[:2])
    formulas.accumulate_attention(mass_HS, inputs.query_WQD, inputs.key_HSD, scale, cap, void_Q)
    return mass_HS


def naive_layer(inputs: LayerInputs) -> naive.Layer:
    return naive.Layer(*(t.double().numpy() for t in vars(inputs).values()))


def select_tokens(policy: Policy, shape: Shape, scores: list[LayerScores], keep_ratio: float) -> Selection:
    """Select single tokens with the reference's budgets."""
    budget = reference_budget(
        policy.scope, prompt_tokens=shape.tokens, keep_ratio=keep_ratio, kv_heads=shape.heads, layers=shape.layers
    )
    even = int(shape.tokens * kept_fraction(keep_ratio))
    return select_within(
        policy,
        scores,
        page_size=1,
        budget_pages=budget,
        guard_pages=guarded(policy.guard, even),
        evictable=(0, shape.tokens),
    )


def kept_by_head(selection: Selection) -> dict[tuple[int, int], list[int]]:
    """{(layer, head): kept positions in the order in which they are packed}."""
    heads = selection.pages_LH.shape[1]
    counts = (selection.pages_LH.flatten() * selection.tokens_PN.shape[1]).tolist()
    parts = np.split(selection.tokens_PN.flatten().numpy(), np.cumsum(counts)[:-1])
    return {(i // heads, i % heads): part.tolist() for i, part in enumerate(parts)}
