"""Each detector: planted defects it must find, clean controls it must leave alone."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from medtut.audit import (
    DETECTORS,
    Subject,
    SubjectError,
    adapters_change_nothing,
    audit,
    find_adapters,
    frozen_that_moved,
    trainable_without_gradient,
)


class LoRALinear(nn.Module):
    """A hand-written adapter around a frozen layer."""

    def __init__(self, base, r=2, scaling=2.0, called=True):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features) * 0.1)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        self.scaling, self.called = scaling, called

    def forward(self, x):
        if not self.called:
            return self.base(x)
        return self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


class Toggling(LoRALinear):
    """Merges in eval() and subtracts in train(), as loralib does."""

    merged = False

    def train(self, mode=True):
        super().train(mode)
        step = self.scaling * (self.lora_B @ self.lora_A).detach()
        if self.merged == mode:
            self.base.weight.data += -step if mode else step
            self.merged = not mode
        return self

    def forward(self, x):
        return self.base(x) if self.merged else super().forward(x)


class Nameless(nn.Module):
    """The same adapter under names that say nothing."""

    def __init__(self, used=True):
        super().__init__()
        self.inner = nn.Linear(12, 12).requires_grad_(False)
        self.one = nn.Linear(12, 2, bias=False)
        self.two = nn.Linear(2, 12, bias=False)
        nn.init.zeros_(self.two.weight)
        self.used = used

    def forward(self, x):
        return self.inner(x) + (self.two(self.one(x)) if self.used else 0.0)


def build(first=None, second=None, norm=False, head=True):
    torch.manual_seed(0)
    layers = [first or LoRALinear(nn.Linear(12, 12)), nn.Tanh()]
    if norm:
        layers.append(nn.BatchNorm1d(12).requires_grad_(norm == "trained"))
    layers += [second or LoRALinear(nn.Linear(12, 12)), nn.LayerNorm(12)]
    layers[-1].requires_grad_(False)
    layers.append(nn.Linear(12, 3).requires_grad_(head))
    return nn.Sequential(*layers)


def make(first=None, second=None, **more):
    def layer(spec):
        return LoRALinear(nn.Linear(12, 12), **spec) if isinstance(spec, dict) else spec

    torch.manual_seed(1)
    return build(layer(first), layer(second), **more)


def batch():
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(3))


def subject(model, **more):
    return Subject(model, batch(), **more)


def only(result):
    findings, _ = result
    assert len(findings) == 1, findings
    return findings[0]


# -------------------------------------------------------------- clean controls
@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(
    "model",
    [
        lambda: make(),
        lambda: make(norm="trained"),
        lambda: make(Nameless(), Nameless()),
        lambda: nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)),
    ],
    ids=["lora", "with-batchnorm", "nameless", "no-adapters"],
)
def test_clean_models_raise_no_alarm(name, model):
    assert DETECTORS[name](subject(model()))[0] == []


# ----------------------------------------------------- (a) adapters change nothing
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"scaling": 4 // 8}, "α // r"),
        ({"called": False}, "Does forward call them?"),
    ],
)
def test_all_adapters_dead(broken, said):
    one = only(adapters_change_nothing(subject(make(broken, broken))))
    assert said in one.message
    assert one.where == "0, 2"
    assert one.numbers == {
        "largest_output_change": 0.0,
        "sites": 2,
        "parameters": 2 * 2 * 24,
    }


@pytest.mark.parametrize("where", [0, 2])
def test_one_dead_adapter_is_named(where):
    specs = [{"scaling": 0} if where == k else {} for k in (0, 2)]
    one = only(adapters_change_nothing(subject(make(*specs))))
    assert one.where == str(where)
    assert one.numbers["sites_without_effect"] == 1
    assert one.numbers["of_sites"] == 2


def test_nameless_low_rank_pair_is_found_and_its_defect_too():
    assert [s.name for s in find_adapters(make(Nameless(), Nameless()))] == ["0", "2"]
    one = only(adapters_change_nothing(subject(make(Nameless(used=False)))))
    assert one.where == "0"


def test_bottleneck_without_frozen_partner_is_no_adapter():
    plain = nn.Sequential(nn.Linear(12, 2), nn.Linear(2, 12))
    assert find_adapters(plain) == []
    wide = Nameless()  # half the width is no low rank
    wide.one, wide.two = nn.Linear(12, 7, bias=False), nn.Linear(7, 12, bias=False)
    assert find_adapters(wide) == []


def test_helper_that_returns_the_layer_untouched():
    plain = nn.Sequential(nn.Linear(12, 12).requires_grad_(False), nn.Linear(12, 2))
    findings, notes = adapters_change_nothing(subject(plain))
    assert not findings
    assert "expects_adapters=True" in notes[0]
    one = only(adapters_change_nothing(subject(plain, expects_adapters=True)))
    assert one.numbers["sites"] == 0

    class LoRAClassifier(nn.Sequential):
        pass

    named = LoRAClassifier(nn.Linear(12, 12).requires_grad_(False), nn.Linear(12, 2))
    assert "LoRAClassifier" in only(adapters_change_nothing(subject(named))).message
    assert adapters_change_nothing(subject(named, expects_adapters=False)) == ([], [])


def test_factors_hidden_from_parameters():
    class LoRAHidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(12, 12).requires_grad_(False)
            self.factors = [nn.Linear(12, 2), nn.Linear(2, 12)]

        def forward(self, x):
            return self.base(x) + self.factors[1](self.factors[0](x))

    one = only(adapters_change_nothing(subject(make(LoRAHidden(), nn.Identity()))))
    assert "does not see them" in one.message


def test_noisy_output_is_said_not_guessed():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.count = LoRALinear(nn.Linear(12, 12)), torch.zeros(1)

        def forward(self, x):
            self.count += 1
            return self.layer(x) + self.count

    findings, notes = adapters_change_nothing(subject(Noisy()))
    assert not findings
    assert "from call to call" in notes[0]


def test_merged_adapters_are_not_judged():
    model = make(Toggling(nn.Linear(12, 12)), Toggling(nn.Linear(12, 12)))
    model.eval()
    findings, notes = adapters_change_nothing(subject(model))
    assert not findings
    assert "2 adapters are merged" in notes[0]
    model.train()
    assert adapters_change_nothing(subject(model)) == ([], [])


# ----------------------------------------------- (b) trainable without gradient
def test_trainable_that_is_not_reached():
    model = make({"called": False})
    one = only(trainable_without_gradient(subject(model)))
    assert (one.severity, one.where) == ("error", "0.lora_A, 0.lora_B")
    assert one.numbers["tensors"] == 2
    assert one.numbers["parameters"] == 48
    assert one.numbers["of_trainable_tensors"] == 6


def test_zero_gradient_is_told_from_no_gradient():
    one = only(trainable_without_gradient(subject(make({"scaling": 0}))))
    assert (one.severity, one.where) == ("warning", "0.lora_A, 0.lora_B")


def test_loss_that_ignores_the_model_and_loss_that_breaks():
    def ignores(model, data):
        return data.sum()

    def breaks(model, data):
        return (model(data) * 0).sum().log()

    one = only(trainable_without_gradient(subject(make(), loss=ignores)))
    assert one.numbers["tensors"] == one.numbers["of_trainable_tensors"]
    broken = trainable_without_gradient(subject(make(), loss=breaks))[0]
    assert any("NaN" in one.message for one in broken)


def test_loss_through_detach():
    def detached(model, data):
        hidden = model[0](data).detach()
        return model[1:](hidden).square().mean()

    one = only(trainable_without_gradient(subject(make(), loss=detached)))
    assert one.where == "0.lora_A, 0.lora_B"


def test_normalised_output_raises_no_alarm():
    """A sum of squares as stand-in loss would be constant here."""

    class Unit(nn.Module):
        def forward(self, x):
            return nn.functional.normalize(x, dim=-1)

    model = nn.Sequential(make(), Unit())
    assert trainable_without_gradient(subject(model)) == ([], [])


def test_nothing_trainable_and_frozen_adapters():
    model = make().requires_grad_(False)
    one = only(trainable_without_gradient(subject(model)))
    assert one.numbers["trainable"] == 0
    half = make()
    half[0].requires_grad_(False)
    one = only(trainable_without_gradient(subject(half)))
    assert one.where == "0"
    assert "frozen" in one.message


# --------------------------------------------------------- (c) frozen that moved
def test_storage_shared_with_a_trainable_tensor():
    model = make()
    model[-1] = nn.Linear(12, 12)
    model[0].base.weight.data = model[-1].weight.data
    one = only(frozen_that_moved(subject(model)))
    assert one.where == "0.base.weight"
    assert 0 < one.numbers["largest_change"] < 0.1


def test_weight_written_in_forward():
    class Drifting(LoRALinear):
        def forward(self, x):
            self.base.bias.data.mul_(0.999)
            return super().forward(x)

    model = make(Drifting(nn.Linear(12, 12)))
    one = only(frozen_that_moved(subject(model)))
    assert one.where == "0.base.bias"
    assert one.severity == "error"


def test_merge_toggling_leaves_rounding_behind():
    model = make(Toggling(nn.Linear(12, 12)))
    quick = subject(model, optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.3))
    one = only(frozen_that_moved(quick))
    assert one.where == "0.base.weight"
    assert 0 < one.numbers["largest_change"] < 1e-6


def test_running_statistics_of_a_frozen_batchnorm():
    one = only(frozen_that_moved(subject(make(norm="frozen"))))
    assert one.severity == "warning"
    assert "2.running_mean" in one.where
    assert one.numbers["tensors"] == 3

    class Held(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    held = make(norm="frozen")
    held[2] = Held(12).requires_grad_(False)
    assert frozen_that_moved(subject(held)) == ([], [])


def test_optimizer_that_writes_frozen_tensors():
    class Careless(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                for one in group["params"]:
                    one.data.mul_(1 - 0.01)

    def make_optimizer(model):
        return Careless(model.parameters(), lr=0.1)

    one = only(frozen_that_moved(subject(make(), optimizer=make_optimizer)))
    assert one.numbers["of_frozen_tensors"] == 6
    assert one.numbers["tensors"] == 5  # LayerNorm's bias is zero and stays it
    assert frozen_that_moved(
        subject(make(), optimizer=lambda m: torch.optim.AdamW(m.parameters()))
    ) == ([], [])


def test_batch_of_one_falls_back_to_eval_mode():
    findings, notes = frozen_that_moved(Subject(make(norm="frozen"), batch()[:1]))
    assert not findings
    assert "eval mode" in notes[0]


# ------------------------------------------------------------------- restoring
def everything(model, optimizer):
    state = [(n, t.detach().clone(), t.requires_grad) for n, t in _tensors(model)]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [(m.training, getattr(m, "merged", None)) for m in model.modules()]
    steps = copy.deepcopy(optimizer.state_dict())
    rng = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    return state, grads, flags, steps, rng, [id(p) for p in model.parameters()]


def _tensors(model):
    yield from model.named_parameters()
    yield from model.named_buffers()
    yield "plain", model.plain


@pytest.mark.parametrize("trained", [False, True])
def test_audit_leaves_everything_as_it_was(trained):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make(Toggling(nn.Linear(12, 12)), norm="frozen")
            self.drop = nn.Dropout(0.5)
            self.plain = torch.zeros(2)

        def forward(self, x):
            self.plain += 1
            random.random()
            np.random.rand()
            return self.drop(self.body(x))

    model = Whole()
    model.drop.eval()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=0.1)
    if trained:
        model(batch()).square().sum().backward()
        optimizer.step()
    data = batch()
    before = everything(model, optimizer)
    report = audit(Subject(model, data, optimizer=optimizer))
    after = everything(model, optimizer)
    assert report.findings
    assert torch.equal(data, batch())
    for (name, a, wants), (_, b, wanted_after) in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b), name
        assert wants == wanted_after
    for a, b in zip(before[1], after[1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert before[2] == after[2]
    assert str(before[3]) == str(after[3])
    assert torch.equal(before[4][0], after[4][0])
    assert (before[4][1] == after[4][1]).all()
    assert before[4][2] == after[4][2]
    assert before[5] == after[5]


def test_state_is_restored_when_a_loss_fails():
    model = make()
    bits = [p.detach().clone() for p in model.parameters()]

    def fails(model, data):
        raise ValueError("no target")

    with pytest.raises(SubjectError, match="ValueError: no target"):
        audit(subject(model, loss=fails))
    assert all(map(torch.equal, bits, model.parameters()))
    assert model.training


# ------------------------------------------------------------------------ peft
def _peft(**config):
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["first"], **config)
    return peft.get_peft_model(Net(), lora)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_model_is_clean(dora):
    model = _peft(use_dora=dora)
    report = audit(subject(model))
    assert report.exit_code == 0, report
    assert len(find_adapters(model)) == 1


def test_peft_model_with_planted_defects():
    model = _peft()
    model.base_model.model.first.scaling["default"] = 4 // 8
    report = audit(subject(model))
    assert "α // r" in report.of("adapters_change_nothing")[0].message
    off = _peft()
    off.base_model.model.first.enable_adapters(False)
    report = audit(subject(off))
    assert "switched off" in report.of("adapters_change_nothing")[0].message
    merged = _peft()
    merged.merge_adapter()
    _, notes = adapters_change_nothing(subject(merged))
    assert "unmerge" in notes[0]
