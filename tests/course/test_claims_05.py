"""The claims of lesson 05: what they read, and that each could come out otherwise."""

from functools import cache

import numpy as np
import pytest

from medtut.course.claims import ClaimsError, judge, load_claims

LESSON = "05_ctclip_modern"
CLAIMS = load_claims(LESSON)

# Counts and arithmetic are exact; the rest is what claims/05.yml expects. Beside
# a value stands one that turns a claim which reads it.
EXACT = {
    "published_bias_change": (0.0, 0.01),
    "flash_relative_difference": (0.89, 0.001),
    "published_layer_norms": (24, 0),
    "published_rms_norms": (2, 26),
    "published_rms_nan": (1, 0),
    "published_dead_parameters": (174_812_584, 0),
    "published_dead_share": (174_812_584 / 458_836_457, 0.0),
    "temperature_moved": (0.006, 2.0),
    "ours_bias_change": (0.02, 0.0),
    "ours_layer_norms": (0, 2),
    "ours_dead_parameters": (0, 512),
    "fused_difference": (4e-7, 0.01),
    "memory_fused_growth": (2.0, 4.0),
    "memory_explicit_growth": (3.9, 2.0),
    "source_speedup_total": (1311.98 / 1234.89, 344.52 / 320.68),
    "attention_matrix_gb": (24.46, 2.0),
    "source_epoch_compute_share": (0.427, 0.95),
    "source_auroc_points": (62.0 - 60.4, 2.6),
    "source_volumes_sum": (47_319 + 3_038, 47_149 + 3_039),
    "source_implied_f1": (2 * 0.294 * 0.666 / (0.294 + 0.666), 0.45),
    "swiglu_over_geglu_flops": (1.0, 1.5),
    "published_interval_width": (0.0, 0.05),
}
TRAINED = {
    "sigmoid_minus_softmax": (-0.004, 0.01),
    "sigmoid_minus_softmax_low": (-0.015, 0.002),
    "small_batch_gain": (-0.01, 0.03),
    "small_batch_gain_low": (-0.03, 0.01),
    "seed_spread_softmax_b4": (0.010, 0.005),
    "seed_spread_sigmoid_b4": (0.009, 0.02),
    "seed_spread_gap_low": (-0.001, 0.0005),
    "seed_spread_gap_high": (0.002, -0.0005),
    "diverged_share_softmax": (0.1, 0.0),
    "diverged_share_sigmoid": (0.05, 0.2),
    "softmax_b4": (0.66, 0.6),
    "softmax_b64": (0.62, 0.7),
    "sigmoid_b4": (0.67, 0.6),
    "sigmoid_b64": (0.63, 0.7),
    "rms_minus_layer": (0.002, -0.03),
    "rms_minus_layer_low": (-0.008, -0.04),
    "rms_minus_layer_high": (0.011, 0.04),
    "swiglu_minus_geglu": (-0.003, 0.02),
    "swiglu_minus_geglu_low": (-0.008, 0.01),
    "swiglu_minus_geglu_high": (0.004, -0.002),
    "rms_swiglu_sigmoid": (0.675, 0.64),
    "layer_geglu_sigmoid": (0.674, 0.7),
    "layer_geglu_softmax": (0.67, 0.6),
    "zero_shot_source": (0.83, 0.78),
    "zero_shot_source_visible": (0.85, 0.81),
    "zero_shot_minus_baseline": (0.12, 0.05),
    "probe_source": (0.86, 0.8),
    "zero_shot_target": (0.75, 0.83),
    "zero_shot_target_lora": (0.78, 0.7),
    "baseline_target": (0.66, 0.75),
    "lora_gain": (0.03, -0.01),
    "lora_gain_low": (0.01, -0.01),
    "withheld_auroc": (0.56, 0.8),
    "named_auroc": (0.84, 0.6),
    "prompt_mismatch_loss": (0.04, 0.0),
    "recall_at_half": (0.5, 0.7),
    "f1_at_half": (0.45, 0.55),
    "f1_dev_threshold": (0.55, 0.46),
    "f1_test_threshold": (0.6, 0.55),
    "retrieval_r5": (0.4, 0.2),
    "retrieval_r5_chance": (0.1, 0.2),
}
METRICS = {key: value for key, (value, _) in (EXACT | TRAINED).items()}
GPU = {"gpu.memory_ratio": 0.5, "gpu.step_speedup": 1.7}
CONTRADICTED = {
    "position-bias-is-used",
    "flash-path-is-the-same-attention",
    "rmsnorm-replaces-layernorm",
    "rmsnorm-is-numerically-stable",
    "every-parameter-is-trained",
    "temperature-is-learned",
    "speedup-of-107",
    "epoch-is-step-time",
    "auroc-and-recall-in-one-measure",
    "volumes-of-ct-rate",
    "f1-is-that-of-precision-and-recall",
    "siglip-beats-softmax",
    "siglip-is-better-in-small-batches",
    "larger-batches-are-better",
    "full-stack-improves-performance",
    "supervised-level",
    "holds-on-another-scanner",
    "unseen-findings-are-found",
    "any-wording-will-do",
    "recall-at-one-half",
    "thresholds-may-see-the-test",
    "intervals-come-from-resampling",
}
UNDECIDED = {"swiglu-is-better", "siglip-is-more-stable"}
UNTESTABLE = {
    "inference-script-runs",
    "several-gpus",
    "mit-license",
    "what-is-cited",
    "f1-beside-the-paper",
    "report-generation",
    "pet-and-mri",
    "detection-and-staging",
}
ON_GPU = "promised-on-a-gpu"
# A claim of two rules stays contradicted until both of these have changed.
TOGETHER = {
    "published_layer_norms": {"published_rms_norms": 26},
    "published_rms_norms": {"published_layer_norms": 0},
    "published_dead_parameters": {"published_dead_share": 0.0},
    "published_dead_share": {"published_dead_parameters": 0},
    "softmax_b4": {"sigmoid_b64": 0.7},
    "softmax_b64": {"sigmoid_b64": 0.7},
    "sigmoid_b4": {"softmax_b64": 0.7},
    "sigmoid_b64": {"softmax_b64": 0.7},
    "named_auroc": {"withheld_auroc": 0.8},
    "recall_at_half": {"f1_at_half": 0.55},
    "f1_at_half": {"recall_at_half": 0.7},
    "f1_dev_threshold": {"recall_at_half": 0.7},
}
for gain in ("sigmoid_minus_softmax", "small_batch_gain"):
    low = f"{gain}_low"
    TOGETHER |= {gain: {low: TRAINED[low][1]}, low: {gain: TRAINED[gain][1]}}
