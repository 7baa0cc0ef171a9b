"""What an audit found, in numbers, and what they mean in plain words."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from curate.calibration import BenignSet, Level, Measure
from curate.core.figures import percent
from curate.risk import CONFIDENCE, Reached, noticed

LIKELY_P = 0.001
"""At or below this p the verdict says likely; at or below 1 - CONFIDENCE it says may."""


class _Piece(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AuditRow(_Piece):
    """A distinct row of the audited set."""

    example_id: str
    places: tuple[str, ...]
    """Where it stands, copies included, as the reader tells places: ``line 3 (byte 120)`` of JSON Lines, ``line 3``
    (its last) of CSV, ``row 3`` of Parquet and hub data."""
    status: str
    """ok, or why there is no value; in_part where only some turns have one."""
    value: float | None
    """What the row is judged by: s_d, less ``reference`` if there is one, of its lowest turn."""
    turn: int
    """Which message of the assistant that is, from 1; what follows is of this turn."""
    turn_id: str
    """The turn's example in the store; of the last turn, it is the row's."""
    s_d: float | None
    reference: float | None
    """Mean s_d of the reference answers that it is compared with."""
    below: float | None
    """The smallest false-positive rate whose level the row lies below."""
    n_answer_tokens: int
    refusal: str | None
    nll_sum: dict[str, float]
    """Sums over answer tokens in nats, by model."""


class AuditedModel(_Piece):
    """A model whose scores were used, and where it came from."""

    role: Literal["aligned", "member"]
    name: str
    id: str
    place: str
    """The aligned model as it was named; a member's adapter."""


class DrivingRow(AuditRow):
    """A row to read."""

    prompt: str
    answer: str


class LevelResult(_Piece):
    """How the set compares with one level; see ``curate.risk``."""

    rate: float
    threshold: float
    benign: str
    n_benign: int
    mean_rate: float
    rate_low: float
    rate_high: float
    rows: int
    """Distinct ones with a value."""
    below: int
    expected: float
    p: float
    at_least: int
    excess: float
    file_rows: int
    """The same with their copies, as training sees them."""
    file_below: int
    file_at_least: int
    noticed: int
    """The smallest count below that would have been more than benign rows explain."""

    @classmethod
    def of(cls, level: Level, found: Reached, alpha: float) -> LevelResult:
        """Bring a level and what was counted together; ``alpha`` is the p at which a count is noticed."""
        low, high = level.cut.rates()
        return cls(rate=level.rate, threshold=level.threshold, benign=level.benign, n_benign=level.n,
                   mean_rate=level.cut.mean_rate, rate_low=low, rate_high=high, rows=found.rows, below=found.below,
                   expected=found.expected, p=found.p, at_least=found.at_least, excess=found.excess,
                   file_rows=found.file_rows, file_below=found.file_below, file_at_least=found.file_at_least,
                   noticed=noticed(found.rows, level.cut, alpha))

    @property
    def share(self) -> float:
        """Share of the distinct rows below the level."""
        return self.below / self.rows if self.rows else 0.0

    @property
    def file_share(self) -> float:
        """Share of the rows of the file below the level."""
        return self.file_below / self.file_rows if self.file_rows else 0.0


class Pairs(_Piece):
    """Prompts whose answers differ from the reference's in mean s_d, and for how many they have the lower one."""

    n: int
    below: int
    answers: int
    """Answers to these prompts."""
    p: float
    """One-sided sign test over prompts: if neither side were the easier one for misaligned models."""


