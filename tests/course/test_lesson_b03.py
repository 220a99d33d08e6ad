"""Bonus 03: its settings, and the cells tagged "export" of its text."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medtut.course.lessons import b03_memory_and_depth as b03
from medtut.course.lessons import l03
from medtut.course.profiles import PROFILES, SettingsError, resolve
from medtut.models.litemedsam import TinyViT
from medtut.models.sam_stages import PrefixCache, first_trainable, stages
from tools.percent import read_text_form

SLUG = "bonus/03_memory_and_depth"
TEXT = Path(__file__).parents[2] / "notebooks" / "source" / f"{SLUG}.py"
COHORT = ("train_patients", "validation_patients", "test_patients")


@pytest.fixture(scope="module")
def scope():
    found = {"torch": torch, "nn": nn, "F": F}
    for cell in read_text_form(TEXT).cells:
        if "export" in cell.metadata.get("tags", []):
            exec(compile(cell.source, TEXT.name, "exec"), found)
    return found


def test_settings_draw_the_lessons_patients_and_take_no_other_model():
    for name in PROFILES:
        ours = resolve(SLUG, name, {})
        assert [getattr(ours, n) for n in COHORT] == [
            l03.PRESETS[name][n] for n in COHORT
        ]
        assert (ours.model, ours.rate, ours.width) == ("litemedsam", None, 32)
    assert b03.PRESETS["smoke"] == l03.PRESETS["smoke"]
    with pytest.raises(SettingsError, match="model"):
        resolve(SLUG, "smoke", {"model": "vit_b"})


# --- bytes kept --------------------------------------------------------------------


def test_bytes_kept_are_those_of_the_activations(scope):
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7))
    x = torch.zeros(4, 3)
    # The input of each trained layer; ReLU's output is the second of them.
    assert scope["kept_bytes"](lambda: model(x), model) == 4 * (4 * 3 + 4 * 5)
    model[0].requires_grad_(False)
    assert scope["kept_bytes"](lambda: model(x), model) == 4 * 4 * 5
    model.requires_grad_(False)
    assert scope["kept_bytes"](lambda: model(x), model) == 0


def test_a_storage_counts_once_whatever_looks_at_it(scope):
    x = torch.zeros(4, 3, requires_grad=True)
    step = lambda: (x[:2] * x[2:]).sum() + (x * x).sum()  # noqa: E731
    assert scope["kept_bytes"](step, nn.Identity()) == x.nbytes


def test_bytes_are_the_same_without_contents(scope):
    made = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Conv2d(4, 1, 3))
            x = torch.zeros(2, 1, 16, 16)
            made[device] = scope["kept_bytes"](lambda m=model, x=x: m(x), model)
    assert made["cpu"] == made["meta"] > 0


# --- attention in depth ------------------------------------------------------------


@pytest.fixture
def module(scope):
    torch.manual_seed(0)
    made = scope["DepthAttention"](dim=8, width=4).double()
    with torch.no_grad():
        made.out.weight.normal_()
        made.norm.weight.normal_()
    return made


def stack(n=2, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n * 3, 8, 5, 6, generator=draw, dtype=torch.double)


def test_it_starts_as_nothing_and_has_the_stated_size(scope):
    made = scope["DepthAttention"](dim=160, width=32)
    assert sum(p.numel() for p in made.parameters()) == 21_056
    x = torch.randn(6, 160, 2, 3)
    assert torch.equal(made(x), x[1::3])


def test_it_is_the_attention_written_out(module):
    x = stack()
    y = module(x)
    assert y.shape == (2, 8, 5, 6)
    n, row, column = 1, 3, 2
    t = module.norm(x[3 * n : 3 * n + 3, :, row, column])  # the same place, three times
    weight = (module.query(t[1]) @ module.key(t).T / 4**0.5).softmax(-1)
    wanted = x[3 * n + 1, :, row, column] + module.out(weight @ module.value(t))
    torch.testing.assert_close(y[n, :, row, column], wanted)


def test_it_looks_at_its_own_stack_and_place_only(module):
    x = stack().requires_grad_()
    module(x)[0, :, 3, 2].sum().backward()
    reached = x.grad.abs().sum(1)
    assert (reached[:3, 3, 2] > 0).all()
    reached[:3, 3, 2] = 0
    assert reached.sum() == 0


def test_above_and_below_are_alike_and_the_middle_is_not(module):
    x = stack(1)
    torch.testing.assert_close(module(x[[2, 1, 0]]), module(x))
    assert (module(x[[1, 0, 2]]) - module(x)).abs().max() > 0.1


def test_in_the_encoder_neighbours_stop_behind_the_frozen_prefix(
    scope, tmp_path, monkeypatch
):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    torch.manual_seed(0)
    encoder = TinyViT().eval().requires_grad_(False)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        plain = encoder(x)[1:2]
        scope["with_depth"](encoder, 2, 4)
        assert stages(encoder)[first_trainable(encoder)][0] == "layers.2.blocks.0"
        cache = PrefixCache(encoder)
        torch.testing.assert_close(cache(x), plain)
        nn.init.normal_(encoder.layers[2].blocks[0][0].out.weight)
        assert (cache(x) - plain).abs().max() > 1e-3
        assert (cache(x[[1, 1, 1]]) - cache(x)).abs().max() > 1e-3
    assert cache.made == 3
    cache(x).sum().backward()
    learns = {n for n, p in encoder.named_parameters() if p.grad is not None}
    assert learns == {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert all(n.startswith("layers.2.blocks.0.0.") for n in learns)
    assert len(learns) == 10
