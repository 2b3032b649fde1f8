"""What quantised pages hold, in plain PyTorch: the formulas that kernels, on any device, are held to.

Axes: P pages, n tokens of a full page, D head size, Y bytes of a page. See `widths.py` for where everything lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_defensive_kernels.widths import CLASSES, PageClass, PageShape, header_bytes

FP16_MAX = torch.finfo(torch.float16).max


def quantise(number_PXY: Tensor, exists_PXY: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of numbers that share a step and a minimum along `dim`: (uint8 codes, fp16 steps, fp16 minima).

    number_PXY: fp32. exists_PXY: bool, broadcasts; what does not exist counts for nothing and has code 0.

        minimum = fp16(min x)     step = fp16((max x - minimum) / (2^bits - 1)), or 1 where that is 0
        code    = round((x - minimum) / step), at least 0 and at most 2^bits - 1

    Minima and steps saturate at fp16's largest number. Codes are rounded to the nearest, ties to even.
    """
    levels = 2**bits - 1
    low = number_PXY.masked_fill(~exists_PXY, float("inf")).amin(dim, keepdim=True)
    high = number_PXY.masked_fill(~exists_PXY, float("-inf")).amax(dim, keepdim=True)
    some = exists_PXY.any(dim, keepdim=True).expand_as(low)
    low, high = low.masked_fill(~some, 0), high.masked_fill(~some, 0)
    minimum = low.clamp(-FP16_MAX, FP16_MAX).half()
    step = ((high - minimum.float()) / levels).clamp(0, FP16_MAX).half()
    step = torch.where(step == 0, 1, step)
    code = ((number_PXY - minimum.float()) / step.float()).round().clamp(0, levels).masked_fill(~exists_PXY, 0)
    return code.to(torch.uint8), step.squeeze(dim), minimum.squeeze(dim)


def dequantise(code_PXY: Tensor, step: Tensor, minimum: Tensor, dim: int) -> Tensor:
    """fp32 numbers of codes; step and minimum without the axis `dim`."""
    return code_PXY.float() * step.float().unsqueeze(dim) + minimum.float().unsqueeze(dim)


def pack_pages(
    key_PnD: Tensor, value_PnD: Tensor, count_P: Tensor, shape: PageShape, page_class: str, *, channel_major: bool
) -> Tensor:
    """Pages as bytes, uint8 `[P, Y]`, what they do not use zero.

    key_PnD, value_PnD: any floats, n tokens of which page p has the first `count_P[p]`.
    """
    width, (pages, tokens, head_size) = CLASSES[page_class], key_PnD.shape
    exists_Pn1 = (torch.arange(tokens, device=key_PnD.device) < count_P[:, None]).unsqueeze(-1)
    key, key_step_PD, key_min_PD = quantise(key_PnD.float(), exists_Pn1, width.key_bits, 1)
    value, value_step_Pn, value_min_Pn = quantise(value_PnD.float(), exists_Pn1, width.value_bits, 2)
    header = torch.cat([key_step_PD, key_min_PD, value_step_Pn, value_min_Pn], dim=1).contiguous().view(torch.uint8)
    key, value = _halves_joined(key, width.key_bits), _halves_joined(value, width.value_bits)
    codes = torch.cat([(key.transpose(1, 2) if channel_major else key).flatten(1), value.flatten(1)], dim=1)
    page_PY = torch.zeros(pages, shape.page_bytes, dtype=torch.uint8, device=key_PnD.device)
    page_PY[:, : header.shape[1]] = header
    start = header_bytes(head_size, tokens)
    page_PY[:, start : start + codes.shape[1]] = codes
    return page_PY


def unpack_pages(page_PY: Tensor, shape: PageShape, page_class: str, *, channel_major: bool) -> tuple[Tensor, Tensor]:
    """(K, V) of pages, fp32 `[P, n, D]` each; of a page that is not full, what lies beyond is of no meaning."""
    width, head_size, tokens = CLASSES[page_class], shape.head_size, shape.tokens(page_class)
    header = page_PY[:, : 4 * (head_size + tokens)].contiguous().view(torch.float16)
    key_step_PD, key_min_PD, value_step_Pn, value_min_Pn = header.split([head_size, head_size, tokens, tokens], dim=1)
    start, key_bytes = header_bytes(head_size, tokens), head_size * width.key_bits // 8
    value_bytes = head_size * width.value_bits // 8
    key = page_PY[:, start : start + tokens * key_bytes]
    key = key.unflatten(1, (key_bytes, tokens)).transpose(1, 2) if channel_major else key.unflatten(1, (tokens, -1))
    start += tokens * key_bytes
    value = page_PY[:, start : start + tokens * value_bytes].unflatten(1, (tokens, -1))
    key, value = _halves_apart(key, width.key_bits), _halves_apart(value, width.value_bits)
    return dequantise(key, key_step_PD, key_min_PD, 1), dequantise(value, value_step_Pn, value_min_Pn, 2)


def requantised(number_PnD: Tensor, count_P: Tensor, page_class: PageClass, *, keys: bool) -> Tensor:
    """Keys or values as they come out of such pages. fp32, same shape."""
    exists_Pn1 = (torch.arange(number_PnD.shape[1], device=number_PnD.device) < count_P[:, None]).unsqueeze(-1)
    bits, dim = (page_class.key_bits, 1) if keys else (page_class.value_bits, 2)
    return dequantise(*quantise(number_PnD.float(), exists_Pn1, bits, dim), dim)


def _halves_joined(code_PnD: Tensor, bits: int) -> Tensor:
    """uint8 `[P, n, D*bits/8]`"""
    if bits == 8:
        return code_PnD
    low, high = code_PnD.chunk(2, dim=-1)
    return low | (high << 4)


def _halves_apart(byte_PnY: Tensor, bits: int) -> Tensor:
    return byte_PnY if bits == 8 else torch.cat([byte_PnY & 15, byte_PnY >> 4], dim=-1)
