"""The MedCLIP towers and the two heads of lesson 02."""

import pytest
import torch

from medtut.errors import MedtutError
from medtut.lora import LoRAConfig, inject, ledger
from medtut.models.medclip import (
    DenseDecoder,
    MedCLIPSegmenter,
    SwinTower,
    VectorDecoder,
    inflate_channels,
)


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomised(module, seed=0):
    """Weights in which no two channels and no bias are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return module


@pytest.fixture
def small():
    torch.manual_seed(0)
    return randomised(SwinTower("small")).eval()


@pytest.fixture(scope="module")
def picture():
    return torch.randn(2, 1, 224, 224, generator=torch.Generator().manual_seed(1))


def test_counts_of_the_true_configuration():
    with torch.device("meta"):  # shapes without numbers
        tower, head = SwinTower("tiny"), VectorDecoder()
    assert count(tower.model) == 27_519_354
    assert count(tower.projection_head) == 393_216
    assert count(tower) == 27_912_570
    assert count(VectorDecoder()) == 1_567_332
    assert count(DenseDecoder(tower.widths)) == 206_532 < count(VectorDecoder())

    model = MedCLIPSegmenter(tower, head)
    config = LoRAConfig(r=8, alpha=16, dropout=0.1, roles=("query", "value"))
    injection = inject(model, config, keep="^seg_head")
    assert len(injection) == 24
    assert injection.parameters == 141_312 == 17_664 * 8
    book = ledger(model)
    assert (book.trainable, book.total.parameters) == (1_708_644, 29_621_214)
    assert round(100 * book.trainable / book.total.parameters, 2) == 5.77
    assert book.rows["adapter"].parameters == 141_312


def test_counts_of_the_small_one(small):
    assert count(small.model) == 3_086_044
    assert count(small.projection_head) == 131_072
    assert 2 * count(small) < 8_000_000  # bytes in half precision
    assert count(DenseDecoder(small.widths)) == 143_172 < count(VectorDecoder())
    assert inject(small, LoRAConfig(r=4, variant="dora")).parameters == 26_496


def test_tiny_is_the_backbone_medclip_names():
    settings = SwinTower("tiny").model.config
    assert settings.embed_dim == 96
    assert list(settings.depths) == [2, 2, 6, 2]
    assert list(settings.num_heads) == [3, 6, 12, 24]
    assert (settings.window_size, settings.patch_size) == (7, 4)
    assert settings.drop_path_rate == 0.1


@torch.no_grad()
def test_stages_and_embedding_are_those_of_transformers(small, picture):
    theirs = small.model(
        picture.expand(-1, 3, -1, -1),
        output_hidden_states=True,
        output_hidden_states_before_downsampling=True,
    )
    ours = small.stages(picture)
    assert [tuple(m.shape[1:]) for m in ours] == [
        (32, 56, 56),
        (64, 28, 28),
        (128, 14, 14),
        (256, 7, 7),
    ]
    for mine, their in zip(ours, theirs.reshaped_hidden_states[1:], strict=True):
        torch.testing.assert_close(mine, their)
    expected = small.projection_head(theirs.pooler_output)
    torch.testing.assert_close(small(picture), expected)
    assert small(picture).norm(dim=1).sub(1).abs().min() > 1e-3  # not scaled to 1


@pytest.mark.parametrize("shape", [(1, 1, 96, 96), (1, 2, 224, 224), (1, 224, 224)])
def test_other_shapes_are_refused_and_leave_the_tower_alone(small, picture, shape):
    with torch.no_grad():
        before = small(picture[:1])
        with pytest.raises(MedtutError, match="224"):
            small(torch.zeros(shape))
        assert torch.equal(small(picture[:1]), before)


def test_unknown_configuration_is_refused():
    with pytest.raises(MedtutError, match="tiny, small"):
        SwinTower("large")


@torch.no_grad()
def test_inflated_channels_keep_the_function(small, picture):
    grey = small(picture)
    torch.testing.assert_close(small(picture.expand(-1, 3, -1, -1)), grey)
    assert inflate_channels(small, 4) is small
    assert small.channels == 4
    torch.testing.assert_close(small(picture.expand(-1, 4, -1, -1)), grey)
    torch.testing.assert_close(small(picture), grey)  # one channel is repeated still
    for gone in range(4):  # every modality is seen
        x = picture.repeat(1, 4, 1, 1)
        x[:, gone] = 0
        assert (small(x) - grey).abs().max() > 1e-4
    inflate_channels(small, 1)
    torch.testing.assert_close(small(picture), grey)


def test_inflation_refuses_what_it_cannot_do(small):
    with pytest.raises(MedtutError, match="at least 1"):
        inflate_channels(small, 0)
    inject(small, LoRAConfig(r=2, roles=("conv",)))
    with pytest.raises(MedtutError, match="first"):
        inflate_channels(small, 4)


def test_vector_decoder_has_the_published_tensors():
    shapes = {k: tuple(v.shape) for k, v in VectorDecoder().state_dict().items()}
    assert shapes == {
        "up1.1.weight": (256, 512, 3, 3),
        "up1.1.bias": (256,),
        "up2.1.weight": (128, 256, 3, 3),
        "up2.1.bias": (128,),
        "up3.1.weight": (64, 128, 3, 3),
        "up3.1.bias": (64,),
        "up4.1.weight": (32, 64, 3, 3),
        "up4.1.bias": (32,),
        "final.weight": (4, 32, 1, 1),
        "final.bias": (4,),
    }


def test_vector_decoder_draws_on_16_by_16():
    decoder = VectorDecoder(classes=3)
    vector = torch.randn(2, 512, requires_grad=True)
    logits = decoder(vector)
    assert logits.shape == (2, 3, 16, 16)
    # By hand, with the operations in the published order.
    y = vector[:, :, None, None]
    for up in (decoder.up1, decoder.up2, decoder.up3, decoder.up4):
        y = torch.nn.functional.interpolate(y, scale_factor=2, mode="bilinear")
        y = torch.nn.functional.conv2d(y, up[1].weight, up[1].bias, padding=1).relu()
    torch.testing.assert_close(logits, decoder.final(y))


def test_dense_decoder_draws_in_place_and_reads_every_stage():
    widths, sides = (8, 16, 24, 32), (56, 28, 14, 7)
    torch.manual_seed(0)
    decoder = DenseDecoder(widths, width=16, classes=2)
    maps = [
        torch.randn(1, w, s, s, requires_grad=True)
        for w, s in zip(widths, sides, strict=True)
    ]
    logits = decoder(maps)
    assert logits.shape == (1, 2, 56, 56)
    grads = torch.autograd.grad(logits[0, 0, 13, 41], maps)
    for grad, side in zip(grads, sides, strict=True):
        strength = grad.square().sum((0, 1))
        row, column = divmod(int(strength.argmax()), side)
        scale = 56 / side
        assert abs((row + 0.5) * scale - 13.5) <= 1.5 * scale
        assert abs((column + 0.5) * scale - 41.5) <= 1.5 * scale


@pytest.mark.parametrize("head", ["vector", "dense"])
def test_segmenter(small, picture, head):
    decoder = VectorDecoder() if head == "vector" else DenseDecoder(small.widths)
    model = MedCLIPSegmenter(small, decoder).eval()
    with torch.no_grad():
        before = model(picture[:1])
    assert before.shape == (1, 4, 224, 224)
    injection = inject(model, LoRAConfig(r=2), keep="^seg_head")
    with torch.no_grad():
        assert torch.equal(model(picture[:1]), before)  # the update starts at zero
    model(picture[:1]).square().mean().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.startswith("seg_head") for n in moved)
    for layer in injection.layers.values():
        assert all(slot.B.grad.abs().max() > 0 for slot in layer.slots())


def test_segmenter_enlarges_between_pixel_centres(small):
    class Fixed(torch.nn.Module):
        takes = "vector"

        def forward(self, vector):
            ramp = torch.arange(16.0)[None, None, None, :].expand(1, 1, 16, 16)
            return ramp + 0 * vector.sum()

    with torch.no_grad():
        out = MedCLIPSegmenter(small, Fixed())(torch.zeros(1, 1, 224, 224))[0, 0]
    # Column c of 224 lies at (c + 0.5) / 14 - 0.5 of 16.
    assert out[100, 111] == pytest.approx(111.5 / 14 - 0.5, abs=1e-4)
    assert torch.equal(out[0], out[223])
