"""The checks of lesson 06 against right answers, wrong ideas, and known numbers."""

import math

import numpy as np
import pytest
import torch
from exercise_cases import ExerciseCases
from torch import nn
from torch.nn import functional as F

from medtut.course import exercises as ex
from medtut.course.exercises.ex06_examine import examine

LESSON = ex.exercises_of("06_fseft_few_shot")
SOLVE = {
    k: getattr(one.solution_function, "__wrapped__", one.solution_function)
    for k, one in LESSON.items()
}
IDEAS = {
    k: {
        m.name: [getattr(w, "__wrapped__", w) for w in m.wrong]
        for m in one.misconceptions
    }
    for k, one in LESSON.items()
}


# Right answers written another way than the solution.
def _dice_numpy(logits, truth, empty):
    p = 1 / (1 + np.exp(-logits.numpy().astype(float)))
    found, organ = p > 0.5, truth.numpy().astype(bool)
    if not found.any() and not organ.any():
        return empty
    return np.logical_and(found, organ).sum() / ((found.sum() + organ.sum()) / 2)


def _dice_f1(logits, truth, empty):
    from sklearn.metrics import f1_score

    found = (logits.sigmoid() > 0.5).flatten().int()
    return f1_score(truth.flatten(), found, zero_division=empty)


def _dice_errors(logits, truth, empty):
    found, organ = logits.gt(0).float(), truth.float()
    hit, wrong = (found * organ).sum(), (found - organ).abs().sum()
    return 2 * hit / (2 * hit + wrong) if hit + wrong else torch.tensor(empty)


def _dice_package(logits, truth, empty):
    from medtut.evaluate.organs import dice

    return dice((logits > 0).numpy(), truth.numpy(), nothing=empty)[0]


def _loss_loop(logits, target, annotated):
    volumes = []
    for z, t, m in zip(logits, target, annotated, strict=True):
        scores = []
        for c in m.nonzero().flatten().tolist():
            p = 1 / (1 + torch.exp(-z[c]))
            scores.append(1 - (2 * (p * t[c]).sum() + 1) / (p.sum() + t[c].sum() + 1))
        if scores:
            volumes.append(torch.stack(scores).mean())
    return sum(volumes) / len(volumes)


def _loss_chosen(logits, target, annotated):
    """Pick the annotated pairs, and give each the weight of its volume's mean."""
    counts = annotated.sum(1, keepdim=True)
    weight = (1 / counts).expand_as(annotated)[annotated] / (counts > 0).sum()
    p, t = (x[annotated].flatten(1) for x in (torch.sigmoid(logits), target))
    each = 1 - (2 * torch.einsum("nv,nv->n", p, t) + 1) / ((p + t).sum(1) + 1)
    return each @ weight


def _loss_in_place(logits, target, annotated):
    logits[~annotated] = 0
    each = 1 - (2 * (logits.sigmoid() * target).sum((2, 3, 4)) + 1) / (
        (logits.sigmoid() + target).sum((2, 3, 4)) + 1
    )
    each = torch.where(annotated, each, torch.nan)
    return each.nanmean(1).nanmean()


def _loss_package(logits, target, annotated):
    from medtut.models.partial_loss import PartialDice

    return PartialDice()(logits, target, annotated)


class _Parametric(nn.Module):
    """With bare parameters, the second one first."""

    def __init__(self, width, kernel):
        super().__init__()
        shape = (width, width, kernel, kernel, kernel)
        self.up = nn.Parameter(torch.zeros(shape))
        self.down = nn.Parameter(torch.randn(shape) * 0.1)

    def forward(self, x):
        h = F.relu(F.conv3d(x, self.down, padding="same"))
        return torch.add(F.conv3d(h, self.up, padding="same"), x)


