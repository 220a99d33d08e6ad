"""Detectors around a classifier: each fires on the defect and is silent without it."""

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn

from medtut.audit import DETECTORS, Subject, SubjectError, audit
from medtut.audit import classifier_checks as cc
from medtut.audit.cli import run_audit
from medtut.audit.detectors import adapters_change_nothing, trainable_without_gradient

TRAIN, TEST = [826, 822, 395, 827], [100, 115, 105, 74]
TRUTH = np.repeat(np.arange(4), TEST)
H = 1.34805  # entropy of TRAIN in nats; that it is, is tested with the floors


def only(result, kind="error"):
    (one,), _ = result
    assert one.severity == kind
    return one


# ------------------------------------------------------------ (a) constant predictor
@pytest.mark.parametrize(
    ("accuracy", "digits", "classes"),
    [(25.38, None, [0]), (29.19, None, [1]), (26.65, None, [2]), (18.78, None, [3]),
     ("29.2", None, [1]), (29, 0, [1]), (29.20, 2, []), (25, None, [0]),
     (74.62, None, []), (100 * 115 / 394, None, [1])],
)  # fmt: skip
def test_constant_answers(accuracy, digits, classes):
    assert cc.constant_answer(accuracy, TEST, digits) == classes


def test_classes_of_one_size_are_all_named():
    assert cc.constant_answer(30.0, [30, 40, 30], 2) == [0, 2]


@pytest.mark.parametrize("k", range(4))
def test_constant_classes_are_found(k):
    said = np.full(394, k)
    found, _ = cc.constant_predictor(Subject(predictions=said, truth=TRUTH))
    assert [one.where for one in found] == ["predictions", "accuracy"]
    assert f"{TEST[k]}/394" in found[1].message
    assert f"always answering class {k}" in found[1].message
    assert found[1].numbers["accuracy"] == f"{100 * TEST[k] / 394:.2f}"


def test_equal_scores_and_scores_that_differ_are_told_apart():
    scores = np.tile([0.2, 0.5, 0.3], (30, 1))
    said = only(cc.constant_predictor(Subject(predictions=scores))).message
    assert "same scores" in said
    scores += np.random.default_rng(0).normal(0, 0.02, scores.shape)
    said = only(cc.constant_predictor(Subject(predictions=scores))).message
    assert "their scores differ" in said


@pytest.mark.parametrize(
    "sound",
    [
        {"predictions": np.roll(TRUTH, 60), "truth": TRUTH},
        {"predictions": np.eye(4)[TRUTH], "truth": TRUTH},
        {"predictions": np.zeros(30, int), "truth": np.zeros(30, int)},
        {"predictions": np.zeros(5, int), "truth": np.arange(5) % 2},
        {"reported": {"accuracy": 93.4}, "test_counts": TEST},
        {"reported": {"accuracy": "0.2920"}, "test_counts": TEST},
        {"reported": {"accuracy": "29"}, "test_counts": TEST},  # tells 4 counts apart
        {"reported": {"accuracy": 29.19}},
    ],
)
def test_sound_predictions_pass(sound):
    assert cc.constant_predictor(Subject(**sound))[0] == []


@pytest.mark.parametrize("accuracy", [29.19, 0.2919, "29.19", 0.2918781725888325])
def test_a_reported_accuracy_is_enough(accuracy):
    reported = Subject(reported={"accuracy": accuracy}, test_counts=TEST)
    one = only(cc.constant_predictor(reported), "warning")
    assert "29.19 % is exactly 115/394" in one.message


