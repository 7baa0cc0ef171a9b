"""Reading ``--defense NAME[:KEY=VALUE,...]``."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from curate.core.errors import UserError
from train.defenses import DEFENSES, Defense, parse


@dataclass
class Sample(Defense):
    weight: float = 0.1
    every: int = 5
    prompt: str = "x"
    exact: bool = False
    state: list[int] = field(default_factory=list, init=False)


KNOWN = {"sample": Sample, "bare": Defense}


def test_fields_are_the_settings() -> None:
    assert parse("sample", KNOWN) == Sample()
    assert parse("sample:weight=2,every=3,prompt=a=b,exact=True", KNOWN) == Sample(2.0, 3, "a=b", True)


@pytest.mark.parametrize(("spec", "message", "hint"), [
    ("smaple", "Unknown defence 'smaple'", "Did you mean 'sample'?"),
    ("sample:wieght=1", "Unknown setting of the defence 'sample' 'wieght'", "Did you mean 'weight'?"),
    ("sample:state=1", "Unknown setting", "Possible"),
    ("sample:every=2.5", "'every=2.5' is no int", "sample:every=VALUE"),
    ("sample:exact=perhaps", "is no bool", "sample:exact=VALUE"),
    ("sample:weight", "'weight' is no float", "sample:weight=VALUE"),
])
def test_mistakes_are_named(spec: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(spec, KNOWN)
    assert message in caught.value.message and hint in caught.value.hint


def test_every_named_defence_can_be_made_from_its_name_alone() -> None:
    assert [type(parse(name)) for name in DEFENSES] == list(DEFENSES.values())
    if not DEFENSES:
        with pytest.raises(UserError, match="Unknown defence 'kl': none is implemented yet"):
            parse("kl")


def test_the_default_moments_do_nothing() -> None:
    bare, model = Defense(), torch.nn.Linear(2, 2)
    with bare.around_forward(model):
        assert bare.penalty(model, None, torch.ones(1)) is None
    assert bare.examples([1, 2]) == [1, 2] and bare.after(model) is None
