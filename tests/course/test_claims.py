"""Claims: the schema refuses what it must, and verdicts are computed."""

import pytest
import yaml

from medtut.course import claims as module
from medtut.course.claims import ClaimsError, Rule, judge, load_claims

CLAIM = {
    "id": "one",
    "source": {"citation": "Somebody 2024", "where": "table 1"},
    "statement": "a < b & c",
    "expectation": "It holds.",
    "rules": [{"metric": "x", "op": ">=", "value": 0.5}],
    "scale_required": ["quick", "full"],
}

# What the lesson is expected to measure, from closed forms or the specification.
METRICS_01 = {
    "start_difference": 0.0,
    "merged_max_difference": 4e-7,
    "bench_merged_over_base": 1.01,
    "trainable_fraction": 0.03,
    "lora_minus_full": 0.006,
    "lora_minus_full_low": -0.002,
    "rank_for_90_percent_energy": 20,
    "width": 192,
    "norm_slope_unscaled": 0.5,
    "norm_slope_alpha_over_r": -0.5,
    "norm_slope_rslora": 0.0,
    "drift_fp32": 1.7e-8,
    "drift_bf16": 1.1e-3,
    "medclip_adapter_fraction": 141_312 / 28_053_882,
    "medclip_trainable_fraction": 1_708_644 / 29_621_214,
}

# Counts are exact; the rest is what claims/02.yml says it expects.
METRICS_02 = {
    "claimed_fraction": 141_312 / 28_053_882,
    "true_trainable_fraction": 1_708_644 / 29_621_214,
    "adapter_parameters": 141_312,
    "trainable_parameters": 1_708_644,
    "activations_gib": 0.6,
    "all_background_published": 0.26,
    "live_published": 0.5,
    "oracle_16": 0.7,
    "oracle_56": 0.9,
    "sweep_published": 0.3,
    "sweep_vector": 0.4,
    "lora_minus_head": 0.06,
    "lora_minus_head_low": 0.03,
    "lora_minus_full": -0.05,
    "lora_minus_full_low": -0.08,
    "lora_minus_published": 0.2,
    "lora_minus_published_low": 0.12,
    "gif_patients": 3,
    "leak_own_split_published_least": 0.01,
    "leak_own_split_foreground_least": 0.02,
}


@pytest.fixture
def write(tmp_path):
    def written(**changes):
        claim = {**CLAIM, **changes}
        claim = {k: v for k, v in claim.items() if v is not None}
        text = yaml.safe_dump({"lesson": "07_test", "claims": [claim]})
        (tmp_path / "07.yml").write_text(text, encoding="utf-8")
        return tmp_path

    return written


@pytest.mark.parametrize(
    ("rule", "number", "holds"),
    [
        ({"op": ">=", "value": 0.5}, 0.5, True),
        ({"op": ">=", "value": 0.5}, 0.49, False),
        ({"op": "<=", "value": 0.5}, 0.5, True),
        ({"op": "<=", "value": 0.5}, 0.51, False),
        ({"op": ">", "value": 0.5}, 0.5, False),
        ({"op": ">", "value": 0.5}, 0.6, True),
        ({"op": "<", "value": 0.5}, 0.5, False),
        ({"op": "<", "value": 0.5}, 0.4, True),
        ({"op": "==", "value": 0}, 0.0, True),
        ({"op": "==", "value": 0}, 1e-12, False),
        ({"between": [0.4, 0.6]}, 0.4, True),
        ({"between": [0.4, 0.6]}, 0.6, True),
        ({"between": [0.4, 0.6]}, 0.39, False),
        ({"between": [0.4, 0.6]}, 0.61, False),
    ],
)
def test_rules_decide(write, rule, number, holds):
    folder = write(rules=[{"metric": "x", **rule}])
    verdict = judge(7, {"x": number}, "quick", folder).verdicts()["one"]
    assert verdict == ("reproduced" if holds else "contradicted")


def test_ratio_and_difference_are_measured(write):
    ratio = {"ratio": ["a", "b"], "op": "==", "value": 2}
    gap = {"difference": ["a", "b"], "op": "==", "value": 3}
    folder = write(rules=[ratio, gap])
    row = judge("07", {"a": 6, "b": 3}, "quick", folder).rows[0]
    assert row.verdict == "reproduced"
    assert dict(row.measured) == {"a / b": 2.0, "a − b": 3.0}
    one_fails = judge("07", {"a": 4, "b": 2}, "quick", folder).rows[0]
    assert one_fails.verdict == "contradicted"
    assert one_fails.detail == "not so: a − b = 3"
    with pytest.raises(ClaimsError, match="b = 0"):
        judge("07", {"a": 6, "b": 0}, "quick", folder)


