"""The package stays small, and lower rooms never import the course."""

import ast
import io
import subprocess
import sys
import token
import tokenize
from pathlib import Path

import pytest

import medtut

PACKAGE = Path(medtut.__file__).parent
# A system may be more than a lesson: 06 has a family of adapters, the readers of three
# layouts and a drawn cohort.
LIMIT, MODULE_LIMIT, LESSON_LIMIT, SYSTEM_LIMIT = 9_000, 400, 1_000, 3_500
LOWER = ("lora", "data", "train", "audit", "models", "adapters", "evaluate")
# Modules of one lesson that do not carry its number in their name: its pieces in the
# course, and the system it opens, with the readers and weights of that system alone.
OWNERS = {
    "course/lessons/__init__.py": "00",
    "course/lessons/common.py": "00",
    "course/lessons/ct.py": "05",
    "course/lessons/ct_designs.py": "05",
    "course/lessons/ct_published.py": "05",
    "course/lessons/ct_target.py": "05",
    "course/lessons/ct_text.py": "05",
    "course/lessons/fseft.py": "06",
    "course/lessons/fseft_data.py": "06",
    "course/lessons/fseft_published.py": "06",
    "course/lessons/fseft_real.py": "06",
    "course/lessons/fseft_results.py": "06",
    "course/lessons/medclip.py": "02",
    "course/lessons/sam.py": "03",
    "course/lessons/sam_judge.py": "03",
    "course/lessons/vgg.py": "04",
    "course/lessons/vgg_pictures.py": "04",
    "course/lessons/vgg_trials.py": "04",
    "evaluate/published.py": "02",
    "evaluate/published_sam.py": "03",
    "models/published_vgg.py": "04",
    "data/mri_augment.py": "04",
    "models/medclip.py": "02",
    "models/medclip_io.py": "02",
    "models/litemedsam.py": "03",
    "models/sam.py": "03",
    "models/sam_prompts.py": "03",
    "models/sam_stages.py": "03",
    "models/vgg.py": "04",
    "models/vgg_weights.py": "04",
    "data/brain_mri.py": "04",
    "data/chest_findings.py": "05",
    "data/chest_lesions.py": "05",
    "data/chest_reports.py": "05",
    "data/ct_rate.py": "05",
    "data/ct_shards.py": "05",
    "models/contrastive.py": "05",
    "models/ct_attention.py": "05",
    "models/ct_predict.py": "05",
    "models/ct_stem.py": "05",
    "models/ctclip.py": "05",
    "models/ctvit.py": "05",
    "models/published_ctclip.py": "05",
    "models/text_tower.py": "05",
    "adapters/__init__.py": "06",
    "data/abdomen_anatomy.py": "06",
    "data/abdomen_cohort.py": "06",
    "data/abdomen_organs.py": "06",
    "data/abdomen_patient.py": "06",
    "data/abdomen_trunk.py": "06",
    "adapters/adaptive_rank.py": "06",
    "adapters/layers.py": "06",
    "adapters/methods.py": "06",
    "adapters/parts.py": "06",
    "adapters/policy.py": "06",
    "adapters/size_prior.py": "06",
    "adapters/store.py": "06",
    "data/few_shot.py": "06",
    "data/organ_records.py": "06",
    "data/organs.py": "06",
    "data/partial.py": "06",
    "data/totalseg.py": "06",
    "evaluate/organs.py": "06",
    "models/frozen_features.py": "06",
    "models/partial_loss.py": "06",
    "models/published_fseft.py": "06",
    "models/suprem_unet.py": "06",
    "models/swin_unetr.py": "06",
    "models/swin_weights.py": "06",
}
HEAVY = (
    "torch",
    "torchvision",
    "monai",
    "transformers",
    "matplotlib",
    "numpy",
    "papermill",
    "nbformat",
    "scipy",
    "pydantic",
    "yaml",
)
NOT_TOKENS = {
    token.NEWLINE, token.INDENT, token.DEDENT, token.ENDMARKER, tokenize.NL,
    tokenize.COMMENT, tokenize.ENCODING,
}  # fmt: skip


