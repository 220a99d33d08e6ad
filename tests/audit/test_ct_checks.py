"""CT detectors: each fires on the defect and is silent without it."""

import numpy as np
import pytest
import torch
from torch import nn

from medtut.audit import DETECTORS, Subject, SubjectError, audit
from medtut.audit import ct_checks as ct
from medtut.audit.cli import run_audit

NEW = ("hu_rescaled_twice", "switch_changes_nothing", "bootstrap_of_zero_width")


def only(result, kind="error"):
    (one,), _ = result
    assert one.severity == kind
    return one


# --------------------------------------------------------------- (a) HU rescaled twice
def chest(padding=-1000, seed=0):
    """Air, a body with lungs and bone, in HU."""
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[-1:1:24j, -1:1:32j, -1:1:32j]
    hu = np.full(z.shape, -1000.0)
    hu[y**2 + x**2 > 0.98] = padding
    body, lungs = (
        (y / 0.6) ** 2 + (x / 0.9) ** 2 < 1,
        (np.abs(x) - 0.4) ** 2 + y**2 < 0.06,
    )
    hu[body] = 40
    hu[body & lungs] = -850
    hu[(y - 0.5) ** 2 + x**2 < 0.01] = 400
    return (hu + rng.normal(0, 15, hu.shape)).astype(np.float32)


def model_input(hu):
    return (hu.clip(-1000, 1000) / 1000)[None]


@pytest.mark.parametrize(
    "read",
    [chest(), chest() - 20, model_input(chest()), torch.tensor(chest()),
     chest()[:, 8:24, 8:24], chest(padding=-3024).clip(-1000, 1000)],
)  # fmt: skip
def test_volumes_in_hu_pass(read):
    assert ct.hu_rescaled_twice(Subject(hu=read)) == ([], [])


def test_padding_below_air_is_a_note_only():
    found, (note,) = ct.hu_rescaled_twice(Subject(hu=chest(padding=-3024)))
    assert found == []
    assert "padding" in note


@pytest.mark.parametrize(
    "read",
    [chest() - 1024, chest().clip(-1024) - 1024, model_input(chest() - 1024),
     np.full((1, 8, 8, 8), -1.0), chest(padding=-2000) - 1024],
)  # fmt: skip
def test_volumes_rescaled_twice_are_found(read):
    one = only(ct.hu_rescaled_twice(Subject(hu=read)))
    assert one.numbers["tissue"] < 0.01
    assert "rescale none" in one.message


def sound(stored, slope, intercept):
    if stored.min() < -200:
        raise ValueError("these are HU already")
    return stored * slope + intercept


def lenient(stored, slope, intercept):
    return stored if stored.min() < -200 else stored * slope + intercept


@pytest.mark.parametrize(
    "rescale", [sound, lenient, lambda *a: torch.tensor(lenient(*a))]
)
def test_sound_readers_pass(rescale):
    assert ct.hu_rescaled_twice(Subject(rescale=rescale)) == ([], [])


def test_a_reader_that_rescales_whatever_comes_is_found():
    one = only(ct.hu_rescaled_twice(Subject(rescale=lambda v, a, b: v * a + b)))
    assert (one.numbers["air"], one.numbers["water"]) == (-2024, -1024)
    clips = Subject(rescale=lambda v, a, b: (v * a + b).clip(-1000, 1000))
    assert only(ct.hu_rescaled_twice(clips)).numbers["water"] == -1000


def test_a_reader_that_never_rescales_is_found():
    one = only(ct.hu_rescaled_twice(Subject(rescale=lambda v, a, b: v)))
    assert "24 and 1024" in one.message


def test_a_reader_that_refuses_what_is_stored_as_usual():
    with pytest.raises(SubjectError, match="int16 24 and 1024"):
        ct.hu_rescaled_twice(Subject(rescale=lambda v, a, b: 1 / 0))


# ------------------------------------------------------- (b) switches without an effect
class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return self.weight * x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


