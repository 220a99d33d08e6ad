"""Published checkpoints: their registry, and files with their keys, made here."""

import os
import pickle

import numpy as np
import pytest
import torch

from medtut.data.organs import STRUCTURES
from medtut.errors import MedtutError
from medtut.models import swin_weights
from medtut.models.suprem_unet import build_suprem_unet
from medtut.models.swin_unetr import build_swin_unetr
from medtut.models.swin_weights import load_published, published_file, registry

TEXT_HEAD = {
    "organ_embedding": (32, 512),
    "text_to_vision.weight": (256, 512),
    "controller.weight": (153, 512, 1, 1, 1),
    "precls_conv.0.weight": (12,),
    "GAP.0.weight": (192,),
}
PRETEXT = {"rotation_head.weight": (4, 192), "contrastive_head.weight": (512, 192)}


@pytest.fixture(scope="module")
def trained():
    """Weights to be found again, by our names."""
    return build_swin_unetr(12, 29, seed=7).state_dict()


@pytest.fixture(scope="module")
def trained_unet():
    return build_suprem_unet(1, 4, seed=7).state_dict()


def extras(shapes, before=""):
    return {before + k: torch.zeros(s) for k, s in shapes.items()}


def stored(name, trained, trained_unet):
    """The content of a file as published, at feature size 12 (U-Net: 4)."""
    if name == "fseft":
        return {"module." + k: v for k, v in trained.items()}
    if name == "btcv":
        state = {k: v for k, v in trained.items() if not k.startswith("classifier")}
        state["out.conv.conv.weight"] = trained["classifier.weight"][:14]
        state["out.conv.conv.bias"] = trained["classifier.bias"][:14]
        return {"state_dict": state, "epoch": 5000, "best_acc": np.float64(0.82)}
    if name == "selfsup":
        swin = {k: v for k, v in trained.items() if k.startswith("swinViT.")}
        swin = {k.removeprefix("swinViT."): v for k, v in swin.items()}
        swin = {k.replace("mlp.linear", "mlp.fc"): v for k, v in swin.items()}
        swin = {"module." + k: v for k, v in swin.items()}
        return {"state_dict": swin | extras(PRETEXT, "module.")}
    unet = name == "suprem_unet"
    source = trained_unet if unet else trained
    head = "out_tr.final_conv" if unet else "out.conv.conv"
    body = {k.replace("classifier", head): v for k, v in source.items()}
    state = extras(TEXT_HEAD, "module.")
    state |= {"module.backbone." + k: v for k, v in body.items()}
    optimizer = {
        "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
        "param_groups": [],
    }
    return {"net": state, "optimizer": optimizer, "epoch": 800}


def blank(name):
    if name == "suprem_unet":
        return build_suprem_unet(1, 4, seed=0)
    return build_swin_unetr(12, 14 if name == "btcv" else 29, seed=0)


