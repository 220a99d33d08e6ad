"""Sweeps: one file per run, restartable, never mixed."""

import json
import sys

import pytest
from rich.console import Console

from medtut.course.profiles import SettingsError, lesson_module
from medtut.course.sweep import load_sweep, parse_seeds, run_sweep
from medtut.errors import MedtutError

CONSOLE = Console(quiet=True)


def sweep(*args, **kwargs):
    return run_sweep(*args, console=CONSOLE, **{"profile": "quick", **kwargs})


@pytest.fixture
def counted(course, monkeypatch):
    """Return the list of (arm, seed) that really ran."""
    module = lesson_module("90")
    ran = []
    original = module.run_arm

    def run_arm(arm, seed, settings):
        ran.append((arm, seed))
        return original(arm, seed, settings)

    monkeypatch.setattr(module, "run_arm", run_arm)
    return ran


def test_arms_times_seeds(course, counted, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/x/medtut", "sweep", "90", "/home/x/out"])
    runs = sweep("90", seeds=[0, 1])
    assert counted == [("lora", 0), ("full", 0), ("lora", 1), ("full", 1)]
    folder = course / "benchmarks" / "sweeps" / "90_tiny"
    text = (folder / "full" / "seed1.json").read_text(encoding="utf-8")
    stored = json.loads(text)
    assert stored == runs[3]
    assert stored["metrics"] == {"dice": 0.51, "lr": 1e-4}
    assert stored["settings"]["lr"] == 1e-4
    assert stored["settings"]["seed"] == 1
    assert stored["cohort"] == "c1"
    assert stored["command"] == "medtut sweep 90"
    assert {"cpu", "cores", "device"} <= set(stored["machine"])
    assert "python" in stored["versions"]
    assert str(course) not in text
    assert [(run["arm"], run["seed"]) for run in load_sweep("90")] == [
        ("full", 0),
        ("full", 1),
        ("lora", 0),
        ("lora", 1),
    ]


def test_restart_runs_only_what_is_missing(course, counted):
    sweep("90", arms=["lora"], seeds=[0])
    sweep("90", arms=["lora"], seeds=[0, 1])
    assert counted == [("lora", 0), ("lora", 1)]


def test_other_settings_are_refused_before_anything_runs(course, counted, monkeypatch):
    sweep("90", arms=["lora"], seeds=[0])
    with pytest.raises(SettingsError, match=r"steps: 10 then, 3 now.*--force"):
        sweep("90", arms=["full", "lora"], seeds=[0], overrides={"steps": 3})
    assert counted == [("lora", 0)]
    sweep("90", arms=["lora"], seeds=[0], overrides={"steps": 3}, force=True)
    assert counted == [("lora", 0)] * 2
    monkeypatch.setattr(lesson_module("90"), "COHORT_VERSION", "c2")
    with pytest.raises(SettingsError, match="cohort version: 'c1' then, 'c2' now"):
        sweep("90", arms=["lora"], seeds=[0], overrides={"steps": 3})


def test_a_broken_file_is_not_overwritten_silently(course, counted):
    path = course / "benchmarks" / "sweeps" / "90_tiny" / "lora" / "seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(SettingsError, match="not a stored run"):
        sweep("90", arms=["lora"], seeds=[0])
    assert sweep("90", arms=["lora"], seeds=[0], force=True)[0]["metrics"]


def test_one_failing_run_does_not_end_the_sweep(course):
    runs = sweep("90", arms=["lora"], seeds=[13, 0])
    assert runs[0] == {"arm": "lora", "seed": 13, "error": "ValueError: diverged"}
    assert runs[1]["metrics"]["dice"] == 0.5
    assert len(load_sweep("90")) == 1


def test_refusals(course):
    with pytest.raises(SettingsError, match=r"no arm 'lra'.*did you mean 'lora'"):
        sweep("90", arms=["lra"])
    with pytest.raises(SettingsError, match="use --seeds"):
        sweep("90", overrides={"seed": 3})
    with pytest.raises(SettingsError, match="no lesson '77'"):
        sweep("77")
    with pytest.raises(MedtutError, match="no stored runs"):
        load_sweep("90")


def test_profiles_are_not_mixed(course):
    sweep("90", arms=["lora"], seeds=[0], profile="smoke")
    sweep("90", arms=["lora"], seeds=[1])
    with pytest.raises(MedtutError, match="cannot be compared"):
        load_sweep("90")


def test_seeds():
    assert parse_seeds("0-4") == [0, 1, 2, 3, 4]
    assert parse_seeds("7, 0-1,7") == [7, 0, 1]
    for bad in ("", "a", "3-1", "1,,2", "-1"):
        with pytest.raises(SettingsError):
            parse_seeds(bad)
