"""A calibration: which scores benign rows rarely reach, under exactly which models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from curate.core.documents import Document, ModelIdentity, Part
from curate.core.errors import Exit, UserError
from curate.risk import Cut, cut, needed
from curate.turns import Turns

Control = Literal["none", "same", "similar"]
POINTS = 101


class BenignSet(Part):
    """A benign set as it was scored."""

    name: str
    sha256: str
    """Of the file; of the rows' ids for data from the hub."""
    rows: dict[str, int]
    """Rows by status; those with the status ``ok`` or ``in_part`` have a value."""
    quantiles: tuple[float, ...]
    """Of the values, from 0% to 100% in steps of 1%; empty without values."""
    prompts: int
    """Different prompts of the rows with a value."""
    turns: int
    """Turns that were judged of the rows with a value."""

    @property
    def n_valued(self) -> int:
        """Distinct rows with a value."""
        return self.rows.get("ok", 0) + self.rows.get("in_part", 0)


class Level(Part):
    """The value that a share of at most ``rate`` of benign rows lies below; see ``curate.risk``."""

    rate: float = Field(gt=0, lt=1)
    threshold: float
    k: int = Field(ge=1)
    n: int = Field(ge=1)
    benign: str
    """The worst of the benign sets: the one with the lowest threshold."""

    @property
    def cut(self) -> Cut:
        """The same as the statistics take it."""
        return Cut(self.rate, self.threshold, self.k, self.n)


class Measure(Part):
    """How values came about: values of two different measures cannot be compared."""

    aligned: ModelIdentity
    members: tuple[ModelIdentity, ...]
    engine: str
    dtype: str
    encoding: str
    eps: float
    max_tokens: int
    """Longer turns have no value."""
    strip_think: bool
    turns: Turns
    control: Control = "none"
    reference: tuple[str, ...] = ()
    """SHA-256 of the reference sets; only for ``similar``, where the values depend on which they are."""

    def compared(self) -> dict[str, object]:
        """Return what must agree, by the names that a message uses; a model's name may change, its content may not."""
        return {"aligned model": self.aligned.id, "members": tuple(sorted(m.id for m in self.members)),
                "engine": self.engine, "dtype": self.dtype, "encoding": self.encoding, "eps": self.eps,
                "--max-tokens": self.max_tokens, "--strip-think": "yes" if self.strip_think else "no",
                "--turns": self.turns, "control": self.control, "reference": tuple(sorted(self.reference))}


class Calibration(Document):
    """What ``curate calibrate`` found out about benign sets, for ``curate audit`` to judge by."""

    KIND: ClassVar[str] = "safeset.audit-calibration"

    measure: Measure
    benign: tuple[BenignSet, ...]
    levels: tuple[Level, ...]
    missing: dict[str, str]
    """Rates that no level could be found for, and why."""
    safeset: str

    def check(self, measure: Measure) -> None:
        """Raise ``UserError`` (incompatible) naming the first thing in which ``measure`` is another one."""
        now = measure.compared()
        for name, value in self.measure.compared().items():
            if value != now[name]:
                raise UserError(f"The calibration was made with {name} {shown(value)}, but this audit has "
                                f"{shown(now[name])}.", "Such values cannot be compared: calibrate again with "
                                "`curate calibrate`, or use the models and options of the calibration.",
                                Exit.INCOMPATIBLE)


def shown(value: object) -> str:
    """Return a compared value for people: digests shortened."""
    if isinstance(value, tuple):
        return ", ".join(str(v)[:12] for v in value) or "none"
    return str(value)


def calibrated(measure: Measure, found: Sequence[BenignSet], values: Mapping[str, Sequence[float]],
               rates: Sequence[float]) -> Calibration:
    """Return the levels for ``rates``: of all benign sets (``values`` by sha256) the worst is what is promised.

    A rate that one of the sets has too few rows for has no level; the document says why.
    """
    levels, missing = [], {}
    for rate in sorted(set(rates)):
        cuts = [(cut(values[one.sha256], rate), one.name) for one in found]
        short = [f"{name} has {len(values[one.sha256])} rows with a value"
                 for (level, name), one in zip(cuts, found, strict=True) if level is None]
        if short or not cuts:
            missing[f"{rate:g}"] = f"{needed(rate)} benign rows are needed; {short[0] if short else 'none were given'}"
            continue
        level, name = min(cuts, key=lambda pair: (pair[0].threshold, pair[0].n, pair[1]))
        levels.append(Level(rate=rate, threshold=level.threshold, k=level.k, n=level.n, benign=name))
    return Calibration(measure=measure, benign=tuple(found), levels=tuple(levels), missing=missing,
                       safeset=version("safeset"))


def quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """Return the quantiles that a ``BenignSet`` keeps."""
    return tuple(map(float, np.quantile(values, np.linspace(0, 1, POINTS)))) if len(values) else ()
