"""The README says what is true now."""

import json
import re
from pathlib import Path

from medtut.course.catalog import all_lessons
from medtut.course.report import memory, minutes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_lesson_has_a_row_with_its_measured_cost():
    costs = json.loads((ROOT / "benchmarks" / "costs.json").read_text("utf-8"))
    for lesson in all_lessons():
        if lesson.bonus:
            continue
        (row,) = [
            line
            for line in README.splitlines()
            if line.startswith("| [") and f"notebooks/{lesson.slug}" in line
        ]
        cost = costs[lesson.slug]["quick"]
        assert minutes(cost["seconds"]) in row
        assert memory(cost["peak_memory_mb"]) in row


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z]+)\b", README.replace("without `make`", "")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_short_enough_to_be_read():
    assert len(README.split()) < 700
