"""What lesson 05's autopsy says, each number against an own derivation."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from medtut.audit import Subject, audit
from medtut.course.claims import load_claims
from medtut.course.lessons import ct_published as ct
from medtut.lora import find_dead
from medtut.models import ct_attention, ctvit
from medtut.models import published_ctclip as published


@pytest.fixture(autouse=True)
def _pure():
    """No function moves the global random state."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


# -- the source's tables ---------------------------------------------------------------
def test_arithmetic_of_the_tables():
    told = ct.source_arithmetic()
    assert told["source_speedup_total"] == pytest.approx(1311.98 / 1234.89)
    assert 1.0624 < told["source_speedup_total"] < 1.0625
    assert told["source_speedup_visual"] == pytest.approx(1.0743, abs=5e-5)
    assert told["source_speedup_backward"] == pytest.approx(1.0661, abs=5e-5)
    assert told["source_memory_saved_gb"] == pytest.approx(28.03)
    matrices = 16 * 24 * 8 * 4 * 576 * 576
    assert told["attention_matrix_gb"] == pytest.approx(6 * matrices / 1e9)
    assert told["attention_matrix_gb"] == pytest.approx(24.46, abs=5e-3)
    steps = 7463 / 8
    assert told["source_epoch_compute_share"] == pytest.approx(
        steps * 1.23489 / 60 / 45
    )
    assert told["source_epoch_compute_share"] == pytest.approx(0.427, abs=5e-4)
    assert told["source_epoch_compute_share_16"] == pytest.approx(0.2133, abs=1e-4)
    assert told["source_volumes_sum"] == 50_357 != 47_149 + 3_039
    assert told["source_implied_f1"] == pytest.approx(0.408, abs=5e-4)
    assert told["source_auroc_points"] == pytest.approx(1.6)
    assert told["source_auroc_relative_gain"] == pytest.approx(2.649, abs=1e-3)
    assert told["source_recall_points"] == pytest.approx(10.8)
    assert told["source_recall_relative_gain"] == pytest.approx(16.216, abs=1e-3)


def test_the_published_times_are_those_of_their_rows():
    assert len(ct.EFFICIENCY) == 4
    for (arm, _), (memory, visual, backward, total) in ct.EFFICIENCY.items():
        assert visual + backward < total < visual + backward + 100
        assert round(memory) == {"as it was": 119, "all on": 91}[arm]


# -- parameters ------------------------------------------------------------------------
def test_books_of_the_published_module():
    books, record = ct.published_books()
    assert record["published_parameters"] == 458_836_457
    assert record["published_dead_parameters"] == 174_812_584
    share = record["published_dead_share"]
    assert share == pytest.approx(174_812_584 / 458_836_457)
    assert books.total.parameters == 458_836_457 - published.BERT_BASE


def test_the_diet_of_the_projection():
    flat, latent, dim, heads, rank = 24 * 24 * 512, 512, 512, 8, 64
    assert ct.projection_diet() == {
        "published": flat * latent,
        "low_rank": rank * (flat + latent),
        "attention": dim * heads + dim * dim + dim * latent,
        "mean": dim * latent,
    }


def test_norms_by_class(monkeypatch):
    want = {"published_rms_norms": 2, "published_layer_norms": 24,
            "ours_rms_norms": 20, "ours_layer_norms": 0}  # fmt: skip
    assert ct.norm_counts() == want
    # One norm that is fixed, whatever the switch says, is seen.
    rms = ct_attention.make_norm
    fixed = lambda kind, dim, bias=False: (  # noqa: E731
        nn.LayerNorm(dim) if bias else rms(kind, dim)
    )
    monkeypatch.setattr(ctvit, "make_norm", fixed)
    assert ct.norm_counts()["ours_layer_norms"] > 0


@pytest.mark.parametrize("projection", ["published", "low_rank", "attention", "mean"])
def test_no_loss_leaves_a_parameter_of_ours_out(projection):
    for loss in ("softmax", "sigmoid"):
        model = ct.small_clip(True, loss=loss, projection=projection)
        assert find_dead(model, ct.contrast(model, ct.small_batch())) == []


def test_the_small_copy_as_published_has_dead_parts():
    model = ct.small_clip(False)
    dead = find_dead(model, ct.contrast(model, ct.small_batch()))
    starts = ("image_tower.bias", "image_tower.decoder_", "to_image_extra")
    assert all(any(n.startswith(one) for n in dead) for one in starts)


