"""LiteMedSAM: its names, its numbers, and a second, plain writing-out of its encoder.

The plain one follows the published order of operations with nothing saved: every
convolution, then its batch norm, no strips, and windows one after the other with the
softmax written out.
"""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from medtut.data import assets
from medtut.errors import MedtutError
from medtut.lora import LoRAConfig, LoRALayer, inject
from medtut.models import litemedsam
from medtut.models.litemedsam import (
    ConvBN,
    LiteMedSAM,
    MBConv,
    TinyViT,
    WindowAttention,
    load_litemedsam,
)
from medtut.models.sam_prompts import decode

# --- the encoder, plainly --------------------------------------------------------


def conv_bn(w, name, x, stride=1):
    weight = w[f"{name}.c.weight"]
    groups = x.shape[1] // weight.shape[1]
    x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
    keys = ("running_mean", "running_var", "weight", "bias")
    mean, var, gain, shift = (w[f"{name}.bn.{k}"].view(-1, 1, 1) for k in keys)
    return (x - mean) / (var + 1e-5).sqrt() * gain + shift


def three(w, name, x, stride=1):
    x = F.gelu(conv_bn(w, f"{name}.conv1", x))
    x = F.gelu(conv_bn(w, f"{name}.conv2", x, stride))
    return conv_bn(w, f"{name}.conv3", x)


def norm(w, name, x):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def one_window(w, name, tokens, side):
    """(side², dim) -> the same."""
    # The table's columns are the distances in the order in which they first occur.
    places = [(i, j) for i in range(side) for j in range(side)]
    seen = {}
    pairs = [
        [seen.setdefault((abs(a - c), abs(b - d)), len(seen)) for c, d in places]
        for a, b in places
    ]
    qkv, heads = linear(w, f"{name}.qkv", norm(w, f"{name}.norm", tokens)), []
    for h, table in enumerate(w[f"{name}.attention_biases"]):
        q, k, v = qkv[:, 96 * h : 96 * (h + 1)].split(32, 1)
        weight = (q @ k.T / 32**0.5 + table[torch.tensor(pairs)]).exp()
        heads.append(weight / weight.sum(1, keepdim=True) @ v)
    return linear(w, f"{name}.proj", torch.cat(heads, 1))


def block(w, name, x, side):
    out = x.clone()
    for image, changed in zip(x, out, strict=True):
        dim, height, width = image.shape
        for top in range(0, height, side):
            for left in range(0, width, side):
                here = image[:, top : top + side, left : left + side]
                full = torch.zeros(dim, side, side)
                full[:, : here.shape[1], : here.shape[2]] = here
                tokens = full.flatten(1).T
                found = one_window(w, f"{name}.attn", tokens, side)
                found = found.T.view(dim, side, side)
                found = found[:, : here.shape[1], : here.shape[2]]
                changed[:, top : top + side, left : left + side] += found
    x = conv_bn(w, f"{name}.local_conv", out).movedim(1, -1)
    y = linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.mlp.norm", x))
    return (x + linear(w, f"{name}.mlp.fc2", F.gelu(y))).movedim(-1, 1)


def norm2d(w, name, x):
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return x * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)


@torch.no_grad()
def plain(w, x):
    """The encoder, from a dict of its tensors."""
    x = F.gelu(conv_bn(w, "patch_embed.seq.0", x))
    x = conv_bn(w, "patch_embed.seq.2", x)
    for i in range(2):
        x = F.gelu(x + three(w, f"layers.0.blocks.{i}", x))
    x = three(w, "layers.0.downsample", x, 2)
    for i in range(2):
        x = block(w, f"layers.1.blocks.{i}", x, 7)
    x = three(w, "layers.1.downsample", x, 2)
    for i in range(6):
        x = block(w, f"layers.2.blocks.{i}", x, 14)
    x = three(w, "layers.2.downsample", x, 1)
    for i in range(2):
        x = block(w, f"layers.3.blocks.{i}", x, 7)
    x = norm2d(w, "neck.1", F.conv2d(x, w["neck.0.weight"]))
    return norm2d(w, "neck.3", F.conv2d(x, w["neck.2.weight"], padding=1))


# --- without the weights ---------------------------------------------------------


