"""Profiles: one typed schema for every setting of every lesson.

papermill only warns about a parameter it does not know, and a YAML ``1e-4`` reaches
a notebook as text. Here both are refused, with a message, before anything runs.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medtut.errors import MedtutError

PROFILES = ("smoke", "quick", "full")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes ``1e-4`` for text; here it is the number it looks like."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class SettingsError(MedtutError):
    """A profile, a setting or a lesson that does not exist, or a wrong value."""


class LessonSettings(BaseModel):
    """What every lesson can be told; a lesson adds its own fields.

    Strict: ``"ten"`` and ``"1e-4"`` are refused where a number belongs, and so is a
    name that is not a field. An int is accepted for a float, a list for a tuple
    (papermill and YAML know lists only).

    Attributes
    ----------
    profile : {"smoke", "quick", "full"}
    seed : int
    data : str or None
        Folder with the user's own data set.
    out : str or None
        Where the lesson writes; None for ``build/<profile>/<slug>``.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False
    )

    profile: Literal["smoke", "quick", "full"]
    seed: int = Field(default=0, ge=0)
    data: str | None = None
    out: str | None = None

    def stored(self) -> dict[str, Any]:
        """Return what is kept with a result: no folders, they belong to one machine."""
        own = "own data" if self.data else None
        return {**self.model_dump(mode="json", exclude={"out"}), "data": own}


def lesson_tables(module: str) -> tuple[dict[str, dict[str, Any]], list[list[str]]]:
    """Return presets by profile and key numbers, from the YAML beside a lesson.

    Parameters
    ----------
    module : ``__file__`` of the lesson's module: ``l01.py`` has its tables in
        ``l01.yml``. A bonus notebook with its lesson's presets has key numbers alone.
    """
    text = Path(module).with_suffix(".yml").read_text(encoding="utf-8")
    tables = yaml.load(text, Loader=_Loader)
    return tables.get("presets", {}), tables["key_numbers"]


