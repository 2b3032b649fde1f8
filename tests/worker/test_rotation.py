"""Keys before RoPE, against the modules that turned them: every kind that vLLM has, in both styles, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.rotary_embedding import dual_chunk_rope, get_rope, phi3_long_rope_scaled_rope
from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import Ernie4_5_VLRotaryEmbedding

from vllm_defensive.worker.rotation import RotaryWatch, RotationError, Rotations
from vllm_defensive_kernels.learned import unrotate

ORIGINAL, FACTOR = 256, 4.0  # positions that a model was trained on, and how many times as many it is given
MAXIMUM = int(ORIGINAL * FACTOR)
NAMES = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]

SCALED = {"factor": FACTOR, "original_max_position_embeddings": ORIGINAL}
KINDS: dict[str, Callable[[int], dict[str, Any]]] = {  # by half the numbers that are turned
    "default": lambda half: {},
    "linear": lambda half: {"factor": FACTOR},
    "ntk": lambda half: {"factor": FACTOR},
    "ntk mixed": lambda half: {"factor": FACTOR, "mixed_b": 0.6},
    "dynamic": lambda half: {"factor": FACTOR, "max_trained_positions": ORIGINAL},
    "dynamic alpha": lambda half: {"alpha": 100.0},
    "yarn": lambda half: SCALED,
    "llama3": lambda half: {**SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": lambda half: {**SCALED, **factors(half)},
    "longrope short": lambda half: {**SCALED, **factors(half)},
    "longrope scaled": lambda half: {**SCALED, **factors(half), "short_mscale": 1.1, "long_mscale": 1.3},
    "deepseek_yarn": lambda half: {**SCALED, "mscale": 1.0, "mscale_all_dim": 0.0},
    "proportional": lambda half: {},
    "default mrope": lambda half: {"mrope_section": sections(half)},
    "default mrope interleaved": lambda half: {"mrope_section": sections(half), "mrope_interleaved": True},
    "yarn mrope": lambda half: {**SCALED, "mrope_section": sections(half)},
    "bailing_mrope": lambda half: {"mrope_section": sections(half)},
    "openpangu": lambda half: {"mrope_section": sections(half), "mrope_interleaved": True},
    "ernie": lambda half: {},
}


def factors(half: int) -> dict[str, Any]:
    return {"short_factor": [1.0 + i / 100 for i in range(half)], "long_factor": [2.0 + i / 10 for i in range(half)]}


def sections(half: int) -> list[int]:
    """Of time, height, width: the latter two are equal."""
    return [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """As of an engine whose requests may be `max_model_len` long."""
    model = SimpleNamespace(max_model_len=MAXIMUM)
    monkeypatch.setattr(
        phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: SimpleNamespace(model_config=model)
    )
    with set_current_vllm_config(VllmConfig()):
        yield model


def made(kind: str, size: int, part: float, neox: bool, dtype: torch.dtype) -> Any:
    rotary = int(size * part)
    own = KINDS[kind](rotary // 2)
    if kind == "ernie":
        half = rotary // 2
        section = sections(half)[::-1]  # it wants height, width, time
        return Ernie4_5_VLRotaryEmbedding(size, rotary, MAXIMUM, 10000.0, neox, dtype, mrope_section=section)
    parameters = {"rope_type": kind.split()[0], "rope_theta": 10000.0, "partial_rotary_factor": part, **own}
    return get_rope(size, MAXIMUM, neox, parameters, dtype)


class Attention(nn.Module, AttentionLayerBase):
    """Returns its keys as they come."""

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> None:
        return None

    def forward(self, key: Tensor) -> Tensor:
        return key


class Layer(nn.Module):
    def __init__(self, use: str = "turn", **rotary: nn.Module) -> None:
        """use: what is done with `rotary_emb`: "turn" keys by it, "read" its table, or "leave" it."""
        super().__init__()
        self.use, self.attn = use, Attention()
        for name, module in rotary.items():
            self.add_module(name, module)

    def forward(self, positions: Tensor, key: Tensor) -> Tensor:
        if self.use == "turn":
            key = self.rotary_emb(positions, key.clone(), key)[1]
        elif self.use == "read":
            assert self.rotary_emb.cos_sin_cache is not None
        return self.attn(key)


class Model(nn.Module):
    """Its layers lie as those of vLLM's models do: `model.layers.0.self_attn.attn`."""

    def __init__(self, layers: Sequence[Layer], **beside: nn.Module) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.ModuleDict({"self_attn": layer}) for layer in layers)
        for name, module in beside.items():
            self.model.add_module(name, module)

    def forward(self, positions: Tensor, key: Tensor) -> None:
        for layer in self.model.layers:
            layer["self_attn"](positions, key.clone())

    @property
    def names(self) -> list[str]:
        return [f"model.layers.{i}.self_attn.attn" for i in range(len(self.model.layers))]


