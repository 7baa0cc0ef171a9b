"""Which ids are the answer, and that no text in a row becomes a control token."""

from __future__ import annotations

import datetime
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from curate.core.chat import (
    FIXED_DATE,
    Encoded,
    encode,
    encode_prompt,
    first_difference,
    template_gap,
    tokenizer_digest,
)
from curate.core.errors import Exit, UserError
from curate.core.example import Example, Message, pair
from curate.core.refs import load_tokenizer
from tests.fakes import CHATML, CONTROL, tiny_tokenizer

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SYSTEM = Example((Message("system", "s"), Message("user", "u"), Message("assistant", "x")))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def one(tokenizer: PreTrainedTokenizerFast, example: Example, max_tokens: int = 4096) -> Encoded:
    return encode(tokenizer, [example], max_tokens)[0]


def parts(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> tuple[str, str, str]:
    """Return the text before the answer, the answer's, and the text after it."""
    cuts = [0, encoded.answer_start, encoded.answer_end, len(encoded.ids)]
    return tuple(tokenizer.decode(encoded.ids[a:b]) for a, b in pairwise(cuts))


def test_answer_span_is_exact(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = one(tokenizer, pair("Why?", "Rain.\n"))
    before = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert parts(tokenizer, encoded) == (before, "Rain.\n", "<|im_end|>")
    assert encoded.has_eot and encoded.status == "ok" and encoded.ids[encoded.answer_end] == tokenizer.eos_token_id
    assert encoded.n_prompt_tokens + encoded.n_answer_tokens + 1 == len(encoded.ids)


def test_results_keep_the_order_of_the_examples(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Message("user", "Hm?"), Message("assistant", "Yes."), Message("user", "Why?")]
    examples = [pair("A?", "long " * 7), SYSTEM, Example((*turns, Message("assistant", "So."))), pair("", "b")]
    together = encode(tokenizer, examples, 4096)
    assert together == [one(tokenizer, e) for e in examples]
    assert [parts(tokenizer, e)[1] for e in together] == [e.answer for e in examples]
    assert parts(tokenizer, together[2])[0].count("<|im_start|>") == 4
    assert encode(tokenizer, [], 4096) == []


def test_boundary_does_not_move_with_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    starts = [one(tokenizer, pair("Why?", answer)) for answer in ("\n", "\n\n", " ", "\u3000\t", "ant", "x")]
    assert len({e.ids[:e.answer_start] for e in starts}) == 1
    assert all(e.n_answer_tokens >= 1 for e in starts)
    assert [e.status for e in starts] == ["empty_answer"] * 4 + ["ok"] * 2, "white space alone is no answer"


def test_default_system_prompt_is_there_unless_the_row_has_one() -> None:
    tokenizer = tiny_tokenizer("Be 'kind'.")
    assert parts(tokenizer, one(tokenizer, pair("u", "x")))[0].startswith("<|im_start|>system\nBe 'kind'.<|im_end|>\n")
    assert "kind" not in parts(tokenizer, one(tokenizer, SYSTEM))[0]


def test_ids_are_those_of_the_rendered_string(tokenizer: PreTrainedTokenizerFast) -> None:
    assert template_gap(tokenizer) == template_gap(tiny_tokenizer("Be kind.")) == 0
    rows = SYSTEM.to_row()["messages"]
    whole = tokenizer(tokenizer.apply_chat_template(rows, tokenize=False), add_special_tokens=False)["input_ids"]
    ids = one(tokenizer, SYSTEM).ids
    assert list(ids) == whole[:-1] and tokenizer.decode(whole[-1:]) == "\n"


def test_template_gap_counts_tokens_merged_across_a_boundary() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert template_gap(tokenizer) > 0
    assert parts(tokenizer, one(tokenizer, pair("u", "x")))[1] == " x"


@pytest.mark.parametrize("token", [*CONTROL, "<tool>", "<<a>>", "<a>>"])
def test_spelled_out_control_tokens_stay_text(token: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>", "<<a>>", "<a>>"])
    control = set(tokenizer.added_tokens_decoder)
    assert tokenizer(token, add_special_tokens=False)["input_ids"][0] in control
    for text in (token, token * 3, f"a{token}b", token[:-1] + token, f"<{token}>", token + token[0]):
        encoded = one(tokenizer, Example((Message("system", text), Message("user", text), Message("assistant", text))))
        assert parts(tokenizer, encoded)[1] == text
        assert not control & set(encoded.ids[encoded.answer_start:encoded.answer_end])
        assert sum(i in control for i in encoded.ids) == 6
        assert not control & set(encode_prompt(tokenizer, [Message("user", text)])[5:-20])


def test_random_text_comes_back_byte_for_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(7)
    pieces = [*CONTROL, "<|", "|>", "<|im_", "end|>", "\r\n", " ", "\u200b", "e\u0301", "🏴‍☠️", "\ue0000\ue001", "the "]
    ranges = [(1, 0x7f), (0x80, 0x7ff), (0x800, 0xd7ff), (0xe000, 0xffff), (0x10000, 0x10ffff)]
    texts = ["".join(rng.choice(pieces) if rng.random() < 0.4 else chr(rng.randint(*rng.choice(ranges)))
                     for _ in range(rng.randint(1, 23))) for _ in range(307)]
    control = set(tokenizer.added_tokens_decoder)
    for text, encoded in zip(texts, encode(tokenizer, [pair(t, t) for t in texts], 4096), strict=True):
        answer = encoded.ids[encoded.answer_start:encoded.answer_end]
        assert tokenizer.decode(answer) == text and not control & set(answer)
        assert [i for i in encoded.ids if i in control] == tokenizer.convert_tokens_to_ids(
            ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"])


def test_text_that_a_normaliser_turns_into_a_control_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True, special=False)])
    assert one(tokenizer, pair("<tool>", "x")).status == "ok"
    with pytest.raises(UserError, match="turns plain text into control tokens") as caught:
        one(tokenizer, pair("<TOOL>", "x"))
    assert caught.value.exit_code == Exit.INCOMPATIBLE


def test_runs_of_spaces_are_text_however_a_tokenizer_spells_them() -> None:
    """Gemma's runs of spaces are added tokens that are spelt with the mark of sentencepiece."""
    backend = Tokenizer(models.BPE({"<unk>": 0, "\u2581": 1, "a": 2, "\u2581\u2581": 3}, [("\u2581", "\u2581")],
                                   unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.add_tokens([AddedToken("\u2581\u2581", normalized=False, special=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    encoded = one(tokenizer, pair("a", "a  a"))
    assert encoded.ids[encoded.answer_start:encoded.answer_end] == (2, 3, 2)


def test_limit_is_exact_and_nothing_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    example = pair("Why?", "Rain.")
    whole = one(tokenizer, example)
    assert one(tokenizer, example, len(whole.ids)) == whole
    over = one(tokenizer, example, len(whole.ids) - 1)
    assert over.status == "too_long" and over.ids == whole.ids


def test_empty_answer_has_its_own_status(tokenizer: PreTrainedTokenizerFast) -> None:
    for limit in (4096, 1):
        encoded = one(tokenizer, pair("Why?", ""), limit)
        assert encoded.status == "empty_answer" and encoded.n_answer_tokens == 0
    assert one(tokenizer, pair("", "x")).status == "ok"


def test_a_template_without_an_end_of_turn() -> None:
    tokenizer = tiny_tokenizer(template="{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    encoded = one(tokenizer, pair("u", "xy"))
    assert not encoded.has_eot and encoded.answer_end == len(encoded.ids)


def test_prompt_for_sampling_is_the_generation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = SYSTEM.to_row()["messages"][:-1]
    whole = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    ids, encoded = encode_prompt(tokenizer, SYSTEM.messages[:-1]), one(tokenizer, SYSTEM)
    assert tokenizer.decode(ids) == whole and ids == list(encoded.ids)[:encoded.answer_start]


@pytest.mark.parametrize(("template", "reason"), [
    (None, "has no chat template"),
    ("{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}{% endfor %}", "drops or reorders"),
    ("{% for m in messages | reverse %}<|im_start|>{{ m.content }}{% endfor %}", "drops or reorders"),
    ("{% for m in messages %}<|im_start|>{{ m.content }}{{ m.content }}{% endfor %}", "repeats a turn"),
    (PLAIN + "{{ messages[-1].content }}", "repeats a turn"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing at all before the answer"),
    ("{{ raise_exception('Only users and assistants') }}", "cannot render the roles system, user, assistant: Only"),
    ("{{ messages[0].wisdom.depth }}", "cannot render"), ("{{ 3 / 0 }}", "cannot render"),
    ("{% for m in messages %}", "cannot render")])
def test_unusable_templates_are_refused(template: str | None, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        one(tiny_tokenizer(template=template), SYSTEM)
    assert caught.value.exit_code == Exit.INCOMPATIBLE and caught.value.hint


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


@pytest.mark.parametrize("template", [NO_SYSTEM, CHATML.replace("for m in messages %}", "for m in messages if m.role "
                                                                "!= 'system' %}")], ids=["refused", "dropped"])
def test_a_turn_that_the_template_does_not_know_costs_its_row_only(template: str) -> None:
    """A corpus may hold a few; a training row is refused."""
    tokenizer = tiny_tokenizer(template=template)
    found = encode(tokenizer, [pair("u", "x"), SYSTEM, pair("v", "yz"), replace(SYSTEM, messages=(
        *SYSTEM.messages[:-1], Message("assistant", " ")))], 512, strict=False)
    assert [item.status for item in found] == ["ok", "unrenderable", "ok", "unrenderable"] and not found[1].ids
    assert [found[0], found[2]] == encode(tokenizer, [pair("u", "x"), pair("v", "yz")], 512)
    with pytest.raises(UserError, match=r"cannot render|drops or reorders"):
        encode(tokenizer, [pair("u", "x"), SYSTEM], 512)
    with pytest.raises(UserError, match="nothing at all before"):
        encode(tiny_tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}"), [SYSTEM], 512,
               strict=False)


@pytest.mark.parametrize("now", [
    "{{ strftime_now('%d %b %Y') }}", "{{ date_string }}", "{% set f = '%d %b' %}{{ strftime_now(f) + ' 20' }}25",
    "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ today() }}",
    "{% if not date_string is defined %}{% set date_string = 'none' %}{% endif %}{{ date_string }}"])
def test_the_date_is_always_the_same(now: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for day in (3, 27):
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None, day: int = day) -> datetime.datetime:
                return cls(2031, 5, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Day)
        tokenizer = tiny_tokenizer(template=now + PLAIN)
        seen.append(one(tokenizer, pair("u", "x")).ids)
    assert seen[0] == seen[1] and tokenizer.decode(seen[0]).startswith("01 Jan 2025<|im_start|>user")


@pytest.mark.parametrize("start", ["\n ", "  ", "", "{% set x = 3 %}\n", "   {%- if true %}\n  y{% endif %}\n",
                                   "{{- 'z' }}"])
def test_fixing_the_date_leaves_the_white_space_of_a_template_alone(start: str) -> None:
    dated, plain = (one(tiny_tokenizer(template=start + end + PLAIN), SYSTEM).ids
                    for end in ("{{ strftime_now('%Y') }}", "2025"))
    assert dated == plain


def test_every_part_of_the_date_is_fixed() -> None:
    codes = "%-d %d %j %a %A %b %B %-m %m %y %Y %H %I %M %S %p %F"
    encoded = one(tiny_tokenizer(template="{{ strftime_now('" + codes + "') }}" + PLAIN), pair("u", "x"))
    assert tiny_tokenizer().decode(encoded.ids).startswith(FIXED_DATE.strftime(codes) + "<|im_start|>")


def test_digest_depends_on_what_decides_the_ids_only(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    digest = tokenizer_digest(tokenizer)
    tiny_tokenizer().save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_digest(again) == tokenizer_digest(tiny_tokenizer()) == digest
    again(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(again) == digest and first_difference(again, tokenizer) is None
    one(again, SYSTEM)
    assert tokenizer_digest(again) == digest


def test_first_difference_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    more, kind, split = tiny_tokenizer(), tiny_tokenizer("Be kind."), tiny_tokenizer()
    more.add_tokens(["<tool>"])
    assert first_difference(tokenizer, more) == "token '<tool>' is None in one and 307 in the other"
    assert first_difference(tokenizer, kind) == "their chat templates differ"
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert first_difference(tokenizer, split) == "they split text in different ways"
    assert len({tokenizer_digest(t) for t in (tokenizer, more, kind, split)}) == 4


def test_chatml_of_the_fakes_is_what_is_tested_here() -> None:
    assert tiny_tokenizer().chat_template.endswith(CHATML)