def deep(init=None, depth=14):
    """Convolutions without normalisation, as VGG: default start, or He's."""
    torch.manual_seed(0)
    layers = []
    for k in range(depth):
        layers += [nn.Conv2d(8 if k else 3, 8, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )
    for one in model.modules():
        if init and isinstance(one, nn.Conv2d):
            nn.init.kaiming_normal_(one.weight, nonlinearity="relu")
            nn.init.zeros_(one.bias)
    return model


def pictures(n=4, side=16):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_a_deep_default_start_is_constant():
    model = deep()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    one = only(cc.constant_predictor(Subject(model, pictures())))
    assert "Initialise" in one.message
    assert one.numbers["spread"] < 1e-4
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("zero_head", [False, True])
def test_a_start_that_trains_is_not(zero_head):
    model = deep("he")
    if zero_head:
        nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    assert cc.constant_predictor(Subject(model, pictures())) == ([], [])


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (deep(), pictures(1).repeat(3, 1, 1, 1)),  # one picture three times
        (deep()[:3], pictures()),  # maps, not classes
        (deep(), pictures(1)),
    ],
)
def test_what_cannot_be_told_raises_no_alarm(model, batch):
    assert cc.constant_predictor(Subject(model, batch)) == ([], [])


# -------------------------------------------------------------- (b) micro averages
def average(kind, percent=False):
    def metric(predicted, truth):
        p, r, f, _ = metrics.precision_recall_fscore_support(
            truth, predicted, average=kind, zero_division=0
        )
        got = {"precision": p, "recall": r, "f1": f}
        got["accuracy"] = metrics.accuracy_score(truth, predicted)
        return {k: (100 if percent else 1) * v for k, v in got.items()}

    return metric


@pytest.mark.parametrize("percent", [False, True])
def test_micro_averages_are_found(percent):
    one = only(cc.micro_averaged(Subject(class_metric=average("micro", percent))))
    assert "precision, f1 came back as the accuracy" in one.message
    assert 'average="macro"' in one.message


@pytest.mark.parametrize(("kind", "notes"), [("macro", 0), ("weighted", 1)])
def test_other_averages_pass(kind, notes):
    found, said = cc.micro_averaged(Subject(class_metric=average(kind)))
    assert (found, len(said)) == ([], notes)


def test_a_metric_that_fails_is_told_what_it_gets():
    for bad in (lambda p, t: 0.5, lambda p: {}):
        with pytest.raises(SubjectError, match="class_metric"):
            cc.micro_averaged(Subject(class_metric=bad))


EQUAL = {"accuracy": 29.19, "precision": 0.2919, "recall": 0.2919}


def test_reported_micro_averages():
    assert "29.19 %" in only(cc.micro_averaged(Subject(reported=EQUAL))).message
    said = np.ones(394, int)
    one = only(
        cc.micro_averaged(Subject(reported=EQUAL, predictions=said, truth=TRUTH))
    )
    assert one.numbers["macro_recall"] == pytest.approx(25)
    assert one.numbers["macro_precision"] == pytest.approx(100 * 115 / 394 / 4)


@pytest.mark.parametrize(
    "sound",
    [
        {"reported": EQUAL | {"precision": 0.0730}},
        {"reported": EQUAL | {"recall": 0.2500}},
        {"reported": {"accuracy": 0.97, "precision": 0.97, "recall": 0.97}},
        {"reported": dict.fromkeys(EQUAL, "100.00")},
        {"reported": {"accuracy": 29.19}, "test_counts": None},
        # Each class confuses one in ten with the next: all averages are the same.
        {
            "reported": dict.fromkeys(EQUAL, "90.00"),
            "truth": np.repeat(np.arange(3), 10),
            "predictions": np.repeat(np.arange(3), 10) + np.tile([1] + [0] * 9, 3)
            - 3 * (np.arange(30) == 20),
        },
    ],
)  # fmt: skip
def test_reported_numbers_that_prove_nothing_pass(sound):
    assert cc.micro_averaged(Subject(**sound))[0] == []


# ------------------------------------------------------------- (c) loss at the prior
def loss(values, counts=TRAIN):
    return cc.loss_at_class_prior(Subject(losses=values, train_counts=counts))


