"""The claims of lesson 06: what they read, and that each could come out otherwise."""

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch

from medtut.course import claims as module
from medtut.course.claims import ClaimsError, judge, load_claims

LESSON = "06_fseft_few_shot"
CLAIMS = load_claims(LESSON)
DECODER, TOTAL = 19_597_824, 62_188_031
TABLES, BIASES = 197_730, 12_960
LORA = 69_120 + 49

# Counts and arithmetic are exact; the rest is what claims/06.yml expects. Beside
# a value stands one that turns a claim which reads it.
EXACT = {
    "published_bias_parameters": (TABLES + BIASES, BIASES),
    "published_bias_tables": (TABLES, 0),
    "honest_bias_parameters": (BIASES, TABLES + BIASES),
    "lora_start_change": (0.0, 0.01),
    "published_compacter_change": (1.0, 0.0),
    "lora_trainable": (LORA, 34_609),
    "lora_decoder_trainable": (LORA + DECODER, 2 * LORA),
    "decoder_share": (DECODER / TOTAL, 0.02),
    "published_perfect_dice": (200 / 201, 1.0),
    "published_empty_dice": (0.0, 1.0),
    "published_thirty_shot": (29, 30),
}
TRAINED = {
    "cache_speedup": (30.0, 6.0),
    "base_k1_zero_shot": (0.63, 0.74),
    "base_k10_zero_shot": (0.63, 0.78),
    "base_k1_probe": (0.675, 0.72),
    "base_k5_probe": (0.685, 0.73),
    "base_k10_probe": (0.69, 0.75),
    "base_k1_spatial3": (0.70, 0.62),
    "base_k5_spatial3": (0.715, 0.66),
    "base_k10_spatial3": (0.73, 0.695),
    "base_k10_spatial1": (0.71, 0.725),
    "base_k1_full": (0.71, 0.69),
    "base_k10_full": (0.76, 0.74),
    "base_k10_lora": (0.76, 0.79),
    "base_k10_norm": (0.755, 0.7),
    "base_k10_bias": (0.75, 0.7),
    "base_k10_compacter": (0.75, 0.7),
    "blackbox_gain_k1": (0.07, 0.04),
    "blackbox_gain_k1_low": (0.05, -0.01),
    "novel_lora_minus_full": (0.0, 0.03),
    "novel_lora_minus_full_low": (-0.012, 0.01),
    "novel_lora_minus_scratch": (0.2, 0.08),
    "novel_lora_minus_scratch_low": (0.14, -0.01),
    "novel_k5_lora": (0.6, 0.64),
    "novel_k5_adaptformer": (0.605, 0.58),
    "novel_k5_norm": (0.603, 0.58),
    "novel_k5_bias": (0.602, 0.58),
    "novel_k5_probe": (0.59, 0.55),
    "background_minus_partial": (-0.15, 0.02),
    "background_minus_partial_high": (-0.1, 0.03),
    "adaptive_rank_minus_fixed": (-0.003, 0.02),
    "adaptive_rank_minus_fixed_low": (-0.012, 0.005),
    "adaptive_rank_mean": (6.0, 16.0),
}
METRICS = {key: value for key, (value, _) in (EXACT | TRAINED).items()}
REAL = {"real_zero_shot_dice": 0.2, "real_adapted_dice": 0.6}
ON_REAL = "one-real-ct"
CONTRADICTED = {
    "bias-tuning-trains-biases",
    "compacter-starts-at-the-pretrained-network",
    "novel-organs-are-parameter-efficient",
    "perfect-organ-scores-one",
    "nothing-to-find-is-no-failure",
    "thirty-shots-are-thirty",
    "zero-shot-on-another-hospital",
    "one-volume-is-nearly-enough",
    "full-fine-tuning-is-limited",
    "lora-leads-with-ten",
    "peft-beats-full-fine-tuning",
    "lora-is-the-best-adapter",
    "adapting-the-encoder-is-what-helps",
    "adaptive-rank-beats-fixed-ranks",
}
UNTESTABLE = {
    "scored-on-the-organ",
    "five-test-volumes",
    "published-code-runs",
    "seeds-are-read",
    "where-things-are",
    "scans-of-the-pretraining",
    "selfsup-weights-are-self-supervised",
    "scratch-is-from-scratch",
    "options-of-the-command",
    "every-method-on-every-network",
    "over-precomputed-features",
    "supervised-beats-self-supervised",
    "distributed-pretraining",
    "allocated-adapters",
    "size-prior-helps",
}
# A claim of several rules stays contradicted until all of these have changed.
TOGETHER = {
    "published_bias_parameters": {"published_bias_tables": 0},
    "published_bias_tables": {"published_bias_parameters": BIASES},
    "honest_bias_parameters": {"published_bias_tables": 0},
    "decoder_share": {"lora_decoder_trainable": 2 * LORA},
    "lora_decoder_trainable": {"decoder_share": 0.02},
}
for gain in ("novel_lora_minus_full", "adaptive_rank_minus_fixed"):
    low = f"{gain}_low"
    TOGETHER |= {gain: {low: TRAINED[low][1]}, low: {gain: TRAINED[gain][1]}}
