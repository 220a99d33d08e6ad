"""One set of versions, written in three places that must agree."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines) -> dict[str, str]:
    found = {}
    for line in lines:
        line = line.strip()
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found[normal(name)] = version
    return found


def constraints() -> dict[str, str]:
    return pins((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())


def conda() -> dict[str, str]:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    listed = yaml.safe_load(text)["dependencies"]
    (by_pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    return pins(by_pip)


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = project["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["lab"] + extras["test"]
    return {normal(r.name): r for r in map(Requirement, lines)}


def test_conda_and_pip_hold_the_same_pins():
    exact = constraints()
    assert conda() == {name: exact[name] for name in conda()}


def test_conda_lists_every_direct_dependency():
    assert set(conda()) == set(requirements())


def test_the_tried_set_lies_in_the_ranges():
    exact = constraints()
    for name, requirement in requirements().items():
        assert exact[name] in requirement.specifier, f"{name} {exact[name]}"
        assert requirement.specifier, f"{name} has no lower bound"


def test_the_supported_torch_pair():
    wanted = requirements()
    assert str(wanted["torch"].specifier) == ">=2.11"
    assert str(wanted["torchvision"].specifier) == ">=0.26"
