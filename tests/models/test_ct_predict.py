"""One CT and sentences: a tiny CT-CLIP and a tiny BERT made here."""

import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from medtut import cli
from medtut.data import ct_rate, ct_volume
from medtut.errors import MedtutError
from medtut.models import ct_predict
from medtut.models.ct_predict import opposite, predict_ct, spacing_of
from medtut.models.ctclip import CTCLIP, load_ctclip, save_ctclip
from medtut.models.ctvit import CTViT
from medtut.models.text_tower import TEMPLATES, load_text_tower, prompts

WORDS = "there is no a nodule effusion lung opacity emphysema consolidation fluid . ' s"
EFFUSION, NODULE = "There is effusion.", "There is no nodule."


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=32,
        initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


def small(path, seed=0, width=32, **note):
    torch.manual_seed(seed)
    tower = CTViT(16, (8, 16, 16), (4, 8, 8), 1, 1, 2, 8)
    return save_ctclip(CTCLIP(tower, width, 8, log_scale=1.5), path, **note)


def scan(path, edit=None, seed=0):
    """Air, a body, two lungs; 96 x 80 x 72 mm."""
    hu = np.full((24, 20, 12), -1000.0)
    hu[3:-3, 3:-3] = 40
    hu[5:11, 6:-5] = hu[13:-5, 6:-5] = -850
    hu += np.random.default_rng(seed).normal(0, 15, hu.shape)
    hu = (edit or (lambda x: x))(hu.astype(np.float32))
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([4.0, 4.0, 6.0, 1.0])), path)
    return path


@pytest.fixture
def ask(bert, tmp_path, monkeypatch):
    """Return the arguments of a question, in a cache of its own."""
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))
    weights = small(tmp_path / "small.safetensors", spacing=(9.0, 5.0, 6.0))
    volume = scan(tmp_path / "ct.nii.gz")
    return {"volume": volume, "weights": weights, "text": bert}


@pytest.fixture
def reads(monkeypatch):
    """Paths of the volumes that were read, one by one."""
    seen, plain = [], ct_volume.read_hu

    def read_hu(path, *rest):
        seen.append(path)
        return plain(path, *rest)

    monkeypatch.setattr(ct_volume, "read_hu", read_hu)
    return seen


@pytest.mark.parametrize(
    ("sentence", "other"),
    [
        ("There is effusion.", "There is no effusion."),
        ("There is no effusion.", "There is effusion."),
        ("there is A nodule", "there is no nodule"),
        ("There is an opacity.", "There is no opacity."),
        ("There is normal lung.", "There is no normal lung."),
        ("There is nothing.", None),
        ("There is not a nodule.", None),
        ("There is no nothing.", None),
        ("There are nodules.", None),
        ("I say there is effusion.", None),
    ],
)
def test_opposites(sentence, other):
    assert opposite(sentence) == other


def test_the_published_pair_of_every_finding():
    for finding in ct_rate.FINDINGS:
        (yes, *_), (no, *_) = prompts(finding, TEMPLATES[:1])
        assert (opposite(yes), opposite(no)) == (no, yes)


@torch.no_grad()
def test_answers_are_those_of_the_towers(ask, bert):
    found = predict_ct(prompts=[EFFUSION, "  Fluid \n in  the lung. "], **ask)
    assert found["size"] == (8, 16, 16)
    assert found["spacing"] == (9.0, 5.0, 6.0)
    assert found["spacing_known"]
    model, tower = load_ctclip(ask["weights"]), load_text_tower(bert)
    ct = ct_volume.read_hu(ask["volume"])
    x = torch.from_numpy(ct_volume.prepare(ct, (8, 16, 16), (9.0, 5.0, 6.0)))
    image = model.encode_image(x[None])[0]
    assert image.std() > 0.05
    said = [EFFUSION, "There is no effusion.", "Fluid in the lung."]
    cosine = model.encode_text(tower(said)) @ image
    p = (1.5 * torch.tensor(1.0)).exp().mul(cosine[:2]).softmax(0)[0].item()
    assert abs(p - 0.5) > 0.02
    first, second = found["answers"]
    assert first["sentence"] == EFFUSION
    assert first["against"] == said[1]
    assert first["p"] == pytest.approx(p, abs=1e-5)
    assert first["cosine"] == pytest.approx(cosine[0].item(), abs=1e-5)
    assert (second["sentence"], second["against"], second["p"]) == (said[2], None, None)
    assert second["cosine"] == pytest.approx(cosine[2].item(), abs=1e-5)
    # The same pair in other words, by hand, and the other way round.
    other = predict_ct(prompts=[EFFUSION], against=[said[1]], **ask)["answers"]
    assert other == [first]
    (turned,) = predict_ct(prompts=[said[1]], **ask)["answers"]
    assert turned["p"] == pytest.approx(1 - p, abs=1e-5)
    # An opposite that is given counts, even where one would be made.
    (chosen,) = predict_ct(prompts=[EFFUSION], against=[said[2]], **ask)["answers"]
    assert chosen["against"] == said[2]
    assert chosen["p"] == pytest.approx(
        (cosine[[0, 2]] * np.exp(1.5)).softmax(0)[0].item(), abs=1e-5
    )


