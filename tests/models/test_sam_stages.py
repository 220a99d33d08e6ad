"""Encoders in stages, and the cache of what lies below everything that learns."""

import copy

import pytest
import torch

from medtut.data.cache import cache_dir
from medtut.errors import MedtutError
from medtut.lora import LoRAConfig, adapted_layers
from medtut.models import prefix
from medtut.models.litemedsam import LiteMedSAM
from medtut.models.sam import adapt_sam, build_sam
from medtut.models.sam_stages import PrefixCache, first_trainable, run, stages

SIDE = 64


@pytest.fixture(scope="module")
def originals():
    torch.manual_seed(0)
    models = {"tiny": build_sam("tiny", SIDE), "lite": LiteMedSAM().eval()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in models.values():
            for p in model.image_encoder.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return models


@pytest.fixture
def make(originals, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    return lambda kind: copy.deepcopy(originals[kind])


@pytest.fixture(scope="module")
def x():
    # Smaller than LiteMedSAM's own 256, in the same proportions.
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def adapted(sam, pattern):
    """LoRA where the pattern says, away from its start at zero; "" for nowhere."""
    config = LoRAConfig(r=2, pattern=pattern or None)
    mode = "lora" if pattern else "frozen"
    adapt_sam(sam, config, encoder=mode, decoder="frozen" if pattern else "full")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapted_layers(sam).values():
            for slot in layer.slots():
                slot.B.copy_(0.1 * torch.randn(slot.B.shape, generator=generator))
    return sam.image_encoder


def gradients(encoder, y):
    weight = torch.linspace(-1, 1, y.numel()).view_as(y)
    named = [(n, p) for n, p in encoder.named_parameters() if p.requires_grad]
    if not named:
        return {}
    grads = torch.autograd.grad((y * weight).sum(), [p for _, p in named])
    return dict(zip([n for n, _ in named], grads, strict=True))


def files():
    return sorted(p.name for p in (cache_dir() / "made").rglob("*.npz"))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tiny", "lite"])
def test_the_stages_are_the_encoder(make, kind, x):
    encoder = make(kind).image_encoder
    assert torch.equal(run(encoder, x), encoder(x))
    names = [name for name, _ in stages(encoder)]
    for cut in (1, 3, len(names) - 1):
        assert torch.equal(run(encoder, run(encoder, x, 0, cut), cut), encoder(x))
    assert names[0] == "patch_embed"
    assert names[-1] == "neck"
    if kind == "tiny":
        assert names[1:-1] == [f"blocks.{i}" for i in range(4)]
    else:
        want = []
        for i, depth in enumerate((2, 2, 6, 2)):
            want += [f"layers.{i}.blocks.{j}" for j in range(depth)]
            want += [f"layers.{i}.downsample"] * (i < 3)
        assert names[1:-1] == want


def test_first_trainable(make):
    encoder = make("tiny").image_encoder.requires_grad_(False)
    count = len(stages(encoder))
    assert first_trainable(encoder) == count == 6
    encoder.neck[1].weight.requires_grad_(True)
    assert first_trainable(encoder) == 5
    encoder.blocks[2].attn.rel_pos_h.requires_grad_(True)
    assert first_trainable(encoder) == 3
    encoder.pos_embed.requires_grad_(True)  # belongs to no module but the encoder
    assert first_trainable(encoder) == 0
    lite = adapted(make("lite"), r"layers\.3\..*qkv")
    assert stages(lite)[first_trainable(lite)][0] == "layers.3.blocks.0"


def test_names_that_begin_alike(make):
    from segment_anything.build_sam import _build_sam

    encoder = _build_sam(32, 12, 1, ()).image_encoder.requires_grad_(False)
    encoder.blocks[11].requires_grad_(True)
    assert stages(encoder)[first_trainable(encoder)][0] == "blocks.11"


CASES = [
    ("tiny", r"blocks\.[23]\..*qkv", 3),
    ("tiny", r"blocks\.3\..*(qkv|lin)", 4),
    ("tiny", "", 6),
    ("lite", r"layers\.[23]\..*qkv", 7),
    ("lite", r"layers\.3\..*qkv", 14),
    ("lite", "", 17),
]


@pytest.mark.parametrize(("kind", "pattern", "start"), CASES)
def test_the_same_numbers_and_gradients(make, kind, pattern, start, x):
    encoder = adapted(make(kind), pattern)
    assert first_trainable(encoder) == start
    want = encoder(x)
    wanted = gradients(encoder, want)
    cache = PrefixCache(encoder)
    for batch in (x, x, x.flip(0)):  # made, kept, and in another order
        got = cache(batch)
        got = got if batch is x or torch.equal(batch, x) else got.flip(0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for name, grad in gradients(encoder, got).items():
            scale = wanted[name].abs().max()
            assert (grad - wanted[name]).abs().max() <= 5e-5 * scale, name
    assert cache.made == 2
    assert len(files()) == 2
    other = PrefixCache(encoder)  # another run finds the files
    torch.testing.assert_close(other(x), want, rtol=1e-5, atol=1e-5)
    assert other.made == 0


def test_without_memory_the_disk_serves(make, x):
    encoder = adapted(make("tiny"), r"blocks\.3\..*qkv")
    cache = PrefixCache(encoder, memory_mb=0)
    first = cache(x)
    assert not cache._kept
    assert torch.equal(cache(x), first)
    assert cache.made == 2
    (small,) = (
        x[:1].nbytes / SIDE**2 / 3 * 16 * 96 for _ in "1"
    )  # one image's features
    tight = PrefixCache(encoder, memory_mb=1.5 * small / 1e6)
    assert torch.equal(tight(x), first)
    assert len(tight._kept) == 1


@pytest.mark.parametrize(("slab", "blocks"), [(1 << 20, 1), (1, 2)])
def test_what_is_kept_lies_in_large_blocks(make, x, monkeypatch, slab, blocks):
    # Else thousands of small tensors break up the heap, and a run takes gigabytes.
    monkeypatch.setattr(prefix, "SLAB", slab)
    encoder = adapted(make("tiny"), r"blocks\.3\..*qkv")
    cache = PrefixCache(encoder)
    first = cache(x)
    assert torch.equal(cache(x), first)
    kept = [t for row in cache._kept.values() for t in row]
    assert len(kept) == len(x) == 2
    assert len({t.untyped_storage().data_ptr() for t in kept}) == blocks
    assert cache._held == sum(t.nbytes for t in kept)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.layers[0].blocks[0].conv1.c.weight.mul_(1.5),
        lambda e: e.patch_embed.seq[0].bn.running_mean.add_(0.5),
        lambda e: e.layers[1].blocks[1].attn.attention_biases.add_(torch.arange(49)),
    ],
)
def test_another_weight_below_is_another_entry(make, x, change):
    encoder = adapted(make("lite"), r"layers\.3\..*qkv")
    cache = PrefixCache(encoder)
    before, weights = cache(x), cache.weights(14)
    assert cache.weights(14) == weights
    change(encoder)
    assert cache.weights(14) != weights
    after = cache(x)
    assert cache.made == 4
    torch.testing.assert_close(after, encoder(x), rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


@torch.no_grad()
def test_what_learns_is_no_part_of_the_key(make, x):
    encoder = adapted(make("lite"), r"layers\.3\..*qkv")
    cache = PrefixCache(encoder)
    cache(x)
    for layer in adapted_layers(encoder).values():
        layer.lora_B_query.mul_(-3)
    torch.testing.assert_close(cache(x), encoder(x), rtol=1e-5, atol=1e-5)
    assert cache.made == 2


def test_frozen_adapters_are_not_cached_over(make, x):
    """Their scale is no tensor and their dropout no constant."""
    encoder = adapted(make("tiny"), r"blocks\.[13]\..*qkv")
    layer = next(iter(adapted_layers(encoder).values())).requires_grad_(False)
    assert first_trainable(encoder) == 2
    cache = PrefixCache(encoder)
    cache(x)
    layer.spec = type(layer.spec)(r=2, alpha=1.0)
    torch.testing.assert_close(cache(x), encoder(x), rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(cache(x), encoder(x), rtol=1e-5, atol=1e-5)
    assert cache.made == 2


def test_thawing_moves_the_cut(make, x):
    encoder = adapted(make("tiny"), r"blocks\.3\..*qkv")
    cache = PrefixCache(encoder)
    cache(x)
    encoder.blocks[1].requires_grad_(True)
    grads = gradients(encoder, cache(x))
    assert any(n.startswith("blocks.1") for n in grads)
    assert all(g.abs().max() > 0 for n, g in grads.items() if "lora" in n)
    assert cache.made == 4
    encoder.pos_embed.requires_grad_(True)  # nothing is frozen below: nothing is kept
    count = len(files())
    torch.testing.assert_close(cache(x), encoder(x), rtol=0, atol=0)
    assert len(files()) == count


def test_gradients_to_the_image(make, x):
    encoder = adapted(make("tiny"), r"blocks\.3\..*qkv")
    image = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(PrefixCache(encoder)(image).sum(), image)
    assert grad.abs().max() > 0
    assert not files()


@torch.no_grad()
def test_half_is_smaller_close_and_apart(make, x):
    encoder = adapted(make("tiny"), r"blocks\.3\..*qkv")
    exact, half = PrefixCache(encoder), PrefixCache(encoder, half=True)
    want = exact(x)
    got = half(x)
    assert got.dtype == want.dtype == torch.float32
    assert 0 < (got - want).abs().max() < 1e-2 * want.abs().max()
    sizes = sorted(p.stat().st_size for p in (cache_dir() / "made").rglob("*.npz"))
    assert len(sizes) == 4
    assert sizes[1] < 0.6 * sizes[2]
    encoder.blocks[2].mlp.lin2.bias.fill_(1e5)
    with pytest.raises(MedtutError, match="half=False"):
        half(x)


@torch.no_grad()
def test_mixed_precision_has_its_own_entries(make, x):
    encoder = adapted(make("tiny"), r"blocks\.3\..*qkv")
    cache = PrefixCache(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        low = cache(x)
        torch.testing.assert_close(low, encoder(x), rtol=0.1, atol=0.1)
    torch.testing.assert_close(cache(x), encoder(x), rtol=1e-5, atol=1e-5)
    assert cache.made == 4
