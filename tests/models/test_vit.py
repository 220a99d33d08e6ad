"""The running example of lesson 01."""

import pytest
import torch

from medtut.errors import MedtutError
from medtut.lora import LoRAConfig, inject
from medtut.models.vit import DenseViT, load_dense_vit


def test_every_pixel_gets_logits_at_its_own_place():
    model = DenseViT(image=24, patch=12, width=8, depth=1, heads=2)
    assert model(torch.zeros(2, 1, 24, 24)).shape == (2, 4, 24, 24)
    # A head that copies: the logits of a patch must land under that patch.
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(4 * 144.0))
    out = model(torch.zeros(1, 1, 24, 24))[0]
    assert torch.equal(out[1, :12, :12].flatten(), torch.arange(144.0, 288.0))


def test_image_side_must_fit_the_patch():
    with pytest.raises(MedtutError, match="not a multiple"):
        DenseViT(image=100, patch=12)


def test_stored_weights_are_ours_and_finite():
    model = load_dense_vit()
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in DenseViT().parameters()
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_missing_weights_say_how_to_make_them(tmp_path):
    with pytest.raises(MedtutError, match=r"pretrain_dense_vit\.py"):
        load_dense_vit(tmp_path / "none.safetensors")


def test_adapters_by_role_reach_query_and_value():
    model = DenseViT(image=24, patch=12, width=8, depth=2, heads=2)
    injection = inject(model, LoRAConfig(r=2))
    assert len(injection.layers) == 4
