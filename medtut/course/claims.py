"""Claims of the sources, judged by rule against a lesson's measured numbers.

A claim stands in ``claims/NN.yml`` with its source, what we expected before the run and
a small typed rule. The verdict is computed from `metrics.json`; the file has no place
to write one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from operator import eq, ge, gt, le, lt
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medtut.course.claims_table import ClaimTable, Row
from medtut.errors import MedtutError

Profile = Literal["smoke", "quick", "full"]
Op = Literal["==", "<=", ">=", "<", ">"]

FOLDER = Path(__file__).with_name("claims")
_SIGNS = {"==": "=", "<=": "≤", ">=": "≥", "<": "<", ">": ">"}
_COMPARE = dict(zip(_SIGNS, (eq, le, ge, lt, gt), strict=True))


class ClaimsError(MedtutError):
    """A claims file, or the metrics handed to it, cannot be used."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where a claim was made: a citation, and the place in it."""

    citation: str = Field(min_length=1)
    where: str = Field(min_length=1)


class Rule(_Strict):
    """A condition on one number: a metric, or a ratio or difference of two.

    Exactly one of `metric`, `ratio`, `difference` names the number; either `op` with
    `value`, or `between` (both ends included), is the condition.
    """

    metric: str | None = None
    ratio: tuple[str, str] | None = None
    difference: tuple[str, str] | None = None
    op: Op | None = None
    value: float | None = Field(default=None, strict=True, allow_inf_nan=False)
    between: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Rule:
        if sum(x is not None for x in (self.metric, self.ratio, self.difference)) != 1:
            raise ValueError("name exactly one of metric, ratio, difference")
        if (self.op is None) != (self.value is None):
            raise ValueError("op and value belong together")
        if (self.op is None) == (self.between is None):
            raise ValueError("give either op with value, or between: [low, high]")
        if self.between and not self.between[0] < self.between[1]:
            raise ValueError("between needs its low end first")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys this rule reads."""
        return (self.metric,) if self.metric else (self.ratio or self.difference or ())

    @property
    def quantity(self) -> str:
        """The number in words."""
        if self.metric:
            return self.metric
        return (" / " if self.ratio else " − ").join(self.metrics)

    def __str__(self) -> str:
        if self.between:
            low, high = self.between
            return f"{low:g} ≤ {self.quantity} ≤ {high:g}"
        return f"{self.quantity} {_SIGNS[self.op]} {self.value:g}"

    def measure(self, metrics: Mapping[str, Any]) -> float:
        """Return the number.

        Raises
        ------
        ClaimsError
            If a metric is missing, not a finite number, or a ratio divides by zero.
        """
        values = [_number(metrics, key) for key in self.metrics]
        if self.metric:
            return values[0]
        if self.difference:
            return values[0] - values[1]
        if values[1] == 0:
            raise ClaimsError(f"{self.quantity} divides by zero: {self.metrics[1]} = 0")
        return values[0] / values[1]

    def holds(self, number: float) -> bool:
        """Whether a number satisfies the condition."""
        if self.between:
            return self.between[0] <= number <= self.between[1]
        return _COMPARE[self.op](number, self.value)


class Claim(_Strict):
    """One statement of a source and how it is judged.

    Attributes
    ----------
    expectation : str
        What we expected, written before the run.
    rules : tuple of Rule
        All must hold for "reproduced".
    scale_required : tuple of str
        Profiles whose numbers can decide; in any other, "not at this scale".
    interval : two metrics, optional
        Ends of the interval of the difference that the claim is about. Where it holds
        0, the runs cannot tell, and the verdict is "not at this scale".
    testable : bool
        False when nothing here can decide; then `reason` says why.
    reason : str, optional
        Also for a claim about something that not every run has, such as other weights
        or data of your own: "not testable here" until the metrics are there.
    """

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    source: Source
    statement: str = Field(min_length=1)
    expectation: str = Field(min_length=1)
    rules: tuple[Rule, ...] = ()
    scale_required: tuple[Profile, ...] = ()
    interval: tuple[str, str] | None = None
    testable: bool = True
    reason: str | None = None

    @property
    def metrics(self) -> list[str]:
        """Every metric the rules read, once, in order."""
        ruled = {key for rule in self.rules for key in rule.metrics}
        return sorted(ruled | set(self.interval or ()))

    @model_validator(mode="after")
    def _whole(self) -> Claim:
        if self.testable and not (self.rules and self.scale_required):
            raise ValueError("a testable claim needs rules and scale_required")
        if self.testable and self.reason and "smoke" in self.scale_required:
            raise ValueError(
                "reason belongs to a claim with testable: false, or that needs more "
                "than smoke"
            )
        if not self.testable and (self.rules or self.scale_required or self.interval):
            raise ValueError("testable: false leaves no place for rules or a scale")
        if not self.testable and not self.reason:
            raise ValueError("testable: false needs a reason")
        return self


class ClaimSet(_Strict):
    """The claims of one lesson."""

    lesson: str
    claims: tuple[Claim, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_differ(self) -> ClaimSet:
        ids = [claim.id for claim in self.claims]
        if twice := sorted({one for one in ids if ids.count(one) > 1}):
            raise ValueError(f"used twice: {', '.join(twice)}")
        return self

    @property
    def metrics(self) -> set[str]:
        """Every metric the claims read."""
        return {key for claim in self.claims for key in claim.metrics}


def _number(metrics: Mapping[str, Any], key: str) -> float:
    value = metrics[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClaimsError(f"The metric {key!r} is {value!r}, not a number.")
    if not math.isfinite(value):
        raise ClaimsError(f"The metric {key!r} is {value}; a finite number is needed.")
    return float(value)


def load_claims(slug: str | int, folder: Path | None = None) -> ClaimSet:
    """Read and check the claims of a lesson.

    Parameters
    ----------
    slug : str or int
        "01_lora_math", "01" or 1.
    folder : Path, optional
        Where the YAML files are; the package's own by default.

    Raises
    ------
    ClaimsError
        If there is no such file, or it does not fit the schema; each fault is named.
    """
    import yaml

    folder = folder or FOLDER
    number = str(slug).split("_")[0]
    path = folder / f"{number.zfill(2)}.yml"
    if not (number.isascii() and number.isdigit() and path.is_file()):
        there = ", ".join(sorted(p.stem for p in folder.glob("*.yml"))) or "none"
        raise ClaimsError(
            f"There are no claims for lesson {slug!r}. There are: {there}."
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return ClaimSet.model_validate(raw)
    except yaml.YAMLError as error:
        raise ClaimsError(f"{path.name} is not valid YAML: {error}") from error
    except ValidationError as error:
        faults = [_fault(one, raw) for one in error.errors()]
        raise ClaimsError(
            f"{path.name} does not fit the claims schema:\n" + "\n".join(faults)
        ) from error


def _fault(error: Mapping[str, Any], raw: Any) -> str:
    """Say one validation fault with the claim's id and a list of what is allowed."""
    place, named = list(error["loc"]), ""
    with contextlib.suppress(LookupError, TypeError):
        named = f" ({raw['claims'][place[1]]['id']})"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        said = "is not a known key"
    if place and place[-1] == "op":
        said = f"{error['input']!r} is no operator; known: {', '.join(get_args(Op))}"
    return f"  {'.'.join(map(str, place)) or 'file'}{named}: {said}"


