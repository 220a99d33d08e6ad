"""The checks of lesson 05 against right answers, wrong ideas, and known numbers."""

import math

import numpy as np
import pytest
import torch
from exercise_cases import ExerciseCases
from torch.nn import functional as F

from medtut.course import exercises as ex
from medtut.course.exercises.ex05_attention import WholeRowError

LESSON = ex.exercises_of("05_ctclip_modern")
SOLVE = {k: one.solution_function for k, one in LESSON.items()}
IDEAS = {k: {m.name: m.wrong for m in one.misconceptions} for k, one in LESSON.items()}


# Right answers written another way than the solution.
def _log_sum(q, keys, values, block):
    """One key after the other, with the logarithm of the sum for two numbers."""
    log_sum, mean = torch.tensor(-math.inf), torch.zeros(values.shape[1])
    for k, v in zip(keys, values, strict=True):
        logit = (k * q).sum() / len(q) ** 0.5
        log_sum = torch.logaddexp(log_sum, logit)
        mean = mean + (v - mean) * (logit - log_sum).exp()
    return mean


def _merged_at_the_end(q, keys, values, block):
    """Each block with its own softmax and log-sum; these are then softmaxed."""
    sums, means = [], []
    for first in range(0, len(keys), block):
        logits = keys[first : first + block] @ (q / math.sqrt(q.numel()))
        sums.append(logits.logsumexp(0))
        means.append(logits.softmax(0) @ values[first : first + block])
    return torch.stack(sums).softmax(0) @ torch.stack(means)


def _numpy(q, keys, values, block):
    q, keys, values = (t.numpy().astype(float) for t in (q, keys, values))
    top, total, mixed = -np.inf, 0.0, np.zeros(values.shape[1])
    for i in range(0, len(keys), block):
        logits = keys[i : i + block] @ q / np.sqrt(len(q))
        new = max(top, logits.max())
        w = np.exp(logits - new)
        total = total * np.exp(top - new) + w.sum()
        mixed, top = mixed * np.exp(top - new) + w @ values[i : i + block], new
    return torch.from_numpy(mixed / total)


def _largest_number_first(q, keys, values, block):
    """From the least float32 in place of -inf, and with einsum."""
    top = torch.tensor(torch.finfo(torch.float32).min)
    both = torch.zeros(values.shape[1] + 1)
    for k, v in zip(keys.split(block), values.split(block), strict=True):
        logits = torch.einsum("nd,d->n", k, q) * len(q) ** -0.5
        with_ones = torch.cat([v, torch.ones(len(v), 1)], dim=1)
        new = max(top, logits.amax())
        both = both * torch.exp(top - new) + torch.exp(logits - new) @ with_ones
        top = new
    return both[:-1] / both[-1]


def _norm_torch(x, weight, eps):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _norm_cast_first(x, weight, eps):
    """As in Llama: back to the dtype, then the weight."""
    y = x.to(torch.float32)
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _norm_double(x, weight, eps):
    length = torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)
    y = x.double() / torch.hypot(length / x.shape[-1] ** 0.5, torch.tensor(eps).sqrt())
    return torch.mul(y, weight).type_as(x)


def _norm_einsum(x, weight, eps):
    y = x.float()
    square = torch.einsum("...d,...d->...", y, y) / y.size(-1)
    return (y / (square + eps).sqrt().unsqueeze(-1) * weight).to(x.dtype)


def _loss_softplus(image, text, log_scale, bias):
    z = torch.exp(log_scale) * (text @ image.mT) + bias
    return (F.softplus(z).sum() - z.trace()) / z.shape[0]


def _loss_entropy(image, text, log_scale, bias):
    z = torch.einsum("id,jd->ij", image, text) * math.exp(log_scale) + bias
    answer = torch.eye(len(z))
    total = F.binary_cross_entropy_with_logits(z, answer, reduction="sum")
    return total / len(z)