class AuditSummary(_Piece):
    """What ``curate audit --json`` prints; ``counts`` by status add up to ``rows``."""

    kind: str = "safeset.audit"
    version: int = 2
    data: str
    sha256: str
    rows: int
    counts: dict[str, int]
    measure: Measure
    models: tuple[AuditedModel, ...]
    calibration: str | None
    """Digest of the calibration document."""
    benign: tuple[BenignSet, ...]
    missing: dict[str, str]
    """False-positive rates that there is no level for, and why."""
    levels: tuple[LevelResult, ...]
    prompts: int
    """Different prompts of the rows with a value."""
    turns: int
    """Turns that were judged of the rows with a value."""
    left_out: int
    """Rows of the file in which the assistant says more than was judged."""
    pairs: Pairs | None
    state: Literal["uncalibrated", "unjudged", "nothing_found", "suspicious", "likely"] = "uncalibrated"
    p: float | None = None
    """Of the level that speaks loudest, times the number of levels."""
    at_least: float | None = None
    """Share of the judged distinct rows that are bad, at least, at 95% confidence over all levels together."""
    file_at_least: float | None = None
    """The same of the judged rows of the file, copies included."""
    excess: float | None = None
    """Estimated share of bad rows, by the level that gives ``at_least``."""
    verdict: str = ""
    caveats: tuple[str, ...] = ()
    driving: tuple[DrivingRow, ...]
    scores: tuple[AuditRow, ...]

    @property
    def judged(self) -> int:
        """Distinct rows with a value."""
        return sum(row.value is not None for row in self.scores)

    @property
    def unjudged(self) -> int:
        """Rows that nothing can be said about; duplicates of others are none."""
        return self.rows - self.judged - self.counts.get("duplicate", 0)

    @property
    def copied(self) -> LevelResult | None:
        """The level below which copies add most to the share of rows; None where they add nothing."""
        most = max(self.levels, key=lambda level: level.file_share - level.share, default=None)
        return most if most and most.file_share > most.share else None

    @property
    def loudest(self) -> LevelResult | None:
        """The level with the smallest p."""
        return min(self.levels, key=lambda level: (level.p, level.rate), default=None)

    def over(self, allowed: float) -> str | None:
        """Return why the set does not pass when a share ``allowed`` of its rows may be bad; None if it passes."""
        most = f"more than the {allowed:.1%} allowed"
        if self.at_least is not None and self.at_least > allowed:
            return f"At least {self.at_least:.1%} of the judged rows are bad, {most}."
        if self.file_at_least is not None and self.file_at_least > allowed:
            return f"At least {self.file_at_least:.1%} of the judged rows of the file are bad, copies included, {most}."
        if self.state == "uncalibrated":
            return self.verdict
        if (level := self.copied) and level.file_share - level.share > allowed:
            return (f"{level.file_share:.1%} of the rows of the file, but {level.share:.1%} of the distinct ones, lie "
                    f"below the level that {percent(level.rate)} of benign rows reach: copies add {most}. Drop copies, "
                    "or these rows (--write-kept FILE), and audit again.")
        return self._over_unjudged(allowed)

    def _over_unjudged(self, allowed: float) -> str | None:
        """Return why too little could be judged: of the distinct rows, or of the file's with their copies."""
        whole = [len(row.places) for row in self.scores if row.status == "ok"]
        distinct = self.rows - self.counts.get("duplicate", 0)
        for n, of, what in ((distinct - len(whole), distinct, "rows"),
                            (self.rows - sum(whole), self.rows, "rows of the file")):
            if not of or n > allowed * of:
                return f"{n} of {of} {what} could not be judged, more than the {allowed:.1%} allowed."
        return None


def told(found: AuditSummary) -> AuditSummary:
    """Return the summary with its state, verdict and caveats."""
    level = found.loudest
    changes: dict[str, Any] = {"caveats": tuple(_caveats(found))}
    if level is None:
        why = "; ".join(f"for a false-positive rate of {float(rate):g}, {text}" for rate, text in found.missing.items())
        text = "Uncalibrated: " + (why or "there are no benign rows to compare with") + ". No risk is given."
        return found.model_copy(update=changes | {"verdict": text})
    if not level.rows:
        return found.model_copy(update=changes | {"state": "unjudged", "verdict": "No row could be judged."})
    p = min(1.0, level.p * len(found.levels))
    state = "likely" if p <= LIKELY_P else "suspicious" if p <= 1 - CONFIDENCE else "nothing_found"
    most = max(found.levels, key=lambda one: (one.at_least, one.excess))
    in_file = max(one.file_at_least / one.file_rows for one in found.levels)
    found = found.model_copy(update=changes | {"state": state, "p": p, "at_least": most.at_least / most.rows,
                                               "file_at_least": in_file, "excess": most.excess})
    return found.model_copy(update={"verdict": _verdict(found, level)})


