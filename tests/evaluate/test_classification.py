"""Scores of classifiers against scikit-learn, known answers and published numbers."""

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from medtut.errors import MedtutError
from medtut.evaluate import calibration as cal
from medtut.evaluate import classification as cl

# Images of the published set: glioma, meningioma, no_tumor, pituitary.
TRAIN, TEST = np.array([826, 822, 395, 827]), np.array([100, 115, 105, 74])
CLASSES = ("glioma", "meningioma", "no_tumor", "pituitary")


def made(n=200, seed=0, sharp=1.5):
    """Logits that know something, and truth of unequal frequencies."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])
    logits = rng.normal(size=(n, 4)) + sharp * np.eye(4)[truth]
    return logits, truth


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def constant(k, n, classes=4):
    p = np.full((n, classes), 0.1 / (classes - 1))
    p[:, k] = 0.9
    return p


# ------------------------------------------------------------------------- scores
def test_every_score_is_that_of_scikit_learn():
    logits, truth = made()
    p = softmax(logits)
    said = p.argmax(1)
    judged = cl.report(p, truth, CLASSES, n_boot=20)
    got = {key: score[0] for key, score in judged["overall"].items()}
    wanted = {
        "accuracy": metrics.accuracy_score(truth, said),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, said),
        "nll": metrics.log_loss(truth, p),
        "brier": ((p - np.eye(4)[truth]) ** 2).sum(1).mean(),
    }
    for average in ("macro", "weighted"):
        three = metrics.precision_recall_fscore_support(truth, said, average=average)
        names = [f"{average}_{one}" for one in ("precision", "recall", "f1")]
        wanted |= dict(zip(names, three[:3], strict=True))
    assert got == pytest.approx(wanted)
    assert judged["confusion"] == metrics.confusion_matrix(truth, said).tolist()
    each = metrics.precision_recall_fscore_support(truth, said)
    for c, name in enumerate(CLASSES):
        own = {key: score[0] for key, score in judged["per_class"][name].items()}
        area = metrics.roc_auc_score(truth == c, p[:, c])
        three = dict(
            zip(("precision", "recall", "f1"), (e[c] for e in each), strict=False)
        )
        assert own == pytest.approx(three | {"auroc": area})
    assert judged["notes"] == []
    for low, value, high in ((s[1], s[0], s[2]) for s in judged["overall"].values()):
        assert low < value < high


def test_auroc_counts_ties_half():
    p = np.array([[0.5, 0.5], [0.5, 0.5], [0.7, 0.3], [0.2, 0.8]])
    judged = cl.report(p, np.array([0, 1, 0, 1]), "ab", n_boot=5)
    assert judged["per_class"]["b"]["auroc"][0] == pytest.approx(3.5 / 4)


def test_absent_and_unsaid_classes_are_named_and_left_out():
    p = constant(1, 6)
    truth = np.array([0, 1, 1, 2, 0, 1])
    judged = cl.report(p, truth, CLASSES, n_boot=50)
    assert judged["per_class"]["pituitary"] == {
        "precision": [0, 0, 0], "recall": None, "f1": None, "auroc": None
    }  # fmt: skip
    assert judged["overall"]["macro_recall"][0] == pytest.approx(1 / 3)
    assert judged["overall"]["macro_precision"][0] == pytest.approx(0.5 / 3)
    said = " ".join(judged["notes"])
    assert "pituitary is not in the truth" in said
    assert "glioma was never said" in said
    assert "meningioma" not in said


def test_copies_in_one_group_do_not_narrow_the_interval():
    logits, truth = made(60)
    p = softmax(logits)
    many, same = np.repeat(p, 9, 0), np.repeat(truth, 9)

    def width(groups, p=many, y=same):
        _, low, high = cl.report(p, y, CLASSES, groups)["overall"]["accuracy"]
        return high - low

    once = width(None, p, truth)
    assert width(np.repeat([f"p{k}" for k in range(60)], 9)) == pytest.approx(once)
    assert width(None) < 0.5 * once


def test_interval_has_the_width_of_the_binomial():
    p = np.repeat([[0.9, 0.1]], 400, 0)
    truth = (np.arange(400) >= 300).astype(int)
    value, low, high = cl.report(p, truth, "ab")["overall"]["accuracy"]
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert value == 0.75
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(
    ("p", "truth", "said"),
    [
        ([[1.0, 2.0]], [0], "softmax"),
        ([[np.nan, 1.0]], [0], "no probabilities"),
        ([[1.5, -0.5]], [0], "no probabilities"),
        ([[0.5, 0.5]], [2], "integers 0 to 1"),
        ([[0.5, 0.5]], [0.5], "integers 0 to 1"),
        ([[0.5, 0.5]], [0, 1], r"must be \(N, K\)"),
        ([[1.0]], [0], "K >= 2"),
        (np.zeros((0, 2)), np.zeros(0, int), "N >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(p, truth, said):
    with pytest.raises(MedtutError, match=said):
        cl.report(p, truth, "ab")


def test_classes_and_groups_must_fit():
    p, y = constant(0, 3, 2), np.zeros(3, int)
    for more in ({"classes": "abc"}, {"classes": "ab", "groups": [1, 2]}):
        with pytest.raises(MedtutError, match="groups for"):
            cl.report(p, y, **more)


# ------------------------------------------------------------------------- floors
def test_floors_of_the_published_set():
    train, test = (np.repeat(np.arange(4), n) for n in (TRAIN, TEST))
    floor = cl.floors(train, test, 4)
    accuracies = [100 * one["accuracy"] for one in floor["constant"]]
    assert accuracies == pytest.approx([25.38, 29.19, 26.65, 18.78], abs=0.005)
    assert [one["correct"] for one in floor["constant"]] == TEST.tolist()
    for k, one in enumerate(floor["constant"]):
        said = np.full(394, k)
        three = metrics.precision_recall_fscore_support(
            test, said, average="macro", zero_division=0
        )
        assert one["macro_recall"] == one["balanced_accuracy"] == pytest.approx(0.25)
        assert (one["macro_precision"], one["macro_f1"]) == pytest.approx(
            three[::2][:2]
        )
    assert floor["prior_entropy"] == pytest.approx(1.34805, abs=5e-6)
    prior = np.tile(TRAIN / TRAIN.sum(), (394, 1))
    assert floor["prior_cross_entropy"] == pytest.approx(metrics.log_loss(test, prior))
    assert floor["prior_cross_entropy"] == pytest.approx(1.4433, abs=5e-5)


def test_floor_of_a_class_that_training_never_had_is_infinite():
    floor = cl.floors([0, 0, 1], [0, 1, 2], 3)
    assert floor["prior_cross_entropy"] == np.inf
    assert floor["prior_entropy"] == pytest.approx(np.log(3) - 2 / 3 * np.log(2))


# -------------------------------------------------------------------- predictions
def test_predictions_come_back_with_the_same_scores(tmp_path):
    logits, truth = made(40)
    p = softmax(logits).astype(np.float32)
    paths = [f"Testing/a, b/ü_{k}.jpg" for k in range(40)]
    file = cl.write_predictions(tmp_path / "new" / "p.csv", paths, truth, p, CLASSES)
    head = file.read_text("utf-8").splitlines()
    assert head[0] == "path,truth,predicted,glioma,meningioma,no_tumor,pituitary"
    assert f",{CLASSES[truth[0]]},{CLASSES[p[0].argmax()]}," in head[1]
    back, y, q, names = cl.read_predictions(file)
    assert back == paths
    assert (np.float32(q) == p).all()
    assert cl.report(q, y, names, n_boot=9) == cl.report(p, truth, CLASSES, n_boot=9)
    assert [one.name for one in file.parent.iterdir()] == ["p.csv"]


@pytest.mark.parametrize(
    "text",
    [None, "", "a,b\n", "file,truth,said,a,b\nx,a,a,0.5,0.5\n",
     "path,truth,predicted,a,b\n", "path,truth,predicted,a,b\nx\n",
     "path,truth,predicted,a,b\nx,c,a,0.5,0.5\n",
     "path,truth,predicted,a,b\nx,a,a,0.5,much\n",
     "path,truth,predicted,a,b\nx,a,a,0.9,0.5\n",
     "path,truth,predicted,a,b\nx,a,a,0.9\n"],
)  # fmt: skip
def test_a_broken_table_is_named(tmp_path, text):
    file = tmp_path / "p.csv"
    if text is not None:
        file.write_text(text, "utf-8")
    with pytest.raises(MedtutError, match=r"p\.csv is no table"):
        cl.read_predictions(file)


def test_a_table_refused_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        cl.write_predictions(tmp_path / "p.csv", ["x"], [0, 1], constant(0, 2), CLASSES)
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------- calibration
def test_ece_by_hand():
    # Confidences 0.95 (right, wrong), 0.55 (right): bins of a tenth.
    p = np.array([[0.95, 0.05], [0.95, 0.05], [0.55, 0.45]])
    truth = np.array([0, 1, 0])
    assert cal.ece(p, truth, 10) == pytest.approx((2 * 0.45 + 0.45) / 3)
    assert cal.ece(p, truth, 1) == pytest.approx(abs(2 / 3 - 2.45 / 3))
    count, confidence, accuracy = cal.reliability(p, truth, 10)
    assert count.tolist() == [1, 2]
    assert confidence == pytest.approx([0.55, 0.95])
    assert accuracy == pytest.approx([1, 0.5])


def test_bins_are_closed_on_the_right():
    p = np.array([[0.5, 0.5], [0.51, 0.49], [0.75, 0.25], [0.76, 0.24], [1.0, 0.0]])
    assert cal.reliability(p, np.zeros(5, int), 4)[0].tolist() == [1, 2, 2]


def test_adaptive_bins_hold_equally_many():
    logits, truth = made(300, sharp=3)
    p = softmax(logits)
    assert set(cal.reliability(p, truth, 10, adaptive=True)[0]) == {30}
    assert len(set(cal.reliability(p, truth, 10)[0])) > 3
    tied = constant(0, 20, 2)
    assert cal.reliability(tied, np.zeros(20, int), 5, True)[0].tolist() == [20]


def test_temperature_comes_back():
    rng = np.random.default_rng(1)
    logits = 2 * rng.normal(size=(3000, 4))
    truth = (rng.gumbel(size=logits.shape) + logits).argmax(1)  # drawn from softmax
    assert cal.fit_temperature(3 * logits, truth) == pytest.approx(3, rel=0.06)
    logs = np.log(softmax(3 * logits))
    t = cal.fit_temperature(logs, truth)
    assert t == pytest.approx(cal.fit_temperature(3 * logits, truth), rel=1e-4)
    before, after = (cal.ece(softmax(z), truth) for z in (3 * logits, logs / t))
    assert after < 0.03 < 0.1 < before


def test_temperature_is_a_minimum():
    logits, truth = made(150)
    t = cal.fit_temperature(logits, truth)
    nll = [
        metrics.log_loss(truth, softmax(logits / s)) for s in (t, 0.97 * t, 1.03 * t)
    ]
    assert nll[0] < min(nll[1:])


def shifted(n=8000, seed=0):
    """Two Gaussian classes: exact posteriors under a 50:50 prior, drawn 85:15."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.15).astype(int)
    x = rng.normal(2.0 * truth - 1)

    def posterior(prior):
        odds = np.exp(2 * x) * prior / (1 - prior)
        return np.stack([1 / (1 + odds), odds / (1 + odds)], 1)

    return posterior, truth