def test_the_published_plateau_is_found():
    one = only(loss([1.40, 1.3512, 1.3500, 1.3498, 1.3476, 1.3490, 1.3481, 1.3498]))
    assert one.numbers["entropy"] == pytest.approx(H, abs=5e-6)
    assert "how frequent classes are" in one.message


@pytest.mark.parametrize(
    "values",
    [[1.387] * 6, [68689.0, 113.0, 157.0, 90.0], [1.4, np.nan, np.nan, np.nan]],
)
def test_loss_that_learned_nothing_is_found(values):
    assert "learned nothing" in only(loss(values)).message


@pytest.mark.parametrize(
    "values",
    [
        [1.38, 1.35, 1.2, 1.0, 0.8, 0.6],
        [1.38, 1.35, 1.36, 1.35, 1.34, 1.2],  # it has only just begun to learn
        [0.9, 0.5, 0.3, 0.2],
    ],
)
def test_falling_losses_pass(values):
    assert loss(values) == ([], [])


def test_batch_noise_does_not_hide_a_plateau():
    rng = np.random.default_rng(0)
    assert only(loss(H + rng.normal(0, 0.05, 2000)))


def test_losses_need_counts():
    for values, counts in (([1.0] * 9, None), ([1.0] * 3, TRAIN)):
        with pytest.raises(SubjectError, match="train_counts"):
            loss(values, counts)


# ------------------------------------------------------------ (d) chosen on the test
def cut(part):
    """Lowest threshold at which nine in ten are right of those called tumour."""
    p, truth = part["probabilities"][:, 1], part["truth"]
    return next((t for t in np.sort(p) if truth[p >= t].mean() >= 0.9), 1.0)


@pytest.mark.parametrize(
    "select",
    [
        lambda v, t: t["scores"].argmax(),
        lambda v, t: (v["scores"] + t["scores"]).argmax(),
        lambda v, t: cut(t),
        lambda v, t: (v["scores"].argmax(), cut(t)),
    ],
)
def test_choices_on_the_test_set_are_found(select):
    one = only(cc.chosen_on_test(Subject(select=select)))
    assert one.numbers["changed"] > 0
    assert "Choose on validation data" in one.message


def reads_test(validation, test):
    best = validation["scores"].argmax()
    validation["scores"][:] = 0
    print(test["scores"][best])
    test["scores"][:] = 0
    return best


@pytest.mark.parametrize(
    "select", [lambda v, t: v["scores"].argmax(), lambda v, t: cut(v), reads_test]
)
def test_choices_on_validation_pass(select):
    assert cc.chosen_on_test(Subject(select=select)) == ([], [])


def test_choices_that_look_at_nothing_or_toss_a_coin():
    one = only(cc.chosen_on_test(Subject(select=lambda v, t: 3)), "warning")
    assert "stayed the same" in one.message
    toss = np.random.default_rng(0)
    found, notes = cc.chosen_on_test(Subject(select=lambda v, t: toss.random()))
    assert found == []
    assert "at random" in notes[0]
    with pytest.raises(SubjectError, match="scores, probabilities and truth"):
        cc.chosen_on_test(Subject(select=lambda v, t: v["names"]))


# ------------------------------------------------------------------ (e) the layout
def resized(x, side=100):
    x = torch.as_tensor(x).permute(2, 0, 1)[None].float() / 255
    return nn.functional.interpolate(x, side, mode="bilinear", antialias=True)


def to_tensor(x):
    from torchvision.transforms import functional as tv

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return tv.normalize(tv.to_tensor(x), mean, std)


