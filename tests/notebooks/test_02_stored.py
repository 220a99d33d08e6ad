"""Lesson 02 as stored: its printed numbers are those of its metrics file."""

import ast
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

from medtut.course.claims import load_claims
from medtut.course.lessons import l02
from medtut.course.sweep import load_sweep
from medtut.evaluate import paired_comparison

ROOT = Path(__file__).parents[2]
SLUG = "02_medclip_segmentation"
NUMBER = r"([-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)"
COMPARED = {
    "lora_minus_published": ("lora", "published"),
    "lora_minus_vector": ("lora", "vector"),
    "lora_minus_head": ("lora", "head"),
    "lora_minus_full": ("lora", "full"),
    "dora_minus_lora": ("dora", "lora"),
    "four_minus_one": ("lora_4", "lora"),
}
OWN = {
    "as published": "own_split_published",
    "without background": "own_split_foreground",
}

# What the text in front of a printed number is, the metric it shows, and its factor.
PRINTED = [
    (rf"claimed {NUMBER} of", "adapter_parameters", 1),
    (rf"claimed \S+ of \S+: {NUMBER}%", "claimed_fraction", 100),
    (rf"trained {NUMBER} of", "trainable_parameters", 1),
    (rf"trained \S+ of \S+: {NUMBER}%", "true_trainable_fraction", 100),
    (rf"at batch size 2: {NUMBER} GiB", "activations_gib", 1),
    (rf"'threshold_baseline': 'whole-tumour Dice {NUMBER}", "threshold_baseline", 1),
    (rf"'brightest_blob': 'whole-tumour Dice {NUMBER}", "brightest_blob", 1),
    (rf"grid of 16 x 16: foreground Dice {NUMBER}", "oracle_16", 1),
    (rf"grid of 56 x 56: foreground Dice {NUMBER}", "oracle_56", 1),
    (
        rf"no tumour found at all +\{{'published': {NUMBER}",
        "all_background_published",
        1,
    ),
    (rf"the best 16 x 16 grid .*'inflation': {NUMBER}", "inflation_16", 1),
    (rf"split by patient: {NUMBER} findings", "split_false_alarms", 1),
    (
        rf"foreground Dice, one run each: \{{'published': '{NUMBER}'",
        "live_published",
        1,
    ),
    (rf"one run each: .*'lora': '{NUMBER}'", "live_lora", 1),
]
for name in COMPARED:
    said = rf"^{name.replace('_', ' ')} +"
    PRINTED += [
        (rf"{said}{NUMBER}", name, 1),
        (rf"{said}\S+ \(95 % interval {NUMBER} to", f"{name}_low", 1),
        (rf"{said}\S+ \(95 % interval \S+ to {NUMBER},", f"{name}_high", 1),
    ]
for said, key in OWN.items():
    PRINTED += [
        (rf"^{said} +by slice .*difference {NUMBER},", f"leak_{key}", 1),
        (rf"^{said} +by slice .*least {NUMBER}$", f"leak_{key}_least", 1),
    ]


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(ROOT / "notebooks" / f"{SLUG}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def stored():
    path = ROOT / "notebooks" / "metrics" / f"{SLUG}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def metrics(stored):
    return stored["metrics"]


@pytest.fixture(scope="module")
def arms():
    return l02.committed()


@pytest.fixture(scope="module")
def printed(notebook):
    return "\n".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    )


def test_stored_run_is_complete_and_evidence(stored, notebook):
    assert (stored["status"], stored["profile"], stored["evidence"]) == (
        "complete",
        "quick",
        True,
    )
    assert not [c for c in notebook.cells if re.search(r"\bTEXT_[A-Z]", c.source)]


@pytest.mark.parametrize(
    ("pattern", "name", "factor"), PRINTED, ids=[name for _, name, _ in PRINTED]
)
def test_printed_number_is_the_recorded_one(printed, metrics, pattern, name, factor):
    (text,) = re.findall(pattern, printed, re.MULTILINE)
    mantissa, _, exponent = text.replace(",", "").partition("e")
    digits = len(mantissa.partition(".")[2])
    unit = 10.0 ** (int(exponent or 0) - digits)
    shown = float(mantissa) * 10.0 ** int(exponent or 0)
    assert shown == pytest.approx(factor * metrics[name], abs=0.5001 * unit)


def test_people_in_the_animation_are_as_many_as_recorded(printed, metrics):
    (people,) = re.findall(r"the animation of patient 0 shows (.*)", printed)
    names = people.split(", ")
    assert len(set(names)) == metrics["gif_patients"] >= 2
    assert "our writer refuses:" in printed


def test_every_metric_that_a_claim_needs_was_recorded(metrics):
    assert load_claims("02").metrics <= set(metrics)


# --- the sweep --------------------------------------------------------------------


