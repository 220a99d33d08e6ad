"""Bonus 04: its settings, and the cells tagged "export" of its text."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from medtut.course.lessons import b04_other_networks as b04
from medtut.course.lessons import l04, vgg
from medtut.course.profiles import PROFILES, SettingsError, resolve
from medtut.lora import adapted_layers
from medtut.models import vgg as nets
from medtut.models import vgg_weights
from medtut.models.prefix import PrefixCache, first_trainable, stages
from medtut.train import TrainConfig, fit
from tools.percent import read_text_form

SLUG = "bonus/04_other_networks"
TEXT = Path(__file__).parents[2] / "notebooks" / "source" / f"{SLUG}.py"
SETTINGS = SimpleNamespace(
    rank=2, batch_size=2, memory_mb=10.0, precision="fp32", rate_lora=1e-2
)
NARROW = 1 / 32


@pytest.fixture(scope="module")
def scope():
    found = {"torch": torch, "nn": nn, "F": F, "np": np, "vgg": vgg}
    found |= {"FrozenBatchNorm2d": FrozenBatchNorm2d, "PrefixCache": PrefixCache}
    found |= {"TrainConfig": TrainConfig, "fit": fit}
    names = ("adapt", "build_other", "load_features", "to_input")
    found |= {name: getattr(nets, name) for name in names}
    found["vgg16"] = lambda **how: nets.vgg16(width=NARROW, **how)
    for cell in read_text_form(TEXT).cells:
        if "export" in cell.metadata.get("tags", []):
            exec(compile(cell.source, TEXT.name, "exec"), found)
    return found


def bytes_of(n=4, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side), np.uint8)


def learning(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_settings_draw_the_lessons_patients_and_know_the_sources():
    for name in PROFILES:
        ours, lessons = resolve(SLUG, name, {}), l04.PRESETS[name]
        assert ours.train_patients == lessons["train_patients"]
        assert ours.test_patients == lessons["test_patients"]
    assert set(b04.PRESETS) == set(PROFILES)
    for weights in ("asset", "torchvision", "random"):
        assert resolve(SLUG, "smoke", {"weights": weights}).weights == weights
    with pytest.raises(SettingsError, match="weights"):
        resolve(SLUG, "smoke", {"weights": "elsewhere"})


# --- what learns -------------------------------------------------------------------


def test_vgg_learns_in_block_five_and_the_head_only(scope):
    lora, full = (
        scope["make"]("vgg16", "random", w, 0, SETTINGS) for w in ("lora", "full")
    )
    names = {"features.24", "features.26", "features.28"}
    assert set(adapted_layers(lora)) == names
    assert learning(full) == {
        f"{n}.{part}" for n in (*names, "classifier.2") for part in ("weight", "bias")
    }
    for model in (lora, full):
        assert stages(model)[first_trainable(model)][0] == "features.24"


def test_others_learn_everywhere_and_random_ones_keep_their_statistics_running(scope):
    lora, full = (
        scope["make"]("resnet18", "random", w, 0, SETTINGS) for w in ("lora", "full")
    )
    convs = {n for n, m in full.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(adapted_layers(lora)) == convs
    assert learning(full) == {n for n, _ in full.named_parameters()}
    assert sum(isinstance(m, nn.BatchNorm2d) for m in lora.modules()) == 20
    fixed = scope["make"]("resnet18", "random", "lora", 0, SETTINGS, norm="frozen")
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in fixed.modules()) == 20


def test_a_seed_draws_the_random_base(scope):
    one, same, other = (
        scope["make"]("vgg16", "random", "lora", s, SETTINGS).features[0].weight
        for s in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_with_a_network_a_resnet_gets_its_trained_weights_and_statistics(
    scope, monkeypatch
):
    theirs = nets.build_other("resnet18", norm="running", seed=7)
    theirs(torch.randn(4, 3, 32, 32))  # moves the running means
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    state["fc.weight"] = torch.zeros(1000, 512)  # of a thousand classes: left out
    asked = []
    monkeypatch.setattr(
        vgg_weights, "_from_torchvision", lambda kind: asked.append(kind) or state
    )
    model = scope["make"]("resnet18", "torchvision", "lora", 0, SETTINGS)
    assert asked == ["resnet18"]
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert isinstance(model.bn1, FrozenBatchNorm2d)
    assert torch.equal(model.bn1.running_mean, state["bn1.running_mean"])
    assert model.fc.weight.shape == (4, 512)
    seen = scope["look"](model, bytes_of())
    assert seen.shape == (4, 3, 32, 32)
    assert seen.abs().max() < 3


def test_pictures_follow_the_weights(scope):
    model = nn.Linear(1, 1)
    black = np.zeros((1, 32, 32), np.uint8)
    assert scope["look"](model, black)[0, 0, 0, 0] == pytest.approx(-0.485 / 0.229)
    model.convention = "keras"
    assert scope["look"](model, black)[0, 0, 0, 0] == pytest.approx(-103.939)


# --- training ----------------------------------------------------------------------


def test_training_moves_what_learns_and_answers_are_the_models(
    scope, tmp_path, monkeypatch
):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model = scope["make"]("vgg16", "random", "lora", 0, SETTINGS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    images, labels = bytes_of(6), [0, 1, 2, 3, 0, 1]
    items = [{"image": i, "label": k} for i, k in zip(images, labels, strict=True)]
    cache, result = scope["train"](model, items, SETTINGS, 0, 1e-2)
    assert len([row for row in result.history if "loss" in row]) >= 1
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == learning(model)
    assert cache.made > 0  # the frozen beginning ran once per picture
    said = scope["answers"](cache, images, SETTINGS)
    with torch.no_grad():
        plain = model.eval()(scope["look"](model, images)).argmax(1).numpy()
    assert said.tolist() == plain.tolist()


# --- BatchNorm ---------------------------------------------------------------------


def test_measured_statistics_are_the_averages_over_batches(scope):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.5))
    parts = [2 + 3 * torch.randn(8, 3, 4, 4) for _ in range(3)]
    model.train()(torch.full((2, 3, 4, 4), 100.0))  # forgotten
    norm = scope["measure"](model.eval(), iter(parts))[0]
    mean = torch.stack([x.mean((0, 2, 3)) for x in parts]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in parts]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert not norm.training


def test_a_stilled_network_answers_alike_and_stays_so_in_training(scope):
    torch.manual_seed(0)
    model = nets.build_other("resnet18", norm="running")
    x = torch.randn(4, 3, 32, 32)
    scope["measure"](model, [x, x + 1])
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1, 0.1)
            nn.init.normal_(m.bias, 0, 0.1)
    with torch.no_grad():
        before = model.eval()(x)
        fixed = scope["still"](model).train()
        torch.testing.assert_close(fixed(x), before, rtol=1e-4, atol=1e-5)
        fixed(x + 5)
        torch.testing.assert_close(fixed(x), before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fixed.modules())
