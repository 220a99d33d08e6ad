"""Find what is silently wrong with a fine-tuning set-up.

``audit(subject)`` runs every detector and returns a `Report`; from the command line
``medtut audit FILE.py:factory`` does the same with what the factory returns.
"""

from __future__ import annotations

from typing import Any

from medtut.audit import classifier_checks as classifier
from medtut.audit import ct_checks as ct
from medtut.audit.adapters import find_adapters
from medtut.audit.data_checks import hwc_viewed_as_chw, split_shares_a_patient
from medtut.audit.detectors import (
    adapters_change_nothing,
    frozen_that_moved,
    trainable_without_gradient,
)
from medtut.audit.loss_checks import evaluation_misbehaves, loss_misbehaves
from medtut.audit.metric_checks import metric_misbehaves
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
    "DETECTORS", "Finding", "Report", "Subject", "SubjectError",
    "adapters_change_nothing", "audit", "evaluation_misbehaves", "find_adapters",
    "frozen_that_moved", "hwc_viewed_as_chw", "load_factory", "loss_misbehaves",
    "metric_misbehaves", "split_shares_a_patient", "trainable_without_gradient",
]  # fmt: skip

# Every detector and what of a subject it looks at: it runs where one of these is there.
_LOOKS_AT = {
    adapters_change_nothing: ("model",),
    trainable_without_gradient: ("model",),
    frozen_that_moved: ("model",),
    split_shares_a_patient: ("split",),
    hwc_viewed_as_chw: ("images", "batch"),
    metric_misbehaves: ("metric",),
    loss_misbehaves: ("segmentation_loss",),
    evaluation_misbehaves: ("evaluation",),
    classifier.constant_predictor: ("model", "predictions", "reported"),
    classifier.micro_averaged: ("class_metric", "reported"),
    classifier.loss_at_class_prior: ("losses",),
    classifier.chosen_on_test: ("select",),
    classifier.layout_scrambles: ("layout",),
    ct.hu_rescaled_twice: ("hu", "rescale"),
    ct.switch_changes_nothing: ("switches",),
    ct.bootstrap_of_zero_width: ("bootstrap", "intervals"),
}
DETECTORS = {one.__name__: one for one in _LOOKS_AT}


def audit(subject: Any) -> Report:
    """Run every detector that applies; the subject is left bit for bit as it was.

    Parameters
    ----------
    subject : Subject, nn.Module or dict
        What to audit; a bare model gets a made-up batch where that is possible, a
        split, images, a loss, a metric or an evaluation need no model.

    Returns
    -------
    Report
        Findings with numbers; ``exit_code`` is 1 when there is one. ``checked`` lists
        the detectors that had something to look at.

    Raises
    ------
    SubjectError
        If the model or the loss fails on the batch, or the split cannot be read.
    """
    subject = as_subject(subject, "the caller")
    # Before a batch is made up: random numbers are nobody's images.
    running = [
        one
        for one, fields in _LOOKS_AT.items()
        if any(getattr(subject, key) is not None for key in fields)
    ]
    findings: list[Finding] = []
    notes: list[str] = []
    if subject.model is not None:
        with preserved(subject.model):
            subject, made_up = with_batch(subject)
        notes += [made_up] if made_up else []
    for detector in running:
        found, said = detector(subject)
        findings += found
        notes += said
    return Report(tuple(findings), tuple(notes), tuple(d.__name__ for d in running))
