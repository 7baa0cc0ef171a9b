"""The page for everybody: contrast, a phone's width, text alternatives, the keyboard, paper."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from curate.core.scores_page import ScoreSummary
from judge.criteria import compare
from judge.evidence import gather
from judge.report.html import Material, html_page
from judge.report.trace import traces
from tests.conftest import ROOT
from tests.judge.synthetic import write_runs
from tests.judge.test_report_html import FAST, browse, hostile_summary, needs_chromium

PHONE = 360
"""Pixels of a common phone; Chromium's own window is never narrower than 500, so the page stands in a frame."""
LOOK = """
const found = {small: [], wide: [], faint: [], unreachable: [], unnamed: [], sizes: []};
function channel(v) { v /= 255; return v <= 0.04045 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); }
function light(c) { return 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]); }
function colour(text) { const n = (text.match(/[\\d.]+/g) || []).map(Number); return n.length > 3 && !n[3] ? null : n; }
function ratio(a, b) { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); }
function look() {
  const frame = document.getElementById('page'), page = frame.contentDocument, of = frame.contentWindow;
  const paper = colour(of.getComputedStyle(page.body).backgroundColor);
  found.scroll = page.documentElement.scrollWidth;
  found.phone = of.matchMedia('(max-width:44rem)').matches;
  found.dark = of.matchMedia('(prefers-color-scheme:dark)').matches;
  for (const one of page.querySelectorAll('details')) one.open = true;
  found.scroll_open = page.documentElement.scrollWidth;
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), at = walker.currentNode.parentElement;
    if (!text || ['title', 'desc', 'style'].includes(at.tagName)) continue;
    const box = at.getBoundingClientRect(), style = of.getComputedStyle(at), inside = at.closest('svg');
    if (!box.width || box.right < 0) continue;
    const ink = colour(inside ? style.fill : style.color);
    if (ink && ratio(ink, paper) < 4.5) found.faint.push([text.slice(0, 40), ratio(ink, paper).toFixed(2)]);
    const drawn = inside ? inside.getBoundingClientRect().width / inside.viewBox.baseVal.width : 1;
    const size = parseFloat(style.fontSize) * drawn;
    found.sizes.push(size);
    if (size < 10) found.small.push([text.slice(0, 40), size.toFixed(1)]);
    if (box.right > page.documentElement.clientWidth + 1 && !at.closest('.scroll')) found.wide.push(text.slice(0, 40));
  }
  found.figures = [...page.querySelectorAll('svg.plot')].map(one => one.getBoundingClientRect().width);
  for (const one of page.querySelectorAll('*')) {
    const style = of.getComputedStyle(one);
    if (/auto|scroll/.test(style.overflowX) && one.scrollWidth > one.clientWidth && one.tabIndex !== 0)
      found.unreachable.push(one.className);
    if (one.tagName === 'SUMMARY' && one.tabIndex !== 0) found.unreachable.push('summary');
    if (one.tagName === 'svg' && one.getAttribute('aria-hidden') !== 'true'
        && !(one.getAttribute('role') === 'img' && one.getAttribute('aria-label') && one.querySelector('title')))
      found.unnamed.push(one.outerHTML.slice(0, 80));
    if (one.getAttribute('role') === 'region' && !one.getAttribute('aria-label')) found.unnamed.push(one.className);
  }
  const first = page.querySelector('a,button,summary,[tabindex]');
  first.focus();
  found.first = [first.className, page.activeElement === first, first.getBoundingClientRect().left >= 0];
  found.heads = [...page.querySelectorAll('h1,h2,h3')].map(one => Number(one.tagName[1]));
  document.getElementById('found').textContent = JSON.stringify(found);
}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    runs = write_runs(tmp_path_factory.mktemp("synthetic"), per_question=2)
    verdicts = gather(runs)
    scores: ScoreSummary = hostile_summary(["plain"] * 5)
    return html_page(Material(compare(verdicts, "none", FAST), verdicts, traces(runs), scores, "A report"))


@contextmanager
def looked_at(page: str, width: int) -> Iterator[tuple[str, list[str]]]:
    """Serve a page, and beside it one that holds it in a frame of a width and says what it sees there.

    Gives the address of the latter and a list of what was asked of the server.
    """
    asked: list[str] = []
    outer = (f"<!DOCTYPE html><iframe id=page src=page.html width={width} height=800 style='border:0'></iframe>"
             f"<pre id=found></pre><script>{LOOK}\nwindow.onload = look;</script>")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = {"/page.html": page, "/": outer}.get(self.path)
            self.send_response(200 if body else 404)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((body or "").encode(errors="replace"))

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()


class Address:
    """Stands in for a file where ``browse`` wants to know the address of a page."""

    def __init__(self, url: str) -> None:
        self.url = url

    def as_uri(self) -> str:
        """Return the address."""
        return self.url


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (PHONE, True), (1100, True)])
def test_it_can_be_read_and_reached(text: str, tmp_path: Path, width: int, dark: bool) -> None:
    """By what the browser made of it: nothing hangs over the edge, is faint, tiny, unnamed or out of the keyboard."""
    with looked_at(text, width) as (url, asked):
        dumped = browse(Address(url), tmp_path, 1200, dark, "--virtual-time-budget=4000", "--dump-dom").stdout
    found: dict[str, Any] = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', dumped, re.DOTALL)[1]))
    assert set(asked) <= {"/", "/page.html", "/favicon.ico"} and asked.count("/page.html") == 1
    assert found["phone"] == (width == PHONE) and found["dark"] == dark
    assert len(found["sizes"]) > 500 and len(found["figures"]) == 8 and min(found["figures"]) > 0.8 * min(width, 440)
    assert found["scroll"] <= width and found["scroll_open"] <= width and found["wide"] == []
    assert found["faint"] == [] and found["small"] == []
    assert found["unreachable"] == [] and found["unnamed"] == []
    assert found["first"] == ["skip", True, True], "the first stop of the keyboard leads past the contents"
    assert found["heads"][0] == 1 and 1 not in found["heads"][1:]
    assert all(b <= a + 1 for a, b in zip(found["heads"], found["heads"][1:], strict=False)), "no level is left out"


@needs_chromium
def test_it_prints(text: str, tmp_path: Path) -> None:
    """Several pages, and black on white also for those who read in the dark."""
    page, paper = tmp_path / "report.html", tmp_path / "report.pdf"
    page.write_text(text)
    said = browse(page, tmp_path, 1150, True, f"--print-to-pdf={paper}", "--no-pdf-header-footer").stderr
    assert "CONSOLE" not in said
    content = paper.read_bytes()
    assert content.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", content)) <= 30


# --- colours, without a browser ---

def colours() -> dict[str, dict[str, str]]:
    """Return the colours of the style sheet by name: in the light, in the dark, on paper."""
    css = (ROOT / "curate" / "data" / "report" / "page.css").read_text()
    found = {}
    for name, text in zip(("light", "dark", "paper"), re.findall(r":root\{(.*?)\}", css, re.DOTALL), strict=True):
        found[name] = dict(re.findall(r"--([\w]+):(#[0-9a-f]{3,6})\b", text))
    return found


def contrast(one: str, other: str) -> float:
    """Return the contrast of WCAG 2: 1 for equal colours, 21 for black on white."""
    def light(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[k:k + 2], 16) / 255 for k in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dim, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "paper"])
def test_colours_have_contrast(theme: str) -> None:
    """Words 4.5 to 1, marks of series 3 to 1, on the page; the word in the wanted corner on its own ground."""
    of = colours()[theme]
    assert contrast("#000", "#ffffff") == pytest.approx(21) and len(of) >= 16
    for name in ("ink", "soft", "link", "pass", "partly", "fail", "none"):
        assert contrast(of[name], of["paper"]) >= 4.5, (theme, name)
    for k in range(8):
        assert contrast(of[f"s{k}"], of["paper"]) >= 3, (theme, k)
    assert contrast(of["pass"], of["good"]) >= 4.5
