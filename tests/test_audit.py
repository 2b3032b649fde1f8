"""An audit file says what was kept, and reading it gives back what was written."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.evictions import eviction
from vllm_defensive import audit
from vllm_defensive.packing import Format, Part
from vllm_defensive.plan import Eviction
from vllm_defensive.policy import Selection
from vllm_defensive.tools.audit_show import main

N = 4
# Two layers of two heads; blocks [1, 4) of five (and a tail of 3 tokens) are packed into 2: 8 pages for four heads.
PAGES_LH = torch.tensor([[1, 3], [2, 2]], dtype=torch.int32)
EVICTION = eviction(
    23,
    (1, 2),
    block_tokens=N,
    shared_blocks=1,
    source_blocks=(9, 8, 7, 6, 5, 4),
    request_id="chat/7 a",
    policy="adakv",
    keep=0.3,
    window=5,
    token_ids=tuple(range(100, 123)),
)
TOKENS = [[4, 9, 18, 19], [*range(4, 16)], [4, 6, 8, 10, 12, 14, 18, 19], [*range(12, 20)]]


@pytest.fixture
def written(tmp_path: Path) -> audit.Audit:
    tokens_PN = torch.tensor([t for head in TOKENS for t in head], dtype=torch.int32).view(8, N)
    path = audit.write(str(tmp_path / "new folder"), EVICTION, [Selection(PAGES_LH, tokens_PN)])
    assert path == audit.path_of(tmp_path / "new folder", "chat/7 a") and path.name == "chat_7_a.safetensors"
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no partial file is left"
    return audit.load(path)


def test_each_head_keeps_shared_packed_and_tail_tokens(written: audit.Audit) -> None:
    for index, packed in enumerate(TOKENS):
        positions = written.positions(index // 2, index % 2).tolist()
        assert positions == [0, 1, 2, 3, *packed, 20, 21, 22]
    assert written.kept_counts.tolist() == [[11, 19], [15, 15]]
    assert written.kept_counts.dtype == written.kept_indices.dtype == torch.int32


def test_the_mask_is_the_positions(written: audit.Audit) -> None:
    mask_LHT = written.mask()
    assert mask_LHT.shape == (2, 2, 23)
    for layer in range(2):
        for head in range(2):
            assert mask_LHT[layer, head].nonzero().flatten().tolist() == written.positions(layer, head).tolist()


def test_what_the_request_asked_for_is_recorded(written: audit.Audit) -> None:
    """Its own policy and ratio, not the engine's."""
    assert (written.policy, written.keep_ratio) == ("adakv", 0.3)
    assert (written.stop, written.block_size, written.window) == (23, N, 5)
    assert (written.packed_blocks, written.shared_blocks) == (2, 1)
    assert written.token_ids.tolist() == list(range(100, 123))


def rewritten(path: Path, **changes: str) -> Path:
    """The same file with other metadata; an empty value takes a field out."""
    with safe_open(path, framework="pt") as file:
        metadata = {k: v for k, v in {**file.metadata(), **changes}.items() if v}
        save_file({name: file.get_tensor(name) for name in file.keys()}, path, metadata=metadata)  # noqa: SIM118
    return path


@pytest.fixture
def path(written: audit.Audit, tmp_path: Path) -> Path:
    return audit.path_of(tmp_path / "new folder", "chat/7 a")


def test_a_file_of_a_later_format_is_refused_by_name(path: Path) -> None:
    later = audit.FORMAT_VERSION + 1
    with pytest.raises(ValueError, match=rf"chat_7_a\.safetensors: format_version={later}: .* version {later - 1}"):
        audit.load(rewritten(path, format_version=str(later)))


def test_a_file_without_a_format_version_is_of_the_first(path: Path, written: audit.Audit) -> None:
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format_version"] == str(audit.FORMAT_VERSION)
    old = audit.load(rewritten(path, format_version="", stop="", num_tokens="23"))
    assert old.stop == 23
    assert torch.equal(old.mask(), written.mask()) and old.policy == written.policy


