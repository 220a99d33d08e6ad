"""``data_scripts/pretrain_ctclip_small.py``: what the small CT-CLIP is taught."""

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from medtut.data import chest_cohort
from medtut.data.chest_cohort import outlines_of
from medtut.data.chest_findings import ChestPatient, Drawn, sample_findings
from medtut.data.chest_reports import phrases, report
from medtut.data.chest_reports import sentences as told
from medtut.data.ct_rate import FINDINGS, Record
from medtut.models.ct_stem import HistogramStem
from medtut.models.ctclip import CTCLIP
from medtut.models.ctvit import CTViT
from medtut.models.text_tower import prompts


@pytest.fixture(scope="module")
def script():
    root = Path(__file__).parents[2] / "data_scripts"
    spec = importlib.util.spec_from_file_location(
        "pretrain_ctclip_script", root / "pretrain_ctclip_small.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def patient(number, findings=None):
    """Findings by lot, or those given, and nothing drawn."""
    rng = np.random.default_rng([8, number])
    known = sample_findings(rng) if findings is None else dict.fromkeys(findings, 0.5)
    side = ("left", "right", "bilateral")
    lobe = ("left upper lobe", "right middle lobe", "")
    drawn = {}
    for name, severity in known.items():
        k = int(rng.integers(3))
        kind = "pacemaker" if name == "Medical material" else ""
        size = float(rng.uniform(3, 60))
        drawn[name] = Drawn(severity, side[k], lobe[k], size, 9, kind)
    hu = np.zeros((96, 96, 48), np.float32)
    hu[:50] = -900
    masks = {f: np.zeros(hu.shape, bool) for f in drawn}
    for i, mask in enumerate(masks.values()):
        mask[8 * i : 8 * i + 9, 10 + i, 3 * i : 3 * i + 2] = True
        mask[0, 0, 0] = i == 0
    facts = {"contrast": False, "ratio": 0.47}
    return ChestPatient(hu, drawn, masks, hu.astype(np.uint8), facts, np.ones(3))


def record(number, findings=None):
    who = patient(number, findings)
    text = report(who, np.random.default_rng(number))
    labels = np.array([f in who.findings for f in FINDINGS], np.uint8)
    words = text["Findings_EN"], text["Impressions_EN"]
    return Record(f"train_{number}_a_1.nii.gz", Path("x"), "p", *words, labels=labels)


class Tower:
    """A text tower whose vectors are drawn from the text; it notes what it reads."""

    width = 12

    def __init__(self):
        self.read = []

    def embed(self, texts, cache=True):
        self.read += texts
        rngs = (np.random.default_rng(list(t.encode())) for t in texts)
        return np.stack([r.normal(size=self.width) for r in rngs]).astype("f4")


# -- what a report says ----------------------------------------------------------------
def filled():
    """Every sentence about a finding, its gaps filled in some ways."""
    text = phrases()
    devices = [*text["devices"].values()]
    for k in range(3):
        degree, side = text["degrees"][k], ("left", "right", "bilateral")[k]
        lungs = "both lungs" if k == 2 else f"the {side} lung"
        where = (lungs, "the right upper lobe", "the left lower lobe")[k]
        kind = devices[k % len(devices)]
        words = {
            "degree": degree, "Degree": degree.capitalize(), "mm": f"{7 * k + 4}",
            "cm": f"{k}.{k + 3}", "side": side, "Side": side.capitalize(),
            "lungs": lungs, "where": where, "kind": kind, "ratio": f"0.{52 + k}",
            "Kind": kind[:1].upper() + kind[1:],
        }  # fmt: skip
        for i, name in enumerate(FINDINGS):
            for polarity, ways in text["findings"][name].items():
                for way in ways:
                    yield way.format(**words), i, polarity != "absent"


def test_every_sentence_of_the_reports_is_recognised(script):
    count = 0
    for sentence, finding, affirms in filled():
        assert script.said(sentence) == (finding, affirms), sentence
        # By the sentences of no other finding.
        hits = {f for p, f, _ in script.patterns() if p.fullmatch(sentence)}
        assert hits == {finding}, sentence
        count += 1
    assert count > 400
    text = phrases()
    for sentence in itertools.chain(*text["normal"], text["nothing"]):
        assert script.said(sentence) is None, sentence


def test_reports_are_cut_into_what_was_said(script):
    withheld = 0
    for number in range(40):
        who, rng = patient(number), np.random.default_rng(number)
        want = [s for s, f, _ in told(who, rng) if f not in script.WITHHELD]
        one = record(number)
        got = script.sentences(one)
        assert got[: len(want)] == want
        rest = got[len(want) :]  # the impression, in other words
        named = [script.said(s) for s in rest]
        known = {FINDINGS[f] for f, _ in filter(None, named)}
        assert known == set(who.findings) - set(script.WITHHELD)
        assert all(yes for _, yes in filter(None, named))
        whole = f"{one.findings} {one.impression}"
        withheld += len(whole) != len(" ".join(got))
    assert withheld > 10


def test_a_point_within_a_number_ends_no_sentence(script):
    hernia = "Sliding hiatal hernia measuring 4.5 cm is observed."
    heart = "The heart is enlarged, with a cardiothoracic ratio of 0.57."
    one = Record("x", Path("x"), "p", f"{hernia} {heart}", "Cardiomegaly.")
    assert script.sentences(one) == [hernia, heart, "Cardiomegaly."]
    assert script.sentences(Record("x", Path("x"), "p")) == []


def test_the_corpus_knows_what_is_true_and_reads_nothing_withheld(script):
    records, tower = [record(n) for n in range(40)], Tower()
    corpus = script.Corpus(records, tower)
    hidden = [FINDINGS.index(f) for f in script.WITHHELD]
    labels = np.stack([r.labels for r in records])
    assert labels[:, hidden].any(0).all()
    want = labels.copy()
    want[:, hidden] = 0
    assert corpus.truth.dtype == torch.float32
    assert np.array_equal(corpus.truth.numpy(), want)
    read = " ".join(tower.read).lower()
    assert "pericardi" not in read
    assert "mosaic" not in read
    assert "nodul" in read
    # Every sentence stands where its kind looks for it.
    kinds = {(f, yes) for f in script.NAMED for yes in (True, False)}
    assert set(corpus.ways) == kinds
    flat = [tower.read[i] for ways in corpus.ways.values() for i in ways]
    assert sorted(flat) == sorted(set(flat)), "the sentences were read first, once"
    for kind, ways in corpus.ways.items():
        assert ways
        for i in ways:
            own = prompts(FINDINGS[kind[0]])[0 if kind[1] else 1][0]
            assert tower.read[i] == own or script.said(tower.read[i]) == kind
            vector = Tower().embed([tower.read[i]])
            assert np.array_equal(corpus.vectors[i : i + 1], vector)
    assert sum(map(len, corpus.ways.values())) == len(corpus.vectors)
    for (finding, yes), i in zip(corpus.ways, corpus.asked, strict=True):
        said = "There is" if yes else "There is no"
        assert tower.read[i] == f"{said} {FINDINGS[finding].lower()}."
        assert i in corpus.ways[finding, yes]
    for one, vector in zip(records, corpus.reports, strict=True):
        whole = Tower().embed([" ".join(script.sentences(one))])[0]
        assert np.array_equal(vector, whole)


# -- patches ---------------------------------------------------------------------------
SHAPE = (24, 32, 32)  # 4 x 4 x 4 patches


@pytest.fixture(scope="module")
def stem(script):
    torch.manual_seed(0)
    return HistogramStem(script.DIM, script.PATCH, "rms")


def volume(seed):
    torch.manual_seed(seed)
    return (torch.rand(SHAPE) * 2 - 1).half().numpy()


@torch.no_grad()
def test_a_patch_alone_is_what_the_convolution_makes_of_it(script, stem):
    model = script.PatchModel(stem)
    x = torch.from_numpy(volume(0)).float()[None, None]
    want = model.head(stem(x))[0]
    parts = F.pad(stem.describe(x)[0].permute(3, 0, 1, 2), (1, 1) * 3)
    cut = [
        [[parts[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, 2 * k : 2 * k + 3]
          for k in range(4)] for j in range(4)] for i in range(4)
    ]  # fmt: skip
    cut = torch.stack([torch.stack([torch.stack(r) for r in s]) for s in cut])
    got = model(cut)
    assert got.shape == want.shape == (4, 4, 4, 16)
    # At the border the convolution is given zeros in place of what lies outside.
    inside = (slice(1, None),) * 3
    assert (got - want)[inside].abs().max() < 1e-5
    assert want.std() > 0.1
    # As a batch of patches, too.
    torch.testing.assert_close(model(cut[1, 2]), got[1, 2])


def test_patches_come_with_what_is_outlined_in_them(script, stem):
    volumes = [np.stack([volume(s) for s in (0, 1)])]
    volumes[0][1, :, :16] = -1.0  # air
    outline = torch.zeros(2, 4, 4, 4, 18, dtype=torch.uint8)
    nodule, hidden = FINDINGS.index("Lung nodule"), FINDINGS.index(script.WITHHELD[0])
    outline[0, 1, 2, 3, nodule], outline[0, 3, 3, 3, nodule] = 2, 1
    outline[1, 0, 0, 0, nodule] = 1  # in the air, and yet shown
    outline[..., hidden] = 2
    data = script.Patches(stem, volumes, [outline])
    assert len(data) == 4, "each volume as it is, and as another scanner shows it"
    assert (data.rows[2][0][:, :29] - data.rows[0][0][:1, :29]).abs().max() > 0
    parts, label = data.rows[0]
    assert parts.shape[1:] == (32, 3, 3, 3)
    at = script.NAMED.index(nodule)
    assert label.shape == (len(parts), 16)
    assert sorted(label[:, at].tolist())[-3:] == [0, 1, 2]
    assert label.sum() == 3, "nothing of what is withheld"
    x = torch.from_numpy(volume(0)).float()[None, None]
    near = F.pad(stem.describe(x)[0].permute(3, 0, 1, 2), (1, 1) * 3)
    row = label[:, at].tolist().index(2)
    want = near[:, 2:5, 4:7, 6:9].half()
    assert torch.equal(parts[row], want)
    # All 64 patches are inside the body, of which at most 60 come without a finding.
    assert 60 <= len(parts) <= 62
    air, label = data.rows[1]
    assert len(air) == 32 + 1
    assert label.sum() == 1
    torch.manual_seed(4)
    one = data[0]
    torch.manual_seed(4)
    assert all(torch.equal(v, data[0][k]) or k for k, v in one.items())
    assert one["parts"].shape == (script.TOKENS, 32, 3, 3, 3)
    assert set(one["outline"].unique().tolist()) <= {0.0, 0.5, 1.0}


def test_of_a_finding_everywhere_few_patches_are_kept(script, stem):
    outline = torch.zeros(1, 4, 4, 4, 18, dtype=torch.uint8)
    outline[0, ..., FINDINGS.index("Emphysema")] = 2
    empty = np.full((1, *SHAPE), -1, np.float16)
    for parts, label in script.Patches(stem, [empty], [outline]).rows:
        assert len(parts) == 24
        assert (label.sum(1) == 2).all()


def test_rare_findings_count_more_but_not_without_end(script):
    share = torch.tensor([0.5, 0.1, 1e-9])
    logits, outline = torch.randn(4, 3), torch.rand(4, 3)
    got = script.here(logits, outline, share, 10)
    weight = torch.tensor([1.0, 3.0, 10.0])
    p = logits.sigmoid()
    each = -(weight * outline * p.log() + (1 - outline) * (1 - p).log())
    torch.testing.assert_close(got, each.mean())
    common = script.here(logits, outline, torch.full((3,), 0.9), 10)
    torch.testing.assert_close(
        common, F.binary_cross_entropy_with_logits(logits, outline)
    )


# -- volumes ---------------------------------------------------------------------------
@torch.no_grad()
def test_the_model_begins_with_what_the_patches_taught(script):
    torch.manual_seed(0)
    model = script.Pretrained(12)
    clip = model.clip
    patches = script.PatchModel(clip.image_tower.embed)
    x = torch.rand(1, 1, 48, 96, 96) * 2 - 1
    before = clip.image_tower(x)
    model.go_on_from(patches)
    tokens, embedded = clip.image_tower(x), clip.image_tower.embed(x)
    torch.testing.assert_close(tokens, embedded, atol=1e-3, rtol=1e-3)
    assert (before - tokens).abs().max() > 0.1, "the layers did something before"
    said = clip.to_image[0].query(tokens)[..., : len(script.NAMED)] + model.rare
    torch.testing.assert_close(said, patches.head(embedded), atol=1e-3, rtol=1e-3)
    assert clip.to_image[0].query.weight.shape == (script.HEADS, script.DIM)


@pytest.fixture(scope="module")
def small():
    """A clip with a head of the pooling for every finding, and what it was shown."""
    torch.manual_seed(0)
    tower = CTViT(32, (12, 16, 16), (6, 8, 8), 1, 1, 2, 8, stem="histogram")
    return CTCLIP(tower, 12, 8, "attention", pool_heads=32, bias=-2.0)


def test_the_loss_is_where_which_sentence_and_which_report(script, small):
    records = [record(n) for n in range(40)]
    tower = Tower()
    corpus, texts = script.Corpus(records, tower), tower.read
    share = torch.full((16,), 0.1)
    model = torch.nn.Module()
    model.clip, model.rare = small, torch.nn.Parameter(torch.randn(16))
    batch = {
        "volume": torch.rand(3, 1, 12, 16, 16) * 2 - 1,
        "outline": torch.rand(3, 2, 2, 2, 16).round(),
        "number": torch.tensor([4, 0, 31]),
    }
    loss = script.VolumeLoss(script.SentenceLoss(corpus), share)
    torch.manual_seed(7)
    got = loss(model, batch)
    torch.manual_seed(7)
    assert torch.equal(loss(model, batch), got), "the seed says which sentences"
    torch.manual_seed(7)
    draw = torch.rand(len(corpus.ways)).tolist()
    image = small.encode_image(batch["volume"])
    pairs = []
    for (finding, yes), u in zip(corpus.ways, draw, strict=True):
        # For half of the draws the published prompt, else one of all its sentences.
        own = f"There is {'' if yes else 'no '}{FINDINGS[finding].lower()}."
        ways = [texts[i] for i in corpus.ways[finding, yes]]
        said = own if u < 0.5 else ways[int((2 * u - 1) * len(ways))]
        text = small.encode_text(torch.from_numpy(Tower().embed([said])))[0]
        logit = small.log_scale.exp() * image @ text + small.logit_bias
        true = [float(records[n].labels[finding] == yes) for n in (4, 0, 31)]
        pairs.append(F.binary_cross_entropy_with_logits(logit, torch.tensor(true)))
    where = small.to_image[0].query(small.image_tower(batch["volume"]))[..., :16]
    there = script.here(where + model.rare, batch["outline"], share, 40)
    own = small.encode_text(corpus.reports[[4, 0, 31]])
    want = there + sum(pairs) / len(pairs) + 0.1 * small.loss(image, own) / math.log(3)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got.backward()
    assert all(p.grad is not None and p.grad.isfinite().all()
               for p in model.parameters())  # fmt: skip
    model.zero_grad()


def test_scans_differ_each_time(script):
    volumes = [np.stack([volume(0)]), np.stack([volume(1), np.full(SHAPE, -1, "f2")])]
    outline = [torch.randint(0, 3, (len(v), 4, 4, 4, 18)).byte() for v in volumes]
    data = script.Scans(volumes, outline)
    assert len(data) == 3
    gaps = []
    for n, (part, i) in enumerate([(0, 0), (1, 0), (1, 1)] * 4):
        np.random.seed(n)
        one, n = data[n % 3], n % 3
        assert one["number"] == n
        x = torch.from_numpy(volumes[part][i]).float()[None]
        assert one["volume"].shape == x.shape
        assert one["volume"].abs().max() <= 1
        gaps.append(float((one["volume"] - x).abs().mean()))
        want = outline[part][i][..., script.NAMED] / 2
        assert torch.equal(one["outline"], want)
        assert type(one["volume"]) is torch.Tensor
    np.random.seed(5)
    first, then = data[0]["volume"], data[0]["volume"]
    np.random.seed(5)
    assert torch.equal(data[0]["volume"], first)
    assert not torch.equal(first, then)
    # Volumes of white noise, of which smoothing leaves little.
    assert min(gaps) < 0.05 < max(gaps) < 0.5


@torch.no_grad()
def test_validation_is_zero_shot(script, small):
    rng = np.random.default_rng(0)
    volumes = np.clip(rng.normal(size=(20, 12, 16, 16)), -1, 1).astype(np.float16)
    volumes += np.linspace(-0.5, 0.5, 20)[:, None, None, None].astype(np.float16)
    truth = rng.integers(0, 2, (20, 18))
    yes, no = rng.normal(size=(2, 18, 3, 12)).astype("f4")
    small.eval()
    got = script.judge(small, volumes, truth, (yes, no))
    image = small.encode_image(torch.from_numpy(volumes).float()[:, None])
    for k in range(18):
        sides = [F.normalize(small.encode_text(torch.from_numpy(s[k])).mean(0), dim=0)
                 for s in (yes, no)]  # fmt: skip
        score = image @ (sides[0] - sides[1])
        assert got[k] == pytest.approx(roc_auc_score(truth[:, k], score), abs=1e-6)
    assert np.ptp(got) > 0.05


def test_a_cohort_has_its_outlines_counted_by_patch(script, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    asked = []

    def draw(body, scanner, seed, difficulty):
        asked.append((body, scanner, seed))
        return patient(seed[1], FINDINGS[:4] if seed[1] == 3 else ())

    monkeypatch.setattr(chest_cohort, "draw_patient", draw)
    monkeypatch.setattr(chest_cohort, "load_body", lambda name: None)
    records, volumes, where = script.cohort(3, 2)
    assert sorted(asked) == [
        ("lung1", "source", (script.COHORT_SEED, n)) for n in (3, 4)
    ]
    assert volumes.shape == (2, 48, 96, 96)
    assert where.shape == (2, 8, 12, 12, 18)
    assert not where[1].any()
    found = outlines_of(records[0].path)
    for k in range(18):
        counts = np.zeros((8, 12, 12), int)
        for d, h, w in np.argwhere(found[k]):
            counts[d // 6, h // 8, w // 8] += 1
        assert np.array_equal(where[0, ..., k], counts.clip(max=2))
        assert counts.any() == (k < 4)
    assert set(where.unique().tolist()) == {0, 1, 2}
    # The lesson's patients have the seed 0: nobody is in both.
    assert script.COHORT_SEED != 0
