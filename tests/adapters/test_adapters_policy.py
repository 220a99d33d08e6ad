"""Head rows, seeds, modes, the adaptive rank's closed forms, and the file."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from medtut.adapters import (
    AdapterError,
    Parts,
    adapt,
    effective_ranks,
    find_parts,
    load_adaptation,
    proximal_step,
    save_adaptation,
)
from medtut.adapters.adaptive_rank import add_diagonals
from medtut.lora import (
    LoRAConfig,
    LoRAError,
    adapted_layers,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)


class Net(nn.Module):
    """A U-Net of one level, with what the parts are told by."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4))
        self.down = nn.Conv3d(4, 8, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.5)
        self.up = nn.Sequential(
            nn.ConvTranspose3d(8, 4, 2, stride=2), nn.BatchNorm3d(4), nn.Conv3d(4, 4, 1)
        )
        self.last = nn.Conv3d(4, 3, 1)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.up(self.drop(torch.relu(self.down(x)))))


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Net().eval()


@pytest.fixture
def x():
    return torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))


def same(a, b, names=None):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[n], b[n]) for n in (a if names is None else names))


def test_parts_by_structure_or_by_name(net):
    assert find_parts(net) == Parts("last", ("up",))
    wrapped = nn.Sequential(net)
    assert find_parts(wrapped) == Parts("0.last", ("0.up",))
    assert find_parts(net, head="up.2", decoder=["up.0"]) == Parts("up.2", ("up.0",))
    with pytest.raises(AdapterError, match="no module 'head'"):
        find_parts(net, head="head")
    for head in ("first.0", "up.0", "up", ""):
        with pytest.raises(AdapterError, match="name the head"):
            find_parts(net, head=head)
    with pytest.raises(AdapterError, match="name the head"):
        find_parts(nn.Linear(2, 2))


def test_a_zero_row_is_the_sigmoids_background(net, x):
    with torch.no_grad():
        net.last.bias -= net(x).mean((0, 2, 3, 4))
        logits = net(x)
    one, two = copy.deepcopy(net), copy.deepcopy(net)
    adapt(one, "as-is", structure=(None, 1))
    adapt(two, "probe", structure=(None, 2, 0))
    with torch.no_grad():
        p = one(x).softmax(1)[:, 1]
        labels = two(x).argmax(1)
    assert torch.allclose(p, logits[:, 1].sigmoid(), atol=1e-6)
    assert torch.equal(labels == 0, (logits[:, [2, 0]].sigmoid() < 0.5).all(1))
    assert 0 < (labels == 0).float().mean() < 1


def test_the_head_without_a_structure(net, x):
    before = net(x)
    kept = copy.deepcopy(net)
    done = adapt(kept, "probe")
    assert torch.equal(kept(x), before)
    assert done.trainable == ("last.weight", "last.bias")
    fresh = copy.deepcopy(net)
    done = adapt(fresh, "lora", classes=2, train_head=False)
    assert fresh(x).shape[1] == 2
    assert fresh.last.out_channels == 2
    assert fresh.last.weight.any()
    assert done.counts["head"] == 0
    bare = Net()
    bare.last = nn.Conv3d(4, 3, 1, bias=False)
    adapt(bare, "probe", structure=2)
    assert not bare.last.bias.any()


@pytest.mark.parametrize("structure", [-1, 3, (), (0, 7)])
def test_rows_that_do_not_exist(net, structure):
    with pytest.raises(AdapterError, match="rows 0 to 2"):
        adapt(net, "probe", structure=structure)
    with pytest.raises(AdapterError, match="rows 0 to 2"):
        adapt(net, "probe", classes=0)


def test_one_seed_one_start_and_the_global_numbers_stay(net):
    base = copy.deepcopy(net)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    models = {}
    for key, method, seed in (("a", "lora", 1), ("b", "norm", 1), ("c", "lora", 2)):
        models[key] = copy.deepcopy(base)
        adapt(models[key], method, structure=1, decoder="new", seed=seed)
    assert torch.equal(torch.rand(3), want)
    drawn = [n for n in base.state_dict() if n.startswith(("up", "last"))]
    drawn = [n for n in drawn if n.endswith("weight") and n != "up.1.weight"]
    assert same(models["a"], models["b"], drawn)
    for name in drawn:
        assert not same(models["a"], models["c"], [name])
        was = base.get_parameter(name).detach()
        assert not torch.equal(models["a"].get_parameter(name)[:1], was[:1])
    again = copy.deepcopy(base)
    adapt(again, "lora", structure=1, decoder="new", seed=1)
    assert same(models["a"], again)
    # A new decoder's head is new as well: the old rows read other features.
    assert models["a"](torch.rand(1, 1, 4, 4, 4)).shape[1] == 1


