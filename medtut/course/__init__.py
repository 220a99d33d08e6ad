"""The course: profiles, lessons, the runner, reports, exercises and claims.

Nothing is imported until it is asked for, so that ``import medtut.course`` stays
quick and a notebook only pays for what it uses.
"""

from importlib import import_module

_WHERE = {
    "Lesson": "medtut.course.lesson",
    "open_lesson": "medtut.course.lesson",
    "LessonSettings": "medtut.course.profiles",
    "SettingsError": "medtut.course.profiles",
    "resolve": "medtut.course.profiles",
    "run_lessons": "medtut.course.runner",
    "load_sweep": "medtut.course.sweep",
    "run_sweep": "medtut.course.sweep",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