def test_an_interval_that_holds_0_decides_nothing(write):
    rule = {"metric": "x", "op": ">", "value": 0}
    folder = write(rules=[rule], interval=["low", "high"], scale_required=["quick"])

    def verdict(low, high, x=1.0):
        row = judge("07", {"x": x, "low": low, "high": high}, "quick", folder).rows[0]
        return row.verdict

    # Whatever the rules say.
    assert verdict(-0.1, 0.2) == verdict(-0.1, 0.2, -1.0) == "not at this scale"
    assert verdict(-0.1, 0.0) == verdict(0.0, 0.1) == "not at this scale"
    assert verdict(0.01, 0.2) == "reproduced"
    assert verdict(-0.2, -0.01, -1.0) == "contradicted"
    given = {"x": -0.004, "low": -0.012, "high": 0.1}
    row = judge("07", given, "quick", folder).rows[0]
    assert row.detail == "its interval, -0.012 to 0.1, holds 0"
    with pytest.raises(ClaimsError, match=r"high \(claim one\)"):
        judge("07", {"x": 1, "low": 1}, "quick", folder)
    bare = {"testable": False, "reason": "?", "rules": [], "scale_required": []}
    write(**bare, interval=["low", "high"])
    with pytest.raises(ClaimsError, match="testable: false"):
        judge("07", {}, "quick", folder)


def test_missing_metric_is_named_except_in_smoke(write):
    folder = write(scale_required=["smoke", "quick"])
    with pytest.raises(ClaimsError, match=r"x \(claim one\)"):
        judge(7, {}, "quick", folder)
    with pytest.raises(ClaimsError, match="x"):
        judge(7, {"x": None}, "quick", folder)
    row = judge(7, {}, "smoke", folder).rows[0]
    assert (row.verdict, row.detail) == ("not at this scale", "smoke is not evidence")
    assert judge(7, {"x": 1}, "smoke", folder).rows[0].verdict == "reproduced"


def test_scale_is_required(write):
    folder = write(scale_required=["full"])
    row = judge(7, {"x": 1}, "quick", folder).rows[0]
    assert (row.verdict, row.detail) == ("not at this scale", "decided in full")
    assert row.measured == (("x", 1.0),)
    assert judge(7, {}, "quick", folder).rows[0].verdict == "not at this scale"
    assert judge(7, {"x": 0}, "full", folder).rows[0].verdict == "contradicted"
    with pytest.raises(ClaimsError, match="smoke, quick, full"):
        judge(7, {"x": 1}, "fast", folder)


def test_not_testable_here_gives_its_reason(write):
    folder = write(testable=False, reason="No data.", rules=None, scale_required=None)
    row = judge(7, {}, "full", folder).rows[0]
    assert (row.verdict, row.detail) == ("not testable here", "No data.")


@pytest.mark.parametrize("value", ["0.7", True, float("nan"), float("inf"), [1]])
def test_metric_that_is_no_number_is_refused(write, value):
    with pytest.raises(ClaimsError, match="'x'"):
        judge(7, {"x": value}, "quick", write())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rules": [{"metric": "x", "op": "=>", "value": 1}]}, "'=>' is no operator"),
        ({"rules": [{"metric": "x", "op": ">="}]}, "belong together"),
        ({"rules": [{"metric": "x"}]}, "either op with value"),
        ({"rules": [{"op": ">=", "value": 1}]}, "exactly one of metric"),
        (
            {"rules": [{"metric": "x", "ratio": ["a", "b"], "op": "<", "value": 1}]},
            "exactly one of metric",
        ),
        ({"rules": [{"metric": "x", "between": [2, 1]}]}, "low end first"),
        (
            {"rules": [{"metric": "x", "between": [1, 2], "op": "<", "value": 1}]},
            "either op",
        ),
        ({"rules": [{"metric": "x", "op": "<", "value": "1e-4"}]}, "valid number"),
        ({"rules": [{"metrik": "x", "op": "<", "value": 1}]}, "metrik"),
        ({"verdict": "reproduced"}, "verdict (one): is not a known key"),
        ({"scale_required": ["quik"]}, "'smoke', 'quick' or 'full'"),
        ({"scale_required": []}, "needs rules and scale_required"),
        ({"testable": False}, "leaves no place"),
        ({"testable": False, "rules": None, "scale_required": None}, "needs a reason"),
        ({"reason": "because", "scale_required": ["smoke"]}, "reason belongs"),
        ({"source": {"citation": "x"}}, "where"),
        ({"id": "Not an id"}, "id"),
        ({"expectation": None}, "expectation"),
    ],
)
def test_schema_refuses(write, changes, said):
    with pytest.raises(ClaimsError) as caught:
        load_claims(7, write(**changes))
    assert said in str(caught.value)
    assert "07.yml" in str(caught.value)