def test_the_heads_of_all_ranks_are_read_together(tmp_path: Path) -> None:
    tokens_PN = torch.tensor([t for head in TOKENS for t in head], dtype=torch.int32).view(8, N)
    whole = audit.load(audit.write(str(tmp_path), EVICTION, [Selection(PAGES_LH, tokens_PN)]))
    # Rank 0 has the first head of each layer, rank 1 the second.
    per_head = tokens_PN.split(PAGES_LH.flatten().tolist())
    paths = [
        audit.write(str(tmp_path), EVICTION, [Selection(PAGES_LH[:, r : r + 1], torch.cat(per_head[r::2]))], (r, 2))
        for r in range(2)
    ]
    assert paths[1].name == "chat_7_a.rank1of2.safetensors"
    for path in paths:
        assert torch.equal(audit.load(path).mask(), whole.mask())
    paths[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"rank0of2"):
        audit.load(paths[1])


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    """Whatever the umask lets others do: it holds a prompt."""
    tokens_PN = torch.tensor([t for head in TOKENS for t in head], dtype=torch.int32).view(8, N)
    before = os.umask(0)
    try:
        path = audit.write(str(tmp_path / "new"), EVICTION, [Selection(PAGES_LH, tokens_PN)])
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent)] == [0o600, 0o700]


@pytest.mark.parametrize("show", [[], ["--html", "no folder/page.html"], ["--html", "."]], ids=repr)
def test_what_cannot_be_read_or_written_ends_the_command_with_one_line(
    show: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(tmp_path)  # a folder
    if show:
        tokens_PN = torch.tensor([t for head in TOKENS for t in head], dtype=torch.int32).view(8, N)
        file = str(audit.write(file, EVICTION, [Selection(PAGES_LH, tokens_PN)]))
    with pytest.raises(SystemExit) as end:
        main(["show", file, *show])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("python -m vllm_defensive.audit: error: ") and (show or [file])[-1] in error


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no audit file .*absent\.safetensors"):
        audit.load(tmp_path / "absent.safetensors")


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not an eviction audit"):
        audit.load(tmp_path / "other.safetensors")


# Two parts: one page of up to 5 tokens for each head but the last, then pages of up to 6, of which the last has room.
TWO = Format("8,4", (Part("8", 5, 0.25), Part("4", 6, 1.0)), N)
IN_EIGHT, IN_FOUR = [[4, 9, 18, 19], [4, 5, 6, 8], [], [12]], [[5, 6], [7, 9], [4, 6, 8], []]


def two_parts(heads: slice = slice(None)) -> list[Selection]:
    parts = []
    for held, tokens in ((IN_EIGHT, 5), (IN_FOUR, 6)):
        pages_LH = torch.tensor([bool(some) for some in held], dtype=torch.int32).view(2, 2)[:, heads]
        rows = [some for layer in (held[:2], held[2:]) for some in layer[heads] if some]
        padded = [some + [-1] * (tokens - len(some)) for some in rows]
        parts.append(Selection(pages_LH, torch.tensor(padded, dtype=torch.int32).view(-1, tokens)))
    return parts


def in_two_parts() -> Eviction:
    return replace(EVICTION, packing=replace(EVICTION.packing, format=TWO))


def test_it_names_the_kind_of_page_of_each_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = audit.write(str(tmp_path), in_two_parts(), two_parts())
    found = audit.load(path)
    assert (found.widths, found.page_classes, found.page_tokens) == ("8,4", ("16", "8", "4"), (N, 5, 6))
    for index, (eight, four) in enumerate(zip(IN_EIGHT, IN_FOUR, strict=True)):
        positions, classes = found.positions(index // 2, index % 2), found.classes(index // 2, index % 2)
        assert positions.tolist() == [0, 1, 2, 3, *sorted(eight + four), 20, 21, 22]
        assert positions[classes == 1].tolist() == eight and positions[classes == 2].tolist() == four
    assert main(["show", str(path)]) == 0
    assert (
        "widths 8,4: held in the memory of 15 tokens (65.2 %), of what was kept 64 % in 16, 20 % in 8, 16 % in 4"
        in capsys.readouterr().out
    )


def test_without_widths_all_are_as_the_cache_has_them(written: audit.Audit) -> None:
    assert written.kept_classes is None and (written.widths, written.page_classes) == ("16", ("16",))
    assert written.classes(1, 1).tolist() == [0] * 15


def test_kinds_of_pages_of_all_ranks(tmp_path: Path) -> None:
    whole = audit.load(audit.write(str(tmp_path), in_two_parts(), two_parts()))
    paths = [audit.write(str(tmp_path), in_two_parts(), two_parts(slice(r, r + 1)), (r, 2)) for r in range(2)]
    joined = audit.load(paths[0])
    assert torch.equal(joined.mask(), whole.mask())
    assert joined.kept_classes is not None and whole.kept_classes is not None
    assert torch.equal(joined.kept_classes, whole.kept_classes)