# While the interval holds 0, nothing else counts; where it does not, these do.
DECIDED = {"swiglu_minus_geglu": {"swiglu_minus_geglu_low": 0.001}}
SPREAD = ("seed_spread_softmax_b4", "seed_spread_sigmoid_b4",
          "diverged_share_softmax", "diverged_share_sigmoid")  # fmt: skip
DECIDED |= {key: {"seed_spread_gap_low": 0.0005} for key in SPREAD}


@cache
def verdicts_as_expected():
    return judge(LESSON, METRICS, "quick").verdicts()


@cache
def turned_by(key):
    """Return the claims whose verdict is another with the other value."""
    other = {key: (EXACT | TRAINED)[key][1], **TOGETHER.get(key, {})}
    given, before = METRICS | DECIDED.get(key, {}), verdicts_as_expected()
    if key in DECIDED:
        before = judge(LESSON, given, "quick").verdicts()
    now = judge(LESSON, given | other, "quick").verdicts()
    return {name for name in now if now[name] != before[name]}


def test_verdicts_as_expected():
    assert CLAIMS.lesson == LESSON
    assert CLAIMS.metrics == {*METRICS, *GPU}
    for profile in ("quick", "full"):
        verdicts = judge(LESSON, METRICS, profile).verdicts()
        said = {
            word: {k for k, v in verdicts.items() if v == word}
            for word in ("contradicted", "not testable here")
        }
        assert said["contradicted"] == CONTRADICTED
        assert said["not testable here"] == UNTESTABLE | {ON_GPU}
        undecided = {k for k, v in verdicts.items() if v == "not at this scale"}
        assert undecided == UNDECIDED


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
    ids = {one.id for one in CLAIMS.claims}
    assert turned == ids - UNTESTABLE - {ON_GPU}


def test_gpu_table_is_judged_where_there_is_one():
    def verdict(profile, **changes):
        return judge(LESSON, METRICS | GPU | changes, profile).verdicts()[ON_GPU]

    assert verdict("quick") == verdict("full") == "reproduced"
    assert verdict("full", **{"gpu.memory_ratio": 0.7}) == "contradicted"
    assert verdict("full", **{"gpu.step_speedup": 1.1}) == "contradicted"
    assert verdict("full", **{"gpu.step_speedup": None}) == "not testable here"


# ---------------------------------------------- expectations that arithmetic can hold
def test_numbers_quoted_from_the_tables():
    text = {one.id: one.expectation for one in CLAIMS.claims}
    seconds = 7_463 / 8 * 1.23489
    matrices = 16 * 24 * 8 * 4 * 576**2 * (4 + 2) / 1e9
    quoted = {
        "speedup-of-107": f"{1311.98 / 1234.89:.3f}",
        "epoch-is-step-time": f"are {seconds / 60:.0f} minutes, {seconds / 2700:.2f}",
        "auroc-and-recall-in-one-measure": f"gains {100 * (0.774 / 0.666 - 1):.1f} %",
        "f1-is-that-of-precision-and-recall": f"{METRICS['source_implied_f1']:.3f}",
        "volumes-of-ct-rate": f"{METRICS['source_volumes_sum']:,}",
        "memory-is-the-attention-matrices": f"About {matrices:.1f}:",
    }
    assert 47_149 + 3_039 == 50_188
    for name, said in quoted.items():
        assert said in text[name], name


def test_numbers_quoted_from_the_published_code():
    from medtut.models.published_ctclip import (
        BERT_BASE,
        published_ledger,
        temperature_reach,
    )

    text = {one.id: one.expectation for one in CLAIMS.claims}
    total = published_ledger()
    dead, whole = total.rows["dead"].parameters, total.total.parameters + BERT_BASE
    assert (dead, whole) == (174_812_584, 458_836_457)
    said = f"{dead / 1e6:.1f} of {whole / 1e6:.1f} million parameters, "
    assert said + f"{100 * dead / whole:.0f} %" in text["every-parameter-is-trained"]
    assert f"by {temperature_reach():.3f} at" in text["temperature-is-learned"]


def test_an_average_f1_never_exceeds_that_of_average_precision_and_recall():
    """It is concave, so Jensen's inequality holds: the listed averages exclude it."""
    rng = np.random.default_rng(0)
    p, r = rng.uniform(1e-3, 1, size=(2, 5000, 18))
    mean_p, mean_r = p.mean(1), r.mean(1)
    listed = (2 * p * r / (p + r)).mean(1)
    assert (listed <= 2 * mean_p * mean_r / (mean_p + mean_r) + 1e-12).all()
    assert METRICS["source_implied_f1"] < 0.45
