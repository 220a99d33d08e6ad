"""What the exercises of every lesson have to stand, whatever they ask for.

A test module names its lesson and its answers in a subclass; the tests are inherited.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from medtut.course import exercises as ex
from medtut.course.exercises import engine, exercise

# Answers by exercise; with the name of a wrong idea, or with words of the outcome.
Answers = dict[str, list[Callable[..., Any]]]
Judged = dict[str, list[tuple[Any, str]]]


def run_source(source: str) -> dict[str, Any]:
    """Run an answer cell with what a lesson has imported by then."""
    space = {"torch": torch, "math": math, "np": np}
    exec(source, space)
    return space


def later(*args):
    raise NotImplementedError


class ExerciseCases:
    """Tests of the exercises of one lesson.

    Attributes
    ----------
    lesson : str
        Its slug.
    functions : tuple of str
        What the exercises ask for, in order.
    right : dict
        Right answers written another way than the solution, two and more of each.
    own_words : dict
        Wrong ideas as somebody else would write them, with the idea's name.
    broken : dict
        Answers that are wrong in no known way, with what they must be told.
    """

    lesson: ClassVar[str]
    functions: ClassVar[tuple[str, ...]]
    right: ClassVar[Answers]
    own_words: ClassVar[Judged] = {}
    broken: ClassVar[Judged] = {}

    def pytest_generate_tests(self, metafunc):
        exercises = ex.exercises_of(self.lesson)
        wrong = [
            (one.id, idea.name, k)
            for one in exercises.values()
            for idea in one.misconceptions
            for k in range(len(idea.wrong))
        ]
        right = [(k, answer) for k, found in self.right.items() for answer in found]
        told = {
            name: [(k, *row) for k, rows in found.items() for row in rows]
            for name, found in (("name", self.own_words), ("said", self.broken))
        }
        tables = {
            ("one_id",): [(k,) for k in exercises],
            ("one_id", "answer"): right,
            ("one_id", "name", "which"): wrong,
            ("one_id", "answer", "name"): told["name"],
            ("one_id", "answer", "said"): told["said"],
        }
        known = {name for names in tables for name in names}
        asked = tuple(name for name in metafunc.fixturenames if name in known)
        if asked:
            metafunc.parametrize(asked, tables[asked], ids=_label)

    def test_exercises_are_in_order_with_their_functions(self):
        number = self.lesson.split("_")[0]
        want = {f"{number}.{k}": name for k, name in enumerate(self.functions, 1)}
        found = {k: one.name for k, one in ex.exercises_of(self.lesson).items()}
        assert list(found.items()) == list(want.items())
        assert list(self.right) == list(want)
        assert {*self.own_words, *self.broken} <= set(want)

    def test_solution_source_alone_is_correct(self, one_id):
        one = exercise(one_id)
        answer = run_source(ex.solution_source(one_id))[one.name]
        outcome = one.check(answer)
        assert outcome.status == "correct", outcome

    def test_right_answers_written_differently_pass(self, one_id, answer):
        outcome = exercise(one_id).check(answer)
        assert outcome.status == "correct", outcome

    def test_each_misconception_is_refused_by_name(self, one_id, name, which):
        one = exercise(one_id)
        idea = next(m for m in one.misconceptions if m.name == name)
        outcome = one.check(idea.wrong[which])
        seen = outcome.status, outcome.misconception
        assert seen == ("misconception", name), outcome
        assert idea.message in outcome.text

    def test_wrong_ideas_in_other_words_are_recognised(self, one_id, answer, name):
        outcome = exercise(one_id).check(answer)
        assert outcome.misconception == name, outcome

    def test_broken_answers_are_told_what_is_wrong(self, one_id, answer, said):
        outcome = exercise(one_id).check(answer)
        assert outcome.status == "incorrect", outcome
        assert said in outcome.text, outcome

    def test_shape_of_an_exercise(self, one_id):
        one = exercise(one_id)
        assert len(one.misconceptions) >= 5
        assert len(self.right[one_id]) >= 2
        assert len(one.hints) == 3
        assert 1 <= one.difficulty <= 3
        assert one.name in one.ask
        # A misconception that only ever fails would be given to any crash.
        for idea in one.misconceptions:
            for wrong in idea.wrong:
                seen = [engine.observe(wrong, case).error for case in one.cases]
                assert None in seen, idea.name

    def test_untouched_answer_is_not_attempted(self, one_id):
        one = exercise(one_id)
        stub = run_source(ex.stub_source(one_id))[one.name]
        for answer in (stub, None, later):
            assert one.check(answer).status == "not attempted", answer


def _label(value: Any) -> str | None:
    return getattr(value, "__name__", None) if callable(value) else None
