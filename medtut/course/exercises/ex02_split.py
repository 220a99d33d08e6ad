"""Exercise 02.2: a split by patient.

Many splits are right, so 02.2 is judged by what a split does, not by its numbers: the
answer is called several times, and what comes back is a record of its faults.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from medtut.course.exercises.cards import Outcome
from medtut.course.exercises.engine import (
    Case,
    Exercise,
    Misconception,
    _is_stub,
    describe,
)


class Probed(Exercise):
    """An exercise that calls the answer through `probe` instead of directly."""

    probe: Callable[..., Any]

    def _judge(self, answer: Any) -> Outcome:
        if callable(answer) and not _is_stub(answer):
            answer = type(self).probe(answer)
        return super()._judge(answer)

    def _fault(self, one: Any, want: Any, answer: Any) -> str | None:
        return super()._fault(one, want, getattr(answer, "__wrapped__", answer))


# ------------------------------------------------------------------------------ 02.2
def split_by_patient(ids, fraction, seed):
    patients = sorted(set(ids))  # a set of strings has another order in every process
    order = np.random.default_rng(seed).permutation(len(patients))
    chosen = {patients[i] for i in order[: round(fraction * len(patients))]}
    train = [i for i, patient in enumerate(ids) if patient in chosen]
    test = [i for i, patient in enumerate(ids) if patient not in chosen]
    return train, test


class _Id(str):
    """A patient id whose hash can be turned, as it is in another Python process."""

    salt = 0

    def __hash__(self) -> int:
        return hash((self.salt, str(self)))

    __eq__ = str.__eq__


@contextmanager
def _global_randomness(seed: int):
    """Set what an answer must not depend on, and give it back."""
    kept = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # the engine gives torch's own back
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


class Record(dict):
    """Faults of a split by name, each with a sentence."""


def _as_split(value: Any) -> tuple[list[Any], list[Any]] | None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return None
    try:
        return [list(getattr(side, "tolist", lambda s=side: s)()) for side in value]
    except TypeError:
        return None


def _faults(value: Any, ids: Sequence[str], fraction: float) -> Record:
    """Say what is wrong with one split."""
    sides = _as_split(value)
    if sides is None:
        said = f"expected the pair (train, test) of index lists, got {describe(value)}"
        return Record(pair=said)
    train, test = sides
    strange = [one for one in train + test if type(one) is not int]
    if strange:
        said = f"indices are whole numbers, and one is {describe(strange[0])}"
        return Record({f"{type(strange[0]).__name__} entries": said})
    found = Record()
    both = sorted(train + test)
    if any(not 0 <= i < len(ids) for i in both):
        said = f"indices run from 0 to {len(ids) - 1}, and yours to {both[-1]}"
        return Record(range=said)
    if lost := len(ids) - len(set(both)):
        found["lost"] = f"{lost} of {len(ids)} slices are on neither side"
    if twice := len(both) - len(set(both)):
        found["twice"] = f"{twice} slices are used twice"
    here, there = {ids[i] for i in train}, {ids[i] for i in test}
    if shared := sorted(here & there):
        names = ", ".join(shared[:3])
        found["shared"] = f"{len(shared)} patients are on both sides ({names})"
    count = len(set(ids))
    close = lambda share: abs(len(here) - share * count) < 0.999  # noqa: E731
    if not shared and not close(fraction):
        found["swapped" if close(1 - fraction) else "share"] = (
            f"{len(here)} of {count} patients are in train, and {fraction:g} of them "
            f"is {fraction * count:g}"
        )
    return found


def _probe_split(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Call an answer again and again, and record what its splits do wrong."""
    if hasattr(answer, "__wrapped__"):
        return answer

    @functools.wraps(answer)
    def run(ids, fraction, seed):
        def call(shift: int, world: int, salt: int = 0) -> Any:
            _Id.salt = salt
            with _global_randomness(world):
                return answer([_Id(one) for one in ids], fraction, seed + shift)

        first = call(0, 0)
        if first is None or first is Ellipsis:
            return first
        found, trains = Record(), []
        for shift in range(8):
            value = first if shift == 0 else call(shift, shift)
            found.update(_faults(value, ids, fraction))
            sides = _as_split(value)
            if sides is None:
                return found
            trains.append(set(sides[0]))
        if all(train == trains[0] for train in trains):
            found["one split"] = "every seed gives the same split"
        again = [_as_split(call(0, world)) for world in (101, 102, 103)]
        if any(one is None or set(one[0]) != trains[0] for one in again):
            found["not repeatable"] = "the same seed gave two different splits"
        elif not found:
            # An answer that cannot work with such ids (NumPy's strings hash in their
            # own way) gives no valid split here, and is not judged by it.
            salted = [call(0, 0, salt) for salt in (1, 2, 3, 4)]
            valid = [one for one in salted if not _faults(one, ids, fraction)]
            if any(set(_as_split(one)[0]) != trains[0] for one in valid):
                found["set order"] = "a new Python process would give another split"
        return found

    return run


def _split_differs(got: Any, want: Any) -> str | None:
    """Compare the faults of two answers, or of one with a right answer's none."""
    if not isinstance(got, Record):
        return f"expected the pair (train, test) of index lists, got {describe(got)}"
    if isinstance(want, Record):
        return None if got.keys() == want.keys() else "other faults"
    return "; ".join(got.values()) or None


def _split_patients(ids, fraction, seed, names=None):
    names = sorted(set(ids)) if names is None else list(names)
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[i] for i in order[: round(fraction * len(names))]}


def _sides(ids, chosen):
    train = [i for i, one in enumerate(ids) if one in chosen]
    return train, [i for i, one in enumerate(ids) if one not in chosen]


