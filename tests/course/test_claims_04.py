"""The claims of lesson 04: what they read, and that each could come out otherwise."""

import pytest

from medtut.course.claims import ClaimsError, judge, load_claims

LESSON = "04_vgg16_lora"

# Counts are exact; the rest is what claims/04.yml says it expects. Beside each value
# stands one that turns a claim which reads it.
EXACT = {
    "dead_parameters": (299_008, 0),
    "trainable_published": (134_276_932, 315_396),
    "lora_linear_parameters": (299_008, 299_009),
    "lora_conv_parameters": (301_272, 571_608),
    "scramble_correlation": (-0.11, 1.0),
    "constant_meningioma": (115 / 394, 100 / 394),
    "prior_entropy_real": (1.34805, 1.3863),
    "output_spread_features": (4e-7, 0.1),
    "output_spread_logits": (4.3e-8, 0.1),
    "output_spread_he": (0.3, 4.3e-8),
    "micro_equals_accuracy": (1, 0),
}
TRAINED = {
    "published_distinct_answers": (1, 3),
    "published_accuracy": (0.25, 0.8),
    "plateau_loss": (1.349, 0.6),
    "plateau_entropy": (1.348, 2.0),
    "head": (0.72, 0.2),
    "lora_linear": (0.74, 0.9),
    "lora_conv": (0.8, 0.7),
    "lora_both": (0.81, 0.9),
    "lora_conv_minus_head": (0.08, -0.01),
    "lora_conv_minus_head_low": (0.04, -0.01),
    "lora_conv_minus_full": (-0.01, -0.1),
    "dora": (0.75, 0.73),
    "pissa": (0.735, 0.76),
    "svd_error": (0.99, 0.05),
    "svd_accuracy": (0.6, 0.8),
    "adapter_mb": (1.26, 2.0),
    "cache_speedup": (40.0, 10.0),
    "size_alone": (0.5, 0.26),
    "kfold_mean": (0.95, 0.82),
    "prior_correction_gain": (0.02, 0.0),
    "ece_before": (0.12, 0.05),
    "ece_after": (0.06, 0.2),
    "missed_tumours_before": (0.06, 0.01),
    "missed_tumours_after": (0.02, 0.1),
    "pca_baseline": (0.7, 0.85),
    "pooled": (0.8, 0.93),
    "pooled_conv": (0.8, 0.6),
}
METRICS = {key: value for key, (value, _) in (EXACT | TRAINED).items()}
REAL = {"real.accuracy": 0.83, "real.balanced_accuracy": 0.8}
CONTRADICTED = {
    "lora-replaces-w-by-uv",
    "fewer-parameters-are-trained",
    "images-fit-the-input",
    "competitive-performance",
    "losses-steadily-decreased",
    "precision-equals-recall",
    "conservative-with-false-negatives",
    "slight-imbalance",
    "the-linears-are-the-place",
    "pissa-outperforms-lora",
    "uv-alone-approximates-w",
    "cross-validation-shows-robustness",
    "pca-first",
}
UNTESTABLE = {
    "two-units-at-the-end",
    "augmentation-contrast-and-cross-validation",
    "tensorflow-is-required",
    "class-codes",
    "auroc-is-modest",
    "table-of-settings",
    "higher-rates-are-poorer",
    "weights-or-resampling",
    "ranks-and-rates",
    "other-architectures",
    "another-data-set",
    "other-domains",
}
ON_REAL = "eighty-percent-on-the-official-test"
# A claim of two rules stays contradicted until both of these have changed.
TOGETHER = {
    "head": {"published_distinct_answers": 3},
    "published_accuracy": {"published_distinct_answers": 3},
    "svd_error": {"svd_accuracy": 0.8},
    "svd_accuracy": {"svd_error": 0.05},
}


def turned_by(key):
    """Return the claims whose verdict is another with the other value."""
    other = {key: (EXACT | TRAINED)[key][1], **TOGETHER.get(key, {})}
    first = judge(LESSON, METRICS, "quick").verdicts()
    now = judge(LESSON, METRICS | other, "quick").verdicts()
    return {name for name in now if now[name] != first[name]}


def test_verdicts_as_expected():
    assert load_claims(LESSON).lesson == LESSON
    assert load_claims(LESSON).metrics == {*METRICS, *REAL}
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
    readers = {one.id for one in load_claims(LESSON).claims if key in one.metrics}
    assert turned_by(key) & readers


@pytest.mark.parametrize("key", TOGETHER)
def test_one_rule_of_two_is_not_enough(key):
    found = judge(LESSON, METRICS | {key: TRAINED[key][1]}, "quick").verdicts()
    both = [one for one in load_claims(LESSON).claims if key in one.metrics]
    both = {one.id for one in both if {*TOGETHER[key]} & {*one.metrics}}
    assert both & CONTRADICTED
    assert {found[name] for name in both} == {"contradicted"}


def test_every_claim_with_a_rule_is_turned_by_some_number():
    turned = set().union(*map(turned_by, METRICS))
    ids = {one.id for one in load_claims(LESSON).claims}
    assert turned == ids - UNTESTABLE - {ON_REAL}


def test_real_pictures_are_judged_where_they_are_given():
    def verdict(profile, **changes):
        return judge(LESSON, METRICS | REAL | changes, profile).verdicts()[ON_REAL]

    assert verdict("full") == "reproduced"
    assert verdict("full", **{"real.accuracy": 0.746}) == "contradicted"
    assert verdict("full", **{"real.balanced_accuracy": 0.7}) == "contradicted"
    assert verdict("full", **{"real.accuracy": None}) == "not testable here"
