"""Weights of the towers: ours, the official file, the published pair."""

import pickle
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from medtut.errors import MedtutError
from medtut.lora import LoRAConfig, LoRAError, adapted_layers, inject
from medtut.models import medclip_io
from medtut.models.medclip import (
    DenseDecoder,
    MedCLIPSegmenter,
    SwinTower,
    VectorDecoder,
)
from medtut.models.medclip_io import (
    OFFICIAL_FILE,
    SMALL_WEIGHTS,
    load_official,
    load_published_pair,
    load_small_tower,
    load_tower_state,
    save_published_pair,
    stored_name,
)


def randomised(seed):
    torch.manual_seed(seed)
    tower = SwinTower("small")
    with torch.no_grad():
        for p in tower.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return tower.eval()


@pytest.fixture(scope="module")
def source():
    return randomised(1)


@pytest.fixture(scope="module")
def picture():
    return torch.randn(1, 1, 224, 224, generator=torch.Generator().manual_seed(2))


OLD = (
    ("attention.q_proj.", "attention.self.query."),
    ("attention.k_proj.", "attention.self.key."),
    ("attention.v_proj.", "attention.self.value."),
    ("attention.o_proj.", "attention.output.dense."),
    ("attention.relative_position_bias.", "attention.self."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)


def old_name(key):
    key = stored_name(key)
    for new, old in OLD:
        key = key.replace(new, old)
    return key


def official_state(tower):
    """What the archive of 2022 holds: old names, a text tower, computed tables."""
    state = {f"vision_model.{old_name(k)}": v for k, v in tower.state_dict().items()}
    block = "vision_model.model.encoder.layers.0.blocks.0.attention.self."
    state[block + "relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    state["text_model.model.embeddings.position_ids"] = torch.arange(8)[None]
    state["text_model.projection_head.weight"] = torch.zeros(512, 768)
    state["logit_scale"] = torch.tensor(2.66)
    return state


@pytest.fixture
def small_official(monkeypatch):
    """The official loader on the small shape: the same names, a tenth of the bytes."""
    monkeypatch.setattr(medclip_io, "SwinTower", lambda config: SwinTower("small"))


def test_names_of_both_versions_of_transformers_are_one():
    new = [stored_name(k) for k in SwinTower("tiny").state_dict()]
    assert len(set(new)) == len(new) == 220
    assert [stored_name(old_name(k)) for k in new] == new
    # Every kind of renamed layer is there in the old form.
    olds = "\n".join(old_name(k) for k in new)
    assert all(old in olds for _, old in OLD)
    assert "q_proj" not in olds
    assert "mlp.fc" not in olds


@pytest.mark.parametrize("form", ["bin", "zip", "cache"])
@torch.no_grad()
def test_official_file_gives_the_same_function(
    source, picture, small_official, form, tmp_path, monkeypatch
):
    path = tmp_path / "pytorch_model.bin"
    torch.save(official_state(source), path)
    if form != "bin":
        with zipfile.ZipFile(tmp_path / OFFICIAL_FILE, "w") as archive:
            archive.write(path, "medclip-vit-pretrained/pytorch_model.bin")
            archive.writestr("medclip-vit-pretrained/config.json", "{}")
        path = tmp_path / OFFICIAL_FILE
    if form == "cache":
        monkeypatch.setenv("MEDTUT_ASSET_DIR", str(tmp_path))
        monkeypatch.setenv("MEDTUT_OFFLINE", "1")
        path = None
    tower = load_official(path)
    assert not tower.training
    assert torch.equal(tower(picture), source(picture))


def test_official_tower_is_the_tiny_one(source, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(official_state(source), path)
    with pytest.raises(MedtutError, match=r"SwinTower\('tiny'\)"):
        load_official(path)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "resnet", "empty"])
def test_another_model_is_refused_by_name(source, small_official, change, tmp_path):
    state = official_state(source)
    head = "vision_model.projection_head.weight"
    if change == "missing":
        del state[head]
    elif change == "unknown":
        state["vision_model.projection_head.bias"] = torch.zeros(512)
    elif change == "shape":
        state[head] = torch.zeros(512, 768)
    elif change == "resnet":
        state = {"vision_model.model.conv1.weight": torch.zeros(64, 3, 7, 7)}
    else:
        state = {}
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    names = {"resnet": "embeddings|conv1", "empty": "embeddings|layers"}
    with pytest.raises(MedtutError, match=names.get(change, "projection_head")):
        load_official(path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("what", ["pickle", "cut", "absent", "list"])
def test_a_file_is_never_run_and_a_bad_one_is_named(source, what, tmp_path):
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "was_run"
    if what == "pickle":
        path.write_bytes(pickle.dumps({"x": Bomb(str(trace))}))
    elif what == "cut":
        torch.save({"x": torch.zeros(999)}, path)
        path.write_bytes(path.read_bytes()[:700])
    elif what == "list":
        torch.save([torch.zeros(2)], path)
    with pytest.raises(MedtutError, match=r"pytorch_model\.bin"):
        load_official(path)
    assert not trace.exists()


def test_offline_without_the_file_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    monkeypatch.setenv("MEDTUT_OFFLINE", "1")
    monkeypatch.delenv("MEDTUT_ASSET_DIR", raising=False)
    with pytest.raises(MedtutError, match=r"medclip-vit-pretrained\.zip by hand"):
        load_official()


def test_the_file_is_fetched_once_from_the_official_address(tmp_path, monkeypatch):
    import pooch

    asked = []

    def retrieve(url, known_hash, fname, path, progressbar):
        asked.append((url, known_hash))
        (path / fname).write_bytes(b"x")
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    for name in ("MEDTUT_OFFLINE", "MEDTUT_ASSET_DIR", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    assert medclip_io.official_file() == medclip_io.official_file()
    address = "https://storage.googleapis.com/pytrial/medclip-vit-pretrained.zip"
    assert asked == [(address, None)]


# -- ours ------------------------------------------------------------------------------
def test_stored_weights_are_small_finite_and_say_where_they_come_from():
    tower = load_small_tower()
    assert all(torch.isfinite(p).all() for p in tower.parameters())
    assert not tower.training
    assert SMALL_WEIGHTS.stat().st_size <= 8_000_000
    with safe_open(SMALL_WEIGHTS, "pt") as file:
        note = file.metadata()
    assert note["made_by"] == "data_scripts/pretrain_medclip_small.py"
    assert {"seed", "steps", "patients", "cohort_version"} <= note.keys()


@torch.no_grad()
def test_half_precision_file_loads(source, picture, tmp_path):
    path = tmp_path / "small.safetensors"
    state = {old_name(k): v.half() for k, v in source.state_dict().items()}
    save_file(state, path)
    torch.testing.assert_close(
        load_small_tower(path)(picture), source(picture), atol=0.05, rtol=0.05
    )


def test_missing_or_cut_weights_say_how_to_make_them(tmp_path):
    path = tmp_path / "none.safetensors"
    with pytest.raises(MedtutError, match=r"pretrain_medclip_small\.py"):
        load_small_tower(path)
    path.write_bytes(b"\x10\x00")
    with pytest.raises(MedtutError, match=r"pretrain_medclip_small\.py"):
        load_small_tower(path)


def test_loading_changes_nothing_when_it_fails(source):
    tower = randomised(3)
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    state = dict(source.state_dict())
    state.pop("projection_head.weight")
    with pytest.raises(MedtutError, match="projection_head"):
        load_tower_state(tower, state, "here")
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


# -- the published pair ----------------------------------------------------------------
def adapted(seed=4):
    torch.manual_seed(seed)
    model = MedCLIPSegmenter(randomised(1), VectorDecoder())
    inject(model, LoRAConfig(r=2, dropout=0.1), keep="^seg_head")
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for slot in layer.slots():
                slot.B.normal_(0, 0.1)
    return model.eval()


@torch.no_grad()
def test_published_pair_goes_round(picture, tmp_path):
    trained = adapted()
    save_published_pair(trained, tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints/lora_medclip/adapter_config.json").is_file()
    fresh = MedCLIPSegmenter(randomised(1), VectorDecoder()).eval()
    assert not torch.equal(fresh(picture), trained(picture))
    load_published_pair(fresh, tmp_path / "checkpoints")
    torch.testing.assert_close(fresh(picture), trained(picture))
    # A plain state dict under the published names, as torch.load gives it anywhere.
    state = torch.load(tmp_path / "checkpoints/seg_head.pth", weights_only=True)
    assert state.keys() == VectorDecoder().state_dict().keys()
    # The adapter belongs to the encoder alone, as the published folder does.
    with safe_open(
        tmp_path / "checkpoints/lora_medclip/adapter_model.safetensors", "pt"
    ) as file:
        assert all(k.startswith("base_model.model.model.encoder") for k in file.keys())  # noqa: SIM118


def test_a_pair_that_does_not_fit_leaves_the_model_alone(tmp_path):
    save_published_pair(adapted(), tmp_path)
    model = MedCLIPSegmenter(randomised(1), DenseDecoder((32, 64, 128, 256)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MedtutError, match="another head than DenseDecoder"):
        load_published_pair(model, tmp_path)
    other = MedCLIPSegmenter(randomised(9), VectorDecoder())
    with pytest.raises(LoRAError):  # other base weights
        load_published_pair(other, tmp_path)
    (tmp_path / "seg_head.pth").unlink()
    with pytest.raises(MedtutError, match=r"seg_head\.pth"):
        load_published_pair(model, tmp_path)
    assert not adapted_layers(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