def _wrong_over_slices(ids, fraction, seed):
    order = np.random.default_rng(seed).permutation(len(ids)).tolist()
    cut = round(fraction * len(ids))
    return order[:cut], order[cut:]


def _wrong_first_slices(ids, fraction, seed):
    cut = round(fraction * len(ids))
    return list(range(cut)), list(range(cut, len(ids)))


def _wrong_first_patients(ids, fraction, seed):
    names = sorted(set(ids))
    return _sides(ids, set(names[: round(fraction * len(names))]))


def _wrong_fixed_seed(ids, fraction, seed):
    return _sides(ids, _split_patients(ids, fraction, 0))


def _wrong_global(ids, fraction, seed):
    names = sorted(set(ids))
    return _sides(ids, set(random.sample(names, round(fraction * len(names)))))


def _wrong_set_order(ids, fraction, seed):
    return _sides(ids, _split_patients(ids, fraction, seed, names=set(ids)))


def _wrong_ids(ids, fraction, seed):
    chosen = _split_patients(ids, fraction, seed)
    return sorted(chosen), sorted(set(ids) - chosen)


def _wrong_one_slice_each(ids, fraction, seed):
    chosen = _split_patients(ids, fraction, seed)
    firsts = [ids.index(one) for one in sorted(set(ids))]
    return [i for i in firsts if ids[i] in chosen], [
        i for i in firsts if ids[i] not in chosen
    ]


def _wrong_share_of_slices(ids, fraction, seed):
    names = sorted(set(ids))
    chosen: set = set()
    for place in np.random.default_rng(seed).permutation(len(names)):
        if sum(one in chosen for one in ids) >= fraction * len(ids):
            break
        chosen.add(names[place])
    return _sides(ids, chosen)


def _wrong_swapped(ids, fraction, seed):
    train, test = _sides(ids, _split_patients(ids, fraction, seed))
    return test, train


def _split_case(said: str, slices: Sequence[int], fraction: float) -> Case:
    """Patients with so many slices each, in a mixed order."""
    ids = [f"case_{k:03d}" for k, count in enumerate(slices) for _ in range(count)]
    random.Random(len(ids)).shuffle(ids)
    return Case(said, lambda: (list(ids), fraction, 3))


class _Split(Probed):
    probe = staticmethod(_probe_split)


def split() -> Exercise:
    def idea(name: str, message: str, *wrong: Callable[..., Any]) -> Misconception:
        return Misconception(name, message, tuple(_probe_split(one) for one in wrong))

    return _Split(
        id="02.2",
        title="a split that keeps patients apart",
        ask="Write split_by_patient(ids, fraction, seed). ids holds the patient id of "
        "every slice, in any order. Return (train, test), two lists of slice indices: "
        "every slice once, no patient on both sides, fraction of the patients in train "
        "(rounded to a whole patient), and one seed always gives one split, another "
        "seed another.",
        difficulty=2,
        minutes=8,
        hints=(
            "What should be drawn at random, slices or patients?",
            "Draw from the distinct ids, then ask of every slice on which side its "
            "patient is. The random numbers must come from a generator made from seed.",
            "patients = sorted(set(ids)); permute them with np.random.default_rng(seed)"
            "; the first round(fraction * len(patients)) are train. Then go through "
            "enumerate(ids).",
        ),
        solution_function=split_by_patient,
        explanation="Neighbouring slices of a patient are near copies. With some in "
        "train, a test score measures memory. sorted() matters: the order of a set of "
        "strings changes from one Python process to the next, and the split with it.",
        cases=(
            _split_case("12 patients, 0.75 in train", [5, 3, 8, 4, 6, 2] * 2, 0.75),
            _split_case("20 patients, 0.9 in train", [4, 7] * 10, 0.9),
            _split_case("one patient with most slices, 0.3", [60] + [2] * 9, 0.3),
        ),
        misconceptions=(
            idea(
                "split over slices",
                "You drew slices, so slices of one patient lie on both sides: the "
                "leak of the published split. Draw patients.",
                _wrong_over_slices,
            ),
            idea(
                "first slices",
                "You cut the list of slices in order: the patient at the cut is on "
                "both sides, and so are all others when slices are not in order.",
                _wrong_first_slices,
            ),
            idea(
                "seed ignored",
                "Patients stay together, but every seed gives the same split. Draw "
                "with a generator made from seed, so that several splits can be tried.",
                _wrong_first_patients,
                _wrong_fixed_seed,
            ),
            idea(
                "not repeatable",
                "The same seed gave two splits: your random numbers come from a global "
                "or unseeded generator. Use np.random.default_rng(seed).",
                _wrong_global,
            ),
            idea(
                "order of a set",
                "The split is right within this process, but the order of a set of "
                "strings changes in the next one, and test patients then become "
                "training patients. Sort the ids before you draw.",
                _wrong_set_order,
            ),
            idea(
                "ids in place of indices",
                "You returned patient ids. The two lists hold indices of slices, so "
                "that they can pick from the data set.",
                _wrong_ids,
            ),
            idea(
                "slices dropped",
                "The patients are split well, but some slices are on neither side.",
                _wrong_one_slice_each,
            ),
            idea(
                "fraction of the slices",
                "You filled train until it held its fraction of the slices. Patients "
                "differ in how many they have; the fraction here is of patients.",
                _wrong_share_of_slices,
            ),
            idea(
                "sides swapped",
                "fraction is for train, the first of the two; you gave it to test.",
                _wrong_swapped,
            ),
        ),
        differ=_split_differs,
    )
