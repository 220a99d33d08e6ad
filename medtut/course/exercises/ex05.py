"""Exercises of lesson 05: attention, a norm, SigLIP's loss, and a threshold.

All but the loss are in `ex05_attention`, `ex05_norm` and `ex05_threshold`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from medtut.course.exercises.engine import Case, Exercise
from medtut.course.exercises.ex05_attention import Answer, attention, idea
from medtut.course.exercises.ex05_norm import norm
from medtut.course.exercises.ex05_threshold import numbers_may_be_wild, threshold


# ------------------------------------------------------------------------------ 05.3
def sigmoid_loss(image, text, log_scale, bias):
    logits = log_scale.exp() * image @ text.T + bias
    sign = 2 * torch.eye(len(image)) - 1  # 1 where they belong together, else -1
    return -torch.nn.functional.logsigmoid(sign * logits).sum() / len(image)


def _sign(image: torch.Tensor) -> torch.Tensor:
    return 2 * torch.eye(len(image)) - 1


def _terms(
    logits: Answer = lambda cos, s, b: s.exp() * cos + b,
    loss: Answer = lambda z, y: -F.logsigmoid(y * z),
    gather: Answer = lambda terms: terms.sum() / len(terms),
) -> Answer:
    """Make the solution from three steps, one of which may be another."""

    def answer(image, text, log_scale, bias):
        z = logits(image @ text.T, log_scale, bias)
        return gather(loss(z, _sign(image)))

    return answer


def _softmax(rows: float, columns: float, bias: bool = False) -> Answer:
    def answer(image, text, log_scale, bias_):
        z = log_scale.exp() * image @ text.T + bias * bias_
        own = torch.arange(len(image))
        return rows * F.cross_entropy(z, own) + columns * F.cross_entropy(z.T, own)

    return answer


def _bias_outside(image, text, log_scale, bias):
    z = _sign(image) * (log_scale.exp() * image @ text.T) + bias
    return -F.logsigmoid(z).sum() / len(image)


def _two_logs(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p = z.sigmoid()
    return -torch.where(y > 0, p.log(), (1 - p).log())


def _pairs(
    said: str, number: int, width: int, scale: float, bias: float, alike: float = 0
) -> Case:
    """Unit vectors, a text near its image; with `alike` all near one direction."""

    def draw() -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(number + width)
        image, noise = torch.randn(2, number, width, generator=generator)
        image = image + alike * torch.ones(width)
        text = image + 0.8 * noise
        vectors = (F.normalize(v, dim=1) for v in (image, text))
        return *vectors, torch.tensor(scale).log(), torch.tensor(bias)

    return Case(said, draw)


def loss() -> Exercise:
    return Exercise(
        id="05.3",
        title="a question for every pair",
        ask="Write sigmoid_loss(image, text, log_scale, bias): SigLIP's loss of B "
        "scans (B, d) and their B reports (B, d), whose vectors come with length one; "
        "row i of both belongs together. The logit of a pair is exp(log_scale) · "
        "cosine + bias, both 0-d tensors. Every one of the B² pairs asks whether it "
        "belongs together; sum -log sigmoid(±logit) over all of them and divide by B.",
        difficulty=2,
        minutes=7,
        hints=(
            "A softmax asks which report of the batch is the right one. Here each pair "
            "is a yes-or-no question by itself. For how many pairs is yes right?",
            "All cosines are image @ text.T. y is +1 on the diagonal and -1 elsewhere, "
            "and it multiplies the whole logit, bias included. log(sigmoid(-300)) is "
            "-inf in float32: look for one function that does both.",
            "logits = log_scale.exp() * image @ text.T + bias; sign = 2·eye(B) - 1; "
            "-logsigmoid(sign * logits).sum() / B.",
        ),
        solution_function=sigmoid_loss,
        explanation="Zhai et al. 2023 (arXiv:2303.15343). With B pairs that match and "
        "B² - B that do not, most answers are no: the bias of -10 says so from the "
        "start, so that the first steps need not. At scale 10, with vectors that know "
        "nothing of each other, each scan costs log(1 + e^10) + (B - 1)·log(1 + "
        "e^-10), 10.0005 in a batch of 10. No pair sees another's logit, so the matrix "
        "can be taken in pieces, over chunks or machines.",
        cases=(
            _pairs("four pairs at the start of a training", 4, 8, 10.0, -10.0),
            _pairs("six pairs later on", 6, 5, 20.0, -4.5),
            _pairs("one pair", 1, 5, 12.0, -9.0),
            _pairs("strangers who look alike", 5, 6, 300.0, -12.0, alike=6),
        ),
        misconceptions=(
            idea(
                "softmax",
                "That is CLIP's loss: a softmax over the batch, in which pairs compete "
                "and a bias would cancel. Here each pair is asked by itself.",
                _softmax(0.5, 0.5),
                _softmax(1, 0),
                _softmax(0, 1),
                _softmax(1, 1),
            ),
            idea(
                "mean over all pairs",
                "You divided by B², the number of pairs, as a mean does. The sum over "
                "all pairs is divided by B: else the one pair that matches weighs less "
                "the larger the batch is.",
                _terms(gather=torch.mean),
            ),
            idea(
                "not divided",
                "You summed over all pairs. Divide by B, or the learning rate has to "
                "change with the batch.",
                _terms(gather=torch.sum),
            ),
            idea(
                "scale not exponentiated",
                "log_scale is the logarithm of the scale, so that the scale stays "
                "positive while it is learned: multiply by its exp.",
                _terms(lambda cos, s, b: s * cos + b),
            ),
            idea(
                "divided by the scale",
                "You divided the cosines. A temperature would be below the bar; "
                "exp(log_scale) is its inverse, and multiplies.",
                _terms(lambda cos, s, b: cos / s.exp() + b),
                _terms(lambda cos, s, b: cos / s + b),
            ),
            idea(
                "no scale",
                "Cosines lie between -1 and 1, where a sigmoid is nearly straight. "
                "Multiply them by exp(log_scale).",
                _terms(lambda cos, s, b: cos + b),
            ),
            idea(
                "labels 0 and 1",
                "You multiplied by 0 where a pair does not belong together: sigmoid(0) "
                "is one half whatever the logit, so strangers teach nothing. The sign "
                "is -1 there.",
                _terms(loss=lambda z, y: -F.logsigmoid(y.clamp(min=0) * z)),
            ),
            idea(
                "matching pairs only",
                "You asked the B pairs that match, and nothing keeps all vectors from "
                "becoming one. The other B² - B say what does not belong together.",
                _terms(loss=lambda z, y: -F.logsigmoid(z) * (y > 0)),
            ),
            idea(
                "strangers only",
                "You left out the diagonal, the pairs that do belong together.",
                _terms(loss=lambda z, y: -F.logsigmoid(-z) * (y < 0)),
            ),
            idea(
                "labels the wrong way round",
                "You pull strangers together. +1 is for the diagonal, -1 for the rest.",
                _terms(loss=lambda z, y: -F.logsigmoid(-y * z)),
            ),
            idea(
                "no bias",
                "The bias is missing. Without it every pair starts near a half, and "
                "nearly all of them have to be unlearned first.",
                _terms(lambda cos, s, b: s.exp() * cos),
            ),
            idea(
                "bias subtracted",
                "You subtracted the bias. It comes as a negative number, and is added.",
                _terms(lambda cos, s, b: s.exp() * cos - b),
            ),
            idea(
                "bias outside the sign",
                "You added the bias after the sign. For a stranger it has to turn with "
                "the logit: sign · (scale · cosine + bias).",
                _bias_outside,
            ),
            idea(
                "bias scaled",
                "You multiplied the bias by the scale too. It is added to the scaled "
                "cosine.",
                _terms(lambda cos, s, b: s.exp() * (cos + b)),
            ),
            idea(
                "minus sign",
                "Logarithms of a sigmoid are negative, so yours is too: a loss that is "
                "made small would drive pairs apart. Put a minus in front.",
                _terms(loss=lambda z, y: F.logsigmoid(y * z)),
            ),
            idea(
                "log of a sigmoid",
                "sigmoid(-300) is 0 in float32, and its logarithm is -inf. (A small "
                "number added inside makes it finite, wrong, and without a gradient.) "
                "logsigmoid, or softplus of the negative, takes both steps at once.",
                _terms(loss=lambda z, y: -(y * z).sigmoid().log()),
                _terms(loss=_two_logs),
                _terms(loss=lambda z, y: -((y * z).sigmoid() + 1e-20).log()),
            ),
            idea(
                "no logarithm",
                "You summed probabilities of being wrong. Their gradient vanishes "
                "where the model is surely wrong; take -log sigmoid.",
                _terms(loss=lambda z, y: (-y * z).sigmoid()),
            ),
            idea(
                "one number for each scan",
                "Those are the rows' sums. One number is asked for: their mean.",
                _terms(gather=lambda terms: terms.sum(1)),
                _terms(gather=lambda terms: terms.sum(1) / len(terms)),
            ),
        ),
        differ=numbers_may_be_wild,
    )


def make() -> list[Exercise]:
    """Return fresh exercises of lesson 05, in order."""
    return [attention(), norm(), loss(), threshold()]
