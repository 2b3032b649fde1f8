"""How each attention layer turns its keys, found beside it in the model, for scores of keys as they were before RoPE.

vLLM has a score of kinds of RoPE, and models bring more. All that can be undone keep a table of cosines and sines by
position, so the table is taken, whatever made it, and the module is asked: keys that it has turned must come back. So a
kind that nobody knew when this was written works if it turns by its table, and is refused by name if not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vllm_defensive_kernels.learned import Rotation, unrotate

_USUAL_NAME = "rotary_emb"
_TABLE = "cos_sin"  # is in the name of every attribute that holds cosines and sines

# A module is asked about these positions, the middle one and the last, for unit vectors and for some that are full.
_FIRST_POSITIONS = (0, 1, 7)
_FULL_VECTORS = 3
# Roundings of a turn and of the turn back, each of numbers below 2, in steps of the table's dtype at 1; a pair that is
# taken for another is off by tenths at position 1.
_TOLERANCE = 8


class RotationError(ValueError):
    """A layer's keys cannot be had as they were before RoPE. One line: the layer, its module's class, the way out."""

    def __init__(self, name: str, module: nn.Module | None, what: str) -> None:
        kind = "" if module is None else f" ({type(module).__name__})"
        super().__init__(
            f"kv_eviction: layer {name}{kind} {what}, and a learned score needs keys before RoPE; "
            "choose a policy that is not learned"
        )


class Rotations:
    """The rotation of each layer of a KV cache group. Layers that share a module share its table, on its device."""

    def __init__(
        self, model: nn.Module, names: Sequence[str], head_size: int, turned: Sequence[bool] | None = None
    ) -> None:
        """Find and try them all. Raises RotationError.

        names: of the attention layers in `model`. turned: of each layer, whether it turns its keys, as a `RotaryWatch`
            saw it; None: all do that have a rotary module.
        """
        known: dict[nn.Module, Rotation] = {}
        self._rotations: list[Rotation | None] = []
        for name, turns in zip(names, [True] * len(names) if turned is None else turned, strict=True):
            module = rotary_module(model, name) if turns else None
            if module is not None and module not in known:
                known[module] = _rotation_of(module, name, head_size)
            elif module is None and turns and turned is not None:
                raise RotationError(name, None, "turned its keys where it was learned, but has no rotary module")
            self._rotations.append(None if module is None else known[module])

    def of(self, layer: int) -> Rotation | None:
        """The rotation of a layer's keys, or None: it does not turn them."""
        return self._rotations[layer]


def rotary_module(model: nn.Module, attention_name: str) -> nn.Module | None:
    """An attention layer's rotary module, or None: the nearest, beside it or beside what holds it, up to the model.

    Raises RotationError where it is not clear which one it is, or the layer is not in the model.
    """
    holder = attention_name
    while holder:
        holder = holder.rpartition(".")[0]
        try:
            children = model.get_submodule(holder).named_children()
        except AttributeError:
            raise RotationError(attention_name, None, "is not in the model under this name") from None
        beside = {name: child for name, child in children if _is_rotary(child)}
        if len(beside) > 1 and _USUAL_NAME not in beside:
            raise RotationError(attention_name, None, f"has several rotary modules, {', '.join(beside)}")
        if beside:
            return beside.get(_USUAL_NAME, next(iter(beside.values())))
    return None


def _is_rotary(module: nn.Module) -> bool:
    """Whether it holds angles by position. Those of transformers' own models are known too, so as to be refused."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    buffers = [name for name, _ in module.named_buffers(recurse=False)]
    holds = any(mark in name for mark in (_TABLE, "inv_freq") for name in buffers)
    return holds or isinstance(module, RotaryEmbeddingBase) or hasattr(module, "cos_sin_cache")


def _rotation_of(module: nn.Module, name: str, head_size: int) -> Rotation:
    """A module's rotation, tried. name: of a layer that has it, for RotationError."""
    table_PR, turned_size = _table(module), getattr(module, "head_size", head_size)
    if turned_size != head_size:
        # What the model does around it, to turn a part of each head or a permuted one, is not known.
        raise RotationError(name, module, f"has heads of {head_size} numbers, and its module turns {turned_size}")
    shaped = table_PR is not None and table_PR.dim() == 2 and 0 < table_PR.shape[1] <= head_size
    if table_PR is None or not shaped or table_PR.shape[1] % 2 or not table_PR.is_floating_point():
        raise RotationError(name, module, "has no table of cosines and sines by position")
    rotation = Rotation(table_PR, interleaved=not getattr(module, "is_neox_style", True))
    if not _comes_back(module, rotation, head_size):
        raise RotationError(name, module, "does something else to keys than to turn them by its table")
    return rotation


