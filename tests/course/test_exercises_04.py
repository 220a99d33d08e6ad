"""The checks of lesson 04 against right answers, wrong ideas, and known numbers."""

import itertools

import numpy as np
import pytest
import torch
from exercise_cases import ExerciseCases

from medtut.course import exercises as ex

LESSON = ex.exercises_of("04_vgg16_lora")
SOLVE = {k: one.solution_function for k, one in LESSON.items()}
IDEAS = {k: {m.name: m.wrong for m in one.misconceptions} for k, one in LESSON.items()}

WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6)
CONVS = list(itertools.pairwise(WIDTHS))  # Simonyan, Zisserman: D


# Right answers written another way than the solution.
def _count_modules(c_in, c_out, kernel, r):
    a = torch.nn.Conv2d(c_in, r, kernel, bias=False)
    b = torch.nn.Conv2d(r, c_out, 1, bias=False)
    return a.weight.numel() + b.weight.numel()


def _count_tensors(c_in, c_out, kernel, r):
    window = torch.empty(c_in, kernel, kernel).flatten()
    return torch.tensor(r * (len(window) + c_out))


def _layout_strides(flat, height, width):
    colours = [flat[:, k::3].view(-1, height, width) for k in range(3)]
    return torch.stack(colours, dim=1).float() / 255


def _layout_numpy(flat, height, width):
    pictures = flat.numpy().reshape(len(flat), height, width, 3) / np.float32(255)
    return torch.from_numpy(np.moveaxis(pictures, -1, 1).copy())


def _layout_torchvision(flat, height, width):
    from torchvision.transforms.functional import to_tensor

    pictures = flat.view(-1, height, width, 3).numpy()
    return torch.stack([to_tensor(one) for one in pictures])


def _recall_loop(confusion):
    recalls = [row[k] / sum(row) for k, row in enumerate(confusion) if sum(row)]
    return sum(recalls) / len(recalls)


def _recall_nanmean(confusion):
    with np.errstate(invalid="ignore"):
        return np.nanmean(np.diag(confusion) / confusion.sum(1))


def _recall_torch(confusion):
    table = torch.from_numpy(confusion).double()
    return (table.diagonal() / table.sum(1)).nanmean()


def _prior_logits(probabilities, train_prior, test_prior):
    shift = test_prior.log() - train_prior.log()
    return (probabilities.log() + shift).softmax(-1)


def _prior_loop(probabilities, train_prior, test_prior):
    rows = []
    for row in probabilities.double():
        likelihood = row / train_prior  # up to a factor of the picture
        rows.append(likelihood * test_prior / (likelihood @ test_prior.double()))
    return torch.stack(rows)


# -------------------------------------------------------------------- known numbers
def _over_vgg16(count):
    return sum(count(c_in, c_out, 3, 8) for c_in, c_out in CONVS)


def test_sums_over_vgg16():
    assert _over_vgg16(SOLVE["04.1"]) == 301_272
    quoted = {"no window in A": 63_512, "loralib's window in B": 571_608}
    for idea in LESSON["04.1"].misconceptions:
        if idea.name in quoted:
            assert _over_vgg16(idea.wrong[0]) == quoted[idea.name]
            assert f"{quoted[idea.name]:,}" in idea.message
    frozen = IDEAS["04.1"]["the frozen weight counted"][0]
    assert _over_vgg16(frozen) + sum(WIDTHS[1:]) == 14_714_688  # and the biases