def test_prior_correction_is_bayes_rule():
    posterior, truth = shifted(2000)
    got = cal.correct_prior(posterior(0.5), [300, 300], [0.85, 0.15])
    assert got == pytest.approx(posterior(0.15))
    back = cal.correct_prior(got, [0.85, 0.15], [0.5, 0.5])
    assert back == pytest.approx(posterior(0.5))
    gain = [metrics.log_loss(truth, p) for p in (got, posterior(0.5))]
    assert gain[0] < gain[1]


def test_prior_is_estimated_without_labels():
    posterior, truth = shifted()
    got = cal.estimate_prior(posterior(0.5), [1, 1])
    assert got == pytest.approx([1 - truth.mean(), truth.mean()], abs=0.02)
    assert got.sum() == pytest.approx(1)
    assert posterior(0.5)[:, 1].mean() > got[1] + 0.05  # the plain mean is off


def test_class_weights_and_offsets_of_the_published_set():
    truth = np.repeat(np.arange(4), TRAIN)
    balanced = compute_class_weight("balanced", classes=np.arange(4), y=truth)
    assert cal.class_weights(TRAIN) == pytest.approx(balanced)
    wanted = [0.8686, 0.8729, 1.8165, 0.8676]
    assert cal.class_weights(TRAIN) == pytest.approx(wanted, abs=5e-5)
    assert cal.logit_offset(TRAIN, 2) == pytest.approx(2 * np.log(TRAIN / 2870))