def randomise(model, seed=0):
    """No two numbers alike, statistics of the batch norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.dtype.is_floating_point:
                t.add_(0.1 * torch.randn(t.shape, generator=generator))
            if name.endswith("running_var"):
                t.abs_().add_(0.2)
    return model.eval()


@pytest.fixture(scope="module")
def random_encoder():
    torch.manual_seed(0)
    return randomise(TinyViT())


def noise(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        model = LiteMedSAM()
    parts = {name: count(part) for name, part in model.named_children()}
    assert parts == {
        "image_encoder": 5_726_740,
        "prompt_encoder": 6_220,
        "mask_decoder": 4_058_340,
    }
    assert count(model) == 9_791_300
    assert model.image_encoder.img_size == 256
    assert model.prompt_encoder.input_image_size == (256, 256)


# Of the lines "name shape", sorted, of the file that the asset pins.
NAMES = "705d0648240419f92fe760af13d9865c6a254d0d93917a6e0302d495d2e7dd62"


def names_digest(state):
    lines = sorted(f"{name} {tuple(t.shape)}" for name, t in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_names_and_shapes_are_the_checkpoints():
    with torch.device("meta"):
        state = LiteMedSAM().state_dict()
    assert len(state) == 435
    assert names_digest(state) == NAMES


# No side is a multiple of a strip or, after the strides, of a window.
@pytest.mark.parametrize("size", [(40, 28), (17, 66)])
def test_encoder_equals_the_plain_one(random_encoder, size):
    x = noise(2, 3, *size)
    with torch.no_grad():
        found = random_encoder(x)
    rows, columns = (-(-n // 4) for n in size)
    assert found.shape == (2, 256, rows, columns)
    wanted = plain(random_encoder.state_dict(), x)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("height", [1, 15, 16, 17, 31, 32, 33, 50])
def test_strips_are_exact(height):
    torch.manual_seed(0)
    module = randomise(MBConv(8))
    x = noise(2, 8, height, 9) - 0.5
    w = {f"m.{k}": v for k, v in module.state_dict().items()}
    wanted = F.gelu(x + three(w, "m", x))
    found = module(x)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_training_mode_leaves_the_statistics_alone(random_encoder):
    x = 5 * noise(2, 3, 16, 16) + 3
    norms = [m.bn for m in random_encoder.modules() if isinstance(m, ConvBN)]
    assert len(norms) == 2 + 2 * 3 + 3 * 3 + 10
    before = {k: v.clone() for k, v in random_encoder.state_dict().items()}
    with torch.no_grad():
        evaluated = random_encoder(x)
    try:
        assert random_encoder.train() is random_encoder
        assert random_encoder.training
        assert not any(bn.training for bn in norms)
        # With gradients, as a training step would.
        trained = random_encoder(x)
        trained.square().mean().backward()
        # Not to the last bit: attention takes another way when gradients are wanted.
        torch.testing.assert_close(trained.detach(), evaluated, rtol=1e-4, atol=1e-4)
        for bn in norms:
            bn(noise(2, bn.num_features, 2, 2))  # even called by itself
    finally:
        random_encoder.eval().zero_grad()
    after = random_encoder.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


PLACE = {"query": 0, "key": 1, "value": 2}


@torch.no_grad()
@pytest.mark.parametrize("role", PLACE)
def test_a_role_reaches_its_part_of_every_head(role, monkeypatch):
    torch.manual_seed(0)
    attention = randomise(WindowAttention(128, 7))
    tokens, seen = noise(3, 49, 128), []
    original = F.scaled_dot_product_attention

    def watch(q, k, v, **more):
        seen.append((q, k, v))
        return original(q, k, v, **more)

    monkeypatch.setattr(litemedsam.F, "scaled_dot_product_attention", watch)
    attention(tokens)
    config = LoRAConfig(r=2, roles=(role,), pattern="qkv", qkv_layout="per-head")
    inject(attention, config)
    assert isinstance(attention.qkv, LoRALayer)
    for slot in attention.qkv.slots():
        slot.B.normal_(generator=torch.Generator().manual_seed(2))
    attention(tokens)
    for part, (before, after) in enumerate(zip(*seen, strict=True)):
        assert before.shape == (3, 4, 49, 32)
        moved = (after - before).abs().amax((0, 2, 3))  # of each head
        assert (moved > 1e-3).all() if part == PLACE[role] else (moved == 0).all()


# --- files that are no weights of this model ---------------------------------------


def test_weights_come_back_in_evaluation_mode(tmp_path):
    torch.manual_seed(0)
    model = LiteMedSAM()
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    found = load_litemedsam(str(tmp_path / "mine.pth"))
    assert not any(m.training for m in found.modules())
    theirs = found.state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in model.state_dict().items())


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "lite_medsam.pth"
    torch.save({"x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(MedtutError, match=r"lite_medsam\.pth cannot be opened"):
        load_litemedsam(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "sam_vit_b.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, path)
    with pytest.raises(MedtutError, match=r"sam_vit_b\.pth does not fit LiteMedSAM.*"
                       r"looks like vit_b for 1024"):  # fmt: skip
        load_litemedsam(path)


def test_one_missing_tensor_is_refused(tmp_path):
    state = LiteMedSAM().state_dict()
    del state["image_encoder.layers.2.blocks.3.attn.attention_biases"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(MedtutError, match=r"blocks\.3\.attn\.attention_biases it has "
                       r"nothing.*\(1 such tensors\)"):  # fmt: skip
        load_litemedsam(tmp_path / "less.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MedtutError, match=r"no file .*gone\.pth"):
        load_litemedsam(tmp_path / "gone.pth")


def test_the_asset_is_taken_where_no_file_is_given(tmp_path, monkeypatch):
    torch.save(LiteMedSAM().state_dict(), tmp_path / "asset.pth")
    asked = []

    def fetch(name):
        asked.append(name)
        return {"weights": tmp_path / "asset.pth"}

    monkeypatch.setattr(assets, "fetch", fetch)
    load_litemedsam()
    assert asked == ["litemedsam"]


# --- with the published weights ----------------------------------------------------

# Made once by `plain` above with the published weights; then the decoder's answer.
EMBEDDING = {
    (0, 0, 0): -0.0222,
    (7, 10, 60): 0.0777,
    (100, 25, 37): -0.0831,
    (128, 40, 20): 0.0100,
    (200, 63, 63): 0.0067,
    (255, 32, 0): -0.0200,
}
LOGITS = {
    (0, 0): -34.2943,
    (60, 150): -2.0020,
    (100, 105): -11.1561,
    (100, 150): 11.1177,
    (139, 150): 3.3312,
    (143, 190): -11.7941,
    (200, 40): -31.8374,
    (255, 255): -28.2689,
}


@pytest.fixture(scope="module")
def published():
    if not assets.status("litemedsam")["cached"]:
        pytest.skip("litemedsam is not in the cache (medtut assets fetch it)")
    return load_litemedsam()


def picture(side=256):
    """Three waves and a bright disc, in [0, 1]; the same everywhere."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [(0.5 + 0.2 * torch.sin(x / 9 + y / (11 + c))) * 0.6 for c in range(3)]
    disc = ((x - 150) ** 2 + (y - 100) ** 2 < 40**2).float()
    return (torch.stack(waves) + 0.25 * disc)[None]


