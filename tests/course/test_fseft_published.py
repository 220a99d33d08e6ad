"""What lesson 06's opening says, each number against an own derivation."""

import math

import numpy as np
import pytest
import torch

from medtut.audit import Subject, audit
from medtut.course.claims import load_claims
from medtut.course.lessons import fseft_published as pub
from medtut.data.organs import STRUCTURES
from medtut.models.partial_loss import PartialDice
from medtut.models.published_fseft import published_dice

WIDTHS = [48, 48, 96, 96, 192, 192, 384, 384]
C, HEAD, DECODER = sum(WIDTHS), 49, 19_597_824


@pytest.fixture(autouse=True)
def _pure():
    """No function moves the global random state."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def table():
    return pub.method_table()


# -- counts ----------------------------------------------------------------------------
def test_table_of_counts(table):
    tables = 13**3 * 2 * (3 + 6 + 12 + 24)
    norms = 17_280
    phm = sum(2 * (64 + c * c // 4 + c) for c in WIDTHS)
    want = {
        "zero-shot": 0,
        "linear probe": HEAD,
        "spatial adapter, 1³": 2 * 48**2 + HEAD,
        "spatial adapter, 3³": 2 * 27 * 48**2 + HEAD,
        "bias of attention and MLP": 9 * C + HEAD,
        "bias, as published": 9 * C + tables + HEAD,
        "bias, all": 21_648 + HEAD,
        "bias, all, and tables": 21_648 + tables + HEAD,
        "norm": norms + HEAD,
        "LoRA, as published": 12 * 4 * C + HEAD,
        "LoRA for q, k, v apart": 6 * 4 * C + HEAD,
        "AdaptFormer, as published": sum(2 * 16 * c + 16 + c for c in WIDTHS) + HEAD,
        "Compacter, as published": phm + norms + HEAD,
        "Compacter, no norms": phm + HEAD,
        "all parameters": 62_188_031 - 28 * HEAD,
    }
    assert {row.method: row.trained for row in table} == want
    more = {row.method: row.with_decoder for row in table}
    assert more.pop("zero-shot") is None
    assert more.pop("all parameters") == want["all parameters"]
    assert all(n == want[name] + DECODER for name, n in more.items())


def test_with_decoder_is_what_adapt_counts(table):
    import copy

    net = copy.deepcopy(pub.full_size())
    method, options = pub.METHODS["LoRA, as published"]
    done = pub.adapt(net, method, structure=0, decoder="fine-tuned", **options)
    row = next(r for r in table if r.method == "LoRA, as published")
    assert done.total == row.with_decoder == 19_666_993


def test_the_axis_of_the_figure_agrees(table):
    trained = {row.method: row.trained for row in table}
    for name, power in pub.FIGURE_LOG10.items():
        assert math.log10(trained[name]) == pytest.approx(power, abs=0.0051), name
    honest = math.log10(trained["bias of attention and MLP"])
    assert abs(honest - pub.FIGURE_LOG10["bias, as published"]) > 1


def test_recorded_counts_are_metrics_of_claims(table):
    found = pub.counts(table)
    assert found["published_bias_parameters"] == 210_690
    assert found["published_bias_tables"] == 197_730
    assert found["honest_bias_parameters"] == 12_960
    assert found["lora_trainable"] == 69_169
    assert found["lora_decoder_trainable"] == 19_666_993
    assert found["decoder_share"] == pytest.approx(0.31514, abs=1e-5)
    rules = {m for c in load_claims("06_fseft_few_shot").claims for m in c.metrics}
    assert set(found) <= rules


def test_work_of_a_step():
    found = pub.step_flops(64)
    assert found["head"] == 2 * 48 * 64**3
    assert found["network"] > 1000 * found["head"]


# -- the source's tables ---------------------------------------------------------------
def test_arithmetic_of_the_tables():
    told = pub.source_arithmetic()
    assert told["source_listed"] == 2042
    assert told["source_average_error"] < 0.0051
    assert told["source_lora_minus_full_lungs"] == pytest.approx(-4.85)
    assert told["source_lora_minus_full_heart"] == pytest.approx(15.33)
    assert told["source_lora_minus_full_gluteus"] == pytest.approx(4.54)
    assert told["source_lora_minus_full_average"] == pytest.approx(5.01)
    assert told["source_lora_minus_decoder"] == pytest.approx(5.42)
    assert told["source_norm_minus_decoder"] == pytest.approx(0.21)
    assert told["source_bias_minus_decoder"] == pytest.approx(0.13)
    assert told["source_base_lora_minus_spatial"] == pytest.approx(0.5)
    assert told["source_se_of_five"] == pytest.approx(10 / math.sqrt(5))
    assert told["source_se_of_nine_organs"] == pytest.approx(
        told["source_se_of_five"] / 3
    )


def test_one_address_for_two():
    files = pub.one_address()
    assert files["btcv, linked"] == files["selfsup, linked"] != files["selfsup, meant"]
    said = pub.mistaken_for("selfsup")
    assert said.startswith("model_swinvit.pt is not checkpoint 'selfsup'")
    assert "btcv" in said
    assert "/tmp" not in said
    assert pub.mistaken_for("btcv") == "accepted"


# -- what a part does ------------------------------------------------------------------
def test_only_the_published_compacter_moves_the_start():
    found = pub.start_changes(range(2))
    theirs = found.pop("Compacter, as published")
    assert theirs.shape == (2, 5)
    assert (theirs[:, 0] == 0).all()  # nothing is adapted before the first block
    assert ((theirs[:, 1:] > 0.3) & (theirs[:, 1:] < 2)).all()
    assert (theirs[:, -1] > 0.8).all()
    assert set(found) == {"Compacter, ours", "AdaptFormer", "LoRA"}
    assert all((rows <= 1e-6).all() for rows in found.values())


def test_faultless_answers():
    cases = pub.dice_cases()
    assert cases["100 voxels"] == pytest.approx((200 / 201, 1))
    theirs, ours = cases["nothing, and nothing found"]
    assert theirs == 0
    assert math.isnan(ours)
    assert cases["100 and 60 voxels apart"] == pytest.approx((200 / 261, 1))


def test_thirty_are_twenty_nine():
    found = pub.shots()
    assert found["published"] == {1: 1, 5: 5, 10: 10, 30: 29}
    assert found["ours"] == {1: 1, 5: 5, 10: 10, 30: 30}


def test_audit_finds_the_metric():
    theirs = audit(Subject(metric=lambda p, t: published_dice(p > 0, t > 0)[0]))
    ours = audit(Subject(metric=lambda p, t: float(pub.dice(p > 0, t > 0)[0])))
    assert [f.where for f in theirs.findings] == ["order"]
    assert not ours.findings


# -- partial labels --------------------------------------------------------------------
def test_gradient_of_what_is_not_annotated():
    found = pub.gradient_reach()
    known = np.array([[True, True, False], [True, False, False]])
    assert (found["ignore"][~known] == 0).all()
    assert (found["ignore"][known] > 0).all()
    assert (found["background"] > 0).all()


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_background_teaches_what_the_majority_outlines(share):
    p = torch.linspace(0, 1, 101)
    masked, background = pub.mean_loss(share, p)
    assert masked.argmin() == 100
    assert masked[-1] == pytest.approx(0, abs=1e-6)
    assert background[0] == pytest.approx(share * 100 / 101)
    assert background[-1] == pytest.approx((1 - share) * 100 / 101)
    assert background.argmin() == (100 if share > 0.5 else 0)


def test_mean_loss_is_that_of_the_package():
    outlined = torch.tensor([[True], [False], [False], [True], [False]])
    target = torch.zeros(5, 1, 5, 5, 4) + outlined[..., None, None, None]
    logits = torch.full_like(target, 0.7)
    want = pub.mean_loss(0.4, torch.tensor([0.7]).sigmoid())
    for rule, expected in zip(("ignore", "background"), want, strict=True):
        got = PartialDice(rule)(logits, target, outlined)
        assert float(got) == pytest.approx(float(expected), abs=1e-6)


def test_sets_take_turns():
    shares = pub.sampler_shares(3)
    assert len(shares) == 14
    assert shares["abdomenct_1k"][0] == pytest.approx(706 / 2042)
    assert all(drawn == pytest.approx(1 / 14) for _, drawn in shares.values())


# -- a rank that is found --------------------------------------------------------------
def test_rank_is_found_by_the_threshold_alone():
    assert pub.found_rank(True) == (3, 0)
    left, largest = pub.found_rank(False)
    assert left == 16
    assert 0 < largest < 0.05  # small, and not zero
    assert pub.found_rank(True, weight=0)[0] == 16


# -- pictures --------------------------------------------------------------------------
def test_pictures(table):
    _, axes = pub.viz.figure(2, 1)
    pub.draw_network(axes[0])
    said = [text.get_text() for text in axes[0].texts]
    assert {"8,062,002", "34,526,784", "19,597,824", "1,421"} <= set(said)
    pub.draw_methods(axes[1], table)
    labels = [t.get_text() for t in axes[1].get_yticklabels()]
    assert labels == [row.method for row in table if row.trained]
    _, axes = pub.viz.figure(1, 2)
    pub.draw_changes(axes[0], {k: np.ones((2, 5)) for k in "abcd"})
    pub.draw_majority(axes[1])
    assert len(axes[1].get_legend().get_texts()) == 4
    assert STRUCTURES[4] == "esophagus"  # the row that the notebook takes
