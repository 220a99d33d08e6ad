"""Adapter folders: ours and peft's, and what is refused."""

import copy
import json

import pytest
import torch
from torch import nn

from medtut.lora import (
    LoRAConfig,
    LoRAError,
    adapted_layers,
    adapter_parameters,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from medtut.lora.io import BASE, CONFIG, WEIGHTS

from .models import TimmViT
from .parity import close, peft_output_factor
from .test_lora_layers import fill


class Net(nn.Module):
    """One of each kind of layer, runnable."""

    def __init__(self, attention=True, grouped=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.group = nn.Conv2d(8, 8, 3, padding=1, groups=2 if grouped else 1)
        self.fc = nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.use = attention
        self.head = nn.Sequential(nn.Linear(8, 3))

    def forward(self, x):
        x = self.group(self.conv(x)).flatten(2).transpose(1, 2)
        x = self.fc(x)
        if self.use:
            x = x + self.attn(x, x, x)[0]
        return self.head(x.mean(1))


def x_image():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def peft_load(base, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder)


def undouble(peft_model):
    """Make peft count the update of attention outputs once."""
    for n, p in peft_model.named_parameters():
        if "base_layer.out_proj.lora_B" in n:
            p.data /= peft_output_factor()


CONFIGS = {
    "roles": (TimmViT, {"r": 3, "alpha": 7.0}),
    "sqrt": (TimmViT, {"r": 3, "alpha": 7.0, "scaling": "alpha/sqrt(r)"}),
    "none": (TimmViT, {"r": 3, "scaling": "none", "roles": ("query", "mlp")}),
    "dora": (TimmViT, {"r": 2, "variant": "dora", "roles": ("value", "output")}),
    "pissa": (TimmViT, {"r": 2, "variant": "pissa", "roles": ("query", "output")}),
    "ranks": (
        TimmViT,
        {"r": 2, "pattern": "attn|mlp", "rank_pattern": {"mlp": 5, r"1\.attn": 4}},
    ),
    "all kinds": (Net, {"r": 2, "alpha": 7.0, "pattern": "conv|group|fc|attn"}),
    "output only": (Net, {"r": 2, "pattern": "attn", "roles": ("output",)}),
    "conv pissa": (Net, {"r": 2, "variant": "pissa", "pattern": "conv|group|attn"}),
    "conv dora": (Net, {"r": 2, "variant": "dora", "pattern": "conv|group|fc"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_ours_and_into_peft(name, tmp_path):
    make, settings = CONFIGS[name]
    torch.manual_seed(0)
    base = make().eval()
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(**settings))
    fill(model)
    want = model(x_image())
    assert (want - base(x_image())).abs().max() > 1e-3
    merge(model)  # merged or not, the files are the same
    save_adapter(model, tmp_path / "a")

    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path / "a")
    assert torch.equal(ours(x_image()), want)
    mine = dict(adapter_parameters(model))
    for n, p in adapter_parameters(ours):
        assert torch.equal(p, mine[n]), n
    load_adapter(ours, tmp_path / "a")  # into an adapted model: replaces
    assert torch.equal(ours(x_image()), want)

    theirs = peft_load(copy.deepcopy(base), tmp_path / "a").eval()
    undouble(theirs)
    close(theirs(x_image()), want, "peft with our file")


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 7, "target_modules": ["qkv", "proj", "fc1"]},
        {"r": 4, "lora_alpha": 7, "target_modules": ["qkv"], "use_rslora": True},
        {"r": 4, "lora_alpha": 7, "target_modules": ["fc2"], "use_dora": True},
        {
            "r": 4,
            "lora_alpha": 7,
            "target_modules": ["fc1", "fc2"],
            "rank_pattern": {"fc1": 2},
            "alpha_pattern": {"1.mlp.fc2": 3},
            "modules_to_save": ["head"],
        },
    ],
)
def test_we_load_pefts_files(settings, tmp_path):
    import peft

    torch.manual_seed(0)
    base = TimmViT().eval()
    settings = dict(settings)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    fill(theirs)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "modules_to_save" in n:
                p.add_(1)
    want = theirs.eval()(x_image())
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="no fingerprint"):
        load_adapter(ours, tmp_path)
    close(ours(x_image()), want, "our model with peft's file")


def test_we_load_pefts_conv_and_attention(tmp_path):
    import peft

    torch.manual_seed(0)
    base = Net(grouped=False).eval()
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["conv", "group", "attn"]
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    undouble(theirs)
    want = theirs.eval()(x_image())
    ours = copy.deepcopy(base)
    with pytest.warns(UserWarning, match=r"no fingerprint|twice") as caught:
        load_adapter(ours, tmp_path)
    assert len(caught) == 2
    close(ours(x_image()), want, "our model with peft's file")


