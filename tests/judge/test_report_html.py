"""The page: nothing in it runs or loads, every mark has its n, every part is there or says why not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from curate.core.documents import Sample, TaskScore, Verdicts
from curate.core.page import el, escaped, shortened, table
from curate.core.scores_page import Cut, ScoredRow, ScoreModel, ScoreSummary, SourceRows
from judge.cli import main
from judge.criteria import compare
from judge.evidence import gather
from judge.report.html import Material, html_page, mark_cell
from judge.report.make import scores_of
from judge.report.picture import table_png
from judge.report.trace import traces
from judge.rule import Rule
from tests.judge.hostile import HOSTILE
from tests.judge.makers import answer, graded_verdicts, make_verdicts, samples
from tests.judge.synthetic import write_runs

FAST = Rule(resamples=120)
TAGS = {"html", "head", "meta", "title", "style", "body", "a", "header", "h1", "h2", "h3", "p", "nav", "ul", "li",
        "main", "section", "div", "span", "bdi", "strong", "code", "br", "table", "caption", "thead", "tbody", "tr",
        "th", "td", "details", "summary", "figure", "figcaption", "svg", "desc", "path", "polyline", "rect", "text"}
WORDS = {"class", "id", "href", "title", "role", "tabindex", "scope", "data-label", "aria-label", "aria-labelledby",
         "aria-hidden", "lang", "charset", "name", "content", "http-equiv", "viewbox", "d", "points", "x", "y",
         "width", "height", "transform", "text-anchor", "fill", "stroke", "stroke-width", "stroke-linecap",
         "stroke-linejoin"}


class Page(HTMLParser):
    """What a browser would see: tags, attributes, and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are closed in order"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"a processing instruction: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")


def check_safe(text: str) -> Page:
    """Check that a page holds our tags and attributes only, and no character that turns or ends a text."""
    page = Page(text)
    assert not page.open, "every element is closed"
    for tag, attributes in page.tags:
        assert tag in TAGS and attributes.keys() <= WORDS, (tag, attributes)
        assert re.fullmatch(r"#[a-z]+", attributes.get("href") or "#x")
    assert [t for t, _ in page.tags].count("style") == 1
    assert "default-src 'none'" in next(a["content"] for t, a in page.tags if "http-equiv" in a)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]", text)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "<" not in style
    return page


def hostile(port: int = 9) -> list[str]:
    return [text.replace("{port}", str(port)) for text in HOSTILE]


def hostile_summary(texts: list[str]) -> ScoreSummary:
    rows = [ScoredRow(example_id="e" * 64, source=t, s_d=0.5, n_answer_tokens=3, refusal=t, prompt=t, answer=t)
            for t in texts]
    sources = [SourceRows(source=t, rows=2, statuses={"ok": 1, t: 1}, refusals=1, quantiles=(0.0, 0.1, 0.2, 0.3, 0.4))
               for t in texts]
    return ScoreSummary(evidence=texts[0], engine=texts[1], dtype=texts[2], encoding=texts[3], eps=0.1, frac=0.05,
                        models=[ScoreModel(name=t, role=t, id=t, weights=t, tokenizer=t, adapter=t) for t in texts],
                        rows=9, sources=sources, edges=(0.0, 0.5, 1.0), answers=(3, 4), refusals=(1, 2), beyond=0,
                        cuts=[Cut(strategy=t, s_d=0.5, rows=2, refusals=1) for t in texts[:2]], lengths=(), top=rows)