def test_package_adapts_a_convolution_with_as_many_numbers():
    from medtut.lora import LoRAConfig, inject

    model = torch.nn.Sequential(torch.nn.Conv2d(6, 10, 3))
    inject(model, LoRAConfig(r=4, alpha=4, roles=("conv",)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == SOLVE["04.1"](6, 10, 3, 4)


def test_a_view_is_a_third_of_the_rows_with_colours_side_by_side():
    picture = torch.arange(6 * 4 * 3, dtype=torch.uint8).view(1, 6, 4, 3)
    seen = IDEAS["04.2"]["a view"][1](picture.flatten(1), 6, 4)
    assert torch.equal(seen[0, 0].flatten(), picture[0, :2].flatten())
    right = SOLVE["04.2"](picture.flatten(1), 6, 4)
    assert torch.equal(255 * right[0, 2, 5], picture[0, 5, :, 2].float())


def test_constant_answer_on_the_published_test_set():
    (table,) = LESSON["04.3"].cases[1].args()
    accuracy, weighted = (f(table) for f in IDEAS["04.3"]["accuracy"])
    assert accuracy == pytest.approx(weighted) == pytest.approx(115 / 394)
    assert SOLVE["04.3"](table) == 0.25
    assert IDEAS["04.3"]["true negatives counted"][0](table) > 0.6


def test_macro_recall_is_balanced_accuracy_and_weighting_undoes_it():
    (table,) = LESSON["04.3"].cases[0].args()
    assert SOLVE["04.3"](table) == pytest.approx(_sklearn("balanced_accuracy")(table))
    for f in IDEAS["04.3"]["accuracy"]:
        assert f(table) == pytest.approx(_sklearn("accuracy")(table))


def test_corrected_probabilities_are_those_of_a_model_of_the_new_mix():
    """Two classes of known densities: Bayes under either mix, in closed form."""
    x = torch.linspace(-2, 4, 50, dtype=torch.float64)
    density = torch.stack([(-(x**2) / 2).exp(), (-((x - 2) ** 2) / 2).exp()], dim=1)
    old, new = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)

    def bayes(mix):
        return density * mix / (density @ mix)[:, None]

    assert torch.allclose(SOLVE["04.4"](bayes(old), old, new), bayes(new))


def test_factor_quoted_for_no_tumor():
    _, old, new = LESSON["04.4"].cases[0].args()
    assert [round(float(one[2]), 3) for one in (old, new)] == [0.138, 0.266]
    assert f"{float(new[2] / old[2]):.2f}" == "1.94"
    assert "1.94" in LESSON["04.4"].explanation


RIGHT = {
    "04.1": [_count_modules, _count_tensors],
    "04.2": [_layout_strides, _layout_numpy, _layout_torchvision],
    "04.3": [_recall_loop, _recall_nanmean, _recall_torch],
    "04.4": [_prior_logits, _prior_loop],
}


# -------------------------------------------------------------------- other words
def _loralib(c_in, c_out, kernel, r):
    a = torch.empty(r * kernel, c_in * kernel)
    b = torch.empty(c_out * kernel, r * kernel)
    return a.numel() + b.numel()


def _published_layout(flat, height, width):
    return torch.tensor(flat.numpy() / 255, dtype=torch.float32).view(
        -1, 3, height, width
    )


def _recall_unguarded(confusion):
    with np.errstate(invalid="ignore"):
        return (confusion.diagonal() / confusion.sum(1)).mean()


def _sklearn(name):
    """Average a score of scikit-learn over the labels that a table stands for."""

    def answer(confusion, **how):
        from sklearn import metrics

        true, found = np.indices(confusion.shape).reshape(2, -1)
        truth, prediction = (np.repeat(x, confusion.ravel()) for x in (true, found))
        score = getattr(metrics, f"{name}_score")
        return score(truth, prediction, **how)

    return answer


def _weighted(confusion):
    return _sklearn("recall")(confusion, average="weighted", zero_division=0)


def _prior_forgetful(probabilities, train_prior, test_prior):
    new = torch.einsum("nk,k->nk", probabilities, test_prior)
    return torch.nn.functional.normalize(new, p=1, dim=1)


def _prior_in_place(probabilities, train_prior, test_prior):
    probabilities *= test_prior / train_prior
    return probabilities / probabilities.sum(1)[:, None]


def _prior_no_keepdim(probabilities, train_prior, test_prior):
    weighted = probabilities * test_prior / train_prior
    return weighted / weighted.sum(1)


OWN_WORDS = {
    "04.1": [
        (_loralib, "loralib's window in B"),
        (lambda i, o, k, r: torch.nn.Conv2d(i, r, k).weight.numel(), "one factor only"),
        (lambda i, o, k, r: _count_modules(i, o, 1, r), "no window in A"),
    ],
    "04.2": [
        (_published_layout, "a view"),
        (lambda f, h, w: f.view(-1, h, w, 3).transpose(1, 3) / 255, "transposed"),
        (lambda f, h, w: f.view(-1, h, w, 3).permute(0, 3, 1, 2), "not divided by 255"),
        (lambda f, h, w: _layout_strides(f, h, w)[:, [2, 1, 0]], "colours reversed"),
    ],
    "04.3": [
        (_sklearn("accuracy"), "accuracy"),
        (_weighted, "accuracy"),
        (lambda c: _recall_loop(c.T), "precision"),
        (_recall_unguarded, "divided by zero"),
    ],
    "04.4": [
        (_prior_forgetful, "the new mix only"),
        (lambda p, old, new: _prior_logits(p, new, old), "upside down"),
        (_prior_no_keepdim, "normalised over the wrong axis"),
    ],
}
BROKEN = {
    "04.1": [
        (lambda i, o, k, r: "many", "expected the number 40960"),
        (lambda i, o, k, r: 301_272, "expected 40960, got 301272"),
    ],
    "04.2": [
        (lambda f, h, w: _layout_strides(f, h, w).double(), "got a float64 tensor"),
        (lambda f, h, w: _layout_strides(f, h, w)[:, :1], "of shape 2×1×4×4"),
        (lambda f, h, w: _layout_strides(f, h, w).flip(2), "largest difference"),
        (lambda f, h, w: f.view(-1, 7), "RuntimeError at line"),
    ],
    "04.3": [
        (lambda c: c.diagonal(), "one number is asked for"),
        (lambda c: 0.25, "On a rare class: expected 0.7"),
        (lambda c: [], "one number is asked for"),
    ],
    "04.4": [
        (_prior_in_place, "changed its input"),
        (lambda p, old, new: p, "largest difference"),
        (lambda p, old, new: p[0], "expected a float32 tensor of shape 6×4"),
        (lambda p, old, new: p.view(-1, 7), "RuntimeError"),
    ],
}


class TestLesson04(ExerciseCases):
    lesson = "04_vgg16_lora"
    functions = ("conv_lora_parameters", "to_chw", "macro_recall", "correct_prior")
    right, own_words, broken = RIGHT, OWN_WORDS, BROKEN
