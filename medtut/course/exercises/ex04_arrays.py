"""Exercises 04.2 and 04.4: the layout of a picture, and another mix of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from medtut.course.exercises.engine import (
    Case,
    Exercise,
    Misconception,
    describe,
    tensors_differ,
)


# ------------------------------------------------------------------------------ 04.2
def to_chw(flat, height, width):
    pictures = flat.reshape(-1, height, width, 3)  # the order in which they were stored
    return pictures.permute(0, 3, 1, 2) / 255


def _stored(flat: Any, height: int, width: int) -> torch.Tensor:
    return flat.reshape(-1, height, width, 3).permute(0, 3, 1, 2)


def _own_maximum(flat, height, width):
    return _stored(flat, height, width) / flat.max()


def _own_maxima(flat, height, width):
    return _stored(flat, height, width) / flat.amax(1)[:, None, None, None]


def _both(read: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """A wrong order of axes, scaled and as it is."""
    return (lambda *args: read(*args) / 255, read, lambda *args: read(*args).float())


def _pictures_differ(got: Any, want: Any) -> str | None:
    """Compare dtype, then shape and values."""
    if isinstance(got, torch.Tensor) and got.dtype != want.dtype:
        return f"expected {describe(want)}, got {describe(got)}"
    return tensors_differ(got, want)


def _bytes(said: str, number: int, height: int, width: int, top: int = 256) -> Case:
    """Pictures of random colours below `top`, as rows of bytes."""

    def draw() -> tuple[torch.Tensor, int, int]:
        generator = torch.Generator().manual_seed(height)
        flat = torch.randint(0, top, (number, height * width * 3), generator=generator)
        return flat.to(torch.uint8), height, width

    return Case(f"{said}, {height}×{width}", draw)


def layout() -> Exercise:
    return Exercise(
        id="04.2",
        title="from rows of a table to pictures",
        ask="Write to_chw(flat, height, width): flat is a uint8 tensor (N, "
        "height·width·3), one colour picture in each row, flattened in the order in "
        "which image files are read: row by row, in a row pixel by pixel, in a pixel "
        "red, green, blue. Return float32 pictures (N, 3, height, width) between 0 and "
        "1, black 0 and white 255/255.",
        difficulty=1,
        minutes=5,
        hints=(
            "Which index runs fastest in a stored row: the line, the column, or the "
            "colour?",
            "First undo the flattening, which puts the colour last; then move the "
            "colour axis to the front. A view moves nothing, permute does.",
            "flat.view(-1, height, width, 3).permute(0, 3, 1, 2) / 255.",
        ),
        solution_function=to_chw,
        explanation="view only gives names to numbers that stay where they are, so it "
        "has to name them in the order in which they lie. The published notebook says "
        ".view(-1, 3, 224, 224): its first channel is the upper third of the picture, "
        "with red, green and blue of a pixel side by side. The shape is right and no "
        "error is raised. Look at one picture after loading, always.",
        cases=(
            _bytes("two square pictures", 2, 4, 4),
            _bytes("one wide picture", 1, 3, 5),
            _bytes("three high pictures", 3, 6, 3),
            _bytes("two dark pictures", 2, 5, 4, top=90),
        ),
        misconceptions=(
            Misconception(
                "a view",
                "You gave the stored numbers new axes and moved none: the published "
                "defect. The shape fits, and each channel is a third of the rows with "
                "the colours side by side. View as (N, height, width, 3), then "
                "permute.",
                _both(lambda f, h, w: f.reshape(-1, 3, h, w))
                + _both(lambda f, h, w: f.reshape(-1, 3, w, h)),
            ),
            Misconception(
                "transposed",
                "The colour axis is in front, but rows and columns changed places: "
                "the picture lies on its side. After view(-1, height, width, 3) the "
                "order is permute(0, 3, 1, 2).",
                _both(lambda f, h, w: _stored(f, h, w).transpose(2, 3)),
            ),
            Misconception(
                "width before height",
                "You viewed the rows as (width, height). A square picture forgives "
                "that, any other is sheared: lines come first.",
                _both(lambda f, h, w: _stored(f, w, h))
                + _both(lambda f, h, w: _stored(f, w, h).transpose(2, 3)),
            ),
            Misconception(
                "colours last",
                "The picture is right, as a viewer wants it: (N, height, width, 3). "
                "A convolution wants the colours in front.",
                _both(lambda f, h, w: f.reshape(-1, h, w, 3)),
            ),
            Misconception(
                "pictures second",
                "You moved the colours in front of the pictures: (3, N, height, "
                "width). The batch axis stays first.",
                _both(lambda f, h, w: _stored(f, h, w).transpose(0, 1)),
            ),
            Misconception(
                "one picture only",
                "You read one picture. flat holds N, and the first axis keeps them "
                "apart.",
                _both(lambda f, h, w: f.reshape(h, w, 3).permute(2, 0, 1)),
            ),
            Misconception(
                "colours reversed",
                "Red and blue changed places. A grey scan does not show it; weights "
                "that expect the other order do.",
                _both(lambda f, h, w: _stored(f, h, w).flip(1)),
            ),
            Misconception(
                "not divided by 255",
                "The axes are right, but the values run from 0 to 255. Weights made "
                "for inputs near one start far off.",
                _both(_stored)[1:],
            ),
            Misconception(
                "divided without a fraction",
                "Integer division leaves 0 and 1: a black picture with a few white "
                "points. Divide with /.",
                _both(lambda f, h, w: _stored(f, h, w) // 255)[1:],
            ),
            Misconception(
                "divided by 256",
                "A byte reaches 255, so white would be 0.996.",
                (lambda f, h, w: _stored(f, h, w) / 256,),
            ),
            Misconception(
                "divided by its own maximum",
                "A dark picture becomes as bright as any other, and its scale depends "
                "on what else is in the batch. Divide by 255, the end of the range.",
                (_own_maximum, _own_maxima),
            ),
            Misconception(
                "minus one to one",
                "You centred the values. Some networks want that; here 0 is black.",
                (lambda f, h, w: _stored(f, h, w) / 127.5 - 1,),
            ),
        ),
        differ=_pictures_differ,
    )


# ------------------------------------------------------------------------------ 04.4
def correct_prior(probabilities, train_prior, test_prior):
    weighted = probabilities * (test_prior / train_prior)  # new mix in, old one out
    return weighted / weighted.sum(dim=1, keepdim=True)


def _rows(weighted: torch.Tensor) -> torch.Tensor:
    return weighted / weighted.sum(dim=1, keepdim=True)


def _mix(said: str, shape: tuple[int, int], train: str, test: str) -> Case:
    """Probabilities of a sharp and unsure model, and two priors from counts."""

    def draw() -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(sum(shape))
        found = (2 * torch.randn(shape, generator=generator)).softmax(1)
        counts = [torch.tensor([float(n) for n in c.split()]) for c in (train, test)]
        return (found, *(count / count.sum() for count in counts))

    return Case(said, draw)


def prior() -> Exercise:
    def idea(name: str, message: str, *wrong: Callable[..., Any]) -> Misconception:
        return Misconception(name, message, wrong)

    return Exercise(
        id="04.4",
        title="another mix of classes",
        ask="Write correct_prior(probabilities, train_prior, test_prior): a model gave "
        "probabilities (N, classes), each row with sum 1; in its training set the "
        "classes had the shares train_prior (classes,), none of them 0; where it is "
        "used they have test_prior. Return the probabilities (N, classes) that a model "
        "of the new mix would give, if pictures of each class look as before.",
        difficulty=3,
        minutes=8,
        hints=(
            "Bayes: p(class | picture) is p(picture | class) · p(class), up to a "
            "factor that makes a row sum to 1. What in it has changed?",
            "Take the old share out and put the new one in. Which axis has to sum to 1 "
            "afterwards?",
            "weighted = probabilities * test_prior / train_prior, then weighted / "
            "weighted.sum(dim=1, keepdim=True).",
        ),
        solution_function=correct_prior,
        explanation="Saerens, Latinne and Decaestecker (2002), Neural Computation 14. "
        "In the Kaggle set 13.8 % of the training pictures and 26.6 % of the test "
        "pictures show no tumour, so that class gains a factor of 1.94. It needs "
        "calibrated probabilities, and it mends the mix only: pictures from another "
        "scanner look different, and no prior undoes that. In practice test_prior has "
        "to come from somewhere; counting the test labels would be cheating.",
        cases=(
            _mix("the real mix", (6, 4), "826 822 395 827", "100 115 105 74"),
            _mix("as many pictures as classes", (3, 3), "1 1 2", "3 2 1"),
            _mix("two classes", (5, 2), "1 1", "1 9"),
            _mix("one picture", (1, 4), "4 3 2 1", "1 1 1 1"),
            _mix("a class that nearly vanishes", (4, 3), "2 1 1", "70 30 1"),
        ),
        misconceptions=(
            idea(
                "the new mix only",
                "You put the new shares in and left the old ones there: the model "
                "learned them and its probabilities hold them. Divide by train_prior.",
                lambda p, old, new: _rows(p * new),
                lambda p, old, new: p * new,
            ),
            idea(
                "the old mix only",
                "You took the old shares out and put none in, which is right for "
                "classes of equal share. Multiply by test_prior too.",
                lambda p, old, new: _rows(p / old),
                lambda p, old, new: p / old,
            ),
            idea(
                "upside down",
                "You multiplied by train_prior / test_prior: what became more frequent "
                "now gets less. The new share belongs above the bar.",
                lambda p, old, new: _rows(p * old / new),
                lambda p, old, new: p * old / new,
            ),
            idea(
                "not normalised",
                "The factors are right, but the rows no longer sum to 1, so they are "
                "no probabilities. Divide each row by its sum.",
                lambda p, old, new: p * new / old,
            ),
            idea(
                "normalised over the wrong axis",
                "You made columns (or the whole table) sum to 1, so pictures now "
                "depend on each other. One row is one picture: sum over dim 1.",
                lambda p, old, new: (p * new / old) / (p * new / old).sum(0),
                lambda p, old, new: (p * new / old) / (p * new / old).sum(),
                lambda p, old, new: (p * new / old) / (p * new / old).sum(1),
            ),
            idea(
                "divided by the largest",
                "You scaled each row by its largest entry. Its sum has to be 1.",
                lambda p, old, new: (
                    (p * new / old) / (p * new / old).amax(1, keepdim=True)
                ),
            ),
            idea(
                "softmax of probabilities",
                "softmax takes logits. Of probabilities it makes a flat row, for its "
                "inputs lie between 0 and 1 only. Divide by the sum, or add log("
                "test_prior / train_prior) to the logits.",
                lambda p, old, new: (p * new / old).softmax(1),
            ),
            idea(
                "added",
                "You added the difference of the shares. The sum stays 1, but a sure "
                "answer moves as far as an unsure one, and may go below 0. Priors "
                "multiply.",
                lambda p, old, new: p + new - old,
                lambda p, old, new: _rows((p + new - old).clamp(min=0)),
            ),
            idea(
                "mix of the predictions",
                "You divided by the mean prediction in place of train_prior. That "
                "forces the batch to the new mix, whatever pictures are in it.",
                lambda p, old, new: _rows(p * new / p.mean(0)),
            ),
            idea(
                "logits returned",
                "Those are logarithms. Probabilities are asked for: softmax over dim 1 "
                "brings them back.",
                lambda p, old, new: (p * new / old).log(),
                lambda p, old, new: _rows(p * new / old).log(),
            ),
            idea(
                "the answer only",
                "You returned the class. Its probability is what a threshold for "
                "missed tumours needs later.",
                lambda p, old, new: (p * new / old).argmax(1),
            ),
        ),
    )