OTHERS = {f"novel_k5_{name}": 0.58 for name in ("adaptformer", "norm", "bias")}
for name in OTHERS:
    TOGETHER[name] = {key: value for key, value in OTHERS.items() if key != name}

# Two claims may read one lower end with two limits; this turns the other one.
LOWER = {
    "novel_lora_minus_full_low": (-0.03, "no-worse-than-full-fine-tuning"),
    "adaptive_rank_minus_fixed_low": (-0.03, "no-rank-to-choose"),
}


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """Reading the file is most of what a verdict costs; it is judged 200 times."""
    monkeypatch.setattr(module, "load_claims", lambda *where: CLAIMS)


@cache
def verdicts_as_expected():
    return judge(LESSON, METRICS, "quick").verdicts()


@cache
def turned_by(key):
    """Return the claims whose verdict is another with the other value."""
    other = {key: (EXACT | TRAINED)[key][1], **TOGETHER.get(key, {})}
    now = judge(LESSON, METRICS | other, "quick").verdicts()
    return {name for name in now if now[name] != verdicts_as_expected()[name]}


def test_verdicts_as_expected():
    assert CLAIMS.lesson == LESSON
    assert CLAIMS.metrics == {*METRICS, *REAL}
    for profile in ("quick", "full"):
        verdicts = judge(LESSON, METRICS, profile).verdicts()
        said = {
            word: {k for k, v in verdicts.items() if v == word}
            for word in ("contradicted", "not testable here")
        }
        assert said["contradicted"] == CONTRADICTED
        assert said["not testable here"] == UNTESTABLE | {ON_REAL}
        assert "not at this scale" not in verdicts.values()


def test_smoke_decides_only_what_needs_no_training():
    row_of = {row.claim.id: row for row in judge(LESSON, METRICS, "smoke").rows}
    for row in row_of.values():
        decided = row.verdict in ("reproduced", "contradicted")
        exact = bool(row.claim.metrics) and {*row.claim.metrics} <= set(EXACT)
        assert decided == exact, row.claim.id
    nothing = judge(LESSON, {}, "smoke").verdicts().values()
    assert set(nothing) == {"not at this scale", "not testable here"}


@pytest.mark.parametrize("key", METRICS)
def test_each_number_is_needed_and_can_turn_a_claim(key):
    lacking = {name: value for name, value in METRICS.items() if name != key}
    with pytest.raises(ClaimsError, match=rf"  {key} \("):
        judge(LESSON, lacking, "quick")
    readers = {one.id for one in CLAIMS.claims if key in one.metrics}
    assert turned_by(key) & readers


@pytest.mark.parametrize("key", TOGETHER)
def test_one_rule_of_two_is_not_enough(key):
    alone = {key: (EXACT | TRAINED)[key][1]}
    found = judge(LESSON, METRICS | alone, "quick").verdicts()
    both = [one for one in CLAIMS.claims if key in one.metrics]
    both = {one.id for one in both if {*TOGETHER[key]} & {*one.metrics}}
    assert both & CONTRADICTED
    assert {found[name] for name in both} == {"contradicted"}


def test_every_claim_with_a_rule_is_turned_by_some_number():
    turned = set().union(*map(turned_by, METRICS))
    for key, (value, name) in LOWER.items():
        now = judge(LESSON, METRICS | {key: value}, "quick").verdicts()
        assert (verdicts_as_expected()[name], now[name]) == (
            "reproduced",
            "contradicted",
        )
        assert name not in turned
        turned.add(name)
    ids = {one.id for one in CLAIMS.claims}
    assert turned == ids - UNTESTABLE - {ON_REAL}


def test_each_of_two_rules_decides_where_the_other_holds():
    def verdict(name, **changes):
        return judge(LESSON, METRICS | changes, "quick").verdicts()[name]

    assert "black-box-improves-from-one-volume" in turned_by("base_k1_spatial3")
    assert "black-box-improves-from-one-volume" in turned_by("blackbox_gain_k1_low")
    lead = {"base_k10_full": 0.74}
    assert verdict("lora-leads-with-ten", **lead) == "reproduced"
    lead["base_k10_spatial3"] = 0.77
    assert verdict("lora-leads-with-ten", **lead) == "contradicted"


def test_every_rule_can_fail_its_claim():
    """None holds for every number, and none for no number."""
    for claim in CLAIMS.claims:
        for rule in claim.rules:
            numbers = (-1e9, 0, 0.5, 6, 30, LORA, 1e9)
            assert {rule.holds(x) for x in numbers} == {True, False}, claim.id


def test_real_ct_is_judged_where_there_is_one():
    def verdict(profile, **changes):
        return judge(LESSON, METRICS | REAL | changes, profile).verdicts()[ON_REAL]

    assert verdict("quick") == verdict("full") == "reproduced"
    assert verdict("quick", real_adapted_dice=0.1) == "contradicted"
    assert verdict("full", real_zero_shot_dice=None) == "not testable here"
    assert verdict("smoke") == "not testable here"


