"""The arm of lesson 05 whose text tower learns: exact at the start, and it learns."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medtut.course.lessons import ct, l05
from medtut.course.lessons.ct_text import AdaptedText
from medtut.course.profiles import resolve
from medtut.data.ct_rate import FINDINGS
from medtut.models import text_tower
from medtut.models.ctclip import CTCLIP, save_ctclip
from medtut.models.ctvit import CTViT
from medtut.models.text_tower import prompt_features

WORDS = ["there", "is", "no", "a", "nodule", "effusion", "in", "the", "lung", ".",
         "right", "left", "small"]  # fmt: skip
TEXTS = ["There is no nodule.", "There is a small effusion in the right lung.", "Lung"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=16,
        hidden_dropout_prob=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return text_tower.load_text_tower(folder, pooling="mean", normalise=True)


def test_at_the_start_it_says_what_the_tower_says(tower):
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    for layers in (1, 2):
        words = AdaptedText(tower, layers, 4).train()
        with torch.no_grad():
            for batch in (1, 64):  # alone, and padded
                found = words(TEXTS, batch)
                torch.testing.assert_close(found, tower(TEXTS), atol=1e-5, rtol=0)
        again = words.embed([TEXTS[2], TEXTS[0], TEXTS[2]], True)
        np.testing.assert_allclose(again, tower(TEXTS)[[2, 0, 2]].detach(), atol=1e-5)
        names = [n for n, p in words.named_parameters() if p.requires_grad]
        assert names
        assert all("lora_" in n for n in names)
        # Two matrices for query and value of each layer, and none of the tower's.
        assert len(names) == 2 * 2 * layers
        assert not any(n.startswith("bert") for n, _ in words.named_parameters())
    after = tower.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_what_is_kept_is_in_float32_whoever_asks_first(tower):
    words, other = AdaptedText(tower, 1, 4), AdaptedText(tower, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = words.read(TEXTS)
    for one, want in zip(found, other.read(TEXTS), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, want)


def test_a_report_is_the_mean_of_its_sentences_and_moves_its_adapters(tower):
    words = AdaptedText(tower, 2, 4)
    each = [TEXTS[:2], [TEXTS[1], TEXTS[1], TEXTS[2]]]
    found = words.reports(each)
    want = torch.stack([tower(one).mean(0) for one in each])
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    found.pow(3).sum().backward()
    # B is 0 at the start, so only its gradient is not.
    for name, p in words.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            assert p.grad.abs().max() > 0
    with torch.no_grad():
        for name, p in words.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
        assert (words(TEXTS) - tower(TEXTS)).abs().max() > 1e-3
        # What is cached is the frozen part alone.
        assert np.abs(words.embed(TEXTS) - tower(TEXTS).numpy()).max() > 1e-3


@pytest.fixture
def arm(tower, tmp_path, monkeypatch):
    """Settings, and patients that are embedded already."""
    torch.manual_seed(0)
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_tower, "load_text_tower", lambda source: tower)
    monkeypatch.setattr(ct, "embedded", lambda part, settings: part.volumes)
    ct.text_tower.cache_clear()
    stem = CTViT(16, (24, 32, 32), (6, 8, 8), 1, 1, 2, 8, stem="histogram")
    clip = CTCLIP(stem, 32, 8, "attention", pool_heads=4, bias=-2.0, log_scale=1.5)
    save_ctclip(clip, tmp_path / "tiny.safetensors", spacing=(12.0, 10.8, 10.8))
    given = {"weights": str(tmp_path / "tiny.safetensors"), "precision": "fp32",
             "epochs": 3.0, "batch_size": 4, "dev": 8, "test": 10}  # fmt: skip
    rng = np.random.default_rng(0)
    said = [" ".join(rng.permutation(WORDS[:9])) + "." for _ in range(8)]
    records = [SimpleNamespace(findings=t.capitalize(), impression="", name=t)
               for t in said]  # fmt: skip
    tokens = rng.normal(size=(8, 2, 2, 2, 16)).astype("f2")
    truth = rng.integers(0, 2, (8, 18)).astype(np.uint8)
    yield resolve("05", "smoke", given), ct.Part(records, tokens, truth)
    ct.text_tower.cache_clear()


def test_the_arm_trains_its_words_and_is_asked_by_them(arm, tower):
    settings, part = arm
    model, result = ct.train_arm("text_lora", 1, 1e-2, settings, {"train": part})
    assert result.steps == 6
    moved = [p for n, p in model.words.named_parameters() if "lora_B" in n]
    assert all(p.abs().max() > 1e-4 for p in moved)
    scores = ct.arm_scores(model, part, settings)
    yes, no = (F.normalize(torch.from_numpy(p) @ model.to_text.weight.T, dim=-1)
               for p in prompt_features(model.words, FINDINGS))  # fmt: skip
    found = ct.prompt_vectors(model, settings.text)
    np.testing.assert_allclose(found[0], yes.detach(), atol=1e-5)
    np.testing.assert_allclose(found[1], no.detach(), atol=1e-5)
    frozen = prompt_features(tower, FINDINGS, cache=False)[0]
    assert np.abs(frozen - prompt_features(model.words, FINDINGS)[0]).max() > 1e-4
    del model.words
    assert np.abs(ct.arm_scores(model, part, settings) - scores).max() > 1e-5


def test_apart_from_its_words_the_arm_begins_as_the_other_one(arm):
    settings, _ = arm
    made = {}
    for name in ("rms_swiglu_sigmoid", "text_lora"):
        torch.manual_seed(3)
        made[name] = ct.arm_model(ct.DESIGNS[name], settings, (2, 2, 2, 16))
    one, other = (m.state_dict() for m in made.values())
    assert {k for k in other if not k.startswith("words.")} == set(one)
    assert all(torch.equal(other[k], v) for k, v in one.items())


def test_the_diet_has_the_parameters_that_it_says(arm):
    settings, _ = arm
    grid, dim, latent = (2, 3, 2), 16, 8
    flat, rank = 3 * 2 * dim, latent // 8
    want = {"rms_swiglu_sigmoid": 4 * dim + dim * dim + dim * latent,
            "low_rank": flat * rank + rank * latent,
            "full_projection": flat * latent}  # fmt: skip
    for name, count in want.items():
        model = ct.arm_model(ct.DESIGNS[name], settings, (*grid, dim))
        assert sum(p.numel() for p in model.to_image.parameters()) == count, name


# --- the source's own training settings ----------------------------------------------


def test_full_has_the_settings_of_the_source_and_the_others_none():
    full = resolve("05", "full")
    assert [getattr(full, n) for n in l05.SCHEDULE] == [300, 0.5, 0.5, 200]
    assert full.validate_samples <= full.dev
    assert full.unset() == ()
    assert set(l05.SCHEDULE) < set(full.stored())
    for profile in ("smoke", "quick"):
        one = resolve("05", profile)
        assert one.unset() == l05.SCHEDULE
        # A run that was stored before they existed is still the same run.
        assert not set(l05.SCHEDULE) & set(one.stored())
        some = resolve("05", profile, {"warmup": 0})
        assert some.stored() == one.stored() | {"warmup": 0}


def test_every_committed_run_still_counts():
    from medtut.course import sweep

    now = resolve("05", "quick").stored()
    for run in sweep.load_sweep("05_ctclip_modern"):
        assert run["settings"] == now | {"seed": run["seed"]}, run["arm"]
        assert run["cohort"] == l05.COHORT_VERSION


@pytest.mark.parametrize("given", [
    {"warmup": -1}, {"clip_norm": -0.5}, {"validate_every": 0.0},
    {"validate_samples": 7},
])  # fmt: skip
def test_training_settings_out_of_range_are_refused(given):
    from medtut.course.profiles import SettingsError

    with pytest.raises(SettingsError, match=next(iter(given))):
        resolve("05", "smoke", given)


def test_training_gets_them(arm, monkeypatch):
    import medtut.train

    settings, part = arm
    calls, plain, judged = [], medtut.train.fit, []

    def fit(model, loss, data, config, **more):
        calls.append((config, more))
        return plain(model, loss, data, config, **more)

    monkeypatch.setattr(medtut.train, "fit", fit)
    scores = ct.arm_scores
    monkeypatch.setattr(
        ct, "arm_scores", lambda m, p, s: judged.append(len(p.truth)) or scores(m, p, s)
    )
    both = part.truth.copy()
    both[0], both[1] = 0, 1  # an AUROC of every finding
    part = ct.Part(part.records, part.volumes, both)
    parts = {"train": part, "dev": part}

    def run(**changes):
        given = settings.model_copy(update={"epochs": 10.0, **changes})
        return ct.train_arm("sigmoid_b4", 1, 1e-3, given, parts)[1]

    run()
    (config, more), = calls  # fmt: skip
    assert (config.warmup, config.clip_norm, config.eval_every) == (1, 1.0, 0)
    assert "validate" not in more
    calls.clear()
    result = run(warmup=7, clip_norm=0.25, validate_every=2.5, validate_samples=5)
    (config, more), = calls  # fmt: skip
    # 2.5 epochs of 8 patients in batches of 4 are 5 steps.
    assert (config.warmup, config.clip_norm, config.eval_every) == (7, 0.25, 5)
    assert judged == [5] * 4
    assert result.best["score"] == max(
        r["score"] for r in result.history if "score" in r
    )
    calls.clear()
    run(warmup=300)
    assert calls[0][0].warmup == 10, "half of 20 steps"