def _loss_loop(image, text, log_scale, bias):
    total = 0.0
    for i, a in enumerate(F.normalize(image, dim=1)):  # again: nothing changes
        for j, b in enumerate(F.normalize(text, dim=1)):
            z = float(log_scale.exp() * (a @ b) + bias) * (1 if i == j else -1)
            total += max(-z, 0) + math.log1p(math.exp(-abs(z)))
    return total / len(image)


def _loss_package(image, text, log_scale, bias):
    from medtut.models import contrastive

    return contrastive.sigmoid_loss(image, text, log_scale, bias, chunk=2)


def _threshold_sorted(scores, truth):
    order = np.argsort(-scores, kind="stable")
    s, hits = scores[order], truth[order].cumsum()
    f1 = 2 * hits / (np.arange(len(s)) + 1 + truth.sum())
    f1[:-1][s[:-1] == s[1:]] = -1  # a threshold does not part equal scores
    return s[f1.argmax()]


def _threshold_sklearn(scores, truth):
    from sklearn.metrics import precision_recall_curve

    precision, recall, at = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return at[::-1][f1[:-1][::-1].argmax()]


def _threshold_python(scores, truth):
    def key(t):
        called = [y for s, y in zip(scores, truth, strict=True) if s >= t]
        return round(2 * sum(called) / (len(called) + sum(truth)), 12), t

    return float(max(scores, key=key))


RIGHT = {
    "05.1": [_log_sum, _merged_at_the_end, _numpy, _largest_number_first],
    "05.2": [_norm_torch, _norm_cast_first, _norm_double, _norm_einsum],
    "05.3": [_loss_softplus, _loss_entropy, _loss_loop, _loss_package],
    "05.4": [_threshold_sorted, _threshold_sklearn, _threshold_python],
}


# -------------------------------------------------------------------- other words
def _row_collected(q, keys, values, block):
    logits = torch.cat([k @ q / q.numel() ** 0.5 for k in keys.split(block)])
    return torch.softmax(logits, 0) @ values


def _row_filled(q, keys, values, block):
    logits = torch.empty(len(keys))
    for i in range(0, len(keys), block):
        logits[i : i + block] = keys[i : i + block] @ q / q.numel() ** 0.5
    return torch.softmax(logits, 0) @ values


def _flashless(q, keys, values, block):
    mask = torch.zeros(1, len(keys))
    return F.scaled_dot_product_attention(
        q.view(1, 1, -1), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask
    ).view(-1)


def _plain_sums(q, keys, values, block):
    weights = [(k @ q / q.numel() ** 0.5).exp() for k in keys.split(block)]
    parts = zip(weights, values.split(block), strict=True)
    return sum(w @ v for w, v in parts) / sum(w.sum() for w in weights)


def _forgets_values(q, keys, values, block):
    m, s, o = -math.inf, 0.0, 0.0
    for i in range(0, len(keys), block):
        z = keys[i : i + block] @ q / len(q) ** 0.5
        n = max(m, float(z.max()))
        e = torch.exp(z - n)
        s = s * math.exp(m - n) + float(e.sum())
        o, m = o + e @ values[i : i + block], n
    return o / s


def _no_scale(q, keys, values, block):
    return _log_sum(q * len(q) ** 0.5, keys, values, block)


def _published_rms(x, weight, eps):
    rms = torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True))
    return x * (weight / (rms + eps))


def _half_squares(x, weight, eps):
    return weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def _library_layer(x, weight, eps):
    layer = torch.nn.LayerNorm(x.shape[-1], eps=eps, bias=False)
    layer.weight.data = weight.float()
    return layer(x.float()).to(x.dtype)


def _float_only(x, weight, eps):
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)


def _clip(image, text, log_scale, bias):
    own = torch.arange(len(image))
    z = image @ text.T * log_scale.exp() + bias
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def _entropy_mean(image, text, log_scale, bias):
    z = image @ text.T * log_scale.exp() + bias
    return F.binary_cross_entropy_with_logits(z, torch.eye(len(z)))


def _written_out(image, text, log_scale, bias):
    z = image @ text.T * log_scale.exp() + bias
    sign = 2 * torch.eye(len(z)) - 1
    return -(1 / (1 + (-sign * z).exp())).log().sum() / len(z)