# ---------------------------------------------- expectations that arithmetic can hold
TEXT = {one.id: " ".join((one.source.where, one.statement, one.expectation))
        for one in CLAIMS.claims}  # fmt: skip

# Dice in %, novel structures, 10 shots, from the authors' table: lung, heart, gluteus.
TABLE = {
    "self-supervised": (19.59, 53.14, 55.37, 42.70),
    "all parameters": (31.01, 60.79, 65.35, 52.38),
    "decoder": (25.98, 65.69, 64.23, 51.97),
    "biases": (26.17, 65.78, 64.34, 52.10),
    "norms": (26.09, 65.91, 64.53, 52.18),
    "adaptformer": (23.84, 72.32, 69.79, 55.32),
    "lora": (26.16, 76.12, 69.89, 57.39),
}


def test_numbers_quoted_from_the_table():
    for name, row in TABLE.items():
        assert round(float(np.mean(row[:3])), 2) == pytest.approx(row[3]), name
    mean = {name: f"{row[3]:.2f}" for name, row in TABLE.items()}
    text = TEXT["peft-beats-full-fine-tuning"]
    assert f"LoRA {mean['lora']}, all parameters {mean['all parameters']}" in text
    lung = [TABLE[name][0] for name in ("lora", "all parameters")]
    assert lung[0] < lung[1]
    assert "({:.2f} after {:.2f})".format(*lung) in text
    order = sorted(("lora", "adaptformer", "norms", "biases"), key=mean.get)[::-1]
    assert (
        "{}, then {}, {} and {}".format(*map(mean.get, order))
        in (TEXT["lora-is-the-best-adapter"])
    )
    assert (
        f"decoder alone {mean['decoder']}" in TEXT["adapting-the-encoder-is-what-helps"]
    )
    gains = [TABLE[k][3] - TABLE["decoder"][3] for k in ("biases", "norms")]
    assert round(max(gains), 1) == 0.2  # "add 0.2 points at most"
    pair = f"{mean['all parameters']} after {mean['self-supervised']}"
    assert pair in TEXT["supervised-beats-self-supervised"]


def test_five_volumes_leave_an_interval():
    assert f"{0.1 / math.sqrt(5):.3f}" in TEXT["five-test-volumes"]


def test_numbers_quoted_from_the_published_score_and_draw():
    from medtut.models.published_fseft import published_dice, published_support

    organ = torch.ones(100)
    perfect = published_dice(organ, organ)[0]
    assert perfect == pytest.approx(METRICS["published_perfect_dice"])
    assert f"{perfect:.3f}" in TEXT["perfect-organ-scores-one"]
    empty = published_dice(torch.zeros(9), torch.zeros(9))
    assert empty[0] == METRICS["published_empty_dice"]
    assert all(math.isnan(one) for one in empty[1:])
    ids = [f"s{i:04d}" for i in range(35)]
    found = [len(published_support(ids, k, 1)[0]) for k in (1, 5, 10, 30)]
    assert found == [1, 5, 10, METRICS["published_thirty_shot"]]
    with pytest.raises(ValueError, match="Sample larger"):
        published_support(ids[:29], 30, 1)


def test_numbers_quoted_from_the_network():
    from monai.networks.nets import SwinUNETR

    from medtut.adapters import adapt
    from medtut.models.published_fseft import published_bias

    model = SwinUNETR(in_channels=1, out_channels=29, feature_size=48).to("meta")
    assert sum(p.numel() for p in model.parameters()) == TOTAL
    found = published_bias(model)
    tables = sum(n for name, n in found.items() if "table" in name)
    assert sum(found.values()) == METRICS["published_bias_parameters"]
    assert tables == METRICS["published_bias_tables"]
    text = TEXT["bias-tuning-trains-biases"]
    share = f"{100 * tables / sum(found.values()):.0f} %"
    for said in (f"{sum(found.values()):,}", f"{tables:,}, or {share}", f"{BIASES:,}"):
        assert said in text

    def trained(method, **how):
        return adapt(copy.deepcopy(model), method, structure=0, **how).total

    lora = trained("lora", rank=4, joint=True)
    more = trained("lora", rank=4, joint=True, decoder="fine-tuned")
    full = trained("full")
    assert (lora, more) == (
        METRICS["lora_trainable"],
        METRICS["lora_decoder_trainable"],
    )
    assert trained("bias") == METRICS["honest_bias_parameters"] + 49
    assert f"of {full:,}" in TEXT["lora-trains-one-in-a-thousand"]
    assert f"10^{math.log10(lora):.2f}" in TEXT["lora-trains-one-in-a-thousand"]
    text = TEXT["novel-organs-are-parameter-efficient"]
    assert f"{more - lora:,} parameters or {100 * (more - lora) / TOTAL:.1f} %" in text
    assert f"factor of {full / more:.0f}, not of {full / lora:.0f}" in text