@pytest.mark.parametrize(
    ("layout", "cause"),
    [
        (lambda x: x.reshape(3, 224, 224), "view or reshape"),
        (lambda x: torch.tensor(x).flatten().view(-1, 3, 224, 224) / 255, "reshape"),
        (lambda x: x.T, "exchanged"),
        (lambda x: np.flip(x.transpose(2, 0, 1), 1).copy(), "without crop, flip"),
        (lambda x: x.transpose(1, 2, 0)[:2], None),
    ],
)
def test_scrambled_layouts_are_found(layout, cause):
    if cause is None:
        with pytest.raises(SubjectError, match=r"\(3, H, W\)"):
            cc.layout_scrambles(Subject(layout=layout))
        return
    one = only(cc.layout_scrambles(Subject(layout=layout)))
    assert cause in one.message
    assert one.numbers["explained"] < 0.5


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(2, 0, 1),
        lambda x: torch.tensor(x).permute(2, 0, 1)[None] / 255,
        lambda x: (
            x[..., ::-1].transpose(2, 0, 1) - np.reshape([104, 117, 124], (3, 1, 1))
        ),
        lambda x: np.repeat(x.mean(2)[None], 3, 0),
        lambda x: x.mean(2)[None],
        resized,
        to_tensor,
    ],
)
def test_sound_layouts_pass(layout):
    assert cc.layout_scrambles(Subject(layout=layout)) == ([], [])


# ------------------------------------------- (f) as published, and from the outside
class Published(nn.Module):
    """Its helper registers factors under odd names and returns the layer untouched."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.fc1 = nn.Linear(4, 8)
        self.lora_fc1 = self.adapt(self.fc1)
        self.head = nn.Linear(8, 4)

    def adapt(self, layer, rank=2):
        for one, shape in (("U", (4, rank)), ("V", (rank, 8))):
            factor = nn.Parameter(0.01 * torch.randn(shape))
            self.register_parameter(f"lora_{one}_{len(self._parameters)}", factor)
        return layer

    def forward(self, x):
        return self.head(torch.relu(self.lora_fc1(self.features(x).mean((2, 3)))))


def test_dead_factors_and_a_base_that_trains():
    torch.manual_seed(0)
    subject = Subject(Published(), pictures())
    assert "no adapter" in only(adapters_change_nothing(subject)).message.lower()
    one = only(trainable_without_gradient(subject))
    assert one.numbers["tensors"] == 2
    assert "lora_U" in one.where


MINE = """import numpy as np, torch
from torch import nn
def published():
    truth = np.repeat(np.arange(4), [100, 115, 105, 74])
    acc = lambda p, t: {"precision": float((p == t).float().mean())}
    return {"predictions": np.ones(394, int), "truth": truth, "class_metric": acc,
            "losses": [1.348] * 9, "train_counts": [826, 822, 395, 827],
            "select": lambda v, t: t["scores"].argmax(),
            "layout": lambda x: x.reshape(3, 224, 224)}
def sound():
    truth = np.repeat(np.arange(4), [100, 115, 105, 74])
    score = lambda p, t: {"accuracy": float((p == t).float().mean())}
    return {"predictions": np.roll(truth, 9), "truth": truth, "class_metric": score,
            "losses": [1.3, 0.9, 0.6, 0.4], "train_counts": [826, 822, 395, 827],
            "select": lambda v, t: v["scores"].argmax(),
            "layout": lambda x: x.transpose(2, 0, 1)}
"""
NEW = ("constant_predictor", "micro_averaged", "loss_at_class_prior", "chosen_on_test",
       "layout_scrambles")  # fmt: skip


def test_all_of_it_is_found_from_the_command_line(tmp_path, capsys):
    (file := tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    assert run_audit(f"{file}:published") == 1
    out = capsys.readouterr().out
    assert all(f"[error] {name}" in out for name in NEW)
    assert run_audit(f"{file}:sound") == 0
    assert all(name in capsys.readouterr().out for name in NEW[:1])
    assert set(NEW) <= set(DETECTORS)


def test_nothing_to_look_at():
    assert all(DETECTORS[name](Subject()) == ([], []) for name in NEW)
    with pytest.raises(SubjectError, match="no 'model'"):
        audit({"truth": TRUTH, "train_counts": TRAIN})