def test_modes(net):
    frozen, renewed, full = (copy.deepcopy(net).train() for _ in range(3))
    adapt(frozen, "norm", decoder="fine-tuned")
    assert not any(m.training for m in frozen.modules())
    adapt(renewed, "norm", decoder="new")
    assert {n for n, m in renewed.named_modules() if m.training} == {
        "up.0", "up.1", "up.2", "last",
    }  # fmt: skip
    done = adapt(full.eval(), "full")
    assert all(m.training for m in full.modules())
    assert done.counts["frozen"] == 0
    assert not done.set_modes(full).eval().drop.training


@pytest.mark.parametrize(("method", "own"), [("bias", 4 + 4 + 8), ("norm", 8)])
def test_bias_and_norm_stay_in_the_backbone(net, method, own):
    done = adapt(net, method, train_head=False)
    assert {done.parts.of(name) for name in done.trainable} == {"backbone"}
    assert done.counts["adapter"] == done.total == own


def test_full_can_leave_the_head(net):
    done = adapt(net, "full", train_head=False)
    assert done.counts["frozen"] == 3 * 4 + 3
    assert not any(p.requires_grad for p in net.last.parameters())


def test_a_decoder_that_cannot_start_again(net):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.gain

    net.up.append(Odd())
    with pytest.raises(AdapterError, match=r"no way to start up\.3"):
        adapt(net, "probe", decoder="new")
    adapt(net, "probe", decoder="fine-tuned")


# -- adaptive rank --------------------------------------------------------------
def test_the_proximal_step_is_the_soft_threshold(net):
    adapt(net, "lora", rank=4, adaptive=True)
    layers = adapted_layers(net)
    assert effective_ranks(net) == dict.fromkeys(layers, 4)
    start = torch.tensor([2.0, -0.5, 0.3, -0.1])
    d = layers["down"].parametrizations.lora_A[0].d
    d.data = start.clone()
    proximal_step(net, 0.3)
    assert torch.allclose(d, torch.tensor([1.7, -0.2, 0.0, 0.0]), atol=1e-7)
    assert effective_ranks(net)["down"] == 2
    # It minimises (v - d)^2 / 2 + t |v|, entry by entry.
    grid = torch.linspace(-3, 3, 6001)[:, None]
    cost = (grid - start).square() / 2 + 0.3 * grid.abs()
    assert torch.allclose(grid[cost.argmin(0), 0], d.detach(), atol=2e-3)
    before = d.detach().clone()
    proximal_step(net, 0)
    assert torch.equal(d, before)
    for threshold in (-1e-3, math.nan):
        with pytest.raises(AdapterError, match="0 or more"):
            proximal_step(net, threshold)
    with pytest.raises(AdapterError, match="adaptive=True"):
        proximal_step(Net(), 0.1)