def _zero_labels(image, text, log_scale, bias):
    z = image @ text.T * log_scale.exp() + bias
    return -F.logsigmoid(torch.eye(len(z)) * z).sum(1).mean()


def _sklearn_pick(average, grid=None):
    def answer(scores, truth):
        from sklearn.metrics import f1_score

        at = np.unique(scores) if grid is None else grid
        found = [f1_score(truth, scores >= t, average=average) for t in at]
        return at[int(np.argmax(found))]

    return answer


def _roc(scores, truth):
    from sklearn.metrics import roc_curve

    false, true, at = roc_curve(truth, scores, drop_intermediate=False)
    return at[(true - false).argmax()]


def _curve_nan(scores, truth):
    from sklearn.metrics import precision_recall_curve

    precision, recall, at = precision_recall_curve(truth, scores)
    with np.errstate(invalid="ignore"):
        f1 = 2 * precision * recall / (precision + recall)
    return at[np.argmax(f1[:-1])]


OWN_WORDS = {
    "05.1": [
        (_row_collected, "the whole row"),
        (_row_filled, "the whole row"),
        (_flashless, "the whole row"),
        (_plain_sums, "no maximum"),
        (_forgets_values, "old values not rescaled"),
        (_no_scale, "no scale"),
    ],
    "05.2": [
        (_published_rms, "eps outside the root"),
        (_half_squares, "squared in float16"),
        (_library_layer, "LayerNorm"),
        (_float_only, "left in float32"),
    ],
    "05.3": [
        (_clip, "softmax"),
        (_entropy_mean, "mean over all pairs"),
        (_written_out, "log of a sigmoid"),
        (_zero_labels, "labels 0 and 1"),
        (lambda i, t, s, b: _loss_softplus(i, t, s, 0 * b), "no bias"),
        (
            lambda i, t, s, b: _loss_softplus(i, t, s.log(), b),
            "scale not exponentiated",
        ),
    ],
    "05.4": [
        (_sklearn_pick("binary"), "lowest among equals"),
        (_sklearn_pick("weighted"), "both classes"),
        (_sklearn_pick("macro"), "both classes"),
        (_sklearn_pick("binary", np.arange(101) / 100), "a coarse grid"),
        (_roc, "corner of the ROC curve"),
        (_curve_nan, "divided by zero"),
    ],
}
BROKEN = {
    "05.1": [
        (lambda q, k, v, block: k[0] @ q, "of shape scalar"),
        (lambda q, k, v, block: v[0] * math.nan, "3 of 3 numbers are NaN"),
        (lambda q, k, v, block: (k @ q).softmax(0) @ v, "13 numbers at once"),
        (lambda q, k, v, block: v[0], "largest difference"),
    ],
    "05.2": [
        (lambda x, w, eps: x, "largest difference"),
        (lambda x, w, eps: x.double(), "got a float64 tensor"),
        (lambda x, w, eps: x[0], "of shape 8"),
        (lambda x, w, eps: x / 0, "numbers are NaN or infinite"),
    ],
    "05.3": [
        (lambda i, t, s, b: i @ t.T, "one number is asked for"),
        (lambda i, t, s, b: 10.0, "got 10"),
        (lambda i, t, s, b: i @ t, "RuntimeError"),
    ],
    "05.4": [
        (lambda s, y: s >= 0.5, "one number is asked for"),
        (lambda s, y: s.mean(), "On a rare finding: expected 0."),
        (lambda s, y: "high", "expected the number"),
        (lambda s, y: math.nan, "got nan"),
    ],
}


class TestLesson05(ExerciseCases):
    lesson = "05_ctclip_modern"
    functions = ("online_softmax", "rms_norm", "sigmoid_loss", "choose_threshold")
    right, own_words, broken = RIGHT, OWN_WORDS, BROKEN


