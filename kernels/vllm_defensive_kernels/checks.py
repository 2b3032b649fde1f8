"""Argument checks of the wrappers: every message names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    """Raise the one kind of error that a caller's mistake gets."""
    raise ValueError(f"{name}={value}: choose {allowed}")


def require_shape(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Raise ValueError unless `tensor` has this shape; None stands for any length."""
    if len(shape) != tensor.dim() or any(w not in (None, h) for w, h in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        refuse(f"{name}.shape", tuple(tensor.shape), f"[{wanted}]")


def require_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless `tensor` has one of these dtypes."""
    if tensor.dtype not in allowed:
        refuse(f"{name}.dtype", tensor.dtype, " or ".join(str(dtype) for dtype in allowed))


def require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `tensor` is on this device."""
    if tensor.device != device:
        refuse(f"{name}.device", tensor.device, f"{device}, where the pages are")


def require_int(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raise ValueError unless `least <= value <= most`."""
    if value < least or (most is not None and value > most):
        refuse(name, value, f"{least} or more" if most is None else f"{least} to {most}")


def require_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        refuse(name, repr(value), " or ".join(repr(choice) for choice in allowed))