def judge(
    slug: str | int,
    metrics: Mapping[str, Any],
    profile: str,
    folder: Path | None = None,
) -> ClaimTable:
    """Compute the verdict of every claim of a lesson.

    Parameters
    ----------
    slug : str or int
        "01_lora_math", "01" or 1.
    metrics : mapping
        A run's `metrics.json`.
    profile : {"smoke", "quick", "full"}
        The profile that made the metrics.

    Raises
    ------
    ClaimsError
        If a metric that a claim needs at this profile is missing (not in smoke, whose
        numbers are no evidence) or is no finite number.
    """
    if profile not in get_args(Profile):
        known = ", ".join(get_args(Profile))
        raise ClaimsError(f"There is no profile {profile!r}. Known: {known}.")
    claims = load_claims(slug, folder)
    missing = [
        f"  {key} (claim {claim.id})"
        for claim in claims.claims
        if profile in claim.scale_required and profile != "smoke" and not claim.reason
        for key in claim.metrics
        if metrics.get(key) is None
    ]
    if missing:
        raise ClaimsError(
            f"The metrics of {claims.lesson} ({profile}) lack what its claims read:\n"
            + "\n".join(missing)
            + "\nRecord them in the lesson, or mend the key in the claims file."
        )
    rows = tuple(_judge_one(claim, metrics, profile) for claim in claims.claims)
    return ClaimTable(claims.lesson, profile, rows)


def _judge_one(claim: Claim, metrics: Mapping[str, Any], profile: str) -> Row:
    rules, there = claim.rules, all(metrics.get(k) is not None for k in claim.metrics)
    if claim.reason and not (there and profile in claim.scale_required):
        return Row(claim, "not testable here", (), claim.reason)
    measured = tuple((r.quantity, r.measure(metrics)) for r in rules) if there else ()
    if profile not in claim.scale_required or not there:
        detail = f"decided in {' or '.join(claim.scale_required)}"
        if profile == "smoke":
            detail = "smoke is not evidence"
        return Row(claim, "not at this scale", measured, detail)
    if claim.interval:
        low, high = (_number(metrics, key) for key in claim.interval)
        if low <= 0 <= high:
            detail = f"its interval, {low:.2g} to {high:.2g}, holds 0"
            return Row(claim, "not at this scale", measured, detail)
    failed = [
        str(r) for r, (_, x) in zip(rules, measured, strict=True) if not r.holds(x)
    ]
    if failed:
        return Row(claim, "contradicted", measured, "not so: " + " and ".join(failed))
    return Row(claim, "reproduced", measured, " and ".join(map(str, rules)))