def _adapter_sequential(width, kernel):
    class Residual(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + x

    how = {"padding": (kernel - 1) // 2, "bias": False}
    convs = [nn.Conv3d(width, width, kernel, **how) for _ in range(2)]
    convs[1].weight.data.zero_()
    return Residual(convs[0], nn.ReLU(), convs[1])


def _adapter_package(width, kernel):
    from medtut.adapters.layers import SpatialAdapter

    return SpatialAdapter(width, kernel)


def _step_library(d, gradient, lr, weight):
    return F.softshrink(d - lr * gradient, lr * weight)


def _step_three_ways(d, gradient, lr, weight):
    z, t = d - gradient * lr, weight * lr
    return torch.where(z > t, z - t, torch.where(z < -t, z + t, 0.0))


def _step_clipped(d, gradient, lr, weight):
    z = torch.add(d, gradient, alpha=-lr)
    return z - z.clamp(-lr * weight, lr * weight)


def _step_scaled(d, gradient, lr, weight):
    z = d.double() - lr * gradient.double()
    size = z.abs().clamp(min=1e-30)
    return (z * F.relu(1 - lr * weight / size)).float()


RIGHT = {
    "06.1": [_dice_numpy, _dice_f1, _dice_errors, _dice_package],
    "06.2": [_loss_loop, _loss_chosen, _loss_in_place, _loss_package],
    "06.3": [_Parametric, _adapter_sequential, _adapter_package],
    "06.4": [_step_library, _step_three_ways, _step_clipped, _step_scaled],
}


# -------------------------------------------------------------------- other words
def _published_dice(logits, truth, empty):
    from medtut.models.published_fseft import published_dice

    return published_dice(logits.sigmoid(), truth)[0]


def _epsilon(above, below):
    """As a loss of a library scores: in float32, with a small number or two."""

    def answer(logits, truth, empty):
        found, organ = (x.float().flatten() for x in (logits > 0, truth))
        loss = 1 - (2 * (found @ organ) + above) / (found.sum() + organ.sum() + below)
        return 1 - float(loss)

    return answer


def _macro(logits, truth, empty):
    from sklearn.metrics import f1_score

    found, organ = (logits > 0).flatten(), (truth > 0).flatten()
    scores = f1_score(organ, found, average=None, labels=[0, 1], zero_division=empty)
    return float(np.mean(scores))


def _sklearn_zero(logits, truth, empty):
    from sklearn.metrics import f1_score

    return f1_score(truth.flatten(), (logits > 0).flatten(), zero_division=0)


def _python_division(logits, truth, empty):
    found, organ = (logits > 0), truth.bool()
    return 2 * (found & organ).sum().item() / (found.sum() + organ.sum()).item()


def _skips_absent(logits, truth, empty):
    return _dice_numpy(logits, truth, empty) if truth.any() else empty


def _published_loss(logits, target, annotated):
    """As upstream: 0 / 0 for a volume in which nothing is annotated."""
    p = logits.sigmoid()
    num = (p * target).sum((2, 3, 4))
    den = p.sum((2, 3, 4)) + target.sum((2, 3, 4))
    loss = 1 - (2 * num + 1) / (den + 1)
    return torch.mean(torch.sum(loss * annotated, -1) / torch.sum(annotated, -1))


def _background(logits, target, annotated):
    return _loss_loop(logits, target, torch.ones_like(annotated))


def _as_number(logits, target, annotated):
    return _loss_loop(logits, target, annotated).item()


def _zeroed_logits(logits, target, annotated):
    logits = logits * annotated[:, :, None, None, None]
    return _loss_loop(logits, target, torch.ones_like(annotated))


def _selected(logits, target, annotated):
    p, t = logits.sigmoid()[annotated], target[annotated]
    num, den = (p * t).flatten(1).sum(1), (p + t).flatten(1).sum(1)
    return (1 - (2 * num + 1) / (den + 1)).mean()


def _plain_convs(width, kernel):
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv3d(width, width, kernel, padding="same", bias=False)
            self.b = nn.Conv3d(width, width, kernel, padding="same", bias=False)

        def forward(self, x):
            return x + self.b(torch.relu(self.a(x)))

    return Adapter()


def _sequence(width, kernel):
    built = _adapter_sequential(width, kernel)
    return nn.Sequential(*built)


def _default_bias(width, kernel):
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv3d(width, width, kernel, padding="same")
            self.b = nn.Conv3d(width, width, kernel, padding="same")
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return x + self.b(self.a(x).relu())

    return Adapter()


def _all_zero(width, kernel):
    built = _plain_convs(width, kernel)
    for p in built.parameters():
        nn.init.constant_(p, 0)
    return built


def _optimizer(d, gradient, lr, weight):
    d = nn.Parameter(d.clone())
    d.grad = gradient + weight * torch.sign(d.detach())
    torch.optim.SGD([d], lr=lr).step()
    return d.detach()


def _decay(d, gradient, lr, weight):
    d = nn.Parameter(d.clone())
    d.grad = gradient.clone()
    torch.optim.SGD([d], lr=lr, weight_decay=weight).step()
    return d.detach()


def _hard(d, gradient, lr, weight):
    return F.hardshrink(d - lr * gradient, lr * weight)


def _shrink_first(d, gradient, lr, weight):
    return F.softshrink(d, lr * weight) - lr * gradient


OWN_WORDS = {
    "06.1": [
        (_published_dice, "smoothed below only"),
        (_epsilon(1e-5, 1e-5), "empty always 1"),
        (_epsilon(0, 1e-5), "empty scores 0"),
        (_epsilon(1, 1), "smoothed on both sides"),
        (_macro, "background counted"),
        (_sklearn_zero, "empty scores 0"),
        (_python_division, "divided by zero"),
        (_skips_absent, "no organ, no error"),
    ],
    "06.2": [
        (_published_loss, "0 / 0 for a volume without labels"),
        (_zeroed_logits, "mask on the logits"),
        (_background, "unlabelled is background"),
        (_as_number, "no gradient"),
        (_selected, "all annotated organs alike"),
    ],
    "06.3": [
        (_plain_convs, "second convolution random"),
        (_sequence, "no way around"),
        (_default_bias, "a bias that shifts"),
        (_all_zero, "both at zero"),
    ],
    "06.4": [
        (_optimizer, "gradient of the penalty"),
        (_decay, "weight decay"),
        (_hard, "hard threshold"),
        (_shrink_first, "threshold before the step"),
    ],
}
BROKEN = {
    "06.1": [
        (lambda z, t, e: z > 0, "one number is asked for"),
        (lambda z, t, e: 0.3, "On 100 voxels, all right: expected 1, got 0.3"),
        (lambda z, t, e: "good", "expected the number 1"),
        (lambda z, t, e: math.nan, "got nan"),
        (lambda z, t, e: (z > 0) @ t, "RuntimeError"),
    ],
    "06.2": [
        (lambda z, t, m: z.sigmoid().flatten(2).sum(2), "one number is asked for"),
        (lambda z, t, m: z.mean(), "expected 0."),
        (lambda z, t, m: _loss_loop(z, t, m) * math.nan, "got nan"),
        (lambda z, t, m: _loss_loop(z, t, m) + z.mean() - z.mean().detach(), "nobody"),
        (
            lambda z, t, m: 2 * (q := _loss_loop(z, t, m)) - q.detach(),
            "gradient is not",
        ),
    ],
    "06.3": [
        (lambda w, k: "adapter", "a torch.nn.Module is asked for, got 'adapter'"),
        (lambda w, k: nn.Conv3d(w, w, k, stride=2), "(2, 4, 5, 6, 4) goes in"),
        (lambda w, k: nn.Identity(), "0 parameters, and 2·kernel³·width² is 864"),
        (lambda w, k: nn.Conv2d(w, w, k), "RuntimeError"),
    ],
    "06.4": [
        (lambda d, g, lr, w: d[:3], "expected a float32 tensor of shape 12"),
        (lambda d, g, lr, w: 0, "got 0"),
        (lambda d, g, lr, w: 2 * _step_library(d, g, lr, w), "2 times the expected"),
        (lambda d, g, lr, w: d.sub_(lr * g) * 0, "entries are exactly zero"),
    ],
}


class TestLesson06(ExerciseCases):
    lesson = "06_fseft_few_shot"
    functions = ("organ_dice", "partial_loss", "spatial_adapter", "proximal_step")
    right, own_words, broken = RIGHT, OWN_WORDS, BROKEN


def test_right_numbers_of_a_changed_input_are_refused():
    def answer(d, gradient, lr, weight):
        d -= lr * gradient
        return F.softshrink(d, lr * weight)

    outcome = LESSON["06.4"].check(answer)
    assert (outcome.status, "changed its input" in outcome.text) == ("incorrect", True)

    class InPlace(_Parametric):
        def forward(self, x):
            return x.add_(super().forward(x) - x)

    outcome = LESSON["06.3"].check(InPlace)
    assert outcome.status == "incorrect", outcome
    assert "inplace operation" in outcome.text


# -------------------------------------------------------------------- known numbers
def test_published_dice_of_small_organs():
    """The numbers of the explanation, from the published score itself."""
    from medtut.models.published_fseft import published_dice

    said = LESSON["06.1"].explanation
    for voxels in (100, 10):
        organ = torch.ones(voxels)
        assert published_dice(organ, organ)[0] == pytest.approx(
            2 * voxels / (2 * voxels + 1), rel=1e-6
        )
    assert f"{200 / 201:.3f} and 10 voxels {20 / 21:.3f}" in said
    assert published_dice(torch.zeros(5), torch.zeros(5))[0] == 0
    logits, truth, empty = LESSON["06.1"].cases[0].args()
    assert int(truth.sum()) == 100
    assert SOLVE["06.1"](logits, truth, empty) == 1
    smooth = IDEAS["06.1"]["smoothed on both sides"][0]
    assert smooth(torch.tensor([-1.0]), torch.tensor([1]), 1.0) == 0.5


def test_cases_of_dice_have_timid_voxels():
    """Else a threshold on the logits at one half would go unnoticed."""
    logits = LESSON["06.1"].cases[0].args()[0]
    assert 0 < int((logits > 0.5).sum()) < int((logits > 0).sum()) == 100
    pieces = LESSON["06.1"].cases[3].args()
    assert IDEAS["06.1"]["largest piece of the truth"][0](*pieces) < 1


def test_partial_loss_of_one_voxel_by_hand():
    """p = 1/2 everywhere: present 1 - 2/2.5, absent 1 - 1/1.5; the third is unknown."""
    logits = torch.zeros(1, 3, 1, 1, 1, requires_grad=True)
    target = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1, 1)
    annotated = torch.tensor([[True, True, False]])
    loss = SOLVE["06.2"](logits, target, annotated)
    loss.backward()
    assert loss.item() == pytest.approx((0.2 + 1 / 3) / 2)
    # d/dp of (2p + 1) / (p + 2) is 3 / (p + 2)², of 1 / (p + 1) it is -1 / (p + 1)².
    want = torch.tensor([-3 / 2.5**2, 1 / 1.5**2, 0]) / 4 / 2
    assert torch.allclose(logits.grad.flatten(), want)
    assert logits.grad.flatten()[2] == 0


def test_background_pushes_down_what_nobody_outlined():
    logits, target, annotated = LESSON["06.2"].cases[0].args()
    gradients = {}
    for name, answer in (
        ("right", SOLVE["06.2"]),
        ("background", IDEAS["06.2"]["unlabelled is background"][0]),
        ("softmax", IDEAS["06.2"]["softmax"][0]),
    ):
        leaf = logits.clone().requires_grad_()
        answer(leaf, target, annotated).backward()
        gradients[name] = leaf.grad[~annotated]
    assert not gradients["right"].any()
    assert (gradients["background"] > 0).all()
    assert gradients["softmax"].any()


@pytest.mark.parametrize(("kernel", "count"), [(1, 4_608), (3, 124_416)])
def test_counts_of_the_published_adapters(kernel, count):
    built = SOLVE["06.3"](48, kernel)
    assert sum(p.numel() for p in built.parameters()) == count
    text = LESSON["06.3"].ask + LESSON["06.3"].explanation
    assert f"{count:,}" in text


def test_who_learns_in_the_first_step():
    """The second convolution at once, the first one step later."""
    torch.manual_seed(0)
    built, x = SOLVE["06.3"](4, 3), torch.randn(1, 4, 5, 5, 5)
    target, seen = torch.randn_like(x), []
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (built(x) - target).square().mean().backward()
        seen.append(
            [bool(p.grad.any()) for p in (built.first.weight, built.second.weight)]
        )
        optimizer.step()
    assert seen == [[False, True], [True, True]]


def test_records_name_what_is_wrong():
    def faults(name, which=0):
        torch.manual_seed(0)
        return set(examine(IDEAS["06.3"][name][which](4, 3), 4, 3))

    assert faults("both at zero") == {"dead, both at zero"}
    assert faults("first at zero") == {"dead, one at zero"}
    assert faults("frozen") == {"frozen"}
    assert faults("a bias that shifts") == {"shifted", "+8 parameters"}
    assert faults("a bias too many") == {"+4 parameters"}
    assert faults("no way around") == {"silent", "map"}
    assert faults("no relu") == {"map"}
    assert faults("a gate") == {"+1 parameters", "map"}


def test_ten_steps_take_a_direction_to_zero():
    """The numbers of the explanation, and that a gradient can hold a direction."""
    d = torch.ones(3)
    gradient = torch.tensor([0.0, 0.9, -1.1])
    steps = 0
    while d[0] != 0:
        d = SOLVE["06.4"](d, gradient, 0.1, 1.0)
        steps += 1
    assert steps in (10, 11)  # 1 - 10 · 0.1 need not be 0 in float32
    assert d[1] == 0
    assert d[2] > 1
    stays = SOLVE["06.4"](torch.zeros(2), torch.tensor([0.9, -1.1]), 0.1, 1.0)
    assert (stays != 0).tolist() == [False, True]
    assert f"which is {0.9**10:.2f}" in LESSON["06.4"].explanation


def test_the_step_is_the_proximal_operator():
    """The minimiser of (x - z)² / 2 + t |x|, found on a grid."""
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    for z in (-2.0, -0.3, 0.0, 0.2, 1.4):
        best = x[((x - z) ** 2 / 2 + 0.5 * x.abs()).argmin()]
        zero = torch.zeros(1)
        got = SOLVE["06.4"](torch.tensor([z]), zero, 0.25, 2.0)
        assert float(got) == pytest.approx(float(best), abs=2e-3)


def test_a_subgradient_never_gives_a_rank():
    d = torch.linspace(-1, 1, 8)
    wrong = IDEAS["06.4"]["gradient of the penalty"][0]
    for _ in range(200):
        d = wrong(d, torch.zeros(8), 0.03, 1.0)
    assert (d != 0).all()
    assert (d.abs() <= 0.03 + 1e-6).all()


def test_step_is_that_of_the_package():
    from medtut.adapters.adaptive_rank import add_diagonals, diagonals, proximal_step
    from medtut.lora import LoRAConfig, inject

    d, gradient, lr, weight = LESSON["06.4"].cases[0].args()
    model = nn.Sequential(nn.Linear(20, 20))
    inject(model, LoRAConfig(r=len(d), pattern="0"))
    add_diagonals(model)
    ((_, diagonal),) = diagonals(model)
    with torch.no_grad():
        diagonal.copy_(d - lr * gradient)
    proximal_step(model, lr * weight)
    assert torch.allclose(SOLVE["06.4"](d, gradient, lr, weight), diagonal)