@cache
def profile_table() -> dict[str, dict[str, Any]]:
    """Return ``profiles.yml``: meaning, evidence, cell_timeout, defaults."""
    text = Path(__file__).with_name("profiles.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def choose_profile(profile: str | None = None) -> str:
    """Return the profile in force: ``MEDTUT_PROFILE``, else `profile`, else quick."""
    name = os.environ.get("MEDTUT_PROFILE") or profile or "quick"
    if name not in PROFILES:
        source = " (from MEDTUT_PROFILE)" if os.environ.get("MEDTUT_PROFILE") else ""
        raise SettingsError(
            f"unknown profile {name!r}{source}{_did_you_mean(name, PROFILES)}; "
            f"choose one of {', '.join(PROFILES)}"
        )
    return name


def lesson_module(slug: str | int) -> ModuleType:
    """Import the module that belongs to a lesson or bonus notebook.

    ``$MEDTUT_NOTEBOOKS/lessons/lNN.py`` comes before the package's own module, so
    that a folder of one's own notebooks needs no change in the package.

    Raises
    ------
    SettingsError
        When no module belongs to that number.
    """
    number, names = _module_names(slug)
    own = os.environ.get("MEDTUT_NOTEBOOKS")
    for name in names:
        path = Path(own or "") / "lessons" / f"{name}.py"
        if own and path.is_file():
            return _load_file(path)
        full = f"medtut.course.lessons.{name}"
        if importlib.util.find_spec(full) is not None:
            return importlib.import_module(full)
    raise SettingsError(
        f"there is no lesson {number}: medtut/course/lessons/{names[-1]}.py "
        "does not exist"
    )


def resolve(
    slug: str | int, profile: str | None = None, overrides: dict[str, Any] | None = None
) -> LessonSettings:
    """Turn a profile and some overrides into checked settings.

    Later wins: defaults of ``profiles.yml``, the lesson's preset, `overrides`. An
    override of None means "from the profile". ``MEDTUT_PROFILE`` beats `profile`.

    Raises
    ------
    SettingsError
        Unknown profile, unknown key, or a value of the wrong type or range.
    """
    given = {k: v for k, v in (overrides or {}).items() if v is not None}
    name = choose_profile(profile or given.pop("profile", None))
    given.pop("profile", None)
    module = lesson_module(slug)
    kind: type[LessonSettings] = module.Settings
    values = profile_table()[name].get("defaults", {}) | module.PRESETS.get(name, {})
    values |= given | {"profile": name}
    try:
        # As JSON: there, and only there, pydantic's strict mode takes a list (papermill
        # and YAML know no other) for a tuple. A Path or an array is still refused.
        text = json.dumps(values, default=lambda x: {"": str(x)})
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise SettingsError(_explain(slug, kind, name, given, error)) from None


def parse_value(text: str) -> Any:
    """Read the right-hand side of ``--set key=value`` as a YAML value.

    Examples
    --------
    >>> parse_value("1e-4"), parse_value("8"), parse_value("[1, 2]"), parse_value("x")
    (0.0001, 8, [1, 2], 'x')
    """

    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise SettingsError(f"cannot read the value {text!r}: {first}") from None


def parse_sets(pairs: list[str] | None) -> dict[str, Any]:
    """Turn ``["steps=10", "lr=1e-4"]`` into a dict.

    Raises
    ------
    SettingsError
        When a pair has no ``=`` or a key is given twice.
    """
    values: dict[str, Any] = {}
    for pair in pairs or []:
        key, sign, text = pair.partition("=")
        key = key.strip()
        if not sign or not key.isidentifier():
            raise SettingsError(f"--set needs name=value, got {pair!r}")
        if key in values:
            raise SettingsError(f"--set {key} is given twice")
        values[key] = parse_value(text)
    return values


def _module_names(slug: str | int) -> tuple[str, list[str]]:
    match = re.match(r"(bonus/)?(\d+)(.*)", str(slug))
    if match is None:
        raise SettingsError(
            f"{str(slug)!r} is not the name of a lesson (like 01_lora_math)"
        )
    number, rest = f"{int(match[2]):02d}", re.sub(r"\W", "_", match[3])
    return number, [f"b{number}{rest}", f"l{number}"] if match[1] else [f"l{number}"]


@cache
def _load_file(path: Path) -> ModuleType:
    full = f"medtut_own_lessons_{path.stem}"
    spec = importlib.util.spec_from_file_location(full, path)
    sys.modules[full] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _explain(
    slug: str | int,
    kind: type[LessonSettings],
    profile: str,
    given: dict[str, Any],
    error: ValidationError,
) -> str:
    lines, known = [], []
    for item in error.errors():
        key = str(next(iter(item["loc"]), "settings"))
        value = given.get(key, item["input"])
        source = "" if key in given else f" (from the preset of {profile!r})"
        said = f"{key} = {value!r}{source} ({type(value).__name__}): "
        said += f"{_expected(kind, key)}; {item['msg'].lower()}"
        if item["type"] == "extra_forbidden":
            said = f"unknown setting {key!r}{_did_you_mean(key, kind.model_fields)}"
            known = [f"known settings: {', '.join(sorted(kind.model_fields))}"]
        elif item["type"] == "missing":
            said = f"{key!r} has no value: not given, and profile {profile!r} has "
            said += "no preset for it"
        lines.append(f"lesson {slug}: {said}")
    return "\n".join(lines + known)


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _expected(kind: type[LessonSettings], key: str) -> str:
    if key not in kind.model_fields:
        return "not a known combination"
    annotation = kind.model_fields[key].annotation
    if get_origin(annotation) is Literal:
        return "expected one of " + ", ".join(repr(v) for v in get_args(annotation))
    return f"expected {_WORDS.get(annotation, str(annotation).replace('typing.', ''))}"