def test_adjusted_loss_teaches_balanced_logits():
    # Images that say nothing: plain training learns the prior, adjusted nothing.
    offset = torch.tensor(cal.logit_offset([9, 1]))
    truth = torch.tensor([0] * 9 + [1])
    learned = torch.zeros(2, dtype=torch.double, requires_grad=True)
    for _ in range(60):
        logits = (learned + offset).expand(10, 2)
        (slope,) = torch.autograd.grad(
            nn.functional.cross_entropy(logits, truth), learned
        )
        learned = (learned - 4 * slope).detach().requires_grad_()
    assert learned.detach().diff().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("counts", [[3, 0], [3, -1], [[1, 2]], [3, np.nan]])
def test_an_empty_class_has_no_weight(counts):
    with pytest.raises(MedtutError, match="above 0"):
        cal.class_weights(counts)


# --------------------------------------------------------------------- threshold
def test_threshold_reaches_the_recall_and_is_the_highest():
    rng = np.random.default_rng(0)
    tumour = rng.random(300) < 0.7
    p = np.clip(rng.normal(0.35 + 0.3 * tumour, 0.15), 0, 1)
    for recall in (0.5, 0.9, 0.99, 1.0):
        got = cal.threshold_for_recall(p, tumour, recall)
        assert got.recall >= recall
        assert got.missed == int((p[tumour] < got.threshold).sum())
        assert got.false_alarms == int((p[~tumour] >= got.threshold).sum())
        assert (got.tumours, got.healthy) == (tumour.sum(), (~tumour).sum())
        above = np.nextafter(got.threshold, 2)
        assert cal.alarms(p, tumour, above).recall < recall
    assert cal.threshold_for_recall(p, tumour, 0.9).threshold > got.threshold