# -- what a part does ------------------------------------------------------------------
def test_the_bias_moves_ours_only(monkeypatch):
    assert ct.bias_change(ours=False) == 0.0
    assert ct.bias_change(ours=True) > 1e-4
    kernel = ct_attention.BACKENDS["fused"]
    dropped = lambda q, k, v, scale, bias: kernel(q, k, v, scale, None)  # noqa: E731
    monkeypatch.setitem(ct_attention.BACKENDS, "fused", dropped)
    assert ct.bias_change(ours=True) == 0.0


def test_flash_is_another_function_and_half_precision_is_not(monkeypatch):
    found = ct.flash_differences(range(2), tokens=128)
    assert found.shape == (2, 2)
    assert (found[:, 0] > 0.5).all()
    assert (found[:, 1] < 0.02).all()
    assert found[0, 0] != found[1, 0]
    # With the switch doing what it says, the difference is that of float16.
    monkeypatch.setattr(
        published,
        "PublishedAttention",
        lambda dim, heads, dim_head, flash, rms: ct_attention.Attention(
            dim, heads, dim_head, "layer", "fused" if flash else "explicit"
        ),
    )
    assert (ct.flash_differences(range(2), tokens=128) < 0.02).all()


def test_norms_in_float16(monkeypatch):
    bad, good = {"nan": 1, "lost": 1}, {"nan": 0, "lost": 0}
    assert ct.rms_in_float16() == {"published": bad, "ours": good}

    def wide(self, x):
        y = nn.functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6)
        return y.to(x.dtype)

    monkeypatch.setattr(published.PublishedRMSNorm, "forward", wide)
    assert ct.rms_in_float16()["published"] == good


def test_a_bootstrap_that_draws_and_one_that_does_not():
    assert ct.interval_width(resample=False) == 0.0
    assert 0.05 < ct.interval_width(resample=True) < 0.6
    rng = np.random.default_rng(1)
    truth = np.arange(40) % 2 == 0
    scores = rng.normal(size=40) + truth
    draws = ct.bootstrap_of(True, draws=300)(scores, truth, 0)
    whole = roc_auc_score(truth, scores)
    assert draws.shape == (300,)
    assert draws.std() > 0.02
    assert abs(draws.mean() - whole) < 0.02
    assert ct.bootstrap_of(False)(scores, truth, 0) == pytest.approx(whole)
    assert not np.array_equal(draws, ct.bootstrap_of(True, draws=300)(scores, truth, 1))


def test_what_the_audit_finds_from_outside():
    def look(ours, bootstrap):
        model = ct.small_clip(ours)
        return audit(
            Subject(
                model=model,
                batch=ct.small_batch(),
                forward=lambda model, batch: model(*batch),
                loss=ct.contrast,
                switches={"position bias": "image_tower.bias"},
                bootstrap=bootstrap,
            )
        ).findings

    found = look(False, ct.bootstrap_of(False))
    assert {one.detector for one in found} == {
        "trainable_without_gradient",
        "switch_changes_nothing",
        "bootstrap_of_zero_width",
    }
    assert look(True, ct.bootstrap_of(True)) == ()


def test_smaller_tokens_make_the_flash_path_differ_more():
    sizes = (1.0, 0.5, 0.1)
    found = [ct.flash_differences(range(1), 200, size)[0, 0] for size in sizes]
    assert 0.6 < found[0] < found[1] - 0.03 < found[2] - 0.06 < 0.94


# -- built right -----------------------------------------------------------------------
def test_fused_attention_is_the_one_written_out(monkeypatch):
    assert ct.fused_difference(range(2), side=6) <= 1e-5
    kernel, bend = ct_attention.BACKENDS["fused"], {}

    def wrong(q, k, v, scale, bias):
        if "gradient" in bend:  # the values are right
            k = 0.9 * k + 0.1 * k.detach()
        return kernel(q, k, v, bend.get("scale", 1) * scale, bend.get("bias", 1) * bias)

    monkeypatch.setitem(ct_attention.BACKENDS, "fused", wrong)
    for bend in ({"scale": 1.02}, {"bias": 0.9}, {"gradient": True}):
        assert ct.fused_difference(range(1), side=6) > 1e-4, bend