# -------------------------------------------------------------------- known numbers
@pytest.mark.parametrize("case", LESSON["05.1"].cases, ids=lambda one: one.label)
def test_online_softmax_is_that_of_the_whole_row(case):
    args = case.args()
    q, keys, values = (t.as_subclass(torch.Tensor) for t in args[:3])
    want = F.scaled_dot_product_attention(q[None], keys, values)[0]
    got = SOLVE["05.1"](*args).as_subclass(torch.Tensor)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    whole = pytest.raises(WholeRowError, match="numbers at once")
    if len(keys) > args[3]:
        with whole:
            IDEAS["05.1"]["the whole row"][0](*args)


def test_row_is_refused_however_it_is_made():
    q, keys, values, _ = LESSON["05.1"].cases[0].args()
    rows = len(keys)
    refused = (
        lambda: torch.einsum("nd,d->n", keys, q),
        lambda: (keys * q).sum(-1),
        lambda: torch.stack([k @ q for k in keys]),
        lambda: torch.ones(rows) @ values,
        lambda: F.linear(q, keys),
    )
    for make in refused:
        with pytest.raises(WholeRowError):
            make()
    for allowed in (keys.T[:, :4], keys.float(), keys[4:], keys.double() * 2):
        assert allowed.numel()


def test_published_norm_fails_where_it_is_said_to():
    x, weight, eps = LESSON["05.2"].cases[4].args()
    outside = IDEAS["05.2"]["eps outside the root"][0](x, weight, eps)
    inside = IDEAS["05.2"]["squared in float16"][0](x, weight, eps)
    right = SOLVE["05.2"](x, weight, eps)
    for wrong in (outside, inside):
        assert wrong[0].isnan().all()
        assert not wrong[3].any()
    assert right.isfinite().all()
    assert right.any(1).tolist() == [False, True, True, True]
    plain = torch.tensor([255.0, 256.0]).half().square()
    assert plain.isfinite().tolist() == [True, False]


def test_published_module_is_the_idea():
    from medtut.models.published_ctclip import PublishedRMSNorm

    x, weight, eps = LESSON["05.2"].cases[4].args()
    module = PublishedRMSNorm(len(weight), eps).half()
    module.weight.data = weight
    want = IDEAS["05.2"]["eps outside the root"][0](x, weight, eps)
    assert torch.equal(module(x).isnan(), want.isnan())
    assert torch.allclose(module(x)[1:], want[1:], rtol=0.01)


def test_loss_of_strangers_at_the_start():
    image, text = torch.eye(20).split(10)
    scale, bias = torch.tensor(10.0).log(), torch.tensor(-10.0)
    closed = math.log1p(math.exp(10)) + 9 * math.log1p(math.exp(-10))
    assert float(SOLVE["05.3"](image, text, scale, bias)) == pytest.approx(closed)
    assert f"{closed:.4f} in a batch of 10" in LESSON["05.3"].explanation


def test_bias_cancels_in_a_softmax():
    args = LESSON["05.3"].cases[1].args()
    wrong = IDEAS["05.3"]["softmax"][0]
    other = wrong(*args[:3], torch.tensor(5.0))
    assert float(_clip(*args)) == pytest.approx(float(other), rel=1e-4)


def test_threshold_calls_whom_the_package_calls():
    from medtut.evaluate.zero_shot import choose_thresholds

    for case in LESSON["05.4"].cases:
        scores, truth = case.args()
        (cut,) = choose_thresholds(scores[:, None], truth[:, None])
        called = scores >= SOLVE["05.4"](scores, truth)
        assert np.array_equal(scores >= cut, called), case.label


def test_threshold_chosen_on_the_test_flatters():
    """Scores that say nothing: the numbers of the explanation."""
    rng, truth = np.random.default_rng(1), np.repeat([1, 0], [10, 90])

    def f1(scores, cut):
        called = scores >= cut
        return 2 * called[:10].sum() / (called.sum() + 10)

    dev, test = rng.random((2, 400, 100))
    cuts = [[SOLVE["05.4"](s, truth) for s in found] for found in (dev, test)]
    honest, flattered = (
        np.mean([f1(*pair) for pair in zip(test, found, strict=True)]) for found in cuts
    )
    want = f"about {flattered:.2f} that way and {honest:.2f} honestly"
    assert want in LESSON["05.4"].explanation
