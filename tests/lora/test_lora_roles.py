"""Roles across libraries, exact counts, and what injection refuses."""

import warnings

import pytest
import torch
from torch import nn

from medtut.lora import (
    LoRAConfig,
    LoRAError,
    LoRAFusedLinear,
    adapted_layers,
    eject,
    inject,
    merge,
    scan,
)
from medtut.lora.roles import attention_parts

from . import models
from .models import Block, lin


def roles(model):
    return {c.name: set(c.roles) for c in scan(model) if c.roles}


QKV = {"query", "key", "value"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("q_proj", "q"),
        ("query", "q"),
        ("to_k", "k"),
        ("value_projection", "v"),
        ("v_lin", "v"),
        ("wq", "q"),
        ("Wqkv", "qkv"),
        ("to_kv", "kv"),
        ("query_key_value", "qkv"),
        ("attn_qkv", "qkv"),
        ("keyboard", ""),
        ("value_head", ""),
        ("fc1", ""),
    ],
)
def test_words_of_a_name(name, parts):
    assert "".join(p[0] for p in attention_parts(name)) == parts


def test_transformers_4_names():
    assert roles(models.swin_v4()) == {
        "attention.self.query": {"query"},
        "attention.self.key": {"key"},
        "attention.self.value": {"value"},
        "attention.output.dense": {"output"},
        "intermediate.dense": {"mlp"},
        "output.dense": {"mlp"},
    }


def test_timm_names():
    assert roles(models.TimmViT()) == {
        "patch_embed.proj": {"conv"},
        **{f"blocks.{i}.attn.qkv": QKV for i in (0, 1)},
        **{f"blocks.{i}.attn.proj": {"output"} for i in (0, 1)},
        **{f"blocks.{i}.mlp.fc{j}": {"mlp"} for i in (0, 1) for j in (1, 2)},
    }


def test_monai_and_ct_vit_names():
    model = Block(
        blocks=nn.ModuleList([Block(attn=models.SABlock(), mlp=models.MLPBlock())]),
        window=Block(attn=Block(qkv=lin(8, 24), proj=lin())),
        layers=nn.ModuleList(
            [Block(to_q=lin(), to_kv=lin(8, 16), to_out=lin()), models.FeedForward()]
        ),
    )
    assert roles(model) == {
        "blocks.0.attn.qkv": QKV,
        "blocks.0.attn.out_proj": {"output"},
        "blocks.0.mlp.linear1": {"mlp"},
        "blocks.0.mlp.linear2": {"mlp"},
        "window.attn.qkv": QKV,
        "window.attn.proj": {"output"},
        "layers.0.to_q": {"query"},
        "layers.0.to_kv": {"key", "value"},
        "layers.0.to_out": {"output"},
        "layers.1.net.1": {"mlp"},
        "layers.1.net.3": {"mlp"},
    }


def test_real_monai_models():
    pytest.importorskip("einops")
    nets = pytest.importorskip("monai.networks.nets")
    vit = nets.ViT(1, (16,) * 3, (8,) * 3, 24, 48, num_layers=2, num_heads=3)
    assert len(inject(vit, LoRAConfig(r=2))) == 2
    swin = nets.SwinUNETR(
        in_channels=1, out_channels=2, feature_size=12, depths=(1,) * 4
    )
    found = inject(swin, LoRAConfig(r=2, roles=("query", "output", "mlp")))
    assert len(found) == 4 * 4


def test_lookalikes_have_no_role():
    model = Block(
        value=lin(),  # a value head without query or key
        proj=lin(),  # a projection outside attention
        classifier=Block(dense=lin(), out_proj=lin()),
        value_head=lin(),
        hypernet_mlps=Block(layers=nn.ModuleList([lin()])),
    )
    assert roles(model) == {}


def hf(name):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    small["num_hidden_layers"] = 1
    if name == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**small))
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**small))
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=small, vision_config=small)
    )


@pytest.mark.parametrize(("name", "blocks"), [("vit", 1), ("bert", 1), ("clip", 2)])
def test_installed_transformers(name, blocks):
    with torch.device("meta"):
        model = hf(name)
    found = [r for c in scan(model) for r in c.roles]
    for role in ("query", "key", "value", "output"):
        assert found.count(role) == blocks, role
    assert found.count("mlp") == 2 * blocks


def swin_tiny():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.SwinModel(
            transformers.SwinConfig(
                embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]
            )
        )


@pytest.mark.parametrize("r", [1, 8])
def test_count_swin_tiny(r):
    injection = inject(swin_tiny(), LoRAConfig(r=r))
    assert injection.parameters == 17_664 * r
    if r == 8:
        assert injection.parameters == 141_312