def test_fused_grows_with_the_tokens_and_written_out_with_their_square():
    tokens = (72, 144, 288)
    kept = ct.memory_curves(tokens, batch=2)
    assert set(kept) == {
        "written out", "fused", "fused, fixed bias", "fused, trained bias"
    }  # fmt: skip
    matrix, row = (
        [2 * 8 * n * n * 4 for n in tokens],
        [2 * 8 * n * 32 * 4 for n in tokens],
    )
    for k in range(3):
        assert kept["written out"][k] >= matrix[k] + 3 * row[k]
        assert 3 * row[k] <= kept["fused"][k] <= 5 * row[k]
        shared = kept["fused, fixed bias"][k] - kept["fused"][k]
        assert shared == matrix[k] / 2  # one for both planes
    assert kept["fused"][2] / kept["fused"][1] <= 2.2
    assert kept["written out"][2] / kept["written out"][1] >= 3


def test_both_gates_cost_the_same():
    tokens, dim, inner = 8, 512, 1365
    want = 3 * 2 * tokens * (dim * 2 * inner + inner * dim)  # forward, two gradients
    assert ct.gated_flops("geglu", tokens) == ct.gated_flops("swiglu", tokens) == want


# -- the committed benchmark -----------------------------------------------------------
def test_without_a_result_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(ct, "repository_root", lambda: tmp_path)
    assert ct.load_bench("gpu") is None
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "ctclip_gpu.json").write_text(json.dumps({"arms": {}}), encoding="utf-8")
    assert ct.load_bench("gpu") == {"arms": {}}
    assert ct.load_bench("cpu") is None


def test_the_table_by_part_reads_what_the_bench_writes(tmp_path):
    from benchmarks import ctclip
    from benchmarks.ctclip_arms import BY_LOSS

    names = [n for pair in BY_LOSS.values() for n in pair]
    state = {
        "settings": {"apart": False}, "arms": names, "batch": 2,
        "memory": {n: {"parameters": 1} for n in names},
        "rounds": [{n: dict.fromkeys(ct.PARTS, 1.0 + k) for k, n in enumerate(names)}],
    }  # fmt: skip
    state["memory"][names[3]] = {"skipped": "no kernel"}
    table = ct.by_part(ctclip.summary(state, {}))
    assert [seconds[2] for seconds in table.values()] == [1, 2, 3, 5, 6]
    keys = [(arm, loss) for arm in ("published", "same, fused", "all on")
            for loss in ("softmax", "sigmoid")]  # fmt: skip
    assert list(table) == keys[:3] + keys[4:]


def test_costs_are_those_of_the_committed_table():
    found = ct.by_cost(ct.load_bench("cpu"))
    assert list(found) == ["all on", "all on, checkpointing", "all on, low rank 64",
                           "all on, attention pooling"]  # fmt: skip
    memory, speed, parameters = zip(*found.values(), strict=True)
    # What the lesson says of them.
    assert [round(x, 2) for x in memory[:2]] == [0.75, 0.41]
    assert [round(x, 2) for x in speed[:2]] == [1.02, 0.82]
    assert [round(x / 1e6, 1) for x in parameters] == [4.2, 4.2, 3.1, 1.9]
    row = {"memory_ratio": 0.5, "total_speedup": 2.0, "parameters": 7}
    some = {"all on": row, "all on, low rank 64": row | {"memory_ratio": None}}
    assert ct.by_cost({"arms": some}) == {"all on": (0.5, 2.0, 7)}


# -- all of it together ----------------------------------------------------------------
def test_claims_of_this_part_find_their_metrics():
    told = ct.source_arithmetic() | ct.published_books()[1] | ct.norm_counts()
    said = {"published_bias_change", "ours_bias_change", "flash_relative_difference",
            "published_rms_nan", "temperature_moved", "ours_dead_parameters",
            "fused_difference", "memory_explicit_growth", "memory_fused_growth",
            "swiglu_over_geglu_flops", "published_interval_width"}  # fmt: skip
    known = {m for claim in load_claims("05").claims for m in claim.metrics}
    recorded = known & (set(told) | said)
    own = {m for m in known if m.startswith(("source_", "published_", "ours_"))}
    assert own <= recorded
    assert said <= known
    assert {"attention_matrix_gb", "source_auroc_points"} <= recorded
    assert math.isclose(published.temperature_reach(), 0.00588, abs_tol=1e-5)
