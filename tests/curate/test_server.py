"""The server engine against a stub whose log-probabilities are known: parity, wrong servers, servers that die."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from click.testing import CliRunner

import curate.chunks as chunks
from curate.cli import main
from curate.core.chat import Encoded, encode
from curate.core.errors import Exit, UserError
from curate.core.refs import load_tokenizer
from curate.core.terminal import Progress
from curate.corpora import open_corpus
from curate.job import ScoreJob, Summary
from curate.query import connect
from curate.score import score
from curate.scorers import FLOOR, evidence
from curate.scorers.choose import EngineSettings, Models, choose, engine_dtype
from curate.scorers.server import ServerScorer
from curate.scorers.wire import Endpoint, Passing, _sent
from curate.store import Store
from tests.curate.runs import tiny_run
from tests.curate.stub_server import Stub, rule
from tests.fakes import tiny_model, tiny_rows, write_rows

N_ROWS = 13
ALIGNED, MEMBER, ANOTHER = 3, 8, 11


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("server") / "tiny")


@pytest.fixture(scope="module")
def member(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(model, tmp_path_factory.mktemp("member") / "m0", "m0", seed=1)


@pytest.fixture
def stub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 5)
    tokenizer = load_tokenizer(str(model))
    running = Stub(tokenizer, {"tiny": ALIGNED, "m0": MEMBER}, tokenizer.convert_tokens_to_ids("<|im_start|>"),
                   entries={"m0": {"parent": "tiny"}}).start()
    yield running
    running.stop()


def settings(*stubs: Stub, **changes: Any) -> EngineSettings:
    return EngineSettings(**({"name": "server", "base_urls": tuple(s.url for s in stubs), "concurrency": 4,
                              "retries": 5, "backoff_s": 0.01, "timeout_s": 20.0} | changes))


def run(tmp_path: Path, model: Path, member: Path | None, engine: EngineSettings, n: int = N_ROWS,
        **changes: Any) -> Summary:
    pool = write_rows(tmp_path / "pool.jsonl", tiny_rows(n, "pool"))
    fields = {"corpora": [open_corpus(str(pool))], "store": tmp_path / "scores", "aligned": str(model),
              "members": [member] if member else [], "device": "cpu", "max_tokens": 400, "engine": engine}
    return score(ScoreJob(**(fields | changes)))


def stored(tmp_path: Path) -> dict[tuple[str, str], tuple[float, int, float]]:
    rows = connect(Store.open_read(tmp_path / "scores"), 0.1, None).execute(
        "SELECT name, example_id, nll_sum, n_tokens, eot_nll FROM nll JOIN models USING (model_id)").fetchall()
    return {(name, example): tuple(rest) for name, example, *rest in rows}


def expected(model: Path, constants: dict[str, int]) -> dict[tuple[str, str], tuple[float, int, float]]:
    examples = tiny_rows(N_ROWS, "pool")
    out = {}
    for example, item in zip(examples, encode(load_tokenizer(str(model)), examples, 400)):
        for name, c in constants.items():
            answer = -sum(rule(item.ids, t, c) for t in range(item.answer_start, item.answer_end))
            out[name, example.id] = (pytest.approx(answer, abs=1e-9), item.n_answer_tokens,
                                     pytest.approx(-rule(item.ids, item.answer_end, c), abs=1e-9))
    return out


def models(model: Path) -> Models:
    return Models(str(model), "tiny", {}, "served", "cpu", 400)


def test_stored_numbers_are_the_servers_rule(tmp_path: Path, model: Path, member: Path, stub: Stub) -> None:
    summary = run(tmp_path, model, member, settings(stub))
    assert summary.counts == {"ok": N_ROWS} and summary.models == {"tiny": N_ROWS, "m0": N_ROWS}
    assert stored(tmp_path) == expected(model, {"tiny": ALIGNED, "m0": MEMBER})
    header = Store.open_read(tmp_path / "scores").header
    assert (header.engine, header.dtype) == ("server", "served")


def test_members_may_be_at_addresses_and_under_names_of_their_own(tmp_path: Path, model: Path, member: Path,
                                                                  stub: Stub) -> None:
    stub.models, stub.entries = {"/models/base": ALIGNED}, {}
    other = Stub(stub.tokenizer, {"bad-cook": MEMBER}, stub.control).start()
    run(tmp_path, model, member, settings(stub, other, served=(("bad-cook", "m0"),)))
    other.stop()
    assert stored(tmp_path) == expected(model, {"tiny": ALIGNED, "m0": MEMBER})


def test_copies_of_a_server_share_the_rows_and_must_be_copies(tmp_path: Path, model: Path, stub: Stub) -> None:
    copy = Stub(stub.tokenizer, {"tiny": ALIGNED}, stub.control).start()
    run(tmp_path, model, None, settings(stub, copy))
    assert stub.rows_asked > 3 and copy.rows_asked > 3 and stub.rows_asked + copy.rows_asked == N_ROWS
    assert stored(tmp_path) == expected(model, {"tiny": ALIGNED})
    copy.models = {"tiny": ANOTHER}
    with pytest.raises(UserError, match="Different models answer as 'tiny'"):
        run(tmp_path, model, None, settings(stub, copy), n=N_ROWS + 1)
    copy.stop()


def test_no_more_requests_at_once_than_allowed_and_their_number_is_said(
        tmp_path: Path, model: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.delay_s = 0.02
    noted: list[str] = []
    monkeypatch.setattr(Progress, "advance", lambda self, amount, note="": noted.append(note.rpartition(", ")[2]))
    run(tmp_path, model, None, settings(stub, concurrency=3))
    assert stub.most_at_once == 3
    assert noted[-13:] == [f"{n} at once" for n in (3, 3, 3, 2, 1) * 2 + (3, 2, 1)]


# Servers that answer something else


def changed(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda choice, body: choice.update(fields)


def number(choice: dict[str, Any], value: Any, position: int = 4) -> None:
    if "prompt_logprobs" in choice:
        choice["prompt_logprobs"][position] = {str(choice["prompt_token_ids"][position]): {"logprob": value}}


def generated_only(choice: dict[str, Any], body: dict[str, Any]) -> None:
    choice.pop("prompt_logprobs", None)
    choice["logprobs"] = {"token_logprobs": [-0.5]}


def shifted(choice: dict[str, Any], body: dict[str, Any]) -> None:
    if "prompt_logprobs" in choice:
        ids, own = choice["prompt_token_ids"], choice["prompt_logprobs"]
        values = [own[t][str(ids[t])]["logprob"] for t in range(1, len(ids))]
        choice["prompt_logprobs"] = [None, *({str(i): {"logprob": v}} for i, v in
                                             zip(ids[1:], [*values[1:], -1.0], strict=True))]


def constant(choice: dict[str, Any], body: dict[str, Any]) -> None:
    for t in range(1, len(choice["prompt_token_ids"])):
        number(choice, -1.5, t)


def unlikely(choice: dict[str, Any], body: dict[str, Any]) -> None:
    for t in range(1, len(choice["prompt_token_ids"])):
        number(choice, -20.0 - t, t)


def other_numbers_for_text(choice: dict[str, Any], body: dict[str, Any]) -> None:
    if isinstance(body["prompt"], str):
        number(choice, -6.0)


def with_first_token(choice: dict[str, Any], body: dict[str, Any]) -> None:
    choice["prompt_token_ids"].insert(0, 1)


def one_short(choice: dict[str, Any], body: dict[str, Any]) -> None:
    choice.get("prompt_logprobs", [None]).pop()


def other_keys(choice: dict[str, Any], body: dict[str, Any]) -> None:
    if "prompt_logprobs" in choice:
        choice["prompt_logprobs"] = [None, *({"7": entry} for entry in choice["prompt_logprobs"][1:])]


WRONG = {
    "generated tokens only": (generated_only, "only of those it generated"),
    "nothing about the prompt": (changed(prompt_logprobs=None), "no log-probabilities of the prompt"),
    "no token ids": (changed(prompt_token_ids=None), "which token ids"),
    "a token more": (with_first_token, "scored other token ids"),
    "the floor": (lambda choice, body: number(choice, FLOOR), "one finite log-probability"),
    "null": (lambda choice, body: number(choice, None), "one finite log-probability"),
    "NaN": (lambda choice, body: number(choice, math.nan), "one finite log-probability"),
    "a probability": (lambda choice, body: number(choice, 0.3), "one finite log-probability"),
    "a number too few": (one_short, "one finite log-probability"),
    "numbers of other tokens": (other_keys, "one finite log-probability"),
    "the next token's numbers": (shifted, "not the log-probabilities of prompt tokens"),
    "a constant": (constant, "no language model"),
    "noise": (unlikely, "no language model"),
    "text is not ids": (other_numbers_for_text, "as text and as token ids"),
    "no choice of its own": (changed(token_ids=None), "which token it generates"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_server_that_does_not_score_the_known_string_is_refused(model: Path, stub: Stub, kind: str) -> None:
    stub.twist, said = WRONG[kind]
    with pytest.raises(UserError, match=said) as err, ServerScorer.connected(models(model), settings(stub)):
        pass
    assert err.value.exit_code == Exit.INCOMPATIBLE and stub.rows_asked == 0


def test_a_server_that_ignores_the_models_name_is_refused(tmp_path: Path, model: Path, member: Path,
                                                          stub: Stub) -> None:
    stub.models["m0"] = ALIGNED
    with pytest.raises(UserError, match="does not tell its models apart"):
        run(tmp_path, model, member, settings(stub))


def test_names_contexts_and_keys_are_checked_before_work(tmp_path: Path, model: Path, member: Path, stub: Stub,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(said: str, **changes: Any) -> UserError:
        with pytest.raises(UserError, match=said) as err:
            run(tmp_path, model, member, settings(stub, **changes))
        return err.value

    refused("names 'm9', which is no model", served=(("x", "m9"),))
    refused("No server serves 'x'; there are 'tiny', 'm0'", served=(("x", "m0"),))
    refused("must look like", base_urls=("http://user:secret@127.0.0.1/v1",))
    refused("holds no key", api_key_env="SAFESET_NO_SUCH_KEY")
    serving, stub.models = stub.models, {}
    refused("it lists no models")
    stub.models, stub.entries = serving, {"m0": {"max_model_len": 400}}
    assert "--max-tokens 399" in refused("takes 400 tokens").hint
    stub.entries, stub.key = {}, "a-b-c"
    monkeypatch.setenv("SAFESET_API_KEY", "x-y-z")
    for key in ("x-y-z", "x-y-z\n", "x'y\\z"):
        monkeypatch.setenv("SAFESET_API_KEY", key)
        err = refused(r"refuses the key \(401\): .*\[key\]")
        assert err.exit_code == Exit.REMOTE and key.strip() not in err.message + err.hint
    for key in ("sk-\u00e9", "sk-\r\nx"):
        monkeypatch.setenv("SAFESET_API_KEY", key)
        err = refused("variable SAFESET_API_KEY has characters that no key has")
        assert err.exit_code == Exit.ENVIRONMENT and "sk-" not in err.message + err.hint
    monkeypatch.setenv("SAFESET_API_KEY", "a-b-c")
    assert run(tmp_path, model, member, settings(stub)).counts == {"ok": N_ROWS}


@pytest.mark.parametrize("bad", [FLOOR, -math.inf, math.nan, None, "-1.0", 0.5])
def test_a_row_without_numbers_gets_a_status(tmp_path: Path, model: Path, stub: Stub, bad: Any) -> None:
    def spoil(choice: dict[str, Any], body: dict[str, Any]) -> None:
        if body["prompt"][0] == stub.control and len(body["prompt"]) % 2:
            number(choice, bad, len(body["prompt"]) - 2)

    stub.twist = spoil
    odd = sum(len(item.ids) % 2 for item in encode(stub.tokenizer, tiny_rows(N_ROWS, "pool"), 400))
    assert 0 < odd < N_ROWS
    with pytest.raises(UserError, match="gave no finite number") as err:
        run(tmp_path, model, None, settings(stub))
    assert err.value.exit_code == Exit.FAILURE_RATE
    summary = run(tmp_path, model, None, settings(stub), max_failures=1.0)
    assert summary.counts == {"ok": N_ROWS - odd, "nonfinite": odd}
    stub.twist = lambda choice, body: None
    assert run(tmp_path, model, None, settings(stub), retry_failed=True).counts == {"ok": N_ROWS}
    assert stored(tmp_path) == expected(model, {"tiny": ALIGNED})


def test_an_answer_about_other_ids_ends_the_run(tmp_path: Path, model: Path, stub: Stub) -> None:
    stub.twist = lambda choice, body: with_first_token(choice, body) if body["prompt"][0] == stub.control else None
    with pytest.raises(UserError, match="scored other token ids") as err:
        run(tmp_path, model, None, settings(stub))
    assert err.value.exit_code == Exit.REMOTE and stored(tmp_path) == {}


# Servers that die

FIRST, MIDDLE, LAST = 1, N_ROWS + 4, 2 * N_ROWS
MOMENT = pytest.mark.parametrize("moment", [FIRST, MIDDLE, LAST])


@MOMENT
def test_a_server_that_stays_away_ends_the_run_and_finished_chunks_are_kept(tmp_path: Path, model: Path, member: Path,
                                                                           stub: Stub, moment: int) -> None:
    def die(number: int) -> str | None:
        if number >= moment:
            threading.Thread(target=stub.stop).start()
        return "die" if number >= moment else None

    stub.row = die
    with pytest.raises(UserError, match="given up after 6 tries") as err:
        run(tmp_path, model, member, settings(stub))
    assert err.value.exit_code == Exit.REMOTE
    truth, kept = expected(model, {"tiny": ALIGNED, "m0": MEMBER}), stored(tmp_path)
    assert len(kept) == {FIRST: 0, MIDDLE: N_ROWS, LAST: N_ROWS + 10}[moment]
    assert all(truth[key] == value for key, value in kept.items())
    stub.row = lambda number: None
    stub.start()
    assert sum(run(tmp_path, model, member, settings(stub)).models.values()) == 2 * N_ROWS - len(kept)
    assert stored(tmp_path) == truth


@MOMENT
@pytest.mark.parametrize("comes_back", ["the same", "another"])
def test_a_server_that_comes_back_must_be_the_same(tmp_path: Path, model: Path, member: Path, stub: Stub, moment: int,
                                                   comes_back: str) -> None:
    def restart() -> None:
        stub.stop()
        if comes_back == "another":
            stub.models = {name: c + 5 for name, c in stub.models.items()}
        stub.start()

    def die_once(number: int) -> str | None:
        if number == moment:
            threading.Thread(target=restart).start()
            return "die"
        return None

    stub.row = die_once
    truth = expected(model, {"tiny": ALIGNED, "m0": MEMBER})
    if comes_back == "the same":
        run(tmp_path, model, member, settings(stub, retries=9))
        assert stored(tmp_path) == truth
        return
    with pytest.raises(UserError, match="Another model than before answers as") as err:
        run(tmp_path, model, member, settings(stub, retries=9))
    assert err.value.exit_code == Exit.REMOTE
    assert all(truth[key] == value for key, value in stored(tmp_path).items())


@pytest.mark.parametrize(("dtype", "noise", "shift", "same"), [
    ("served", 0.0, 0.02, True), ("served", 0.0, 0.05, False), ("served", 0.02, 0.07, True),
    ("served", 0.02, 0.1, False), ("served", 1.0, 0.2, False), ("float32", 0.0, 0.002, False)])
def test_a_near_miss_is_told_by_how_far_the_servers_own_numbers_move(
        model: Path, stub: Stub, dtype: str, noise: float, shift: float, same: bool) -> None:
    def moved(by: Callable[[], float]) -> None:
        def twist(choice: dict[str, Any], body: dict[str, Any]) -> None:
            amount = by() if isinstance(body["prompt"], list) and body.get("prompt_logprobs") is not None else 0.0
            for entry in choice.get("prompt_logprobs", [None])[1:]:
                next(iter(entry.values()))["logprob"] -= amount

        stub.twist = twist

    sent = itertools.count()
    moved(lambda: noise if next(sent) > 2 else 0.0)  # after the probe: when it is sent many times at once
    here = replace(models(model), dtype=dtype)
    with ServerScorer.connected(here, settings(stub)) as scorer:
        moved(lambda: shift)
        encoded = encode(stub.tokenizer, tiny_rows(1, "pool"), 400)
        if same:
            assert len(list(scorer.score(encoded))) == 1
            return
        with pytest.raises(UserError, match="Another model than before answers as 'tiny'") as err:
            list(scorer.score(encoded))
        assert err.value.exit_code == Exit.REMOTE


def test_a_swap_that_no_request_noticed_keeps_its_chunk_out(tmp_path: Path, model: Path, stub: Stub) -> None:
    def swap(number: int) -> None:
        if number == 7:
            stub.models = {"tiny": ANOTHER}

    stub.row = swap
    with pytest.raises(UserError, match="Another model than before"):
        run(tmp_path, model, None, settings(stub))
    truth, kept = expected(model, {"tiny": ALIGNED}), stored(tmp_path)
    assert len(kept) == 5 and all(truth[key] == value for key, value in kept.items())


def test_the_next_run_notices_another_model_by_what_is_stored(tmp_path: Path, model: Path, stub: Stub) -> None:
    run(tmp_path, model, None, settings(stub))
    stub.models = {"tiny": ANOTHER}
    with pytest.raises(UserError, match="does not give 'tiny' the numbers it gave before") as err:
        run(tmp_path, model, None, settings(stub), n=N_ROWS + 2)
    assert err.value.exit_code == Exit.REMOTE and len(stored(tmp_path)) == N_ROWS


def test_a_model_that_is_no_longer_served_is_named(tmp_path: Path, model: Path, stub: Stub) -> None:
    def swap(number: int) -> str | None:
        if number == 2:
            stub.models = {"llama": ALIGNED}
        return "die" if number == 2 else None

    stub.row = swap
    with pytest.raises(UserError, match=r"serves 'llama' now, and no longer 'tiny'|does not know") as err:
        run(tmp_path, model, None, settings(stub, concurrency=1))
    assert err.value.exit_code == Exit.REMOTE


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_failures_that_pass_are_tried_again_a_bounded_number_of_times(tmp_path: Path, model: Path, stub: Stub,
                                                                      status: int) -> None:
    stub.row = lambda number: status if number in (1, 6, 7) else None
    run(tmp_path, model, None, settings(stub))
    assert stored(tmp_path) == expected(model, {"tiny": ALIGNED})
    assert stub.rows_asked == N_ROWS + 3
    stub.row, stub.rows_asked = (lambda number: status), 0
    with pytest.raises(UserError, match=f"given up after 6 tries: .* answered {status}") as err:
        run(tmp_path, model, None, settings(stub, concurrency=1), n=N_ROWS + 1)
    assert err.value.exit_code == Exit.REMOTE and stub.rows_asked == 6


def test_a_request_that_the_server_refuses_is_not_repeated(tmp_path: Path, model: Path, stub: Stub) -> None:
    stub.row = lambda number: 400
    with pytest.raises(UserError, match=r"refuses a request \(400\): .*told to") as err:
        run(tmp_path, model, None, settings(stub, concurrency=1))
    assert err.value.exit_code == Exit.INCOMPATIBLE and stub.rows_asked == 1


def test_a_hanging_server_is_given_up(tmp_path: Path, model: Path, stub: Stub) -> None:
    stub.row = lambda number: "hang" if number > 6 else None
    with pytest.raises(UserError, match=r"given up after 3 tries: no answer from .* in time") as err:
        run(tmp_path, model, None, settings(stub, timeout_s=0.3))
    assert err.value.exit_code == Exit.REMOTE and len(stored(tmp_path)) == 5


def test_an_answer_that_trickles_in_is_given_up_and_repetitions_are_told(
        tmp_path: Path, model: Path, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.row = lambda number: "trickle"
    with pytest.raises(UserError, match=r"given up after 3 tries: no whole answer from .* in time"):
        run(tmp_path, model, None, settings(stub, timeout_s=0.1))
    assert capsys.readouterr().err.count("in time; trying again, up to 5 times.") == 1


def test_a_key_that_an_error_repeats_is_taken_out(stub: Stub) -> None:
    endpoint = Endpoint.at(stub.url, "sk-'secret\\", 1.0)
    said = f"b'Bearer sk-' {endpoint.client.api_key!r} {json.dumps(endpoint.client.api_key)} sk-'secret\\"
    assert "secret" not in endpoint.cleaned(said) and endpoint.cleaned("a  b\n") == "a b"

    def broken() -> None:
        raise openai.APIConnectionError(request=None) from ValueError(f"Illegal header value {endpoint.client.api_key}")

    with pytest.raises(Passing, match=r"no connection to .*: Illegal header value \[key\]$"):
        _sent(endpoint, broken)

# What is chosen, and what counts as a number


def test_the_command_line_scores_on_a_server(tmp_path: Path, model: Path, member: Path, stub: Stub) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", tiny_rows(N_ROWS, "pool"))
    stub.models = {"tiny": ALIGNED, "lora-7": MEMBER}
    line = ["score", "--corpus", str(pool), "--aligned", str(model), "--member", str(member), "--store",
            str(tmp_path / "scores"), "--max-tokens", "400", "--base-url", stub.url, "--concurrency", "2", "--json"]
    for wrong, code in (([], Exit.INCOMPATIBLE), (["--served-model", "lora-7"], Exit.USAGE),
                        (["--served-model", "lora-7=m0", "--engine", "transformers"], Exit.USAGE)):
        assert CliRunner().invoke(main, [*line, *wrong]).exit_code == code
    done = CliRunner().invoke(main, [*line, "--served-model", "lora-7=m0"])
    assert done.exit_code == 0 and json.loads(done.stdout)["computed"] == {"tiny": N_ROWS, "m0": N_ROWS}
    assert "Engine: server (a --base-url is given)." in done.stderr
    assert stored(tmp_path) == expected(model, {"tiny": ALIGNED, "m0": MEMBER})


def test_auto_takes_the_fastest_that_works_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import curate.scorers.choose as choosing

    said: list[str] = []

    def chosen(**changes: Any) -> str:
        return choose(EngineSettings(**changes), "auto", {}, said.append).name

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen() == "transformers" and "no CUDA device" in said[-1]
    assert chosen(base_urls=("http://x/v1",)) == "server" and "--base-url" in said[-1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choosing, "require", lambda *_: None)
    for found, name in ((None, "transformers"), ("here", "vllm")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda module, found=found: found)
        assert chosen() == name and "vLLM" in said[-1]
    n = len(said)
    assert chosen(name="transformers") == "transformers" and len(said) == n
    for bad in ({"name": "server"}, {"name": "transformers", "base_urls": ("http://x/v1",)},
                {"name": "transformers", "served": (("a", "b"),)}):
        with pytest.raises(UserError):
            chosen(**bad)


def test_a_servers_dtype_is_what_the_user_says(model: Path) -> None:
    server = EngineSettings("server")
    assert engine_dtype(server, "auto", "auto") == "served" and engine_dtype(server, "bfloat16", "auto") == "bfloat16"
    assert engine_dtype(EngineSettings("transformers"), "float16", "cpu") == "float16"


def test_vllm_merges_members_in_float32_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx in (True, False):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
        assert engine_dtype(EngineSettings("vllm"), "auto", "cpu") == "float32"
        assert engine_dtype(EngineSettings("transformers"), "auto", "cpu") == ("bfloat16" if amx else "float32")
    assert engine_dtype(EngineSettings("vllm"), "bfloat16", "cpu") == "bfloat16"


def test_evidence_needs_one_log_probability_for_every_token() -> None:
    item = Encoded((9, 8, 7, 6, 5), 2, 4)
    good = evidence(item, [-0.25, -1.5, -2.0])
    assert (good.nll_sum, good.n_tokens, good.eot_nll, good.status) == (1.75, 2, 2.0, "ok")
    open_end = evidence(Encoded((9, 8, 7), 1, 3), [-1.0, -2.0])
    assert (open_end.nll_sum, open_end.eot_nll, open_end.status) == (3.0, None, "ok")
    for bad in (None, [], [-1.0, -1.0], [-1.0] * 4, [-1.0, math.nan, -1.0], [-1.0, -1.0, -math.inf],
                [FLOOR, -1.0, -1.0], [-1.0, None, -1.0], [-1.0, True, -1.0], [0.2, -1.0, -1.0]):
        got = evidence(item, bad)
        assert got.status == "nonfinite" and math.isnan(got.nll_sum) and math.isnan(got.eot_nll)


def test_the_scorer_can_be_left_in_the_middle(model: Path, stub: Stub) -> None:
    stub.delay_s = 0.05
    encoded = encode(stub.tokenizer, tiny_rows(N_ROWS, "pool"), 400)
    with ServerScorer.connected(models(model), settings(stub, concurrency=2)) as scorer, scorer.member(None):
        batches = scorer.score(encoded)
        next(batches)
        batches.close()
        asked = stub.rows_asked
        assert asked < N_ROWS
        assert sum(len(part) for part in scorer.score(encoded)) == N_ROWS
    assert stub.rows_asked <= asked + N_ROWS + 2
