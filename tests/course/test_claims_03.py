"""The claims of lesson 03: what they read, and that each could come out otherwise."""

import pytest

from medtut.course.claims import ClaimsError, judge, load_claims

LESSON = "03_sam_lora"

# Counts are exact; the rest is what claims/03.yml says it expects.
METRICS = {
    "adapter_rank64": 2_359_296,
    "adapter_rank128": 4_718_592,
    "adapter_rank256": 9_437_184,
    "self_target_first": 0.665,
    "self_target_last": 0.003,
    "self_target_dice_change": 0.0,
    "one_slice_dice": 0.013,
    "resize_loss": 0.01,
    "update_exponent_unscaled": 0.5,
    "update_exponent_rslora": 0.0,
    "rank_spread_unscaled": 0.06,
    "rank_spread_rslora": 0.02,
    "full_minus_lora": 0.0,
    "unmerged_slowdown": 1.11,
    "merged_equals_unmerged": 1e-5,
    "zero_shot": 0.72,
    "lora": 0.84,
    "lora_minus_zero": 0.12,
    "lora_minus_zero_low": 0.06,
    "jitter_loss": 0.08,
    "no_box": 0.2,
    "boxed": 0.85,
    "propagated": 0.77,
    "max_slice_minus_all": -0.02,
    "all_over_max_pictures": 9.0,
    "fusion_packed_minus_mean": 0.01,
}
# Only a full run with Meta's checkpoint records these.
VIT_B = {"vit_b_lora_minus_zero": 0.2, "vit_b_lora_minus_zero_low": 0.15}
UNTESTABLE = {
    "losses-between-005-and-03",
    "lora-improves-natural-image-sam",
    "two-ranges-for-one-model",
    "scans-combined-into-one-mask",
    "only-880-annotated",
    "crop-of-138-by-202",
    "samed-trains-the-prompt-encoder",
    "batches-do-not-fit",
    "space-depth-encoder-too-complex",
    "over-fitting-after-epoch-33",
}
CONTRADICTED = {
    "falling-loss-shows-better-masks",
    "every-tumour-slice-is-validated",
    "resizing-spoils-the-dice",
    "larger-ranks-stagnate",
    "few-parameters-limit-the-task",
    "no-inference-latency",
    "boxes-from-the-truth",
}


def test_lesson_03_as_expected():
    claims = load_claims(LESSON)
    assert claims.lesson == LESSON
    assert claims.metrics == set(METRICS) | set(VIT_B)
    for profile in ("quick", "full"):
        verdicts = judge(LESSON, METRICS, profile).verdicts()
        for name, verdict in verdicts.items():
            want = "contradicted" if name in CONTRADICTED else "reproduced"
            want = "not testable here" if name in UNTESTABLE else want
            assert verdict == want, name
        assert set(verdicts) >= UNTESTABLE | CONTRADICTED
    smoke = judge(LESSON, {}, "smoke").verdicts()
    assert set(smoke.values()) == {"not at this scale", "not testable here"}


def test_smoke_decides_only_what_needs_no_training():
    verdicts = judge(LESSON, METRICS, "smoke").verdicts()
    decided = {k for k, v in verdicts.items() if v in ("reproduced", "contradicted")}
    assert decided == {
        "every-tumour-slice-is-validated",
        "fewer-parameters",
        "merged-is-the-same-model",
    }


def test_research_question_is_not_answered_by_litemedsam():
    """However good the adapted LiteMedSAM is, the question is about another model."""
    best = METRICS | {"lora_minus_zero": 0.5, "lora_minus_zero_low": 0.4}
    row = judge(LESSON, best, "quick").rows[0]
    assert row.claim.id == "lora-improves-natural-image-sam"
    assert row.verdict == "not testable here"
    assert "ViT-B" in row.detail


@pytest.mark.parametrize("key", sorted(METRICS))
def test_each_metric_is_needed(key):
    lacking = {name: value for name, value in METRICS.items() if name != key}
    with pytest.raises(ClaimsError, match=rf"  {key} \("):
        judge(LESSON, lacking, "quick")


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        (
            {"self_target_dice_change": 0.3},
            "falling-loss-shows-better-masks",
            "reproduced",
        ),
        ({"one_slice_dice": 1.0}, "every-tumour-slice-is-validated", "reproduced"),
        ({"resize_loss": 0.2}, "resizing-spoils-the-dice", "reproduced"),
        ({"adapter_rank128": 4_718_593}, "fewer-parameters", "contradicted"),
        ({"rank_spread_rslora": 0.06}, "larger-ranks-stagnate", "reproduced"),
        (
            {"update_exponent_unscaled": 0.1},
            "first-step-grows-with-the-rank",
            "contradicted",
        ),
        (
            {"update_exponent_rslora": 0.3},
            "first-step-grows-with-the-rank",
            "contradicted",
        ),
        ({"rank_spread_unscaled": 0.01}, "finer-tuning-sheds-light", "contradicted"),
        ({"full_minus_lora": 0.03}, "few-parameters-limit-the-task", "reproduced"),
        ({"unmerged_slowdown": 1.0}, "no-inference-latency", "reproduced"),
        ({"merged_equals_unmerged": 0.01}, "merged-is-the-same-model", "contradicted"),
        ({"lora_minus_zero": 0.07}, "lora-adapts-litemedsam", "contradicted"),
        ({"lora_minus_zero_low": 0.03}, "lora-adapts-litemedsam", "contradicted"),
        ({"zero_shot": 0.9}, "zero-shot-leaves-room", "contradicted"),
        ({"zero_shot": 0.5}, "zero-shot-leaves-room", "contradicted"),
        ({"jitter_loss": 0.01}, "boxes-from-the-truth", "reproduced"),
        ({"no_box": 0.7}, "without-a-box-it-is-lost", "contradicted"),
        ({"propagated": 0.6}, "one-box-for-a-volume", "contradicted"),
        (
            {"max_slice_minus_all": -0.06},
            "max-slice-is-a-moderate-sacrifice",
            "contradicted",
        ),
        (
            {"all_over_max_pictures": 4.0},
            "max-slice-is-a-moderate-sacrifice",
            "contradicted",
        ),
        (
            {"fusion_packed_minus_mean": -0.05},
            "packing-is-as-good-as-averaging",
            "contradicted",
        ),
    ],
)
def test_each_claim_could_come_out_otherwise(changes, claim, verdict):
    assert judge(LESSON, METRICS | changes, "quick").verdicts()[claim] == verdict


def test_research_question_is_answered_by_full_with_vit_b():
    def verdict(profile, **changes):
        return judge(LESSON, METRICS | VIT_B | changes, profile).rows[0].verdict

    assert verdict("full") == "reproduced"
    assert verdict("full", vit_b_lora_minus_zero_low=-0.01) == "contradicted"
    assert verdict("full", vit_b_lora_minus_zero=None) == "not testable here"
    assert verdict("quick") == verdict("smoke") == "not testable here"
