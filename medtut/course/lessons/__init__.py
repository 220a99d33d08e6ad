"""One module per lesson, ``lNN.py``: its settings, presets and sweep arms.

A lesson module defines

``Settings``
    A subclass of :class:`medtut.course.profiles.LessonSettings`.
``PRESETS``
    ``{"smoke": {...}, "quick": {...}, "full": {...}}``, a value for every field that
    has no default.
``KEY_NUMBERS`` (optional)
    ``[(metric key, label, format), ...]`` for the index page; a dot in the key goes
    down into a nested metric.
``ARMS``, ``run_arm(arm, seed, settings)`` and ``COHORT_VERSION`` (optional)
    What ``medtut sweep`` runs.

A bonus notebook ``bonus/NN_name`` looks for ``bNN_name.py`` first and takes the
lesson's own module otherwise. What several lessons do alike is in ``common.py``.
"""
