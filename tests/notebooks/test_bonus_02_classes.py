"""The two branches of the bonus notebook (cells tagged "export" of its text)."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medtut.models.medclip import DenseDecoder, MedCLIPSegmenter
from tools.percent import read_text_form

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "notebooks" / "source" / "bonus" / "02_dual_branch.py"
WIDTHS = (8, 16)


class Tower(nn.Module):
    """Two frozen stages, of 56 and 28 cells, in the place of the Swin transformer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, WIDTHS[0], 4, stride=4)
        self.second = nn.Conv2d(WIDTHS[0], WIDTHS[1], 2, stride=2)
        self.requires_grad_(False)

    def stages(self, x):
        y = self.first(x)
        return [y, self.second(y)]


@pytest.fixture(scope="module")
def scope():
    found = {"torch": torch, "nn": nn, "F": F}
    for cell in read_text_form(TEXT).cells:
        if "export" in cell.metadata.get("tags", []):
            exec(compile(cell.source, TEXT.name, "exec"), found)
    return found


def make(scope, dual):
    torch.manual_seed(0)
    model = MedCLIPSegmenter(Tower(), DenseDecoder(WIDTHS, width=16))
    return scope["TwoBranches"](model, width=8) if dual else model


def picture():
    return torch.randn(1, 1, 224, 224, generator=torch.Generator().manual_seed(1))


def away_from_start(model):
    """Give the last layer, zero at the start, some weights."""
    nn.init.normal_(model.out.weight, generator=torch.Generator().manual_seed(2))
    return model


def test_it_starts_as_the_lessons_model(scope):
    with torch.no_grad():
        plain, dual = (make(scope, dual)(picture()) for dual in (False, True))
    assert plain.shape == dual.shape == (1, 4, 224, 224)
    assert torch.equal(plain, dual)


def test_everything_but_the_tower_has_a_gradient_from_the_second_step_on(scope):
    model = make(scope, True)
    label = torch.zeros(1, 224, 224, dtype=torch.long)
    optimiser = torch.optim.SGD(filter(lambda p: p.requires_grad, model.parameters()))
    moving = []
    for _ in range(2):
        optimiser.zero_grad()
        F.cross_entropy(model(picture()), label).backward()
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        moving.append({n for n, p in trained if p.grad is not None and p.grad.any()})
        optimiser.step()
    first, second = moving
    assert {n for n in first if n.startswith(("local", "fuse", "squeeze"))} == set()
    assert {"out.weight", "out.bias"} < first
    assert second == {n for n, _ in trained}
    assert not any(n.startswith("encoder") for n in second)


@pytest.mark.parametrize("silenced", ["local", "squeeze"])
def test_both_branches_reach_the_logits(scope, silenced):
    model = away_from_start(make(scope, True)).eval()
    with torch.no_grad():
        before = model(picture())
        for p in getattr(model, silenced).parameters():
            p.zero_()
        assert (model(picture()) - before).abs().max() > 1e-3


def test_the_local_branch_keeps_every_pixel(scope):
    model = away_from_start(make(scope, True)).eval()
    nn.init.zeros_(model.final.weight)  # what is left comes through the branch
    nn.init.zeros_(model.squeeze.weight)  # and does not come from the tower
    x = picture().requires_grad_()
    model(x)[0, 1, 100, 100].backward()
    strength = x.grad[0, 0].abs()
    # Three 3 x 3 convolutions; beyond them only the statistics of the norms.
    near = strength[97:104, 97:104].max()
    strength[97:104, 97:104] = 0
    assert strength.max() < near / 20
