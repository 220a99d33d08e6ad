"""The published classifier as it runs, and the truncated SVD its paper describes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medtut.errors import MedtutError
from medtut.lora import find_dead
from medtut.models.published_vgg import PublishedVGG16, scrambled, truncated_svd
from medtut.models.vgg import output_spread, vgg16

SMALL = {"width": 0.125, "side": 32, "hidden": 48}


def test_counts_as_published():
    with torch.device("meta"):
        model, plain = PublishedVGG16(), vgg16()
    used = sum(p.numel() for p in plain.parameters())
    dead = 8 * (25088 + 4096) + 8 * (4096 + 4096)
    assert dead == 299_008
    assert sum(p.numel() for p in model.parameters()) == used + dead == 134_575_940
    assert all(p.requires_grad for p in model.parameters())


def test_what_the_helper_returns_and_registers():
    model = PublishedVGG16(**SMALL)
    assert model.lora_fc1 is model.fc1
    assert model.lora_fc2 is model.fc2
    keys = model.state_dict()
    assert {"fc1.weight", "lora_fc1.weight"} <= set(keys)
    own = {f"{n}_{id(f)}" for n in "UV" for f in (model.fc1, model.fc2)}
    assert own <= set(keys)
    U, V = keys[f"U_{id(model.fc1)}"], keys[f"V_{id(model.fc1)}"]
    assert U.shape == (64, 8)
    assert V.shape == (8, 48)
    assert U.std().item() == pytest.approx(0.01, rel=0.15)
    loss = F.cross_entropy(model(torch.rand(2, 3, 32, 32)), torch.tensor([0, 1]))
    loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == own
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout)]


def test_the_ledger_finds_the_dead():
    model = PublishedVGG16(**SMALL)
    dead = find_dead(model, model(torch.rand(2, 3, 32, 32)).sum())
    assert len(dead) == 4


def test_the_scrambled_picture():
    hwc = torch.arange(2 * 6 * 4 * 3.0).view(2, 6, 4, 3)
    seen = scrambled(hwc)
    assert seen.shape == (2, 3, 6, 4)
    assert seen.data_ptr() == hwc.data_ptr()
    assert torch.equal(seen.flatten(1), hwc.flatten(1))
    for c in range(3):  # a third of the rows each, colours in turn
        rows = hwc[:, 2 * c : 2 * c + 2]
        assert torch.equal(seen[:, c].flatten(1), rows.flatten(1))


def test_the_scrambled_picture_has_little_to_do_with_the_picture():
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 224)] * 2, indexing="ij")
    disc = (x**2 + (y - 0.3) ** 2 < 0.35).float()
    hwc = torch.stack([disc, 0.5 * disc + 0.25 * (x + 1), 1 - disc], -1)[None]
    true = hwc.permute(0, 3, 1, 2)
    both = torch.stack([true.flatten(), scrambled(hwc).flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.3
    # A grey picture has its three colours equal; seen so, they are three places.
    grey = disc[None, ..., None].expand(1, 224, 224, 3).contiguous()
    assert (scrambled(grey)[0, 0] - scrambled(grey)[0, 2]).abs().mean() > 0.2


def test_forward_scrambles_stored_rows():
    model = PublishedVGG16(**SMALL).eval()
    hwc = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    want = model.fc3(
        model.fc2(model.fc1(model.features(scrambled(hwc)).flatten(1)).relu()).relu()
    )
    assert torch.equal(model(hwc.flatten(1)), want)
    assert torch.equal(model(hwc), want)
    assert not torch.equal(model(hwc.permute(0, 3, 1, 2)), want)


def test_outputs_hardly_depend_on_the_input():
    x = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    settings = {"width": 0.125, "hidden": 64}
    published = dict(output_spread(PublishedVGG16(side=64, **settings), x))
    he = dict(output_spread(vgg16(**settings), (x - 0.45) / 0.225))
    assert published["fc3"] < 1e-6
    assert he["classifier.6"] > 1e4 * published["fc3"]


def test_seeds_and_sides():
    one, same, other = (PublishedVGG16(**SMALL, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(one["fc1.weight"], same["fc1.weight"])
    assert not torch.equal(one["fc1.weight"], other["fc1.weight"])
    for side in (0, 48):
        with pytest.raises(MedtutError, match=str(side)):
            PublishedVGG16(side=side)


def test_truncated_svd():
    torch.manual_seed(0)
    layer = nn.Linear(60, 40)
    S = torch.linalg.svdvals(layer.weight)
    for r in (1, 8, 40):
        pair, error = truncated_svd(layer, r)
        best = (S[r:].square().sum() / S.square().sum()).sqrt().item()
        assert error == pytest.approx(best, abs=2e-4)
        assert sum(p.numel() for p in pair.parameters()) == r * 100 + 40
    x = torch.randn(3, 60)
    torch.testing.assert_close(pair(x), layer(x), rtol=1e-4, atol=1e-4)
    thin, _ = truncated_svd(nn.Linear(6, 4, bias=False), 2)
    assert sum(p.numel() for p in thin.parameters()) == 20
    for r in (0, 41):
        with pytest.raises(MedtutError, match=f"r={r}"):
            truncated_svd(layer, r)


def test_count_of_the_papers_text():
    shapes = ((25088, 4096), (4096, 4096))
    thin = sum(8 * (i + o) + o for i, o in shapes)
    assert thin + 4096 * 4 + 4 == 323_588
