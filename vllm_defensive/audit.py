"""What was kept of each evicted request, written by the worker that did it and read by whoever wants to know.

One `<request id>.safetensors` per evicted request, and one `<request id>.again<number>.safetensors` for each further
time that it was evicted while it generated (`events` finds all of a request); or with tensor parallelism one
`<request id>.rank0of2.safetensors` per worker, with the heads of that worker; `load` reads any of them together with
the others:

    kept_counts   int32 [L, H]     tokens kept by each head, shared blocks, window and tail included
    kept_indices  int32 [sum]      their positions, ascending, for head (0, 0), (0, 1), ... one after the other
    kept_classes  uint8 [sum]      the kind of page that each of them is in, by its place in page_classes; tokens of one
                                   head and kind fill its pages in ascending order, page_tokens each. Where there is
                                   none, all are in pages as the cache has them
    token_ids     int32 [T]        the tokens up to where it was evicted; the last that were generated may be missing

and the metadata format_version, policy, keep_ratio, stop, block_size, packed_blocks, shared_blocks, window, widths,
page_classes, page_tokens, repeat, first_reader (the position from which on tokens see this).

`FORMAT_VERSION` grows when a reader of today would misread a file of tomorrow; added fields do not count.

They hold prompts, so nobody but the server's user may read them, nor look into a folder that is made for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vllm_defensive.compat.base import get_logger
from vllm_defensive.plan import Eviction
from vllm_defensive.policy import Selection

FORMAT_VERSION = 2  # the first one had no such field, and called `stop` num_tokens


@dataclass(frozen=True)
class Audit:
    """One file, as `load` returns it. Shapes as in the module's docstring."""

    kept_counts: Tensor
    kept_indices: Tensor
    token_ids: Tensor
    policy: str
    keep_ratio: float
    stop: int
    block_size: int
    packed_blocks: int
    shared_blocks: int
    window: int
    widths: str = "16"
    page_classes: tuple[str, ...] = ("16",)
    page_tokens: tuple[int, ...] = ()
    repeat: int = 0
    first_reader: int = 0
    kept_classes: Tensor | None = None

    def positions(self, layer: int, head: int) -> Tensor:
        """Ascending kept positions, int32, of one head."""
        return self.kept_indices[self._of_head(layer, head)]

    def classes(self, layer: int, head: int) -> Tensor:
        """The kind of page of each of `positions`, uint8, by its place in `page_classes`."""
        if self.kept_classes is None:
            return torch.zeros(int(self.kept_counts[layer, head]), dtype=torch.uint8)
        return self.kept_classes[self._of_head(layer, head)]

    def _of_head(self, layer: int, head: int) -> slice:
        counts = self.kept_counts.flatten().long()
        index = layer * self.kept_counts.shape[1] + head
        start = int(counts[:index].sum())
        return slice(start, start + int(counts[index]))

    @property
    def held_tokens(self) -> int:
        """Tokens up to the stop that would take, unpacked, the memory that was left of them."""
        return (self.shared_blocks + self.packed_blocks) * self.block_size + self.stop % self.block_size

    def mask(self) -> Tensor:
        """bool `[L, H, T]`: True where the entry was kept."""
        heads = torch.arange(self.kept_counts.numel()).repeat_interleave(self.kept_counts.flatten().long())
        kept = torch.zeros(self.kept_counts.numel(), self.stop, dtype=torch.bool)
        kept[heads, self.kept_indices.long()] = True
        return kept.view(*self.kept_counts.shape, self.stop)


