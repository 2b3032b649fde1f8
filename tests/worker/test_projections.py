"""Output projections of layers that do not hold their weight as a matrix: right, and no more of them than was said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vllm_defensive.worker import projections
from vllm_defensive.worker.projections import Projections
from vllm_defensive_kernels import gram_factor

L, Q, D, M = 3, 4, 8, 24


class Quantised(nn.Module):
    """A linear layer of int8 weights; it remembers how many tokens it was given."""

    input_size_per_partition, output_size = Q * D, M

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (M, Q * D), dtype=torch.int8))
        self.quant_method = SimpleNamespace(apply=self._apply_method)
        self.tokens: list[int] = []

    def _apply_method(self, layer: Any, x_TX: Tensor, bias: Any) -> Tensor:
        assert layer is self and bias is None
        self.tokens.append(len(x_TX))
        return x_TX @ self.weight.to(x_TX.dtype).T

    @property
    def expected(self) -> Tensor:
        return self.weight.T.bfloat16().unflatten(0, (Q, D))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Layers of bf16 beside their quantised output projections."""
    monkeypatch.setattr(projections, "UNITS", 12)  # strips that do not divide the width
    monkeypatch.setattr(projections, "FACTORED_HEADS", 3)
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"norm": nn.LayerNorm(4, dtype=torch.bfloat16), "o_proj": Quantised()}) for _ in range(L)]
    return nn.ModuleList(layers)


def made(model: nn.Module, keep: bool) -> Projections:
    return Projections(model, [f"{i}.attn" for i in range(L)], Q, D, keep)


@pytest.mark.parametrize("keep", [True, False])
def test_each_layer_gets_its_own_whatever_was_asked_for_before(model: nn.Module, keep: bool) -> None:
    found = made(model, keep)
    for layer in (0, 2, 1, 1, 0):
        slices, factor = found.slices(layer), found.factor(layer)
        assert slices is not None and factor is not None and found.found(layer)
        assert slices.dtype == torch.bfloat16 and torch.equal(slices, model[layer].o_proj.expected)
        assert torch.equal(factor, gram_factor(model[layer].o_proj.expected))


def held(found: Projections) -> int:
    """Bytes of the tensors that it refers to."""
    tensors = [t for part in vars(found).values() if isinstance(part, dict) for t in part.values()]
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))


def test_without_keep_one_layer_is_held_and_all_factors(model: nn.Module) -> None:
    found = made(model, keep=False)
    for layer in range(L):
        found.factor(layer)
    assert held(found) == L * Q * D * D * 2
    for layer in range(L):
        found.slices(layer)
    lasting, _ = found.bytes_at_most()
    assert held(found) == lasting == (L * Q * D * D + Q * D * M) * 2


def test_with_keep_a_layer_is_asked_once(model: nn.Module) -> None:
    for keep, times in ((True, 1), (False, 3)):
        model[1].o_proj.tokens.clear()
        found = made(model, keep)
        for _ in range(3):
            found.slices(1)
        assert model[1].o_proj.tokens == [12, 12, 8] * times


@pytest.mark.parametrize("keep", [True, False])
def test_new_weights_are_asked_for_anew(model: nn.Module, keep: bool) -> None:
    found = made(model, keep)
    found.slices(0), found.factor(0)
    model[0].o_proj.weight += 1
    found.forget()
    assert held(found) == 0
    assert torch.equal(found.slices(0), model[0].o_proj.expected)
    assert torch.equal(found.factor(0), gram_factor(model[0].o_proj.expected))