class Block(nn.Module):
    """Attention with a position bias, norms of a kind, defects to order."""

    def __init__(self, bias=True, used=True, first=nn.LayerNorm, rest=nn.LayerNorm):
        super().__init__()
        self.norm, self.ffn_norm = first(8), rest(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)
        self.used, self.bias = used, None
        if bias:
            self.bias = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
            nn.init.zeros_(self.bias[2].weight)  # a zero start is no defect
            nn.init.zeros_(self.bias[2].bias)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        logits = q @ k.mT
        if self.bias is not None:
            place = torch.arange(x.shape[1], dtype=x.dtype)
            bias = self.bias((place[:, None] - place)[..., None])[..., 0]
            logits = logits + self.used * bias if self.used else logits
        return self.out(self.ffn_norm(x + logits.softmax(-1) @ v)).mean(1)


def tokens():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def pair(on, off, name="position bias"):
    switches = {name: (lambda: Block(**on), lambda: Block(**off))}
    return ct.switch_changes_nothing(Subject(switches=switches, batch=tokens()))


def test_a_bias_that_is_added_passes():
    assert pair({}, {"bias": False}) == ([], [])
    assert pair({"used": 1e-5}, {"bias": False}) == ([], [])  # little is not nothing


def test_a_bias_that_is_computed_and_dropped_is_found():
    one = only(pair({"used": False}, {"bias": False}))
    assert one.where == "position bias"
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    off = Block(bias=False)
    torch.random.set_rng_state(state)
    kept = {k: v.clone() for k, v in off.state_dict().items()}
    switches = {"bias": (lambda: off, lambda: off)}
    assert ct.switch_changes_nothing(Subject(switches=switches, batch=tokens()))[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, kept[k]) for k, v in off.state_dict().items())
    assert "same to the last bit" in one.message
    one = only(pair({"bias": False}, {"bias": False}))  # or is never made


@pytest.mark.parametrize("used", [True, False])
def test_a_part_of_the_model_is_randomised(used):
    torch.manual_seed(0)
    model = Block(used=used)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    part = Subject(model, tokens(), switches={"position bias": "bias"})
    found, _ = ct.switch_changes_nothing(part)
    assert [one.where for one in found] == ([] if used else ["position bias"])
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert model.training


def test_norms_are_counted_by_type():
    rms = {"first": RMSNorm, "rest": RMSNorm}
    assert pair(rms, {}, "norm") == ([], [])
    one = only(pair({"first": RMSNorm}, {}, "norm"), "warning")
    assert one.numbers["on"] == "1 LayerNorm, 1 RMSNorm"
    assert one.numbers["off"] == "2 LayerNorm"
    assert one.numbers["left"] == "1 LayerNorm"
    builtin = {"first": nn.RMSNorm, "rest": nn.RMSNorm}
    assert pair(builtin, {}, "norm") == ([], [])


def test_the_published_count():
    def stack(norms):
        return lambda: nn.Sequential(*[one(8) for one in norms], nn.Linear(8, 2))

    on, off = stack([RMSNorm] * 2 + [nn.LayerNorm] * 24), stack([nn.LayerNorm] * 26)
    switches = {"RMSNorm": (on, off)}
    found, _ = ct.switch_changes_nothing(Subject(switches=switches, batch=tokens()))
    assert "24 LayerNorm, 2 RMSNorm" in found[0].message


def test_a_wrapper_around_a_norm_is_no_norm():
    class PreNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

    assert ct._norms(nn.Sequential(PreNorm(), nn.BatchNorm2d(3))) == {
        "LayerNorm": 1,
        "BatchNorm2d": 1,
    }


@pytest.mark.parametrize("model", [Block(), None])
def test_a_part_that_is_not_there(model):
    part = Subject(model, tokens(), switches={"position bias": "rel_pos"})
    with pytest.raises(SubjectError, match="no part 'rel_pos'"):
        ct.switch_changes_nothing(part)


# ------------------------------------------------------ (c) bootstrap of no width
def auroc(s, y):
    return np.mean(np.subtract.outer(s[y == 1], s[y == 0]) > 0)


def bootstrap(resamples=True, columns=1, ends=False):
    def run(scores, truth, seed):
        rng, draws = np.random.default_rng(seed), []
        for _ in range(50):
            chosen = rng.integers(len(scores), size=len(scores))
            here = chosen if resamples else slice(None)  # drawn, but not used
            draws.append([auroc(scores[here], truth[here]) + k for k in range(columns)])
        draws = np.array(draws).squeeze()
        return tuple(np.quantile(draws, [0.025, 0.975])) if ends else draws

    return run


