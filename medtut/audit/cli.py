"""``medtut audit FILE.py:factory``."""

from __future__ import annotations


def run_audit(target: str) -> int:
    """Audit what a factory returns and print the report.

    Parameters
    ----------
    target : str
        ``FILE.py:factory``.

    Returns
    -------
    int
        1 when there is a finding, else 0.

    Raises
    ------
    SubjectError
        If the target cannot be loaded or run.
    """
    from medtut.audit import audit, load_factory

    report = audit(load_factory(target))
    report.render()
    return report.exit_code
