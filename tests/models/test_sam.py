"""Building, adapting, loading and resizing SAM; LiteMedSAM where it differs."""

import pickle

import pytest
import torch

from medtut.errors import MedtutError
from medtut.lora import LoRAConfig, LoRAError, adapted_layers, ledger, merge, unmerge
from medtut.models.litemedsam import LiteMedSAM
from medtut.models.sam import (
    OFFICIAL,
    adapt_sam,
    build_sam,
    load_state,
    qkv_layout,
    resize_input,
)
from medtut.models.sam_prompts import decode

SIDE = 64


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomised(sam, seed=0):
    """Tables, norms and biases start at constants; here no two numbers are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sam.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return sam.eval()


def make(kind):
    torch.manual_seed(0)
    if kind == "tiny":
        return randomised(build_sam("tiny", SIDE))
    sam = randomised(LiteMedSAM())  # its encoder takes any size; smaller is faster
    sam.image_encoder.img_size, n = SIDE, SIDE // 4
    prompts = sam.prompt_encoder
    prompts.input_image_size, prompts.image_embedding_size = (SIDE, SIDE), (n, n)
    return sam


@pytest.fixture(params=["tiny", "lite"])
def sam(request):
    return make(request.param)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def predict(sam, images):
    boxes = torch.tensor([[[8.0, 9.0, 40.0, 50.0]]]).expand(len(images), 1, 4)
    return decode(sam, sam.image_encoder(images), boxes)


def shake(sam, seed=2):
    """Move the adapters away from B = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(sam).values():
            for slot in layer.slots():
                slot.B.copy_(0.1 * torch.randn(slot.B.shape, generator=generator))