@pytest.fixture(scope="module")
def files(trained, trained_unet, tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("published"), {}
    for name in registry():
        paths[name] = folder / f"{name}.pth"
        torch.save(stored(name, trained, trained_unet), paths[name])
    return paths


SWIN = ("swinViT", "encoder", "decoder")
FILLED = {
    "fseft": (*SWIN, "classifier"),
    "clipdriven": SWIN,
    "suprem_swinunetr": SWIN,
    "suprem_unet": ("down_tr", "up_tr"),
    "btcv": (*SWIN, "classifier"),
    "selfsup": ("swinViT",),
}


def test_registry_says_what_each_needs():
    entries = registry()
    assert set(entries) == set(FILLED)
    for name, entry in entries.items():
        assert entry["fills"] == FILLED[name]
        assert entry["url"].startswith("https://")
        assert entry["architecture"] in ("swin_unetr", "suprem_unet")
        assert all(entry[k] for k in ("title", "licence", "filename", "needs", "note"))
        assert (entry["spacing"], entry["hu"]) == (1.5, [-175.0, 250.0])
        assert entry["url"].endswith(entry["filename"]) or not entry["direct"]
    assert entries["fseft"]["structures"] == STRUCTURES
    counts = {name: len(e["structures"]) for name, e in entries.items()}
    assert counts == {
        "fseft": 29,
        "clipdriven": 32,
        "suprem_swinunetr": 25,
        "suprem_unet": 25,
        "btcv": 14,
        "selfsup": 0,
    }
    assert entries["btcv"]["structures"][1:] == STRUCTURES[:13]
    # Upstream takes row i of the template's i, from 1: one row more than there is.
    assert STRUCTURES.index("duodenum") + 1 == len(entries["btcv"]["structures"])
    clip = entries["clipdriven"]["structures"]
    assert entries["suprem_unet"]["structures"] == clip[:25]
    unshared = {"prostate_uterus", "bone", "brain"}
    assert set(STRUCTURES) - set(clip) == unshared
    # The address that upstream gives for both belongs to one of them.
    assert entries["btcv"]["url"] != entries["selfsup"]["url"]
    assert "supervised one" in entries["btcv"]["note"]
    assert "btcv file instead" in entries["selfsup"]["note"]


@pytest.mark.parametrize("name", FILLED)
def test_every_tensor_comes_to_its_place(name, files, trained, trained_unet):
    model = blank(name)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    done = load_published(name, files[name], model)
    source = trained_unet if name == "suprem_unet" else trained
    for key, tensor in model.state_dict().items():
        filled = key.startswith(FILLED[name])
        expected = source[key][: len(tensor)] if tensor.dim() else source[key]
        assert torch.equal(tensor, expected if filled else start[key]), key
        assert filled == (key in done.loaded), key
    names = {k for k, _ in model.named_parameters()}
    assert set(done.missing) == {k for k in names if not k.startswith(FILLED[name])}
    assert len(done.loaded) == len(set(done.loaded))
    head = "classifier.weight" in done.loaded
    assert done.structures == (registry()[name]["structures"] if head else ())
    assert model.facts["structures"] == done.structures
    assert model.facts["checkpoint"] == name
    if name in ("clipdriven", "suprem_swinunetr", "suprem_unet"):
        left = {k.removeprefix("module.") for k in done.ignored}
        assert set(TEXT_HEAD) < left
        assert {
            k.removeprefix("backbone.").split(".")[0] for k in left - set(TEXT_HEAD)
        }
        assert any("out" in k for k in left - set(TEXT_HEAD))
    elif name == "selfsup":
        assert set(done.ignored) == {"module." + k for k in PRETEXT}
    else:
        assert done.ignored == ()


def test_the_model_runs_as_the_one_that_was_saved(files, trained):
    model = blank("fseft").eval()
    load_published("fseft", files["fseft"], model)
    original = build_swin_unetr(12, 29, seed=7).eval()
    x = torch.rand(1, 1, 32, 32, 64)
    with torch.no_grad():
        assert torch.equal(model(x), original(x))


def test_without_its_head(files):
    model = build_swin_unetr(12, 1, seed=0)
    before = model.classifier.weight.clone()
    with pytest.raises(MedtutError, match=r"classifier.weight \[29, 12, 1, 1, 1\]"):
        load_published("fseft", files["fseft"], model)
    done = load_published("fseft", files["fseft"], model, head=False)
    assert set(done.missing) == {"classifier.weight", "classifier.bias"}
    assert done.structures == ()
    assert "module.classifier.bias" in done.ignored
    assert torch.equal(model.classifier.weight, before)


def refused(name, path, model, match):
    """The error's text; the model is as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MedtutError, match=match) as caught:
        load_published(name, path, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.facts == {}
    return str(caught.value)


def test_the_supervised_file_is_not_the_self_supervised_one(files):
    text = refused("selfsup", files["btcv"], blank("selfsup"), "no part of it")
    assert "fits btcv" in text
    assert registry()["selfsup"]["url"] in text
    text = refused("btcv", files["selfsup"], blank("btcv"), "not checkpoint 'btcv'")
    assert "fits selfsup" in text


@pytest.mark.parametrize(
    ("name", "given"),
    [("fseft", "btcv"), ("fseft", "clipdriven"), ("clipdriven", "fseft"),
     ("btcv", "fseft"), ("suprem_swinunetr", "btcv"), ("fseft", "selfsup")],
)  # fmt: skip
def test_one_checkpoint_for_another(name, given, files):
    text = refused(name, files[given], blank(name), f"not checkpoint '{name}'")
    assert f"fits {given}" in text
    assert registry()[name]["filename"] in text


def test_another_architecture(files):
    refused("suprem_unet", files["suprem_unet"], blank("fseft"), "no suprem_unet")
    refused("suprem_unet", files["fseft"], blank("suprem_unet"), "no key matches")
    refused("fseft", files["fseft"], blank("suprem_unet"), "no swin_unetr: no ")
    wide = build_swin_unetr(24, 29)
    text = refused("clipdriven", files["clipdriven"], wide, r"the model has \[")
    assert "fits none" in text


def change(files, name, tmp_path, edit):
    state = torch.load(files[name], weights_only=False)
    edit(state.get("state_dict", state))
    path = tmp_path / "changed.pth"
    torch.save(state, path)
    return path


def test_a_tensor_that_is_lost_odd_or_not_finite(files, tmp_path):
    key = "module.decoder3.conv_block.conv1.conv.weight"
    path = change(files, "fseft", tmp_path, lambda s: s.pop(key))
    refused("fseft", path, blank("fseft"), r"decoder3\S+ is missing \(1 faults")
    path = change(files, "fseft", tmp_path, lambda s: s[key].fill_(float("nan")))
    refused("fseft", path, blank("fseft"), r"decoder3\S+ holds numbers")
    path = change(files, "fseft", tmp_path, lambda s: s.update({key: s[key][:5]}))
    refused("fseft", path, blank("fseft"), r"for decoder3\S+ \[5, 48, 3, 3, 3\], the")
    path = change(files, "fseft", tmp_path, lambda s: s.update({key[7:]: s[key]}))
    refused("fseft", path, blank("fseft"), "mean the same")
    index = "module.swinViT.layers1.0.blocks.0.attn.relative_position_index"
    path = change(files, "fseft", tmp_path, lambda s: s[index].add_(1))
    refused("fseft", path, blank("fseft"), "another window")
    # It follows from the window, so it may be left out.
    path = change(files, "fseft", tmp_path, lambda s: s.pop(index))
    assert index[7:] not in load_published("fseft", path, blank("fseft")).loaded


def test_inner_prefixes(files, tmp_path):
    """Wrapped in DataParallel below the top."""

    def edit(state):
        for key in [*state]:
            new = key.replace("module.swinViT.", "swinViT.module.")
            state[new] = state.pop(key)

    path = change(files, "fseft", tmp_path, edit)
    assert len(load_published("fseft", path, blank("fseft")).missing) == 0


class Evil:
    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


def test_nothing_in_a_file_is_run(trained, tmp_path):
    flag, path = tmp_path / "flag", tmp_path / "evil.pth"
    torch.save({"state_dict": trained, "more": Evil(flag)}, path)
    text = refused("fseft", path, blank("fseft"), "cannot be opened as plain weights")
    assert "asks to run" in text
    assert "mkdir" in text
    assert not flag.exists()
    path.write_bytes(pickle.dumps(Evil(flag), protocol=2))
    refused("fseft", path, blank("fseft"), "cannot be opened as plain weights")
    assert not flag.exists()


def test_files_that_cannot_be_read(files, tmp_path):
    path = tmp_path / "cut.pth"
    whole = files["btcv"].read_bytes()
    for size in (0, 10_000, len(whole) - 100):
        path.write_bytes(whole[:size])
        refused("btcv", path, blank("btcv"), "cut.pth cannot be opened")
    refused("btcv", tmp_path / "none.pth", blank("btcv"), "none.pth cannot be opened")
    for content in ({}, [1], {"epoch": 3}, {"net": {}}, torch.zeros(2)):
        torch.save(content, path)
        refused("btcv", path, blank("btcv"), "cut.pth cannot be opened")


def test_old_files_without_a_zip(trained, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(trained, path, _use_new_zipfile_serialization=False)
    assert not load_published("fseft", path, blank("fseft")).missing


def test_names_that_do_not_exist(files):
    for call in (published_file, lambda n: load_published(n, "x", None)):
        with pytest.raises(
            MedtutError, match="no checkpoint 'swin'; there are fseft, "
        ):
            call("swin")


def test_where_a_file_is_looked_for(monkeypatch, tmp_path):
    mine, asked = tmp_path / "mine", []

    def fetch(url, target, progress):
        asked.append((url, target, progress))
        target.write_bytes(b"1")

    monkeypatch.setattr(swin_weights, "from_url", fetch)
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDTUT_ASSET_DIR", str(mine))
    monkeypatch.delenv("MEDTUT_OFFLINE", raising=False)
    with pytest.raises(MedtutError, match=r"a page, not a file.*fseft\.pth.*Licence"):
        published_file("fseft")
    entry = registry()["btcv"]
    for _ in range(2):  # the second time it is there
        path = published_file("btcv", progress=False)
        assert path.name == entry["filename"]
    assert [a[0] for a in asked] == [entry["url"]]
    mine.mkdir()
    (mine / "fseft.pth").write_bytes(b"2")
    assert published_file("fseft") == mine / "fseft.pth"
    monkeypatch.setenv("MEDTUT_OFFLINE", "1")
    with pytest.raises(MedtutError, match=r"MEDTUT_OFFLINE is set.*model_swinvit"):
        published_file("selfsup")

    def fail(url, target, progress):
        raise swin_weights.Unreachable(f"{url}: no route")

    monkeypatch.delenv("MEDTUT_OFFLINE")
    monkeypatch.setattr(swin_weights, "from_url", fail)
    with pytest.raises(MedtutError, match=r"selfsup.*no route"):
        published_file("selfsup")
    assert len(asked) == 1


def test_cards_stand_for_every_checkpoint():
    from medtut import data

    card = swin_weights.Path(data.__file__).parent / "cards" / "swin-published.md"
    text = card.read_text(encoding="utf-8")
    for name, entry in registry().items():
        assert f"`{name}`" in text
        assert entry["filename"] in text
        assert entry["url"] in text
