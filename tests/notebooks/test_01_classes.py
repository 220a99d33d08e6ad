"""The classes that lesson 01 writes out hold to the same standard as the package.

They are taken from the notebook itself (cells tagged "export") and compared with
Hugging Face peft, or with the matrix they stand for where peft has no counterpart.
"""

from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.lora.parity import assert_parity, close

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_lora_math.ipynb"


@pytest.fixture(scope="module")
def classes():
    nb = nbformat.read(NOTEBOOK, as_version=4)
    scope = {"torch": torch, "nn": nn, "F": F}
    for cell in nb.cells:
        if "export" in cell.metadata.get("tags", []):
            exec(compile(cell.source, str(NOTEBOOK.name), "exec"), scope)
    return scope


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_pefts(classes, bias):
    assert_parity(classes["LoRALinear"], bias=bias)


def test_parity_would_see_the_floor_division(classes):
    class Floor(classes["LoRALinear"]):
        def __init__(self, base, r, alpha):
            super().__init__(base, r, alpha)
            self.scale = alpha // r

    with pytest.raises(AssertionError):
        assert_parity(Floor)


def test_conv_is_pefts(classes):
    import peft
    from peft.tuners.lora.layer import Conv2d

    torch.manual_seed(0)
    base = nn.Conv2d(3, 6, 3, stride=2, padding=1)
    ours = classes["LoRAConv2d"](base, 4, 7.0)
    config = peft.LoraConfig(r=4, lora_alpha=7)
    theirs = Conv2d(base, "default", config, r=4, lora_alpha=7)
    x = torch.randn(2, 3, 9, 9)
    close(ours(x), base(x), "at the start")
    with torch.no_grad():
        for mine, other in [
            (ours.A, theirs.lora_A["default"].weight),
            (ours.B, theirs.lora_B["default"].weight),
        ]:
            mine.normal_()
            other.copy_(mine)
    close(ours(x), theirs(x), "output")


def test_fused_projection_changes_query_and_value_only(classes):
    torch.manual_seed(0)
    base = nn.Linear(8, 24)
    hand = classes["LoRAFusedQV"](base, 3, 7.0)
    x = torch.randn(2, 5, 8)
    close(hand(x), base(x), "at the start")
    with torch.no_grad():
        hand.A.normal_()
        hand.B.normal_()
    delta = torch.zeros(24, 8)
    for part, row in ((0, 0), (1, 16)):
        delta[row : row + 8] = 7 / 3 * hand.B[part] @ hand.A[part]
    want = base(x) + x @ delta.T
    close(hand(x), want, "query and value rows only")
    assert torch.equal(hand(x)[..., 8:16], base(x)[..., 8:16]), "the key is untouched"
