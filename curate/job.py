"""What ``curate score`` sets out to do, and what became of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from curate.chunks import Shard
from curate.core.errors import UserError
from curate.corpora import Corpus
from curate.scorers.choose import EngineSettings
from curate.turns import Turns


@dataclass(frozen=True)
class Sampling:
    """Which rows of a corpus to take: all, the first ``limit``, or ``sample`` rows drawn by content and ``seed``."""

    limit: int | None = None
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.sample is not None:
            raise UserError("--limit and --sample were both given.",
                            "Take the first rows with --limit, or rows at random with --sample.")


@dataclass(frozen=True)
class ScoreJob:
    """What ``curate score`` sets out to do."""

    corpora: Sequence[Corpus]
    store: Path | str
    aligned: str
    members: Sequence[Path] = ()
    """Run cards, or their folders."""
    dtype: str = "auto"
    device: str = "auto"
    max_tokens: int = 4096
    max_bad: float = 0.0
    max_failures: float = 0.01
    sampling: Sampling = Sampling()
    turns: Turns = "last"
    """``all``: each turn of the assistant is an example of its own."""
    shard: Shard | None = None
    retry_failed: bool = False
    """Put chunks with rows without a finite number aside and score them again."""
    engine: EngineSettings = field(default_factory=EngineSettings)


@dataclass
class Summary:
    """What became of the rows: ``n_rows`` is the sum of ``counts``."""

    n_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    """The distinct examples that were taken."""
    models: dict[str, int] = field(default_factory=dict)
    """Newly computed rows by model name."""
    quarantined: int = 0
    left: int = 0
    """Rows, counted once for each model, that are not scored yet: they belong to other shards."""

    def as_json(self) -> dict[str, object]:
        """Return plain values."""
        return {"rows": self.n_rows, "counts": dict(self.counts), "computed": self.models,
                "quarantined": self.quarantined, "left": self.left}