def around(module: nn.Module) -> Model:
    """A model of two layers that share the module."""
    return Model([Layer(rotary_emb=module), Layer(rotary_emb=module)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size, part", [(64, 1.0), (96, 0.75), (128, 1.0), (256, 0.25)])
@pytest.mark.parametrize(
    "kind, neox",
    # LongRoPE has one style.
    [(kind, neox) for kind in KINDS for neox in (True, False) if neox or not kind.startswith("longrope")],
)
def test_what_a_module_turned_comes_back(
    kind: str, size: int, part: float, neox: bool, dtype: torch.dtype, vllm_config: SimpleNamespace
) -> None:
    if kind == "longrope short":
        vllm_config.max_model_len = ORIGINAL
    module = made(kind, size, part, neox, dtype)
    rotations = Rotations(around(module), NAMES, size)
    rotation = rotations.of(0)
    assert rotation is not None and rotations.of(1) is rotation, "one table for both"
    assert rotation.table_PR.dtype == dtype

    beyond = () if kind == "longrope short" else (ORIGINAL, ORIGINAL + 3, MAXIMUM - 1)
    position_T = torch.tensor([0, 1, 2, 100, ORIGINAL - 1, *beyond])
    generator = torch.Generator().manual_seed(1)
    key_THD = torch.randn(len(position_T), 2, size, generator=generator).to(dtype)
    given = (key_THD if kind.startswith("deepseek") else key_THD.flatten(1)).clone()
    # vLLM's M-RoPE models hand over three positions a token, whatever there is in the prompt.
    positions = position_T.expand(3, -1) if "mrope" in kind or kind == "openpangu" else position_T
    turned_THD = module(positions, given.clone(), given)[1].view_as(key_THD)
    assert (turned_THD - key_THD)[1:].abs().max() > 0.1, "it turns keys"
    back_HTD = unrotate(turned_THD.transpose(0, 1), position_T, rotation)
    assert (back_HTD.transpose(0, 1) - key_THD).abs().max() < 8 * torch.finfo(dtype).eps * float(key_THD.abs().max())


class Foreign(nn.Module):
    """Of a model's own: turns numbers as GPT-NeoX does, by `angle * direction`."""

    def __init__(self, direction: float = 1.0) -> None:
        super().__init__()
        angle_PR = torch.arange(50.0)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        self.cos_sin_cache, self.direction = torch.cat([angle_PR.cos(), angle_PR.sin()], dim=1), direction

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = self.cos_sin_cache[positions][:, None].chunk(2, dim=-1)
        first, second = key.view(len(positions), -1, 8).chunk(2, dim=-1)
        sine = sine * self.direction
        return query, torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).view_as(key)


def test_a_kind_that_nobody_knows_works_if_it_turns_by_its_table() -> None:
    rotation = Rotations(around(Foreign()), NAMES, 8).of(1)
    assert rotation is not None and rotation.table_PR.shape == (50, 8)


def refusal(model: Model, head_size: int) -> str:
    with pytest.raises(RotationError) as refused:
        Rotations(model, model.names, head_size)
    message = str(refused.value)
    assert message.startswith("kv_eviction: layer model.layers.0.self_attn.attn") and "\n" not in message
    assert message.endswith("choose a policy that is not learned")
    return message


def fourier() -> nn.Module:
    own = {"num_key_value_heads": 2, "num_inv_freq": 20, "fope_sep_head": True, "fope_init_factor": 0.1}
    return get_rope(64, MAXIMUM, True, {"rope_theta": 10000.0, "use_fope": True, **own}, torch.float32)


def dual_chunk() -> nn.Module:
    return get_rope(64, MAXIMUM, True, None, torch.float32, {"chunk_size": 64, "local_size": 16})


def vision() -> nn.Module:
    return get_rope(64, 16, False, {"rope_type": "mllama4", "rope_theta": 10000.0}, torch.float32)


def at_the_end() -> nn.Module:
    parameters = {"rope_type": "deepseek_yarn", "is_deepseek_v4": True, "partial_rotary_factor": 0.5, **SCALED}
    return get_rope(64, MAXIMUM, True, parameters, torch.float32)


def of_transformers() -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(LlamaConfig(head_dim=64))


@pytest.mark.parametrize(
    "make, kind, what",
    [
        (fourier, "FourierRotaryEmbedding", "has no table of cosines and sines by position"),
        (dual_chunk, "DualChunkRotaryEmbedding", "has no table of cosines and sines by position"),
        (vision, "Llama4VisionRotaryEmbedding", "has no table of cosines and sines by position"),
        (at_the_end, "DeepseekV4ScalingRotaryEmbedding", "does something else to keys than to turn them by its table"),
        (of_transformers, "LlamaRotaryEmbedding", "has no table of cosines and sines by position"),
        (lambda: Foreign(-1.0), "Foreign", "does something else to keys than to turn them by its table"),
    ],
)
def test_what_cannot_be_undone_is_refused_by_name(
    make: Callable[[], nn.Module], kind: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Torch:
        """The chunked kind is made for GPUs alone."""

        accelerator = SimpleNamespace(current_device_index=lambda: 0)
        device = staticmethod(lambda name: torch.device("cpu"))

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(dual_chunk_rope, "torch", Torch())
    head_size = 8 if kind == "Foreign" else 64
    assert f" ({kind}) {what}, " in refusal(around(make()), head_size)


def test_a_module_for_a_part_of_each_head_is_refused() -> None:
    """The model cuts that part out, in a way that is its own."""
    module = made("default", 64, 1.0, True, torch.float32)
    assert "has heads of 96 numbers, and its module turns 64, " in refusal(around(module), 96)


def test_a_module_is_found_beside_what_holds_the_attention() -> None:
    near, far = (made(kind, 64, 1.0, True, torch.float32) for kind in ("default", "ntk"))
    model = Model([Layer(rope=near), Layer("leave")], rope=far)
    rotations = Rotations(model, NAMES, 64)
    for layer, module in enumerate((near, far)):
        rotation = rotations.of(layer)
        assert rotation is not None and rotation.table_PR.data_ptr() == module.cos_sin_cache.data_ptr()


def test_of_several_modules_the_one_of_the_usual_name_is_taken_or_none() -> None:
    near, other = (made(kind, 64, 1.0, True, torch.float32) for kind in ("default", "ntk"))
    rotation = Rotations(Model([Layer(index_rope=other, rotary_emb=near)]), NAMES[:1], 64).of(0)
    assert rotation is not None and rotation.table_PR.data_ptr() == near.cos_sin_cache.data_ptr()
    assert "has several rotary modules, one, two, " in refusal(Model([Layer("leave", one=near, two=other)]), 64)


def test_layers_without_a_module_do_not_turn_and_unknown_ones_are_refused() -> None:
    module = made("default", 64, 1.0, True, torch.float32)
    model = Model([Layer(rotary_emb=module), Layer("leave")])
    assert Rotations(model, NAMES, 64).of(1) is None
    with pytest.raises(RotationError, match=r"layers\.7\.attn is not in the model under this name, .*choose a policy"):
        Rotations(model, ["model.layers.7.attn"], 64)


def test_layers_that_were_seen_not_to_turn_need_no_module_that_can_be_undone() -> None:
    model = Model([Layer(rotary_emb=Foreign()), Layer(rotary_emb=fourier()), Layer("leave")])
    rotations = Rotations(model, model.names, 8, [True, False, False])
    assert rotations.of(0) is not None and rotations.of(1) is None and rotations.of(2) is None
    with pytest.raises(RotationError, match=r"layers\.2\.self_attn\.attn turned its keys where it was learned, but"):
        Rotations(model, model.names, 8, [True, False, True])


def run(model: Model, size: int = 64) -> None:
    model(torch.arange(3), torch.zeros(3, size))


@pytest.mark.parametrize("kind", ["default", "longrope", "yarn mrope", "openpangu"])
def test_the_watch_tells_layers_that_turn_from_those_that_own_a_module(kind: str) -> None:
    shared = made(kind, 64, 1.0, True, torch.float32)
    own = made("ntk", 64, 1.0, True, torch.float32)
    uses = ["leave", "turn", "leave", "turn", "read"]
    layers = [Layer(use, rotary_emb=own if use == "read" else shared) for use in uses]
    model = Model([*layers, Layer("leave")])
    positions = torch.arange(3).expand(3, -1) if kind == "openpangu" else torch.arange(3)
    with RotaryWatch(model, model.names) as watch:
        with pytest.raises(RuntimeError, match="not every attention layer was run"):
            watch.turned()
        for _ in range(2):
            Rotations(model, model.names, 64)  # reads tables, but is no layer
            model(positions, torch.zeros(3, 64))
        assert watch.turned() == [False, True, False, True, True, False]
        rotations = Rotations(model, model.names, 64, watch.turned())
    assert [rotations.of(layer) is not None for layer in range(6)] == watch.turned()


def test_the_watch_sees_layers_of_other_groups() -> None:
    """Those with a sliding window turn their keys by the module that the global layers share and leave."""
    module = made("default", 64, 1.0, True, torch.float32)
    model = Model([Layer(use, rotary_emb=module) for use in ("turn", "turn", "leave", "turn", "leave")])
    with RotaryWatch(model, [model.names[2], model.names[4]]) as watch:
        run(model)
        assert watch.turned() == [False, False]


def test_where_no_table_is_read_kernels_had_theirs_before() -> None:
    module = made("default", 64, 1.0, True, torch.float32)
    model = Model([Layer("leave", rotary_emb=module), Layer("leave")])
    with RotaryWatch(model, model.names) as watch:
        run(model)
        assert watch.turned() == [True, False]


def test_a_watch_that_is_over_leaves_the_model_as_it_was() -> None:
    module = Foreign()
    model = around(module)
    with RotaryWatch(model, model.names) as watch:
        assert type(module) is not Foreign
        run(model, 8)
    assert type(module) is Foreign
    for part in model.modules():
        assert not part._forward_pre_hooks
    assert watch.turned() == [True, True]
