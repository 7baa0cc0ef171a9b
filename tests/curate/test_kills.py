"""A few of the kills that ``bench/faults.py`` inflicts on what works with others; see docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

from tests.curate.faults import while_scoring
from tests.curate.killed_clients import client_kills
from tests.curate.test_faults import alone


def test_a_client_of_a_server_killed_while_it_scores_loses_and_doubles_nothing(tmp_path: Path) -> None:
    inflicted, struck, wrong = alone(tmp_path, client_kills, 2, wait=while_scoring)
    assert wrong == 0 and inflicted == 2 and struck >= 1


def test_a_writer_of_objects_killed_before_a_request_loses_and_doubles_nothing(tmp_path: Path, bucket: str) -> None:
    from tests.curate.killed_objects import swept

    assert alone(tmp_path, swept, at=((17,), (5,))) == (2, 2, 0)