@pytest.mark.parametrize("how", [{}, {"columns": 3}, {"ends": True}])
def test_bootstraps(how):
    look = lambda **k: ct.bootstrap_of_zero_width(Subject(**k))  # noqa: E731
    assert look(bootstrap=bootstrap(**how)) == ([], [])
    one = only(look(bootstrap=bootstrap(False, **how)))
    assert one.numbers["low"] == one.numbers["high"]
    assert "drawn indices" in one.message


def test_one_score_of_several_that_is_not_resampled():
    def draws(scores, truth, seed):
        chosen = np.random.default_rng(seed).integers(64, size=(50, 64))
        return np.stack([scores[chosen].mean(1), np.full(50, scores.mean())], 1)

    assert (
        only(ct.bootstrap_of_zero_width(Subject(bootstrap=draws))).where == "bootstrap"
    )


def test_reported_intervals():
    intervals = {"auroc": [0.73, 0.71, 0.75], "f1": (0.45, 0.45), "recall": [1, 1, 1],
                 "auprc": None, "precision": [0.29, 0.29, 0.29]}  # fmt: skip
    found, _ = ct.bootstrap_of_zero_width(Subject(intervals=intervals))
    assert [one.where for one in found] == ["f1", "precision"]


def test_an_interval_of_one_number():
    with pytest.raises(SubjectError, match="'auroc' must be"):
        ct.bootstrap_of_zero_width(Subject(intervals={"auroc": 0.7}))


@pytest.mark.parametrize(
    "bad",
    [lambda *a: 0.5, lambda s, y: 1, lambda *a: [0.5], lambda *a: {"auroc": (1, 2)}],
)
def test_a_bootstrap_that_gives_no_draws(bad):
    with pytest.raises(SubjectError, match="bootstrap failed"):
        ct.bootstrap_of_zero_width(Subject(bootstrap=bad))


def test_our_own_report_passes():
    from medtut.evaluate.zero_shot import findings_report

    def ours(scores, truth, seed):
        judged = findings_report(scores[:, None], truth[:, None], seed=seed, draws=50)
        return judged.table[1:, 0]

    assert ct.bootstrap_of_zero_width(Subject(bootstrap=ours)) == ([], [])


# ------------------------------------------------------------------ all of it together
MINE = """
import numpy as np
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, used):
        super().__init__()
        self.bias, self.head, self.used = nn.Linear(1, 6), nn.Linear(6, 2), used

    def forward(self, x):
        bias = self.bias(torch.ones(1))
        return self.head(x + bias if self.used else x)

def factory(good):
    def draws(scores, truth, seed):
        drawn = np.random.default_rng(seed).integers(64, size=(20, 64))
        return scores[drawn if good else np.arange(64)[None].repeat(20, 0)].mean(1)
    hu = np.full((8, 8, 8), -1000.0)
    hu[2:6, 2:6, 2:6] = 40
    return {"hu": hu if good else hu - 1024, "bootstrap": draws,
            "switches": {"position bias": (lambda: Model(good), lambda: Model(False))},
            "batch": torch.randn(3, 6)} if not good else {"hu": hu, "bootstrap": draws,
            "switches": {"position bias": "bias"}, "model": Model(True),
            "batch": torch.randn(3, 6)}

def published():
    return factory(False)

def sound():
    return factory(True)
"""


def test_all_of_it_is_found_from_the_command_line(tmp_path, capsys):
    (file := tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    assert run_audit(f"{file}:published") == 1
    out = capsys.readouterr().out
    assert all(f"[error] {name}" in out for name in NEW)
    assert run_audit(f"{file}:sound") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NEW)
    assert set(NEW) <= set(DETECTORS)


def test_nothing_to_look_at():
    assert all(DETECTORS[name](Subject()) == ([], []) for name in NEW)
    assert audit({"intervals": {"auroc": (0.6, 0.7)}}).checked == (NEW[2],)
