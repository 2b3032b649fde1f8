"""Scores that read no tensor of the model, and those of other packages."""

import torch
from torch import Tensor

from vllm_defensive.policy.aggregates import aggregate
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.layer import Layer


@aggregate("recency", reads="nothing")
def recency(policy: Policy, layer: Layer) -> Tensor:
    """The later, the better (StreamingLLM, arXiv 2309.17453, whose first tokens are `policy.sinks`)."""
    return _positions(layer).float().expand(layer.heads, -1)


@aggregate("uniform", reads="nothing")
def uniform(policy: Policy, layer: Layer) -> Tensor:
    """All alike."""
    return torch.ones(layer.heads, layer.scored, device=layer.device)


@aggregate("random", reads="nothing")
def random(policy: Policy, layer: Layer) -> Tensor:
    """Hashed from (layer, head of the model, position): the same on every device, in every run, on any ranks."""
    return _hashed(_head_keys(layer, layer.first_head), _positions(layer))


@aggregate("random-uneven", reads="nothing")
def random_uneven(policy: Policy, layer: Layer) -> Tensor:
    """The same, and the heads' scores lie factors of up to e^6 apart."""
    head_H1 = _head_keys(layer, 0)
    return torch.exp(6 * _hash_to_unit(head_H1)) * _hashed(head_H1, _positions(layer))


@aggregate("custom", values="all")
def custom(policy: Policy, layer: Layer) -> Tensor:
    """By `policy.score`, a function of another package."""
    assert policy.score is not None, f"{policy.name} has no function"
    scores_HT = policy.score(
        query_WQD=layer.query_WQD,
        key_HSD=layer.key_HSD,
        value_HSD=layer.value_HSD,
        output_QDM=layer.output_QDM,
        scale=layer.scale,
    )
    assert scores_HT.shape == (layer.heads, layer.scored), f"{policy.name} returned {tuple(scores_HT.shape)}"
    return scores_HT.float()


def _head_keys(layer: Layer, first: int) -> Tensor:
    """A number for each head, int64 [H, 1]."""
    return layer.index * 1000 + first + torch.arange(layer.heads, device=layer.device).unsqueeze(-1)


def _positions(layer: Layer) -> Tensor:
    """Of the scored tokens, int64 [T]."""
    return torch.arange(layer.first_token, layer.first_token + layer.scored, device=layer.device)


def _hashed(head_H1: Tensor, position_T: Tensor) -> Tensor:
    return _hash_to_unit(head_H1 * 1_000_003 + position_T)


def _hash_to_unit(key: Tensor) -> Tensor:
    """Spread int64 keys evenly over [0, 1): multiply and fold within 32 bits. The same on every device."""
    for factor in (0x9E3779B1, 0x85EBCA77):
        key = ((key ^ (key >> 15)) * factor) & 0xFFFFFFFF
    return ((key ^ (key >> 16)) >> 8).float() / 2**24