def code_lines(source: str) -> int:
    """Count lines that hold code: no blank lines, comments or docstrings."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body:
            continue
        first = body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            docs.update(range(first.lineno, first.end_lineno + 1))
    lines: set[int] = set()
    for item in tokenize.generate_tokens(io.StringIO(source).readline):
        if item.type not in NOT_TOKENS:
            lines.update(range(item.start[0], item.end[0] + 1))
    return len(lines - docs)


def modules() -> dict[str, Path]:
    """Return every module of the package by its path below it."""
    return {p.relative_to(PACKAGE).as_posix(): p for p in sorted(PACKAGE.rglob("*.py"))}


def imported(source: str) -> set[str]:
    """Return the dotted names a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def climbs(source: str) -> bool:
    """Whether a module imports the course or the command line."""
    return any(
        name == top or name.startswith(top + ".")
        for name in imported(source)
        for top in ("medtut.course", "medtut.cli")
    )


def test_lines_of_code():
    """What lessons share, each lesson's own in the course, and with its system.

    Exercises and claims have no limit. Six lessons of up to 1,000 lines of their own do
    not fit into 9,000 together with what they share, so they are counted apart.
    """
    counts = {
        name: code_lines(path.read_text(encoding="utf-8"))
        for name, path in modules().items()
    }
    apart = ("course/exercises/", "course/claims")
    package = {k: n for k, n in counts.items() if not k.startswith(apart)}
    rooms: dict[str, int] = {}
    for name, lines in package.items():
        room = name.split("/")[0] if "/" in name else "top"
        rooms[room] = rooms.get(room, 0) + lines
    assert set(OWNERS) <= set(package)
    own = {
        name: lines
        for name, lines in package.items()
        if name.startswith("course/lessons/") or name in OWNERS
    }
    lessons: dict[str, int] = {}
    systems: dict[str, int] = {}
    for name, lines in own.items():
        number = OWNERS.get(name, name.split("/")[-1][1:3])
        systems[number] = systems.get(number, 0) + lines
        if name.startswith("course/"):
            lessons[number] = lessons.get(number, 0) + lines
    shared = sum(package.values()) - sum(own.values())
    print(f"medtut: {shared} lines of code of {LIMIT}, lessons apart; {rooms}")
    print(f"with the lessons' own parts: {sum(package.values())}")
    print(f"exercises and claims apart: {sum(counts.values()) - sum(package.values())}")
    print(f"lessons' own part: {lessons}; with the system they open: {systems}")
    assert shared < LIMIT
    assert all(lines < LESSON_LIMIT for lines in lessons.values()), lessons
    assert all(lines < SYSTEM_LIMIT for lines in systems.values()), systems


def test_no_module_is_long():
    long = {
        name: lines
        for name, path in modules().items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MODULE_LIMIT
    }
    assert long == {}


def test_lower_rooms_do_not_import_the_course():
    bad = [
        name
        for name, path in modules().items()
        if name.split("/")[0] in LOWER and climbs(path.read_text(encoding="utf-8"))
    ]
    assert bad == []


def test_the_package_does_not_import_what_is_not_installed():
    bad = [
        name
        for name, path in modules().items()
        if {n.split(".")[0] for n in imported(path.read_text(encoding="utf-8"))}
        & {"tools", "benchmarks", "data_scripts", "tests"}
    ]
    assert bad == []


@pytest.mark.parametrize("module", ["medtut", "medtut.cli"])
def test_import_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*[n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_counters_see_what_they_should():
    source = (
        '"""Doc\nmore."""\nimport os  # why\n\ndef f():\n    """Doc."""\n    return 1'
    )
    assert code_lines(source) == 3
    assert climbs("def f():\n    from medtut.course.files import write_text")
    assert climbs("from medtut import course")
    assert climbs("import medtut.cli")
    assert not climbs("from medtut.data import cache\nimport medtut.courses")