def test_pefts_group_mixing_conv_is_refused(tmp_path):
    import peft

    base = Net().eval()
    config = peft.LoraConfig(r=4, target_modules=["group"])
    with pytest.warns(UserWarning, match="groups"):
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match="no fingerprint"),
        pytest.raises(LoRAError, match="mixes groups"),
    ):
        load_adapter(base, tmp_path)
    assert all(p.requires_grad for p in base.parameters())


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    base = TimmViT()
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(r=2))
    fill(model)
    return base, save_adapter(model, tmp_path / "adapter")


def test_another_base_is_refused_and_the_tensor_named(saved):
    base, folder = saved
    with torch.no_grad():
        base.blocks[1].mlp.fc1.bias[0] += 1e-7
    with pytest.raises(LoRAError) as error:
        load_adapter(base, folder)
    assert "another base" in str(error.value)
    assert "blocks.1.mlp.fc1.bias" in str(error.value)
    assert "blocks.0" not in str(error.value)
    assert not list(adapter_parameters(base))
    load_adapter(base, folder, allow_other_base=True)


def test_half_precision_copy_is_another_base(saved):
    base, folder = saved
    with pytest.raises(LoRAError, match="dtype"):
        load_adapter(base.half(), folder)


def test_another_architecture_is_refused(saved):
    _, folder = saved
    with pytest.raises(LoRAError, match="missing"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), folder)
    with pytest.raises(LoRAError, match="does not have"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), folder, allow_other_base=True)
    wide = TimmViT(16)
    inject(wide, LoRAConfig(r=4))
    fill(wide)
    before = wide(x_image())
    with pytest.raises(LoRAError, match="shape"):
        load_adapter(wide, folder, allow_other_base=True)
    assert torch.equal(wide(x_image()), before)  # its own adapters are still there
    merge(wide)
    before = wide(x_image())
    with pytest.raises(LoRAError, match="shape"):
        load_adapter(wide, folder, allow_other_base=True)
    assert torch.equal(wide(x_image()), before)
    assert all(layer.merged for layer in adapted_layers(wide).values())


@pytest.mark.parametrize("cut", [0, 5, 100, -8])
def test_truncated_file(saved, cut):
    base, folder = saved
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(LoRAError, match="damaged"):
        load_adapter(base, folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_missing_file(saved, name):
    base, folder = saved
    (folder / name).unlink()
    with pytest.raises(LoRAError, match="missing"):
        load_adapter(base, folder)
    with pytest.raises(LoRAError, match="not a folder"):
        load_adapter(base, folder / "nowhere")


def test_broken_config(saved):
    base, folder = saved
    (folder / CONFIG).write_text("{", encoding="utf-8")
    with pytest.raises(LoRAError, match="damaged"):
        load_adapter(base, folder)


def test_files_of_two_saves_are_refused(saved):
    base, folder = saved
    other = copy.deepcopy(base)
    inject(other, LoRAConfig(r=2))
    second = save_adapter(fill(other, seed=1), folder.parent / "second")
    (folder / WEIGHTS).write_bytes((second / WEIGHTS).read_bytes())
    with pytest.raises(LoRAError, match="different saves"):
        load_adapter(base, folder)


def test_no_half_written_file_stays(saved, monkeypatch):
    import medtut.lora.io as module

    base, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(before) == {WEIGHTS, CONFIG, BASE}
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(r=2))

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(LoRAError, match="disk full"):
        save_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_trained_head_goes_along(tmp_path):
    torch.manual_seed(0)
    base = TimmViT()
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(r=2), keep="^head")
    fill(model)
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.warns(UserWarning, match=r"head\.weight"):
        save_adapter(model, tmp_path)
    save_adapter(model, tmp_path, extra=["head"])
    fresh = copy.deepcopy(base)
    with torch.no_grad():
        fresh.head.weight.zero_()  # a new head is not part of the base
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x_image()), model(x_image()))
    assert fresh.head.weight.requires_grad
    theirs = peft_load(copy.deepcopy(base), tmp_path).eval()
    close(theirs(x_image()), model.eval()(x_image()), "peft")
    with pytest.raises(LoRAError, match="no module"):
        save_adapter(model, tmp_path, extra=["nope"])


def test_files_say_what_they_are(saved):
    _, folder = saved
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    assert config["r"] == 4  # two parts of rank 2 on one fused layer
    assert config["lora_alpha"] == 32
    base = json.loads((folder / BASE).read_text(encoding="utf-8"))
    assert base["layers"]["blocks.0.attn.qkv"]["parts"] == ["query", "value"]
    assert "blocks.0.attn.qkv.weight" in base["tensors"]


def test_saving_without_adapters(tmp_path):
    with pytest.raises(LoRAError, match="no adapters"):
        save_adapter(TimmViT(), tmp_path)