def test_count_sam_vit_b():
    build = pytest.importorskip("segment_anything.build_sam")
    with torch.device("meta"):
        sam = build._build_sam(768, 12, 12, [2, 5, 8, 11])
    encoder = inject(sam.image_encoder, LoRAConfig(r=4))
    assert encoder.parameters == 36_864 * 4
    assert len(encoder) == 12
    assert all(isinstance(m, LoRAFusedLinear) for m in encoder.layers.values())
    decoder = roles(sam.mask_decoder)
    attention = "transformer.layers.0.cross_attn_token_to_image"
    assert decoder[f"{attention}.q_proj"] == {"query"}
    assert decoder[f"{attention}.out_proj"] == {"output"}
    assert decoder["transformer.layers.1.mlp.lin2"] == {"mlp"}
    assert not any("hypernetworks" in n for n in decoder)


def test_count_vgg16():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        vgg = torchvision.models.vgg16()
    big = LoRAConfig(r=8, pattern=r"classifier\.(0|3)$")
    assert inject(vgg, big).parameters == 37_376 * 8
    eject(vgg)
    # The first convolution has 27 inputs and takes r = 8.
    convs = inject(vgg, LoRAConfig(r=8, roles=("conv",)))
    assert convs.parameters == 301_272


def test_rank_pattern_first_match_wins():
    model = models.TimmViT()
    config = LoRAConfig(r=2, rank_pattern={r"blocks\.1\.": 4, r"attn": 3})
    injection = inject(model, config)
    ranks = {n: layer.spec.r for n, layer in injection.layers.items()}
    assert ranks == {"blocks.0.attn.qkv": 3, "blocks.1.attn.qkv": 4}
    assert injection.parameters == 2 * (3 + 4) * 16


def test_pattern_selects_and_roles_choose_the_parts():
    model = models.TimmViT()
    config = LoRAConfig(r=2, roles=("key",), pattern=(r"1\.attn", r"head$"))
    layers = inject(model, config).layers
    assert {n: m.parts for n, m in layers.items()} == {
        "blocks.1.attn.qkv": ("key",),
        "blocks.1.attn.proj": ("all",),
        "head": ("all",),
    }


def test_nothing_matched_lists_what_is_there():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 3, 1), nn.ReLU())
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(LoRAError) as error:
        inject(model, LoRAConfig(r=2))
    text = str(error.value)
    assert "query, value" in text
    assert "conv     1" in text
    assert "no role  0" in text
    assert [p.requires_grad for p in model.parameters()] == before
    with pytest.raises(LoRAError, match="'nope'"):
        inject(model, LoRAConfig(pattern="nope"))
    with pytest.raises(LoRAError, match="no Linear"):
        inject(nn.Sequential(nn.ReLU()), LoRAConfig())
    with pytest.raises(LoRAError, match="single Linear"):
        inject(nn.Linear(2, 2), LoRAConfig())


def test_a_role_without_layer_warns():
    with pytest.warns(UserWarning, match="'conv'"):
        inject(Block(a=models.swin_v4()), LoRAConfig(r=2, roles=("query", "conv")))


def test_injecting_twice_is_refused():
    model = models.TimmViT()
    inject(model, LoRAConfig(r=2))
    with pytest.raises(LoRAError, match="already"):
        inject(model, LoRAConfig(r=2, roles=("mlp",)))
    assert len(adapted_layers(model)) == 2


def test_a_failed_injection_leaves_the_model_alone():
    model = models.TimmViT()
    with pytest.raises(LoRAError, match=r"head.*at most 3"):
        inject(model, LoRAConfig(r=4, pattern="attn|head"))
    assert not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "bad", [{"roles": ("values",)}, {"roles": ()}, {"pattern": "("}]
)
def test_bad_selection(bad):
    with pytest.raises(LoRAError):
        LoRAConfig(**bad)


def test_a_layer_whose_parent_never_calls_it_is_refused():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        swin = torchvision.models.swin_t()
    with pytest.raises(LoRAError, match="never calls"):
        inject(swin, LoRAConfig(r=2))


def test_names_freeze_keep_and_eject():
    torch.manual_seed(0)
    model = models.TimmViT()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    inject(model, LoRAConfig(r=2), keep="^head")
    assert set(state) < set(model.state_dict())  # old names are still there
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {"head.weight", "head.bias"}
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.fill_(0.1)
    assert not torch.allclose(model(x), before)
    merge(model)
    eject(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_what_was_frozen_stays_frozen_though_it_is_kept():
    model = models.TimmViT()
    model.head.bias.requires_grad_(False)
    inject(model, LoRAConfig(r=2), keep="head")
    assert model.head.weight.requires_grad
    assert not model.head.bias.requires_grad


def test_a_layer_used_twice_is_adapted_once_everywhere():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        injection = inject(model, LoRAConfig(r=2, pattern="0"))
    assert model[0] is model[2] is injection.layers["0"]