def test_without_a_prompt_the_findings_in_order(ask):
    found = predict_ct(**ask)["answers"]
    p = [one["p"] for one in found]
    assert p == sorted(p, reverse=True)
    assert p[0] - p[-1] > 0.05
    asked = {prompts(f)[0][0] for f in ct_rate.FINDINGS}
    assert {one["sentence"] for one in found} == asked
    assert len(found) == 18


def test_prompts_stay_in_their_order(ask):
    p = {}
    for said in ([EFFUSION, NODULE], [NODULE, EFFUSION]):
        found = predict_ct(prompts=said, **ask)["answers"]
        assert [one["sentence"] for one in found] == said
        p |= {one["sentence"]: one["p"] for one in found}
    assert abs(p[EFFUSION] - p[NODULE]) > 1e-3


def test_a_second_question_reads_no_volume(ask, reads, tmp_path):
    first = predict_ct(prompts=[EFFUSION], **ask)["answers"]
    assert len(reads) == 1
    predict_ct(prompts=[NODULE], **ask)
    copy = shutil.copy(ask["volume"], tmp_path / "another name.nii.gz")
    again = predict_ct(prompts=[EFFUSION], **ask | {"volume": copy})["answers"]
    assert again == first
    assert len(reads) == 1, "the same content, whatever is asked and its name is"
    # Whatever the vector depends on makes another entry.
    weights = small(tmp_path / "other.safetensors", seed=1, spacing=(9.0, 5.0, 6.0))
    spaced = small(tmp_path / "spaced.safetensors", spacing=(9.0, 5.0, 5.0))
    volume = scan(tmp_path / "second.nii.gz", seed=1)
    stored = scan(tmp_path / "stored.nii.gz", lambda hu: hu + 1024)
    seen = {first[0]["cosine"]}
    for change in (
        {"weights": weights},
        {"weights": spaced},
        {"volume": volume},
        {"volume": stored, "rescale": (1.0, -1024.0)},
        {"volume": stored, "rescale": (1.0, -1000.0)},
    ):
        before = len(reads)
        seen.add(predict_ct(prompts=[EFFUSION], **ask | change)["answers"][0]["cosine"])
        assert len(reads) == before + 1, change
    assert len(seen) >= 5  # (1, -1024) may give the first one again
    with pytest.raises(MedtutError, match="rescale it twice"):
        predict_ct(prompts=[EFFUSION], rescale=(1.0, -1024.0), **ask)


def test_a_header_with_its_voxels_elsewhere_is_read_each_time(ask, reads, tmp_path):
    nrrd = pytest.importorskip("nrrd")
    header = {
        "space": "right-anterior-superior",
        "space directions": np.diag([4.0, 4.0, 6.0]),
        "space origin": [0, 0, 0],
    }
    path, said = tmp_path / "ct.nhdr", []
    for seed in (0, 1):
        ct = np.asarray(nibabel.load(scan(tmp_path / "x.nii", seed=seed)).dataobj)
        nrrd.write(str(path), ct, {**header, "encoding": "raw"}, detached_header=True)
        said += predict_ct(prompts=[EFFUSION], **ask | {"volume": path})["answers"]
    assert len(reads) == 2
    assert said[0]["cosine"] != said[1]["cosine"]


def test_spacing_is_the_one_of_the_weights(ask, reads, tmp_path, monkeypatch):
    for note, mm in (
        ({}, None),
        ({"spacing": [6, 3.6, 3.6]}, (6, 3.6, 3.6)),
        ({"spacing": (1.5, 0.75, 0.75)}, (1.5, 0.75, 0.75)),
    ):
        assert spacing_of(small(tmp_path / "a.safetensors", **note)) == mm
    for bad in ("six", (6.0, 3.6), (6, 3.6, 0), (6, 3.6, 3.6, 1), (6, -3.6, 3.6)):
        small(tmp_path / "a.safetensors", spacing=bad)
        with pytest.raises(MedtutError, match=r"a\.safetensors.*\(D, H, W\)"):
            spacing_of(tmp_path / "a.safetensors")
    plain = ask | {"weights": small(tmp_path / "a.safetensors")}
    found = predict_ct(prompts=[EFFUSION], **plain)
    assert not found["spacing_known"]
    assert found["spacing"] == ct_volume.SPACING
    monkeypatch.setattr(ct_volume, "SPACING", (5.0, 5.0, 5.0))
    assert predict_ct(prompts=[EFFUSION], **plain)["spacing"] == (5.0, 5.0, 5.0)
    assert len(reads) == 2, "the spacing is part of the key by itself"


