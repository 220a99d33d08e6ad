"""The DoRA and PiSSA that the bonus notebook writes out are Hugging Face peft's.

They are taken from the notebook itself (cells tagged "export").
"""

from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.lora.parity import assert_parity, close, peft_linear

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "bonus" / "01_dora_pissa.ipynb"


@pytest.fixture(scope="module")
def classes():
    nb = nbformat.read(NOTEBOOK, as_version=4)
    scope = {"torch": torch, "nn": nn, "F": F}
    for cell in nb.cells:
        if "export" in cell.metadata.get("tags", []):
            exec(compile(cell.source, NOTEBOOK.name, "exec"), scope)
    return scope


def linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(12, 10, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_pefts(classes, bias):
    assert_parity(classes["DoRALinear"], bias=bias, use_dora=True)


@pytest.mark.parametrize("bias", [True, False])
def test_pissa_is_pefts(classes, bias):
    assert_parity(classes["PiSSALinear"], bias=bias, init_lora_weights="pissa")


@pytest.mark.parametrize("bias", [True, False])
def test_doras_magnitude_is_pefts_away_from_its_start(classes, bias):
    ours = classes["DoRALinear"](linear(bias), 4, 7.0)
    theirs = peft_linear(linear(bias), 4, 7.0, use_dora=True)
    m = theirs.lora_magnitude_vector["default"].weight
    close(ours.m, m, "magnitude at the start")
    other = (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, m)
    with torch.no_grad():
        for mine, his in zip((ours.A, ours.B, ours.m), other, strict=True):
            mine.add_(torch.randn_like(mine))
            his.copy_(mine)
    x = torch.randn(3, 5, 12)
    for layer in (ours, theirs):
        (layer(x) ** 2).sum().backward()
    close(ours(x), theirs(x), "output")
    for mine, his in zip((ours.A, ours.B, ours.m), other, strict=True):
        close(mine.grad, his.grad, "gradient")


def test_pissa_starts_at_pefts_principal_part(classes):
    ours = classes["PiSSALinear"](linear(), 4, 7.0)
    theirs = peft_linear(linear(), 4, 7.0, init_lora_weights="pissa")
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    close(ours.B @ ours.A, B @ A, "principal part")
    close(ours.A.norm(dim=1), ours.B.norm(dim=0), "an even split")
    close(ours.residual, theirs.get_base_layer().weight, "residual")


@pytest.mark.parametrize("name", ["DoRALinear", "PiSSALinear"])
def test_only_the_factors_are_trained(classes, name):
    base = linear()
    before = base.weight.clone()
    layer = classes[name](base, 4, 7.0)
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"} | ({"m"} if name == "DoRALinear" else set())
    assert torch.equal(base.weight, before)


def test_the_comparison_would_see_a_wrong_norm_and_a_wrong_residual(classes):
    class Columns(classes["DoRALinear"]):
        def forward(self, x):
            V = self.base.weight + self.scale * self.B @ self.A
            ratio = self.base.weight.norm(dim=0) / V.norm(dim=0).detach()
            return F.linear(x, V * ratio, self.base.bias)

    class Whole(classes["PiSSALinear"]):
        """The defect of the naive file: the principal part counts twice."""

        def __init__(self, base, r, alpha):
            super().__init__(base, r, alpha)
            self.residual = base.weight.detach()

    with pytest.raises(AssertionError, match="differs"):
        assert_parity(Columns, use_dora=True)
    with pytest.raises(AssertionError, match="differs"):
        assert_parity(Whole, init_lora_weights="pissa")