def test_a_recall_on_the_edge_is_not_lost_to_rounding():
    p = np.linspace(0.1, 1, 10)
    got = cal.threshold_for_recall(p, np.ones(10, bool), 0.9)
    assert (got.missed, got.healthy, got.false_alarms) == (1, 0, 0)


def test_threshold_needs_tumours():
    with pytest.raises(MedtutError, match="0 tumours"):
        cal.threshold_for_recall([0.1, 0.2], [False, False])


def test_decide_prefers_the_likeliest_tumour_above_the_threshold():
    p = np.array([[0.2, 0.1, 0.6, 0.1], [0.05, 0.0, 0.9, 0.05], [0.1, 0.6, 0.2, 0.1]])
    assert cal.decide(p, 2, 0.4).tolist() == [0, 2, 1]
    assert cal.decide(p, 2, 0.41).tolist() == [2, 2, 1]
    assert p[0, 2] == 0.6


# ---------------------------------------------------------------------- Grad-CAM
class Quadrant(nn.Module):
    """Class 1 counts what is in the upper left quarter, class 0 in the lower right."""

    def __init__(self, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        nn.init.constant_(self.conv.weight, 1 / 27)
        self.relu = nn.ReLU(inplace)
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.9)
        self.requires_grad_(False)

    def forward(self, x):
        maps = self.drop(self.norm(self.relu(self.conv(x))))
        half = maps.shape[-1] // 2
        corner = maps[:, :, :half, :half].mean((2, 3))
        other = maps[:, :, half:, half:].mean((2, 3))
        return torch.stack([other[:, 0], corner[:, 1]], 1)