# -- building ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "total", "encoder", "depth", "per_rank"),
    [
        ("vit_b", 93_735_472, 89_670_912, 12, 36_864),
        ("vit_l", 312_342_832, 308_278_272, 24, 98_304),
        ("vit_h", 641_090_608, 637_026_048, 32, 163_840),
    ],
)
def test_counts(kind, total, encoder, depth, per_rank):
    with torch.device("meta"):  # shapes without numbers
        sam = build_sam(kind)
    assert count(sam) == total
    assert count(sam.image_encoder) == encoder
    assert count(sam.prompt_encoder) == 6_220
    assert count(sam.mask_decoder) == 4_058_340
    assert sam.image_encoder.img_size == 1024
    assert not sam.training
    open_blocks = [b.window_size == 0 for b in sam.image_encoder.blocks]
    assert open_blocks == [i % (depth // 4) == depth // 4 - 1 for i in range(depth)]
    injection = adapt_sam(sam, LoRAConfig(r=4))
    assert (len(injection), injection.parameters) == (depth, 4 * per_rank)
    assert ledger(sam).trainable == 4 * per_rank


def test_counts_of_the_decoder_and_of_litemedsam():
    with torch.device("meta"):
        sam, lite = build_sam("tiny"), LiteMedSAM()
    assert adapt_sam(sam, LoRAConfig(r=4), encoder="frozen", decoder="lora")
    assert ledger(sam).trainable == 23_552
    assert count(lite) == 9_791_300
    assert adapt_sam(lite, LoRAConfig(r=4)).parameters == 4 * 2 * (
        2 * (128 + 128) + 6 * (160 + 160) + 2 * (320 + 320)
    )


def test_tiny_and_unknown_kinds():
    encoder = build_sam("tiny").image_encoder
    assert encoder.img_size == 256
    assert encoder.pos_embed.shape == (1, 16, 16, 96)
    assert [b.window_size for b in encoder.blocks] == [14, 0, 14, 0]
    with pytest.raises(MedtutError, match=r"vit_b.*tiny"):
        build_sam("vit_g")


# -- smaller inputs ------------------------------------------------------------
def narrow():
    """SAM at its native 1024 pixels, 32 wide, one window block and one global."""
    from segment_anything.build_sam import _build_sam

    return randomised(_build_sam(32, 2, 1, (1,)))


@torch.no_grad()
def test_the_native_size_changes_nothing():
    sam, x = narrow(), torch.rand(1, 3, 1024, 1024)
    before, output = {k: v.clone() for k, v in sam.state_dict().items()}, None
    output = sam.image_encoder(x)
    assert resize_input(sam, 1024) is sam
    assert all(torch.equal(v, before[k]) for k, v in sam.state_dict().items())
    assert torch.equal(sam.image_encoder(x), output)


@torch.no_grad()
@pytest.mark.parametrize("side", [256, 512])
def test_smaller_inputs(side):
    sam, n = narrow(), side // 16
    encoder, windows = sam.image_encoder, sam.image_encoder.blocks[0].attn
    encoder.blocks[1].attn.rel_pos_h.requires_grad_(False)
    kept = windows.rel_pos_h.clone()
    large = [encoder.blocks[1].attn.rel_pos_h.clone(), None]
    large[1] = encoder.blocks[1].attn.rel_pos_w.clone()
    # A ramp along rows stays one, with the same ends but for half a cell.
    encoder.pos_embed.copy_(torch.linspace(0, 1, 64)[None, :, None, None])
    resize_input(sam, side)
    assert encoder.pos_embed.shape == (1, n, n, 32)
    rows = encoder.pos_embed[0, :, 0, 0]
    assert (rows.diff() > 0).all()
    assert torch.equal(rows, encoder.pos_embed[0, :, -1, 5])
    assert rows[0] < 1 / n
    assert rows[-1] > 1 - 1 / n
    assert torch.equal(windows.rel_pos_h, kept)
    assert encoder.blocks[1].attn.rel_pos_w.shape == (2 * n - 1, 32)
    assert not encoder.blocks[1].attn.rel_pos_h.requires_grad
    assert encoder.blocks[1].attn.rel_pos_w.requires_grad

    prompts = sam.prompt_encoder
    assert encoder.img_size == side
    assert prompts.input_image_size == (side, side)
    assert prompts.image_embedding_size == (n, n)
    assert prompts.mask_input_size == (side // 4, side // 4)

    x = torch.rand(1, 3, side, side)
    embedding = encoder(x)
    logits, _ = decode(sam, embedding, torch.tensor([[[3.0, 4.0, 200.0, 100.0]]]))
    assert logits.shape == (1, 1, 1, side // 4, side // 4)
    # segment-anything interpolates a table that does not fit, when it runs.
    encoder.blocks[1].attn.rel_pos_h.data, encoder.blocks[1].attn.rel_pos_w.data = large
    torch.testing.assert_close(encoder(x), embedding)


@pytest.mark.parametrize("side", [250, 0, -16, 8])
def test_sizes_that_do_not_fit(side):
    with pytest.raises(MedtutError, match="multiple of 16"):
        resize_input(build_sam("tiny", 64), side)


def test_litemedsam_has_one_size():
    with pytest.raises(MedtutError, match="TinyViT"):
        resize_input(LiteMedSAM(), 512)


# -- adapting ------------------------------------------------------------------
MODES = [
    ("lora", "frozen"),
    ("lora", "lora"),
    ("lora", "full"),
    ("full", "frozen"),
    ("frozen", "full"),
    ("full", "lora"),
]


@pytest.mark.parametrize(("encoder", "decoder"), MODES)
def test_only_what_was_chosen_learns(sam, images, encoder, decoder):
    with torch.no_grad():
        before = predict(sam, images)[0]
    injection = adapt_sam(sam, LoRAConfig(r=2), encoder=encoder, decoder=decoder)
    logits, iou = predict(sam, images)
    torch.testing.assert_close(logits, before)  # the update starts at zero
    (logits.square().mean() + iou.square().mean()).backward()
    modes = {"image_encoder": encoder, "mask_decoder": decoder}
    assert {n.split(".")[0] for n in injection.layers} == {
        part for part, mode in modes.items() if mode == "lora"
    }
    learning = set()
    for name, p in sam.named_parameters():
        mode = modes.get(name.split(".")[0], "frozen")
        adapter = name.split(".")[-1].startswith("lora_")
        assert p.requires_grad == (adapter or mode == "full"), name
        if not p.requires_grad:
            assert p.grad is None, name
        elif p.grad is not None:
            learning.add(name)
    for name, layer in injection.layers.items():
        assert layer.parts in (("query", "value"), ("all",))
        assert all(slot.B.grad.abs().max() > 0 for slot in layer.slots()), name
    assert all(any(n.startswith(part) for n in learning) == (mode != "frozen")
               for part, mode in modes.items())  # fmt: skip


@torch.no_grad()
def test_merged_equals_unmerged(sam, images):
    before = predict(sam, images)[0]
    adapt_sam(sam, LoRAConfig(r=4, alpha=8), decoder="lora")
    shake(sam)
    adapted = predict(sam, images)[0]
    assert (adapted - before).abs().max() > 1e-3
    merge(sam)
    torch.testing.assert_close(predict(sam, images)[0], adapted, rtol=1e-5, atol=1e-5)
    unmerge(sam)
    assert torch.equal(predict(sam, images)[0], adapted)


@torch.no_grad()
@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_a_role_moves_its_rows_and_only_those(sam, role):
    assert qkv_layout(sam) == ("thirds" if hasattr(sam, "pixel_mean") else "per-head")
    injection = adapt_sam(sam, LoRAConfig(r=2, roles=(role,)))
    shake(sam)
    generator = torch.Generator().manual_seed(3)
    for name, layer in injection.layers.items():
        attention = sam.get_submodule(name.rpartition(".")[0])
        # Rows as the attention's own reshape takes them.
        heads, delta = attention.num_heads, layer.delta("weight")
        if hasattr(sam, "pixel_mean"):
            parts = delta.view(3, heads, -1, delta.shape[1])
        else:
            parts = delta.view(heads, 3, -1, delta.shape[1]).transpose(0, 1)
        moved = [bool(part.abs().max() > 0) for part in parts]
        assert moved == [role == r for r in ("query", "key", "value")]
        assert (parts[moved.index(True)].abs().flatten(1).amax(1) > 0).all()  # any head

        # What no layout is needed for: among equal tokens every weighting of the
        # values is the same, so whatever moves only the logits changes nothing.
        grid = (1, 7, 7) if hasattr(sam, "pixel_mean") else (1, 49)
        if len(grid) == 2 and attention.attention_biases.shape[1] == 196:
            grid = (1, 196)
        width = delta.shape[1]
        equal = torch.randn(width, generator=generator).expand(*grid, width)
        mixed = torch.randn(*grid, width, generator=generator)
        after = [attention(x.contiguous()) for x in (equal, mixed)]
        layer.B.zero_()
        gap = [
            float((attention(x.contiguous()) - y).abs().max())
            for x, y in zip((equal, mixed), after, strict=True)
        ]
        assert gap[1] > 1e-4
        assert gap[0] > 1e-4 if role == "value" else gap[0] < 1e-5


def test_patterns_select_in_the_encoder():
    sam = make("lite")
    config = LoRAConfig(r=2, pattern=r"layers\.[13]\..*qkv")
    names = list(adapt_sam(sam, config, decoder="lora").layers)
    encoder = [n for n in names if n.startswith("image_encoder")]
    assert encoder == [
        f"image_encoder.layers.{i}.blocks.{j}.attn.qkv" for i in (1, 3) for j in (0, 1)
    ]
    assert len(names) - len(encoder) == 14  # q and v of the decoder's 7 attentions


def state_of(sam):
    return {n: p.requires_grad for n, p in sam.named_parameters()}


@pytest.mark.parametrize(
    ("config", "modes", "message"),
    [
        (LoRAConfig(), {"encoder": "LoRA"}, "frozen, lora and full"),
        (LoRAConfig(), {"decoder": True}, "frozen, lora and full"),
        (LoRAConfig(pattern="nowhere"), {}, "nowhere.*image_encoder.blocks.0"),
        (LoRAConfig(r=129), {"encoder": "frozen", "decoder": "lora"}, "at most 128"),
        (LoRAConfig(roles=("conv",)), {"decoder": "lora"}, "mask_decoder.*conv"),
    ],
)
def test_refusals_leave_the_model_alone(config, modes, message):
    sam = build_sam("tiny", SIDE)
    sam.neck_frozen = sam.image_encoder.neck.requires_grad_(False)
    before = state_of(sam)
    with pytest.raises(LoRAError, match="(?s)" + message):
        adapt_sam(sam, config, **modes)
    assert state_of(sam) == before
    assert not adapted_layers(sam)


def test_adapted_twice():
    sam = build_sam("tiny", SIDE)
    adapt_sam(sam)
    with pytest.raises(LoRAError, match="already has adapters"):
        adapt_sam(sam, encoder="full")


# -- checkpoints ---------------------------------------------------------------
@pytest.fixture
def stored(tmp_path):
    sam = narrow()
    path = tmp_path / "narrow.pth"
    torch.save(sam.state_dict(), path)
    return sam, path


def test_a_checkpoint_comes_back(stored):
    sam, path = stored
    other = randomised(narrow(), seed=5)
    load_state(other, path, "narrow")
    assert all(
        torch.equal(v, sam.state_dict()[k]) for k, v in other.state_dict().items()
    )


def test_a_checkpoint_is_read_before_the_tables_shrink(tmp_path):
    native = randomised(build_sam("tiny", 1024))
    torch.save(native.state_dict(), tmp_path / "tiny.pth")
    small = build_sam("tiny", 256, tmp_path / "tiny.pth")
    assert small.image_encoder.img_size == 256
    want = resize_input(native, 256).state_dict()
    assert all(torch.equal(v, want[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 1024)}, "vit_l for 1024"),
        ({"image_encoder.pos_embed": torch.zeros(1, 32, 32, 768)}, "vit_b for 512"),
        ({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 64)}, "a SAM 64 wide"),
        ({"image_encoder.pos_embed": None}, "(?s)pos_embed.*nothing.*no SAM"),
        ({"more": torch.zeros(1)}, "for more it has .1,., the model nothing"),
        (
            {
                "image_encoder.pos_embed": None,
                "image_encoder.layers.0.x": torch.ones(1),
            },
            "LiteMedSAM",
        ),
    ],
)
def test_checkpoints_of_another_model(stored, changed, message):
    sam, path = stored
    state = {
        k: v for k, v in ({**sam.state_dict(), **changed}).items() if v is not None
    }
    torch.save(state, path)
    before = {k: v.clone() for k, v in sam.state_dict().items()}
    with pytest.raises(MedtutError, match=message) as caught:
        load_state(sam, path, "narrow")
    assert "narrow.pth does not fit narrow" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in sam.state_dict().items())


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was run",))


def test_files_that_are_no_checkpoints(stored):
    sam, path = stored
    good = path.read_bytes()
    for content in (good[: len(good) // 2], b"", b"hello", pickle.dumps(Evil(), 2)):
        path.write_bytes(content)
        with pytest.raises(MedtutError, match=r"narrow\.pth cannot be opened"):
            load_state(sam, path, "narrow")
    torch.save({"model": sam.state_dict()}, path)
    with pytest.raises(MedtutError, match="no state dict"):
        load_state(sam, path, "narrow")


def test_a_missing_checkpoint_says_where_to_get_one(tmp_path):
    with pytest.raises(MedtutError, match="no file") as caught:
        build_sam("tiny", checkpoint=tmp_path / "sam_vit_b_01ec64.pth")
    assert all(url in str(caught.value) for url in OFFICIAL.values())
    assert {k: u.rsplit("/")[-1][:9] for k, u in OFFICIAL.items()} == {
        kind: f"sam_{kind}" for kind in ("vit_b", "vit_l", "vit_h")
    }