BOX = torch.tensor([[[105.0, 55.0, 195.0, 145.0]]])


@torch.no_grad()
def test_published_weights_give_the_stored_numbers(published):
    x = picture()
    embedding = published.image_encoder(x)
    assert embedding.shape == (1, 256, 64, 64)
    for place, value in EMBEDDING.items():
        assert float(embedding[0][place]) == pytest.approx(value, abs=2e-4), place
    assert float(embedding.std()) == pytest.approx(0.0999, abs=2e-4)
    logits, iou = decode(published, embedding, BOX)
    for place, value in LOGITS.items():
        assert float(logits[0, 0, 0][place]) == pytest.approx(value, abs=1e-3), place
    assert float(iou) == pytest.approx(0.9803, abs=1e-3)
    # The disc, and nothing else: what these weights are for.
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    disc, mask = (x - 150) ** 2 + (y - 100) ** 2 < 40**2, logits[0, 0, 0] > 0
    assert 2 * (disc & mask).sum() / (disc.sum() + mask.sum()) > 0.99


def test_published_file_has_the_models_names(published):
    state = torch.load(assets.fetch("litemedsam")["weights"], weights_only=True)
    assert len(state) == 435
    assert names_digest(state) == NAMES
    own = published.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items())


def test_published_encoder_equals_the_plain_one(published):
    x = picture(72)[..., :52]
    with torch.no_grad():
        found = published.image_encoder(x)
    wanted = plain(published.image_encoder.state_dict(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