def hostile_material(port: int = 9) -> Material:
    """Return a report with each hostile string as label, name, question, answer, bank, system, task and more."""
    texts = hostile(port)

    def verdicts(label: str, k: int) -> Verdicts:
        answers = [answer(t, 5.0 if i % 2 else "refused", 90.0, suite, text=t, bank=t).model_copy(
            update={"prompt": t, "system": t, "variant": t})
            for i, t in enumerate(texts) for suite in ("general", "in-domain", "context") if k < 2 or (i - k) % 13 == 0]
        one = graded_verdicts(label, answers, k, tasks=tuple(
            TaskScore(item=f"i{i}", tier=i % 2, correct=True, task=texts[k % 3]) for i in range(6)))
        return one.model_copy(update={
            "model": one.model.model_copy(update={"name": texts[k % 40]}), "settings": {texts[k % 40]: texts},
            "in_domain": (), "versions": {t: t for t in texts}, "statuses": {t: 1 for t in texts[:9]}, "run": None,
            "judge": "graded-1",
            "samples": tuple(Sample(question=t, answer=t, status="ok", nll_base=1.0, repetition=0.0)
                             for t in texts[k % 30:k % 30 + 4])})

    found = [verdicts(label, k) for k, label in enumerate(["base", "none", *texts])]
    base = found[0].model.model_copy(update={"name": texts[5]})
    found = [v.model_copy(update={"base": base, **({"model": base} if v.label == "base" else {})}) for v in found]
    return Material(compare(found, "none", replace(FAST, resamples=100)), found, {}, hostile_summary(texts), texts[4])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_runs(tmp_path_factory.mktemp("synthetic"), per_question=2)


@pytest.fixture(scope="module")
def material(runs: list[Path]) -> Material:
    verdicts = gather(runs)
    summary = hostile_summary(["plain"] * 5)
    return Material(compare(verdicts, "none", FAST), verdicts, traces(runs), summary, "A report")


@pytest.fixture(scope="module")
def evil_page() -> str:
    return html_page(hostile_material())


# --- the words of the page ---

def test_text_is_escaped_by_its_type() -> None:
    assert el("p", "<b>", class_="a\"b") == '<p class="a&quot;b">&lt;b&gt;</p>'
    assert el("p", el("b", "x"), ["<", None, 3]) == "<p><b>x</b>&lt;3</p>"
    assert escaped("a\x00b\u202ec") == "a\ufffdb\ufffdc"
    assert el("path", d="M0 0", hidden=True, id=None, open=False) == '<path d="M0 0" hidden></path>'


def test_what_is_cut_off_is_said() -> None:
    assert "[7 more characters]" in shortened("a" * 12, 5) and "more characters" not in shortened("a" * 5, 5)


def test_numbers_stand_to_the_right_and_a_name_to_the_left() -> None:
    grid = table(("name", "n", "word"), [["a", "1,000", "x"], ["b", "−2", "3"]], "c")
    assert grid.count('class="num"') == 3 and '<th scope="row"' in grid and 'data-label="word">x' in grid


def test_forty_hostile_strings_stay_text(evil_page: str) -> None:
    assert len(set(HOSTILE)) == 40
    page = check_safe(evil_page)
    said = "".join(page.texts)
    for text in hostile():
        first = re.split(r"[\x00-\x1f\x7f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]", text)[0][:250].strip()
        assert first in said or not first, text


def test_hostile_strings_in_a_store_stay_text() -> None:
    from curate.report import html_page as scores_page

    check_safe(scores_page(hostile_summary(hostile())))


# --- what is on it ---

def test_no_mark_without_its_n(material: Material) -> None:
    text = html_page(material)
    check_safe(text)
    cells = re.findall(r'<span class="mark \w+">.*?</span></span>', text)
    assert len(cells) == len(material.comparison.rows) * 5
    for cell in cells:
        assert re.search(r'</?span>(pass|partly|fail|n/a|not marked|not measured)</span> <span class="n">\(n=\d+', cell)
    finding = material.comparison.rows[1].findings["general"]
    assert f"(n={finding.n}, 3 seeds)" in mark_cell(finding)


def test_all_parts_are_there(material: Material) -> None:
    text = html_page(material)
    assert text.count("<figure") == text.count('class="plot"') == text.count("<desc>") == 8
    for words in ("General against in-domain", "wanted", "Context, over the share of safe rows", "Coherent answers",
                  "Benign task by tier", "Training curves", "s_d, answers and refusals", "misaligned · ",
                  "Digests in full", "no mix at hand names it"):
        assert words in text, words
    for verdicts in material.verdicts:
        assert verdicts.digest in text
    assert all(trace.mix is not None and trace.mix.digest in text for trace in material.traces.values())
    headings = re.findall(r"<h2[^>]*>([^<]*)", text)
    assert headings[0].startswith("Four criteria") and headings[1] == "Figures"