def hole(hu):
    hu[3, 4, 5] = np.nan
    return hu


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (hole, "1 of 5760 voxels are NaN"),
        (lambda hu: hu[:, :, :1], "at least 2 slices"),
        (lambda hu: hu - 1024, "rescaled twice"),
        (lambda hu: hu + 1024, "Give the slope and intercept"),
    ],
)
def test_what_is_no_ct_in_hu(ask, tmp_path, edit, says):
    path = scan(tmp_path / "bad.nii.gz", edit)
    for _ in range(2):  # a failure is not kept as an answer
        with pytest.raises(MedtutError, match=says):
            predict_ct(prompts=[EFFUSION], **ask | {"volume": path})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"volume": "nowhere.nii.gz"}, r"no file nowhere\.nii\.gz; give one CT"),
        ({"volume": "."}, "no file"),
        ({"weights": "nowhere.safetensors"}, "pretrain_ctclip_small.py"),
        ({"prompts": [" "]}, "1 --prompt, 0 --against, 1 empty"),
        ({"prompts": [EFFUSION], "against": [""]}, "1 --against, 1 empty"),
        ({"prompts": [EFFUSION], "against": ["a", "b"]}, "1 --prompt, 2 --against"),
        ({"against": ["a"]}, "0 --prompt, 1 --against"),
        ({"rescale": (1.0, None)}, "Both are needed"),
    ],
)
def test_refusals(ask, change, says):
    with pytest.raises(MedtutError, match=says):
        predict_ct(**ask | change)


def test_no_weights_of_the_course(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(ct_predict, "SMALL_WEIGHTS", tmp_path / "ctclip_small")
    with pytest.raises(MedtutError, match=r"ctclip_small; .*data_scripts"):
        predict_ct(**ask | {"weights": None})
    shutil.copy(ask["weights"], tmp_path / "ctclip_small")
    assert predict_ct(prompts=[NODULE], **ask | {"weights": None})["answers"]


def test_towers_of_another_width(ask, reads, bert, tmp_path):
    wide = small(tmp_path / "wide.safetensors", width=48)
    with pytest.raises(
        MedtutError, match=r"wide\.safetensors.*48.*bert.* 32; .*--text"
    ):
        predict_ct(**ask | {"weights": wide})
    assert reads == [], "said before the volume is read"


# -- the command -----------------------------------------------------------------------
def medtut(ask, *more):
    flags = ("--weights", str(ask["weights"]), "--text", str(ask["text"]))
    line = ("predict", "ct", str(ask["volume"]), *flags, *more)
    return CliRunner().invoke(cli.app, line, env={"COLUMNS": "80"})


def test_the_table(ask):
    mark = "Fluid [/b] in the lung."
    done = medtut(ask, "--prompt", EFFUSION, "--prompt", mark)
    assert done.exit_code == 0, done.exception
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["sentence", "against", "P", "cosine"]
    one, two = predict_ct(prompts=[EFFUSION, mark], **ask)["answers"]
    assert lines[1].split("  ")[0].strip() == EFFUSION
    assert lines[1].split()[-2:] == [f"{one['p']:.3f}", f"{one['cosine']:.3f}"]
    assert lines[2].startswith(f" {mark}")
    assert lines[2].split()[-3:] == ["-", "-", f"{two['cosine']:.3f}"]
    assert "only a cosine similarity" in lines[3]
    assert "(8, 16, 16) voxels of (9.0, 5.0, 6.0) mm." in lines[4]
    assert "a teaching model; not for patients" in lines[5]
    assert "only a cosine" not in medtut(ask, "--prompt", EFFUSION).stdout


def test_json_and_every_option(ask, tmp_path):
    ask["volume"] = scan(tmp_path / "stored.nii.gz", lambda hu: hu + 1024)
    more = ("--prompt", EFFUSION, "--against", "Fluid.", "--json")
    done = medtut(ask, *more, "--slope", "1", "--intercept", "-1024")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["note"] == "a teaching model; not for patients"
    hu = ask | {"volume": scan(tmp_path / "hu.nii.gz")}
    want = predict_ct(prompts=[EFFUSION], against=["Fluid."], **hu)
    assert found.keys() == want.keys()
    (one,), (two,) = found["answers"], want["answers"]
    assert (one["sentence"], one["against"]) == (EFFUSION, "Fluid.")
    assert one["p"] == pytest.approx(two["p"], abs=1e-4)
    assert one["cosine"] == pytest.approx(two["cosine"], abs=1e-4)
    refused = medtut(ask, *more)
    assert isinstance(refused.exception, MedtutError)
