"""Find what is silently wrong with a fine-tuning set-up.

``audit(subject)`` runs every detector and returns a `Report`; from the command line
``medtut audit FILE.py:factory`` does the same with what the factory returns.
"""

from __future__ import annotations

from typing import Any

from medtut.audit.adapters import find_adapters
from medtut.audit.detectors import (
    adapters_change_nothing,
    frozen_that_moved,
    trainable_without_gradient,
)
from medtut.audit.report import Finding, Report
from medtut.audit.state import preserved
from medtut.audit.subject import (
    Subject,
    SubjectError,
    as_subject,
    load_factory,
    with_batch,
)

__all__ = [
    "DETECTORS",
    "Finding",
    "Report",
    "Subject",
    "SubjectError",
    "adapters_change_nothing",
    "audit",
    "find_adapters",
    "frozen_that_moved",
    "load_factory",
    "trainable_without_gradient",
]

DETECTORS = {
    one.__name__: one
    for one in (adapters_change_nothing, trainable_without_gradient, frozen_that_moved)
}


def audit(subject: Any) -> Report:
    """Run every detector; the subject is left bit for bit as it was.

    Parameters
    ----------
    subject : Subject, nn.Module or dict
        What to audit; a bare model gets a made-up batch where that is possible.

    Returns
    -------
    Report
        Findings with numbers; ``exit_code`` is 1 when there is one.

    Raises
    ------
    SubjectError
        If the model or the loss fails on the batch.
    """
    subject = as_subject(subject, "the caller")
    findings: list[Finding] = []
    notes: list[str] = []
    with preserved(subject.model):
        subject, made_up = with_batch(subject)
    if made_up:
        notes.append(made_up)
    for detector in DETECTORS.values():
        found, said = detector(subject)
        findings += found
        notes += said
    return Report(tuple(findings), tuple(notes), tuple(DETECTORS))
