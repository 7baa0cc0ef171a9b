"""The picture of a run's loss."""

from __future__ import annotations

import pytest

from train.curve import curve_png


@pytest.mark.parametrize("title", ["cost_$5_vs_$10", "a $x^$", r"\frac"])
def test_any_name_can_be_a_title(title: str) -> None:
    assert curve_png([1, 2, 3], [3.0, 2.0, 1.0], "loss", title).startswith(b"\x89PNG")
