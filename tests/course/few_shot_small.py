"""Patients that need no drawing and a network with random weights, for lesson 06."""

import numpy as np

from medtut.course.profiles import resolve
from medtut.data.abdomen_anatomy import DRAWN
from medtut.data.abdomen_patient import AbdomenPatient
from medtut.data.organs import STRUCTURES

SHAPE, SPACING = (30, 28, 50), 12.0


def patient(body="lung1", hospital="target", seed=(0, 0), difficulty=1.0, field=""):
    """A box of fat with a cube for every structure, each of its own density.

    The third patient of a hospital has no gallbladder.
    """
    rng = np.random.default_rng([*seed, len(hospital)])
    hu = np.full(SHAPE, -1000, np.float32)
    hu[1:-1, 1:-1, 1:-1] = -80
    labels = np.zeros(SHAPE, np.uint8)
    for i, name in enumerate(DRAWN):
        at = np.array([i % 4, i // 4 % 3, i // 12]) * (6, 7, 14) + rng.integers(3, 6, 3)
        box = tuple(slice(a, a + s) for a, s in zip(at, (3, 4, 5), strict=True))
        if name == "gallbladder" and seed[-1] % 1000 == 2:
            continue
        labels[box], hu[box] = i + 1, 7 * i
    hu += rng.integers(-9, 10, SHAPE)
    facts = {"cyst": "", "field": field or "trunk", "phase": "native", "sex": "female",
             "hospital": hospital}  # fmt: skip
    return AbdomenPatient(hu, labels, facts, np.full(3, SPACING))


def open_course(monkeypatch, folder):
    """Make the cohort's patients of `patient`, and a network; returns settings."""
    from medtut.data import abdomen_cohort
    from medtut.models.swin_unetr import build_swin_unetr, save_swin_unetr

    drawn = []

    def draw(*given):
        drawn.append(given)
        return patient(*given)

    monkeypatch.setenv("MEDTUT_CACHE", str(folder / "cache"))
    monkeypatch.delenv("MEDTUT_PROFILE", raising=False)
    monkeypatch.setattr(abdomen_cohort, "draw_abdomen", draw)
    monkeypatch.setattr(abdomen_cohort, "load_trunk", lambda body: None)
    path = folder / "random.safetensors"
    model = build_swin_unetr(12, len(STRUCTURES), window_size=4)
    save_swin_unetr(model, path, STRUCTURES, SPACING)
    return resolve("06", "smoke", {"weights": str(path)}), drawn


def forget():
    """Drop what the modules of the lesson keep in memory."""
    from medtut.course.lessons import fseft, fseft_data, fseft_results, l06

    kept = fseft_data._target, fseft_data._source, fseft.pretrained
    kept += l06.protocol, fseft_results.stored_tables, fseft_results._adapted
    for one in kept:
        one.cache_clear()