def test_committed_sweep_holds_the_same_five_seeds_and_patients_of_every_arm(arms):
    runs = load_sweep(SLUG)
    assert set(arms) == set(l02.ARMS)
    assert len({scores.shape for scores in arms.values()}) == 1
    assert arms["lora"].shape[0] >= 5
    assert arms["lora"].shape[1] >= 10
    assert all(((scores >= 0) & (scores <= 1)).all() for scores in arms.values())
    assert len({tuple(run["metrics"]["patients"]) for run in runs}) == 1
    for name in l02.ARMS:
        seeds = [run["seed"] for run in runs if run["arm"] == name]
        assert seeds == list(range(len(arms["lora"])))


def test_committed_runs_are_of_one_kind_and_at_the_present_cohort():
    runs = load_sweep(SLUG)
    settings = [{k: v for k, v in r["settings"].items() if k != "seed"} for r in runs]
    assert all(one == settings[0] for one in settings)
    assert settings[0]["profile"] == "quick"
    for key, value in l02.PRESETS["quick"].items():
        assert settings[0][key] == value
    assert {run["cohort"] for run in runs} == {l02.COHORT_VERSION}


def test_rates_come_from_one_grid_and_maximise_validation():
    for run in load_sweep(SLUG):
        by_rate = {float(k): v for k, v in run["metrics"]["validation_by_lr"].items()}
        assert set(by_rate) == set(l02.LEARNING_RATES)
        assert run["metrics"]["lr"] == max(by_rate, key=by_rate.get)
        best = max(score for _, score in run["metrics"]["validation"])
        steps = dict(map(tuple, run["metrics"]["validation"]))
        assert steps[run["metrics"]["best_step"]] == best


def test_score_of_a_run_is_the_mean_of_its_patients():
    for run in load_sweep(SLUG):
        metrics = run["metrics"]
        assert metrics["score"] == pytest.approx(np.mean(metrics["cases"]))
        parts = np.array([metrics[k] for k in ("NCR", "ED", "ET")], dtype=float)
        np.testing.assert_allclose(np.nanmean(parts, 0), metrics["cases"], atol=1e-6)


def test_dense_lora_beats_the_published_design(arms):
    result = paired_comparison(arms["lora"], arms["published"])
    assert result.difference >= 0.15
    assert result.low > 0.10
    assert result.seeds >= 5


@pytest.mark.parametrize("name", COMPARED)
def test_recorded_comparisons_are_those_of_the_committed_runs(metrics, arms, name):
    first, second = COMPARED[name]
    result = paired_comparison(arms[first], arms[second])
    assert metrics[name] == pytest.approx(result.difference, abs=1e-9)
    assert metrics[f"{name}_low"] == pytest.approx(result.low, abs=1e-9)
    assert metrics[f"{name}_high"] == pytest.approx(result.high, abs=1e-9)


def test_recorded_means_and_leak_are_those_of_the_committed_runs(metrics, arms):
    for name, scores in arms.items():
        assert metrics[f"sweep_{name}"] == pytest.approx(scores.mean(), abs=1e-9)
    for key in OWN.values():
        own = l02.committed(key)
        gap = own["leaky"] - own["lora"]
        assert metrics[f"leak_{key}"] == pytest.approx(gap.mean(), abs=1e-9)
        assert metrics[f"leak_{key}_least"] == pytest.approx(gap.min(), abs=1e-9)


def test_live_runs_agree_with_the_committed_ones(metrics, arms, stored):
    seed = stored["settings"]["seed"]
    for name in ("published", "lora"):
        assert abs(metrics[f"live_{name}"] - arms[name][seed].mean()) < 0.03
    assert metrics["live_minus_committed"] < 0.03


# --- what the text rests on -------------------------------------------------------


def test_what_the_text_states_holds_in_the_metrics(metrics):
    assert metrics["adapter_parameters"] == 141_312
    assert metrics["trainable_parameters"] == 1_708_644
    assert metrics["claimed_fraction"] == pytest.approx(141_312 / 28_053_882)
    assert metrics["true_trainable_fraction"] == pytest.approx(1_708_644 / 29_621_214)
    assert metrics["activations_gib"] < 0.1 * 12, "a few per cent of the promised"
    assert metrics["oracle_16"] < metrics["oracle_56"]
    assert metrics["live_published"] < metrics["oracle_16"]
    assert metrics["metric_findings"] >= 1
    assert metrics["metric_false_alarms"] == metrics["split_false_alarms"] == 0
    assert metrics["leaky_shared_patients"] >= 1
    assert 0.2 < metrics["all_background_published"] < 0.35, "a quarter of the scale"
    assert metrics["inflation_16"] > 0
    assert 0 < metrics["wrapped_fraction"] < 1
    assert metrics["pair_is_exact"] is True
    assert metrics["small_adapter"] == 47_104
    assert metrics["small_trainable"] == 47_104 + 143_172


def test_the_pair_on_disk_is_adapter_and_decoder(printed, metrics):
    (text,) = re.findall(r"(\{'[^\n]*seg_head\.pth[^\n]*\})", printed)
    files = {k: int(v.removesuffix(" KiB")) for k, v in ast.literal_eval(text).items()}
    assert any(name.startswith("lora_medclip/") for name in files)
    assert sum(files.values()) == pytest.approx(metrics["pair_bytes"] / 1024, abs=3)
    assert metrics["pair_bytes"] >= 4 * (47_104 + 143_172)