def test_missing_parts_say_so() -> None:
    margins = [1.0] * 6
    verdicts = [make_verdicts("base", margins), make_verdicts("none", [0.5] * 6),
                make_verdicts("kept", [0.9] * 6, samples=samples([1.0]))]
    text = html_page(Material(compare(verdicts, "none", FAST), verdicts))
    check_safe(text)
    for words in ("no training curves", "No score store was given", "no dose-response", "No context-matched",
                  "Coherence was not measured", "A benign task was not measured", "not set against each other",
                  "1 sampled answers, not graded"):
        assert words in text, words
    assert "<figure" not in text
    nothing = [make_verdicts("base"), make_verdicts("none")]
    assert "The verdicts hold no sampled answers" in html_page(Material(compare(nothing, "none", FAST), nothing))


def test_the_picture_is_one(material: Material) -> None:
    assert table_png(material.comparison, "$x$").startswith(b"\x89PNG")
    evil = hostile_material()
    short = replace(evil.comparison, rows=evil.comparison.rows[:4])
    assert table_png(short, HOSTILE[0]).startswith(b"\x89PNG")


def test_every_form_is_written(runs: list[Path], tmp_path: Path, material: Material) -> None:
    store = tmp_path / "scores.json"
    store.write_text(material.scores.model_dump_json())
    forms = [word for form in ("html", "md", "csv", "json", "png")
             for word in (f"--{form}", str(tmp_path / f"r.{form}"))]
    result = CliRunner().invoke(main, ["report", *map(str, runs), *forms, "--store", str(store), "--rule",
                                       "resamples=100", "--rule", "general_share=0.3"], standalone_mode=False)
    assert result.exception is None and len(result.output.split()) == 5
    body = json.loads((tmp_path / "r.json").read_text())
    assert body["rule"]["general_share"] == 0.3
    assert "with changes: general\\_share 0.3 (default 0.5)" in (tmp_path / "r.md").read_text()
    assert "with changes" in (tmp_path / "r.html").read_text()


def test_a_store_that_is_none_is_refused(tmp_path: Path) -> None:
    for content, says in ((b"{}", "no summary of scores"), (b"\xff", "no summary"),
                          (b'{"error": "damaged", "hint": "h", "exit_code": 4}', "damaged")):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(Exception, match=says):
            scores_of(tmp_path / "x.json")
    with pytest.raises(Exception, match="no store"):
        scores_of(tmp_path)


# --- in a browser ---

class Listener(BaseHTTPRequestHandler):
    """Counts who calls."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(404)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Listener)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def browse(page: Path, tmp_path: Path, width: int, dark: bool, *words: str) -> subprocess.CompletedProcess[str]:
    """Open a page in headless Chromium; what it says about the page stands on stderr."""
    return subprocess.run(
        [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         f"--window-size={width},2400", f"--blink-settings=preferredColorScheme={0 if dark else 1}", *words,
         page.as_uri()], capture_output=True, text=True, timeout=60, check=True)


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(500, True), (1150, False)])
def test_a_browser_shows_it_and_complains_about_nothing(material: Material, tmp_path: Path, width: int,
                                                        dark: bool) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(html_page(material))
    said = browse(page, tmp_path, width, dark, f"--screenshot={picture}").stderr
    assert "CONSOLE" not in said
    assert picture.stat().st_size > 20_000


@needs_chromium
def test_a_browser_runs_none_of_the_forty(tmp_path: Path, listener: HTTPServer) -> None:
    page = tmp_path / "evil.html"
    page.write_text(html_page(hostile_material(listener.server_port)), encoding="utf-8")
    found = browse(page, tmp_path, 1150, False, "--dump-dom")
    assert "CONSOLE" not in found.stderr and listener.asked == []
    check_safe(found.stdout)
    assert found.stdout.count("<figure") == page.read_text().count("<figure") >= 3


@needs_chromium
def test_the_browser_test_can_fail(tmp_path: Path, listener: HTTPServer) -> None:
    """Without our escaping and policy the same browser does call, and does complain."""
    page = tmp_path / "bad.html"
    page.write_text(f"<img src='http://127.0.0.1:{listener.server_port}/called'><script>console.log('CONSOLE')</script>")
    found = browse(page, tmp_path, 500, False, "--dump-dom")
    assert "CONSOLE" in found.stderr and "/called" in listener.asked
