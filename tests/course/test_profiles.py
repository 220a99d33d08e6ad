"""Settings: what is accepted, what is refused, and what the refusal says."""

import os

import pytest

from medtut.course.catalog import environment
from medtut.course.profiles import (
    PROFILES,
    SettingsError,
    parse_sets,
    parse_value,
    profile_table,
    resolve,
)


def test_preset_then_override(course):
    assert resolve("90", "quick").steps == 10
    settings = resolve("90_tiny", "quick", {"steps": 3, "lr": None, "ranks": [2]})
    assert (settings.steps, settings.lr, settings.ranks) == (3, 1e-3, (2,))
    assert resolve(90, "quick", {"lr": 1}).lr == 1.0


def test_environment_beats_the_notebook(course, monkeypatch):
    monkeypatch.setenv("MEDTUT_PROFILE", "smoke")
    assert resolve("90", "quick").steps == 2
    monkeypatch.setenv("MEDTUT_PROFILE", "huge")
    with pytest.raises(
        SettingsError, match=r"huge.*MEDTUT_PROFILE.*smoke, quick, full"
    ):
        resolve("90", "quick")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stepz": 3}, "unknown setting 'stepz'.*did you mean 'steps'.*\n.*lr, name"),
        ({"steps": "ten"}, "steps = 'ten'.*whole number"),
        ({"steps": True}, "steps = True.*whole number"),
        ({"steps": 2.5}, "steps = 2.5.*whole number"),
        ({"lr": "1e-4"}, "lr = '1e-4'.*expected a number"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"steps": 0}, "steps = 0.*greater than or equal to 1"),
        ({"name": 3}, "name = 3.*text"),
        ({"ranks": ["a"]}, "ranks"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_refusals_say_key_value_and_expectation(course, given, says):
    with pytest.raises(SettingsError, match=f"(?s){says}"):
        resolve("90", "quick", given)


def test_unknown_profile_and_lesson(course):
    with pytest.raises(SettingsError, match="did you mean 'quick'"):
        resolve("90", "quik")
    with pytest.raises(SettingsError, match="no lesson 77"):
        resolve("77_nothing", "quick")
    with pytest.raises(SettingsError, match="not the name of a lesson"):
        resolve("lora", "quick")


def test_a_missing_preset_is_named(course):
    module = course / "notebooks" / "lessons" / "l92.py"
    text = module.read_text(encoding="utf-8").replace('"steps": 100, ', "")
    module.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=r"'steps' has no value.*'full'"):
        resolve("92", "full")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("8", 8),
        ("0.5", 0.5),
        ("[1e-3, 4]", [1e-3, 4]),
        ("true", True),
        ("'1e-4'", "1e-4"),
        ("lora", "lora"),
        ("null", None),
    ],
)
def test_values_of_set(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize("pair", ["steps", "=3", "a b=3", "steps=[1"])
def test_set_needs_name_and_value(pair):
    with pytest.raises(SettingsError):
        parse_sets([pair])


def test_set_twice_is_refused():
    with pytest.raises(SettingsError, match="twice"):
        parse_sets(["steps=1", "steps=2"])


def test_profile_table():
    table = profile_table()
    assert tuple(table) == PROFILES
    assert [table[name]["evidence"] for name in PROFILES] == [False, True, True]


def test_variables_set_for_a_while_are_put_back(monkeypatch):
    monkeypatch.setenv("MEDTUT_PROFILE", "full")
    monkeypatch.delenv("MEDTUT_OUT", raising=False)
    with environment(MEDTUT_PROFILE="smoke", MEDTUT_OUT="x"):
        assert (os.environ["MEDTUT_PROFILE"], os.environ["MEDTUT_OUT"]) == (
            "smoke",
            "x",
        )
    assert os.environ["MEDTUT_PROFILE"] == "full"
    assert "MEDTUT_OUT" not in os.environ