def test_proximal_gradient_finds_the_lasso_solution():
    """With orthonormal factors the optimum of the penalised fit is known."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 6, bias=False))
    nn.init.zeros_(layer[0].weight)
    inject(layer, LoRAConfig(r=4, alpha=4, pattern="0"))
    add_diagonals(layer)
    U, _ = torch.linalg.qr(torch.randn(6, 4))
    V, _ = torch.linalg.qr(torch.randn(6, 4))
    lora = layer[0]
    lora.lora_B.data, lora.parametrizations.lora_A.original.data = U, V.T.contiguous()
    values = torch.tensor([3.0, 1.0, 0.4, -2.0])
    target, lam, lr = (U * values) @ V.T, 0.5, 0.3
    d = lora.parametrizations.lora_A[0].d
    for _ in range(100):
        loss = (lora.effective_weight("weight") - target).square().sum() / 2
        (grad,) = torch.autograd.grad(loss, d)
        d.data -= lr * grad
        proximal_step(layer, lr * lam)
    want = values.sign() * (values.abs() - lam).clamp(min=0)
    assert torch.allclose(d, want, atol=1e-5)
    assert effective_ranks(layer) == {"0": 3}
    # The update's rank is what is left of the diagonal, and so is its trace norm.
    change = lora.delta("weight")
    assert torch.linalg.matrix_rank(change) == 3
    assert torch.allclose(torch.linalg.matrix_norm(change, "nuc"), want.abs().sum())


def test_adaptive_lora_merges_and_exports_as_plain_lora(net, x, tmp_path):
    base = copy.deepcopy(net)
    adapt(net, "lora", rank=3, adaptive=True, train_head=False)
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p)
    proximal_step(net, 0.5)
    copied, after = copy.deepcopy(net), net(x)
    assert torch.equal(copied(x), after)
    merge(net)
    assert torch.allclose(net(x), after, rtol=1e-4, atol=1e-4)
    unmerge(net)
    save_adapter(net, tmp_path)
    load_adapter(base, tmp_path)
    assert torch.allclose(base(x), after, rtol=1e-4, atol=1e-4)
    assert not any("parametrizations" in n for n in base.state_dict())


# -- the file -------------------------------------------------------------------
CASES = [
    ("lora", {"structure": (None, 2), "rank": 2, "adaptive": True}),
    ("lora", {"structure": 1, "rank": 2, "train_head": False, "roles": ("conv",)}),
    ("spatial", {"structure": 0, "kernel": 1}),
    ("norm", {"classes": 2, "decoder": "new"}),
    ("bias", {"decoder": "fine-tuned"}),
    ("full", {"structure": 0}),
    ("as-is", {"structure": 2}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_save_and_load(net, x, tmp_path, method, options):
    base = copy.deepcopy(net)
    done = adapt(net, method, **options)
    for p in done.parameters(net):
        p.data += 0.1 * torch.randn_like(p)
    net(x)  # moves the running statistics of what is in train()
    file = save_adaptation(net, done, tmp_path / "a.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]
    fresh = copy.deepcopy(base)
    again = load_adaptation(fresh, file)
    assert (again.method, again.counts) == (method, done.counts)
    assert (again.trainable, again.renewed) == (done.trainable, done.renewed)
    assert same(net, fresh)
    assert [m.training for m in fresh.modules()] == [m.training for m in net.modules()]
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    if method == "full":
        return
    # Nothing of the frozen base is in the file, and another base is refused.
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert {n for n in names & frozen if not n.startswith("last")} == set()
    other = copy.deepcopy(base)
    other.down.weight.data[0, 0, 0, 0, 0] += 1
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(LoRAError, match=r"another base model[\s\S]*down\.weight"):
        load_adaptation(other, file)
    assert list(other.state_dict()) == list(state)
    load_adaptation(other, file, allow_other_base=True)
    assert same(net, other, done.trainable)


def test_files_that_cannot_be_read(net, tmp_path):
    with pytest.raises(AdapterError, match="missing"):
        load_adaptation(net, tmp_path / "no.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10" * 50)
    with pytest.raises(AdapterError, match="damaged"):
        load_adaptation(net, broken)
    from safetensors.torch import save_file

    plain = tmp_path / "plain.safetensors"
    save_file({"w": torch.ones(2)}, plain)
    with pytest.raises(AdapterError, match="foreign"):
        load_adaptation(net, plain)
    whole = copy.deepcopy(net)
    done = adapt(whole, "full")
    file = save_adaptation(whole, done, tmp_path / "full.safetensors")
    wide = Net()
    wide.down = nn.Conv3d(4, 8, 5, stride=2, padding=2)
    with pytest.raises(AdapterError, match=r"down\.weight has no place"):
        load_adaptation(wide, file)
    with pytest.raises(AdapterError, match="no module 'last'"):
        load_adaptation(nn.Sequential(nn.Conv3d(1, 1, 1)), file)


def test_the_settings_are_complete_and_plain(net):
    done = adapt(net, "lora", structure=(None, 1), rank=2)
    settings = json.loads(json.dumps(done.settings))
    assert settings["structure"] == [None, 1]
    assert (settings["rank"], settings["joint"], settings["adaptive"]) == (
        2,
        False,
        False,
    )
    assert settings["seed"] == 0