def path_of(folder: str | os.PathLike[str], request_id: str, rank: tuple[int, int] = (0, 1), repeat: int = 0) -> Path:
    """Where the audit of a request goes: under vLLM's internal id, the client's followed by a random part.

    rank: (tensor-parallel rank, their number) of the worker that writes it. repeat: evictions of the request before.
    Characters that are unsafe in a file name become underscores, and of a very long id the end is used.
    """
    part = f".again{repeat}" if repeat else ""
    part += f".rank{rank[0]}of{rank[1]}" if rank[1] > 1 else ""
    return Path(folder) / f"{re.sub(r'[^A-Za-z0-9._-]', '_', request_id)[-200:]}{part}.safetensors"


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Make the folder, for its owner alone, unless it is there. Raises OSError."""
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)


def events(folder: str | os.PathLike[str], request_id: str, rank: tuple[int, int] = (0, 1)) -> list[Audit]:
    """The audits of one request, in the order of its evictions. Raises ValueError as `load` does."""
    found: list[Audit] = []
    while (path := path_of(folder, request_id, rank, len(found))).exists():
        found.append(load(path))
    return found


def load(path: str | os.PathLike[str]) -> Audit:
    """The audit of one request, all ranks' heads in their order. Raises FileNotFoundError, or ValueError if the file
    is not an audit, or one of a later format.

    path: its file, or that of any rank; those of the other ranks must lie beside it.
    """
    file = Path(path)
    match = re.fullmatch(r"(.*\.rank)\d+(of(\d+)\.safetensors)", file.name)
    if match is None:
        return _load(file)
    parts = [_load(file.with_name(f"{match[1]}{rank}{match[2]}")) for rank in range(int(match[3]))]
    heads = range(parts[0].kept_counts.shape[1])
    positions = [
        part.positions(layer, head) for layer in range(len(parts[0].kept_counts)) for part in parts for head in heads
    ]
    counts_LH = torch.cat([part.kept_counts for part in parts], dim=1)
    classes = [
        part.classes(layer, head) for layer in range(len(parts[0].kept_counts)) for part in parts for head in heads
    ]
    return replace(
        parts[0],
        kept_counts=counts_LH,
        kept_indices=torch.cat(positions),
        kept_classes=None if parts[0].kept_classes is None else torch.cat(classes),
    )


def _load(path: Path) -> Audit:
    if not Path(path).exists():
        raise FileNotFoundError(f"no audit file {os.fspath(path)}")
    with safe_open(os.fspath(path), framework="pt") as file:
        meta = file.metadata() or {}
        if "keep_ratio" not in meta:
            raise ValueError(f"{os.fspath(path)} is not an eviction audit: it has no 'keep_ratio'")
        version = int(meta.get("format_version", 1))
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{os.fspath(path)}: format_version={version}: this vllm-defensive reads audits up to version "
                f"{FORMAT_VERSION}; read it with the one that wrote it, or a newer one"
            )
        return Audit(
            kept_counts=file.get_tensor("kept_counts"),
            kept_indices=file.get_tensor("kept_indices"),
            token_ids=file.get_tensor("token_ids"),
            policy=meta["policy"],
            keep_ratio=float(meta["keep_ratio"]),
            stop=int(meta["stop" if version > 1 else "num_tokens"]),
            **{k: int(meta[k]) for k in ("block_size", "packed_blocks", "shared_blocks", "window")},
            widths=meta.get("widths", "16"),
            page_classes=tuple(meta.get("page_classes", "16").split(" ")),
            repeat=int(meta.get("repeat", 0)),
            first_reader=int(meta.get("first_reader", meta["stop" if version > 1 else "num_tokens"])),
            page_tokens=tuple(int(n) for n in meta.get("page_tokens", meta["block_size"]).split(" ")),
            kept_classes=file.get_tensor("kept_classes") if "widths" in meta and meta["widths"] != "16" else None,
        )


def record(
    folder: str,
    eviction: Eviction,
    parts: Sequence[Selection],
    rank: tuple[int, int] = (0, 1),
) -> None:
    """`write` for the engine: a full disk costs an audit and a warning, never the engine."""
    try:
        write(folder, eviction, parts, rank)
    except (OSError, SafetensorError) as error:
        get_logger("kv_eviction").warning("KV eviction: no audit of %s: %s", eviction.request_id, error)


def write(
    folder: str,
    eviction: Eviction,
    parts: Sequence[Selection],
    rank: tuple[int, int] = (0, 1),
) -> Path:
    """Write one file, atomically: a reader never sees half of it. parts: of the packing's format."""
    region, format = eviction.region, eviction.packing.format
    start, last = region.tokens
    shared, tail = torch.arange(start), torch.arange(last, region.stop)
    names = list(dict.fromkeys(("16", *(part.page_class for part in format.parts))))
    tokens = {"16": region.page_tokens, **{part.page_class: part.tokens for part in format.parts}}
    places = [names.index(part.page_class) for part in format.parts]
    per_part = [_by_head(part) for part in parts]
    indices, classes = [], []
    for of_head in zip(*per_part, strict=True):
        kept = torch.cat(of_head)
        of_class = torch.repeat_interleave(torch.tensor(places), torch.tensor([len(some) for some in of_head]))
        order = kept.argsort()
        indices.append(torch.cat([shared, kept[order], tail]))
        classes.append(torch.cat([torch.zeros_like(shared), of_class[order], torch.zeros_like(tail)]))
    counts = torch.tensor([len(kept) for kept in indices], dtype=torch.int32)
    tensors = {"kept_classes": torch.cat(classes).to(torch.uint8)} if format.quantised else {}
    assert eviction.token_ids is not None
    target = path_of(folder, eviction.request_id, rank, eviction.repeat)
    make_folder(target.parent)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    content = save(
        {
            "kept_counts": counts.view(parts[0].pages_LH.shape),
            "kept_indices": torch.cat(indices).to(torch.int32),
            **tensors,
            "token_ids": torch.tensor(eviction.token_ids, dtype=torch.int32),
        },
        metadata={
            "format_version": str(FORMAT_VERSION),
            "policy": eviction.policy,
            "keep_ratio": repr(eviction.score.keep),
            "stop": str(region.stop),
            "block_size": str(region.block_tokens),
            "packed_blocks": str(len(eviction.packing.blocks)),
            "shared_blocks": str(region.shared_blocks),
            "window": str(region.window),
            "widths": format.widths,
            "repeat": str(eviction.repeat),
            "first_reader": str(region.stop if eviction.first_reader is None else eviction.first_reader),
            "page_classes": " ".join(names),
            "page_tokens": " ".join(str(tokens[name]) for name in names),
        },
    )
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    partial.replace(target)
    return target


def _by_head(part: Selection) -> list[Tensor]:
    """Positions that each head keeps in pages of this part, ascending."""
    pages = part.tokens_PN.cpu().long().split(part.pages_LH.flatten().tolist())
    return [kept[kept >= 0] for kept in pages]


if __name__ == "__main__":
    import sys

    from vllm_defensive.tools.audit_show import main

    sys.exit(main())
