"""The pyramid that lesson 02 writes out is the package's dense decoder."""

from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medtut.models.medclip import DenseDecoder

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02_medclip_segmentation.ipynb"


def close(ours, theirs, what):
    torch.testing.assert_close(
        ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda text: f"{what}: {text}"
    )


@pytest.fixture(scope="module")
def classes():
    nb = nbformat.read(NOTEBOOK, as_version=4)
    scope = {"torch": torch, "nn": nn, "F": F}
    for cell in nb.cells:
        if "export" in cell.metadata.get("tags", []):
            exec(compile(cell.source, NOTEBOOK.name, "exec"), scope)
    return scope


def both(notebook, widths, width=64, classes=4):
    """Their module and ours with the same numbers, no two alike and none at rest."""
    torch.manual_seed(0)
    ours = DenseDecoder(widths, width, classes).double()
    theirs = notebook["Pyramid"](widths, width, classes).double()
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype) / max(p[0].numel(), 4) ** 0.5)
    theirs.load_state_dict(ours.state_dict())  # the same names and shapes
    return theirs, ours


@pytest.mark.parametrize(
    ("widths", "kwargs"),
    [((32, 64, 128, 256), {}), ((8, 12, 16, 24), {"width": 16, "classes": 3})],
)
def test_pyramid_is_the_packages_decoder(classes, widths, kwargs):
    theirs, ours = both(classes, widths, **kwargs)
    sides = (56, 28, 14, 7)
    maps = [
        torch.randn(2, w, s, s, dtype=torch.double)
        for w, s in zip(widths, sides, strict=True)
    ]
    grads = []
    for module in (theirs, ours):
        stages = [m.clone().requires_grad_() for m in maps]
        y = module(stages)
        torch.manual_seed(1)
        (y * torch.randn_like(y)).sum().backward()
        learned = {name: p.grad for name, p in module.named_parameters()}
        grads.append((y.detach(), [s.grad for s in stages], learned))
    (y, inputs, weights), (want, want_inputs, want_weights) = grads
    assert y.shape == (2, kwargs.get("classes", 4), 56, 56)
    close(y, want, "output")
    for i, (a, b) in enumerate(zip(inputs, want_inputs, strict=True)):
        assert b.abs().max() > 0, "every stage is read"
        close(a, b, f"gradient of stage {i}")
    for name, b in want_weights.items():
        close(weights[name], b, f"gradient of {name}")


def test_pyramid_by_default_fits_medclips_tower(classes):
    theirs, ours = classes["Pyramid"](), DenseDecoder()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert sum(v.numel() for v in shapes[0].values()) == 206_532
