"""Two towers: projections, zero dead parameters, and the file they are kept in."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from medtut.errors import MedtutError
from medtut.lora import find_dead
from medtut.models.contrastive import sigmoid_loss, softmax_loss
from medtut.models.ctclip import CTCLIP, load_ctclip, save_ctclip
from medtut.models.ctvit import CTViT

SMALL = {"dim": 16, "image": (8, 4, 6), "patch": (2, 2, 2), "spatial_depth": 1,
         "temporal_depth": 1, "heads": 2, "dim_head": 8}  # fmt: skip
KINDS = ("published", "low_rank", "attention", "mean")


def small(seed: int = 0, tower: dict | None = None, **kw) -> CTCLIP:
    torch.manual_seed(seed)
    return CTCLIP(CTViT(**SMALL | (tower or {})), 12, 8, **{"rank": 3, **kw})


def batch(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 1, 8, 4, 6), torch.randn(n, 12)


def test_cost_of_the_projections():
    with torch.device("meta"):
        tower = CTViT()
        costs = {k: CTCLIP(tower, 768, projection=k) for k in KINDS}
        assert costs["published"].to_text.weight.numel() == 393_216
    assert {
        k: sum(p.numel() for p in m.to_image.parameters()) for k, m in costs.items()
    } == {
        "published": 294_912 * 512,
        "low_rank": 294_912 * 64 + 64 * 512,
        "attention": 512 * 8 + 2 * 512 * 512,
        "mean": 512 * 512,
    }
    assert 294_912 * 512 == 150_994_944


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("projection", KINDS)
def test_no_parameter_is_out_of_reach(projection, loss):
    for tower in ({"position": "bias"}, {"position": "rope", "norm": "layer"},
                  {"ffn": "geglu", "peg": False, "checkpoint": True}):  # fmt: skip
        model = small(tower=tower, projection=projection, loss=loss)
        value = model.loss(*model(*batch()))
        assert find_dead(model, value) == []
        value.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        names = dict(model.named_parameters())
        # A bias common to all pairs of a row changes no softmax: its gradient is 0, and
        # so is that of a tower without positions; nothing else may be 0.
        still = [n for n, p in names.items() if not p.grad.any()]
        assert [n for n in still if not n.endswith("bias.net.4.bias")] == []


@torch.no_grad()
def test_what_the_projections_compute():
    x = batch()[0]
    for kind in KINDS:
        model = small(projection=kind)
        tokens = model.image_tower(x)
        got = model.to_image(tokens)
        weights = list(model.to_image.parameters())
        if kind == "published":
            want = tokens.mean(1).reshape(3, -1) @ weights[0].T
        elif kind == "low_rank":
            want = tokens.mean(1).reshape(3, -1) @ weights[0].T @ weights[1].T
        elif kind == "mean":
            want = tokens.reshape(3, -1, 16).mean(1) @ weights[0].T
        else:
            query, value, out = weights
            flat = tokens.reshape(3, -1, 16)
            pooled = [
                ((flat @ query[h]).softmax(1)[..., None] * (flat @ value[part].T)).sum(
                    1
                )
                for h, part in enumerate((slice(0, 8), slice(8, 16)))
            ]
            want = torch.cat(pooled, -1) @ out.T
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vectors_have_length_one_and_do_not_depend_on_the_batch():
    model = small().eval()
    volumes, features = batch()
    image, text = model(volumes, 100 * features)
    for vectors in (image, text):
        assert vectors.shape == (3, 8)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(model.encode_image(volumes[1:2]), image[1:2])
    torch.testing.assert_close(text, F.normalize(features @ model.to_text.weight.T))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode_image(volumes).dtype == torch.float32


def test_the_loss_is_the_one_that_was_chosen():
    volumes, features = batch()
    one, two = small(loss="sigmoid"), small(loss="softmax")
    assert one.log_scale.item() == pytest.approx(two.log_scale.item())
    assert one.log_scale.exp().item() == pytest.approx(10.0)
    assert one.logit_bias.item() == -10
    assert two.logit_bias is None
    pair = one(volumes, features)
    want = sigmoid_loss(*pair, one.log_scale, one.logit_bias)
    assert torch.equal(one.loss(*pair), want)
    assert one.loss(*pair, chunk=2).item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.equal(two.loss(*pair), softmax_loss(*pair, two.log_scale))
    assert small(log_scale=1.0, bias=-2.0).logit_bias.item() == -2


def test_unknown_choices():
    with pytest.raises(MedtutError, match="published, low_rank, attention, mean"):
        small(projection="flat")
    with pytest.raises(MedtutError, match="sigmoid, softmax"):
        small(loss="triplet")
    with pytest.raises(MedtutError, match="3 heads"):
        small(tower={"heads": 3}, projection="attention")


# -- the file --------------------------------------------------------------------------
@torch.no_grad()
def test_saved_and_loaded_again(tmp_path):
    tower = {"norm": "layer", "position": "rope", "patch_norm": False}
    model = small(tower=tower, projection="low_rank", loss="softmax", log_scale=2.5)
    path = save_ctclip(model, tmp_path / "new" / "small.safetensors", seed=3)
    assert path.stat().st_size < 2 * sum(p.numel() for p in model.parameters()) + 6_000
    with safe_open(path, "pt") as file:
        assert file.metadata()["seed"] == "3"
        assert json.loads(file.metadata()["config"])["image_tower"]["norm"] == "layer"
        kinds = {file.get_tensor(k).dtype for k in file.keys()}  # noqa: SIM118
    assert kinds == {torch.float16, torch.float32}  # the temperature is kept whole
    again = load_ctclip(path)
    assert not again.training
    assert again.log_scale.item() == 2.5
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert again.config == json.loads(json.dumps(model.config))
    for one, two in zip(model(*batch()), again(*batch()), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=5e-3)
    assert [p.name for p in path.parent.iterdir()] == ["small.safetensors"]


def test_files_that_are_none(tmp_path):
    model, path = small(), tmp_path / "a.safetensors"
    with pytest.raises(MedtutError, match=r"a\.safetensors"):
        load_ctclip(path)
    save_ctclip(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MedtutError, match="damaged"):
        load_ctclip(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(MedtutError, match="another model"):
        load_ctclip(path)
    with torch.no_grad():
        model.to_text.weight[0, 0] = 1e6
    path.unlink()
    with pytest.raises(MedtutError, match=r"to_text\.weight is not finite"):
        save_ctclip(model, path)
    assert not path.exists()