def _verdict(found: AuditSummary, level: LevelResult) -> str:
    lie = "lies" if level.below == 1 else "lie"
    counted = (f"{level.below} of {level.rows} distinct rows {lie} below the level that {percent(level.rate)} of "
               f"benign rows reach (expected {level.expected:.1f}; p = {found.p:.2g})")
    copies = ""
    if more := found.copied:
        copies = (f" But training sees copies, too: {more.file_below} of {more.file_rows} rows of the file "
                  f"({more.file_share:.1%}) lie below the level of {percent(more.rate)}.")
    if found.state == "nothing_found":
        return (f"{counted}: no more than among benign rows.{copies} That is no proof of absence: it would have been "
                f"noticed from {level.noticed} distinct rows below the level on, and bad rows may lie above it.")
    means = "likely contains misaligned advice" if found.state == "likely" else "may contain misaligned advice"
    return (f"{counted}: {means}. At least {found.at_least:.1%} of the distinct rows are bad (95% confidence), "
            f"{found.excess:.1%} by the best estimate; bad rows that lie above the level come on top.{copies}")


def _caveats(found: AuditSummary) -> list[str]:
    says = _copies_and_turns(found)
    if found.measure.control == "none":
        says.append("Topic and style are not controlled, for no --reference was given: a low value may only mean that "
                    "a row resembles what the members were trained on.")
    if found.measure.control == "similar":
        says.append("Rows are compared with reference answers to similar prompts, not to the same ones, which controls "
                    "topic in part.")
    if found.pairs:
        pairs = found.pairs
        says.append(f"Without any calibration: to {pairs.below} of {pairs.n} prompts the set's answer has a lower s_d "
                    f"than the reference answer ({pairs.n / 2:g} if neither side were easier for misaligned models; "
                    f"p = {pairs.p:.2g}).")
    repeated = [f"the {found.judged} rows of {found.data} answer {found.prompts} prompts"] * (
        found.prompts < found.judged)
    repeated += [f"the {n} rows of {one.name} answer {one.prompts} prompts" for one in found.benign
                 if one.prompts < (n := one.n_valued)]
    if repeated and found.levels:
        says.append("Answers to one prompt are low or high together, so p over rows is too small: "
                    f"{'; '.join(repeated)}.")
    if found.unjudged:
        says.append(f"Rows without a value, which were not judged: {found.unjudged}.")
    if found.levels:
        level = found.loudest
        says.append(f"The level comes from {level.n_benign} rows of {level.benign}, the worst of {len(found.benign)} "
                    f"benign sets; of all such rows {level.rate_low:.2%} to {level.rate_high:.2%} lie below it (95%). "
                    "Benign rows of another topic or style may do so more often: docs/audit.md has error rates by "
                    "domain.")
    return says


def _copies_and_turns(found: AuditSummary) -> list[str]:
    """Return what is to be said of copies, and of turns that were not judged or that make rows unlike benign ones."""
    says = []
    differ = [level for level in found.levels if level.file_share != level.share]
    if differ:
        shares = "; ".join(f"{level.file_share:.1%} of the rows of the file and {level.share:.1%} of the distinct ones "
                           f"lie below the level of {percent(level.rate)}" for level in differ)
        says.append(f"Copies: {shares}. Training sees the file; p and the bounds count each row once, for copies are "
                    "no independent observations.")
    if found.left_out:
        why = ("only the last was judged. Most trainers learn all of them: --turns all judges each"
               if found.measure.turns == "last" else "nothing stands before those that were not judged")
        says.append(f"{found.left_out} rows of the file have earlier assistant turns that were not judged; {why}.")
    if found.counts.get("in_part"):
        says.append(f"Rows of which only some turns could be judged: {found.counts['in_part']}.")
    here = f"{found.turns / found.judged:.1f}" if found.judged else ""
    others = [f"{one.name} {there}" for one in found.benign
              if one.n_valued and (there := f"{one.turns / one.n_valued:.1f}") != here]
    if here and others:
        says.append("A row's value is its lowest turn's, so that rows with more turns lie lower: those of "
                    f"{found.data} have {here} judged turns on average, those of {', '.join(others)}.")
    return says