def test_same_id_twice_bad_yaml_and_no_file(tmp_path):
    path = tmp_path / "07.yml"
    text = yaml.safe_dump({"lesson": "x", "claims": [CLAIM, CLAIM]})
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ClaimsError, match="used twice: one"):
        load_claims(7, tmp_path)
    path.write_text("lesson: [", encoding="utf-8")
    with pytest.raises(ClaimsError, match="not valid YAML"):
        load_claims(7, tmp_path)
    for slug in (8, "../07", "seven"):
        with pytest.raises(ClaimsError, match="There are: 07"):
            load_claims(slug, tmp_path)


def test_table_in_three_forms(write):
    table = judge(7, {"x": 0.25}, "quick", write())
    assert "a &lt; b &amp; c" in table._repr_html_()
    assert "contradicted" in table._repr_html_()
    assert "measured: x = 0.25 (not so: x ≥ 0.5)" in str(table)
    row = table.to_dict()["claims"][0]
    assert row["measured"] == {"x": 0.25}
    assert row["rules"] == ["x ≥ 0.5"]


@pytest.mark.parametrize(
    "path", sorted(module.FOLDER.glob("*.yml")), ids=lambda p: p.stem
)
def test_committed_files_fit_the_schema(path):
    assert load_claims(path.stem).lesson.startswith(path.stem + "_")


def test_lesson_01_as_expected():
    assert load_claims("01_lora_math").metrics == set(METRICS_01)
    verdicts = judge("01_lora_math", METRICS_01, "quick").verdicts()
    unlike = {name: v for name, v in verdicts.items() if v != "reproduced"}
    assert unlike == {
        "ten-thousand-times-fewer": "not testable here",
        "recover-by-subtracting-bfloat16": "contradicted",
        "sam-ranks-are-comparable": "contradicted",
        "medclip-only-half-a-percent-trained": "contradicted",
    }
    smoke = judge("01_lora_math", {}, "smoke").verdicts()
    assert set(smoke.values()) == {"not at this scale", "not testable here"}


def test_lesson_02_as_expected():
    assert load_claims("02").lesson == "02_medclip_segmentation"
    assert load_claims("02").metrics == set(METRICS_02)
    verdicts = judge("02", METRICS_02, "quick").verdicts()
    unlike = {name: v for name, v in verdicts.items() if v != "contradicted"}
    assert unlike == {
        "scheduler-log-and-curves": "not testable here",
        "slices-of-brats": "not testable here",
        "best-validation-dice": "not at this scale",
        "lora-carries-the-model-over": "reproduced",
        "dense-lora-beats-the-published-design": "reproduced",
        "the-leak-raises-the-score": "reproduced",
    }
    full = judge("02", METRICS_02, "full").verdicts()
    assert full == verdicts | {"best-validation-dice": "contradicted"}
    smoke = judge("02", {}, "smoke").verdicts()
    assert set(smoke.values()) == {"not at this scale", "not testable here"}


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        ({"true_trainable_fraction": 0.005}, "half-a-percent", "reproduced"),
        ({"trainable_parameters": 141_312}, "only-adapters-are-trained", "reproduced"),
        ({"activations_gib": 9.5}, "twelve-gigabytes", "reproduced"),
        ({"sweep_vector": 0.34}, "imbalance-takes-care-of-itself", "reproduced"),
        ({"all_background_published": 0}, "dice-averaged-over-classes", "reproduced"),
        ({"oracle_56": 0.74}, "decoder-draws-at-full-size", "reproduced"),
        ({"lora_minus_head_low": -0.01}, "lora-carries-the-model-over", "contradicted"),
        ({"gif_patients": 1}, "one-patient-in-motion", "reproduced"),
        (
            {"lora_minus_published_low": 0.1},
            "dense-lora-beats-the-published-design",
            "contradicted",
        ),
        (
            {"lora_minus_published": 0.14},
            "dense-lora-beats-the-published-design",
            "contradicted",
        ),
        (
            {"leak_own_split_foreground_least": -0.01},
            "the-leak-raises-the-score",
            "contradicted",
        ),
        (
            {"lora_minus_full": 0.0, "lora_minus_full_low": -0.01},
            "lora-as-good-as-full",
            "reproduced",
        ),
    ],
)
def test_lesson_02_could_come_out_otherwise(changes, claim, verdict):
    verdicts = judge("02", METRICS_02 | changes, "quick").verdicts()
    assert verdicts[claim] == verdict


def test_rule_text_is_readable():
    rule = Rule(difference=("a", "b"), op=">=", value=-0.02)
    assert str(rule) == "a − b ≥ -0.02"