def _table(module: Any) -> Tensor | None:
    """`[positions, R]`, or whatever the module has in its place. A view: no memory of its own."""
    both = getattr(module, "long_short_cos_sin_cache", None)
    if both is not None:  # LongRoPE: one table behind the other; which of them holds is settled when it is made
        short = module.original_max_position_embeddings
        return both[short:] if module.use_long_rope else both[:short]
    table = getattr(module, "cos_sin_cache", None)
    return table if isinstance(table, Tensor) else None


@torch.inference_mode()
def _comes_back(module: Any, rotation: Rotation, head_size: int) -> bool:
    """Whether keys that the module has turned are, un-rotated, what they were."""
    table_PR = rotation.table_PR
    # In the table's dtype: vLLM's modules cast their tables to whatever they are given, and keep what comes of it.
    last = len(table_PR) - 1
    asked = sorted({min(position, last) for position in (*_FIRST_POSITIONS, last // 2, last)})
    position_T = torch.tensor(asked, device=table_PR.device)
    full_XD = 2 * torch.rand(_FULL_VECTORS, head_size, generator=torch.Generator().manual_seed(0)) - 1
    key_XD = torch.cat([torch.eye(head_size), full_XD]).to(table_PR)
    key_TXD = key_XD.expand(len(position_T), -1, -1)
    axes = getattr(module, "mrope_section", None)  # M-RoPE: time, height, width, which are one outside of images
    positions = position_T.expand(max(3, len(axes)), -1) if axes else position_T
    for flat in (True, False):  # models hand over `[T, H*D]`, or `[T, H, D]` where the module asks for it
        given = (key_TXD.flatten(1) if flat else key_TXD).contiguous()
        try:
            turned = _forward(module)(positions, given.clone(), given.clone())[1]
            back_XTD = unrotate(turned.reshape(key_TXD.shape).transpose(0, 1), position_T, rotation)
        except Exception:  # of a module that nobody knows, anything; the other shape may be the right one
            continue
        step = torch.finfo(table_PR.dtype).eps
        if bool(((back_XTD - key_XD[:, None].float()).abs() <= _TOLERANCE * step).all()):
            return True
    return False


def _forward(module: Any) -> Any:
    """What the module computes, in torch where it has other ways too."""
    from vllm.model_executor.custom_op import CustomOp

    chooses = isinstance(module, CustomOp) and type(module).forward is CustomOp.forward
    return module.forward_native if chooses else module.forward


class RotaryWatch:
    """Sees which attention layers turn their keys, while the model runs eagerly.

    A layer may have a rotary module and not use it, as global layers without positions do, and a kernel of the model's
    own may turn keys by the module's table without a call of the module. So what is watched is the tables: a layer
    turns its keys if its module's was read after the attention layer before it, of whatever kind, had begun.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """names: as `Rotations` has them. Raises RotationError. Ends with `close`, or as a context manager."""
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        self._modules = [rotary_module(model, name) for name in names]
        self._turned: list[bool | None] = [None] * len(names)
        self._read: set[nn.Module] = set()  # since the last attention layer
        self._any_read = False
        layers = {model.get_submodule(name): layer for layer, name in enumerate(names)}
        # Before the model begins, others may read: whoever looks for tables.
        self._hooks = [model.register_forward_pre_hook(lambda *_: self._read.clear())]
        self._kinds: dict[nn.Module, type[nn.Module]] = {}
        for module in model.modules():
            if isinstance(module, AttentionLayerBase):
                self._hooks.append(module.register_forward_pre_hook(partial(self._attends, layers.get(module))))
            if _is_rotary(module):
                self._kinds[module] = type(module)
        for module in self._kinds:
            module.__class__ = _reporting(type(module), self._read.add)

    def __enter__(self) -> RotaryWatch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for module, kind in self._kinds.items():
            module.__class__ = kind
        self._hooks, self._kinds = [], {}

    def turned(self) -> list[bool]:
        """Of each layer, whether it turned its keys in any step so far. RuntimeError before every layer was run."""
        seen = [turned for turned in self._turned if turned is not None]
        if len(seen) < len(self._turned):
            raise RuntimeError("kv_eviction: not every attention layer was run while its RoPE was watched")
        # Where nobody read a table at all, kernels were given theirs when the model was made.
        return seen if self._any_read else [module is not None for module in self._modules]

    def _attends(self, layer: int | None, *_: Any) -> None:
        """An attention layer begins. layer: which of those that are watched, or None."""
        self._any_read |= bool(self._read)
        if layer is not None:
            self._turned[layer] = bool(self._turned[layer]) or self._modules[layer] in self._read
        self._read.clear()


def _reporting(kind: type[nn.Module], report: Any) -> type[nn.Module]:
    """The class, but `report(module)` is called whenever a table of a module of this class is read."""

    def read(module: nn.Module, name: str) -> Any:
        if _TABLE in name:
            report(module)
        return kind.__getattribute__(module, name)

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})
