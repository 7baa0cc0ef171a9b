"""How far a store is, seen from elsewhere: no lock is taken and nothing is written.

Times come from the listing of the ledger, whose entries are put one by one as chunks are finished.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curate.storage import holder
from curate.store import Store

WINDOW_S = 600.0
"""The rate is that of this long before the latest write."""


@dataclass(frozen=True)
class ModelStatus:
    """How many rows of the store one model has scored, and how many it has not.

    ``left`` is what the latest ``curate score`` is still to do (before that is known, every row that can be scored);
    None for a model that it leaves out.
    """

    name: str
    role: str
    scored: int
    left: int | None


@dataclass(frozen=True)
class Status:
    """What can be seen of a store: ``rows`` are those that can be scored; None where nothing can be said."""

    store: str
    rows: int
    models: tuple[ModelStatus, ...]
    rows_per_s: float | None
    eta_s: float | None
    last_write: float | None
    """Seconds since 1970."""
    writer: dict[str, Any] | None
    """Who holds the lock of a folder: pid, host, since, and alive (None on another host)."""
    shared: bool

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def status(place: Path | str) -> Status:
    """Look at a store; ``UserError`` when there is none or it is damaged."""
    store = Store.open_read(place)
    rows = store.example_index().filter(status="ok").height
    known = store.models()
    due = _due(store) or {m.identity.id: rows for m in known}
    scored = {m.identity.id: store.n_scored(m.identity.id) for m in known}
    lefts = {i: max(n - scored.get(i, 0), 0) for i, n in due.items()}
    models = tuple(ModelStatus(m.name, m.role, scored[m.identity.id], lefts.get(m.identity.id)) for m in known)
    writes = store.writes()
    rate = rows_per_second([write for write in writes if write[2] == "nll"])
    left = sum(model.left or 0 for model in models)
    eta = left / rate if rate and left else None
    return Status(str(place), rows, models, rate, eta, max((time for time, _, _ in writes), default=None),
                  _writer(store), store.storage.shared)


def _due(store: Store) -> dict[str, int]:
    """Return how many rows each model of the latest scoring will have in the end, if that has been worked out."""
    return store.plan.models if "plan.json" in store.storage.listed() else {}


def rows_per_second(writes: Sequence[tuple[float, int, str]]) -> float | None:
    """Return the rate of the latest writes ``(time, rows, kind)``: rows after the first of them by the time since."""
    if not writes:
        return None
    ordered = sorted(writes)
    recent = [write for write in ordered if write[0] >= ordered[-1][0] - WINDOW_S]
    span = recent[-1][0] - recent[0][0]
    return sum(rows for _, rows, _ in recent[1:]) / span if span > 0 else None


def _writer(store: Store) -> dict[str, Any] | None:
    if store.storage.shared:
        return None
    try:
        note = holder(store.storage.get("lock"))
    except FileNotFoundError:
        return None
    return note and {**note, "alive": _alive(note["pid"]) if note["host"] == socket.gethostname() else None}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def lines(found: Status, now: float | None = None) -> list[str]:
    """Return what there is to say beside the table of models."""
    now = time.time() if now is None else now
    said = [f"{found.rows:,} rows can be scored."]
    if found.rows_per_s:
        eta = f", about {_span(found.eta_s)} left" if found.eta_s else ", nothing left"
        said.append(f"{found.rows_per_s:,.1f} rows/s over the last {WINDOW_S / 60:.0f} minutes of work{eta}.")
    if found.last_write is not None:
        said.append(f"Last write {_span(max(now - found.last_write, 0.0))} ago.")
    if found.shared:
        said.append("An object store has no lock: any number may be writing.")
    elif found.writer is None:
        said.append("Nobody is writing.")
    else:
        who = "process {pid} on {host} since {since}".format(**found.writer)
        dead = ", which is dead: the next `curate score` goes on" if found.writer["alive"] is False else ""
        said.append(f"Written by {who}{dead}.")
    return said


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