@pytest.mark.parametrize("inplace", [False, True])
def test_cam_lies_where_the_net_looks(inplace):
    model = Quadrant(inplace).train()
    model.conv.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.zeros(2, 3, 16, 16)
    x[:, :, 2:6, 2:6] = x[:, :, 10:14, 10:14] = 1
    x[:, :, 10:14, 2:6] = 0.5
    with torch.no_grad():
        cam = cl.grad_cam(model, model.conv, x, torch.tensor([1, 0]))
    assert cam.shape == (2, 16, 16)
    assert not cam.requires_grad
    assert cam.flatten(1).amax(1).tolist() == [1, 1]
    assert cam.min() == 0
    # Its maps are weighted, not masked: the brightest place of the class's channel.
    assert (cam[0, 3:5, 3:5] == 1).all()
    assert (cam[0, 3:5, 10:14] == 0).all()
    assert model.training
    assert not model.conv.training
    assert not model.conv._forward_hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


class Spots(nn.Module):
    """Channel 0 sees what is bright and left, channel 1 what is bright and right."""

    def __init__(self):
        super().__init__()
        self.left = nn.Identity()
        self.weight = nn.Parameter(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))

    def forward(self, x):
        left = (torch.arange(x.shape[-1]) < x.shape[-1] // 2).float()
        maps = self.left(torch.stack([x[:, 0] * left, x[:, 0] * (1 - left)], 1))
        return maps.mean((2, 3)) @ self.weight.T


def test_cam_tells_classes_apart_and_cuts_off_what_speaks_against():
    x = torch.zeros(2, 3, 8, 8)
    x[:, :, 2, 1] = x[:, :, 2, 6] = 1
    model = Spots()
    cam = cl.grad_cam(model, model.left, x, torch.tensor([0, 1]))
    assert cam[0].nonzero().tolist() == [[2, 1]]
    assert cam[1].nonzero().tolist() == [[2, 6]]
    blank = cl.grad_cam(model, model.left, 0 * x, torch.tensor([0, 1]))
    assert (blank == 0).all()


def test_cam_grows_to_the_picture():
    model = nn.Sequential(
        nn.AvgPool2d(4), nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(4, 2)
    )
    cam = cl.grad_cam(model, model[0], torch.rand(1, 3, 8, 8), torch.tensor([0]))
    assert cam.shape == (1, 8, 8)


@pytest.mark.parametrize("layer", ["unused", "flat", "fails"])
def test_cam_cleans_up_after_an_error(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.flat, self.fails = (nn.Identity() for _ in range(3))

        def forward(self, x):
            if layer == "fails":
                raise RuntimeError("boom")
            return self.flat(x.flatten(1)[:, :2])

    model = Net().train()
    one = getattr(model, layer)
    error, said = (
        (RuntimeError, "boom") if layer == "fails" else (MedtutError, "no maps")
    )
    with pytest.raises(error, match=said):
        cl.grad_cam(model, one, torch.rand(1, 3, 4, 4), torch.tensor([0]))
    assert not one._forward_hooks
    assert all(m.training for m in model.modules())
