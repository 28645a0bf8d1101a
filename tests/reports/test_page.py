"""The report page: whole, safe, self-contained, and of use to the eye, the keyboard and the screen reader."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.reports.page import page_html, write_page

NASTY = "</script><script>alert('1')</script>\"'><img src=x onerror=alert(1)>&amp; {{ 7*7 }} é☃𝄞"
VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """What a page holds: elements with their attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.stack, f"elements left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] not in (["script"], ["style"]):
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_safe(page: Page) -> None:
    """One script, that of the page; no handlers, nothing from elsewhere."""
    assert len(page.named("script")) == 1
    assert not page.named("img") and not page.named("iframe") and not page.named("base")
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            assert name not in ("src", "srcset", "data", "action", "formaction")
            if name in ("href", "xlink:href"):
                assert value is not None
                assert value.startswith("#") or (tag, value) == ("link", "data:,")


def poisoned(results: dict[str, Any], text: str) -> dict[str, Any]:
    """The results with `text` wherever a user could have put it."""
    results["arms"][1] |= {
        "name": text,
        "family": text,
        "longest_tokens": [text],
        "samples": [{"seed": 0, "text": text}],
    }
    for row in results["differences"]:
        row |= {key: text for key in ("a", "b") if row[key] == "bpe-300"}
    for paragraph in results["paragraphs"]:
        paragraph["tokens"][text] = paragraph["tokens"].pop("bpe-300")
        paragraph["tokens"][text][0]["text"] = text
        paragraph |= {"title": text, "text": text}
    for line in results["evaluations"]:
        line["arm"] = text if line["arm"] == "bpe-300" else line["arm"]
    results["overlap"]["names"][1] = text
    results["claims"][0] |= {"claim": text, "finding": text, "columns": [text], "rows": [[text]]}
    results["measures"] = [{**results["measures"][0], "label": text, "unit": text, "definition": text, "source": text}]
    results["left_out"] = [{"name": text, "reason": text}]
    results["arms"].append({**results["arms"][0], "name": f"{text}2", "status": "failed", "reason": text})
    results["corpus"]["spec"] = results["corpus"]["fingerprint"] = text
    results["machine"]["devices"] = [text]
    results["versions"] = {text: text}
    return results | dict.fromkeys(("title", "answer", "command", "git_commit"), text)


def test_whatever_users_wrote_is_text(make_results: Any) -> None:
    html = page_html(poisoned(make_results(seeds=(0,)), NASTY))
    page = Page(html)
    check_safe(page)
    assert page.text.count(NASTY) > 30
    assert "49 é" not in page.text
    (policy,) = [m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and "script-src 'sha256-" in policy and "default-src 'none'" in policy


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.text(st.one_of(st.sampled_from("<>\"'&/$#\\{}%-!"), st.characters()), min_size=1, max_size=20))
def test_any_text(make_results: Any, text: str) -> None:
    results = make_results(sizes=(300,), seeds=(0,))
    with mock.patch("jaxlm.reports.page.charts", return_value=[]):  # slow, and tried with names of their own elsewhere
        page = Page(page_html(poisoned(results, text)))
    check_safe(page)
    shown = text.encode("utf-8", "backslashreplace").decode().replace("\r\n", "\n").replace("\r", "\n")
    if "\x00" not in text and shown.isprintable():
        assert page.text.count(shown) >= 20


def test_one_file_is_all(make_results: Any, tmp_path: Path) -> None:
    results = make_results()
    write_page(results, tmp_path / "new" / "report.html")
    html = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    check_safe(Page(html))
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)", html)
    assert html.lstrip().startswith("<!DOCTYPE html>")
    write_page(results, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html, "the same results give another page"


def test_results_survive_json(make_results: Any) -> None:
    results = make_results()
    assert page_html(json.loads(json.dumps(results))) == page_html(results)


def test_sections_are_in_order(make_results: Any) -> None:
    page = Page(page_html(make_results()))
    sections = [section["id"] for section in page.named("section")]
    assert sections == [
        "differences", "results", "grid", "charts", "claims", "measures", "paragraphs", "vocabularies", "samples",
        "missing", "again",
    ]  # fmt: skip
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in page.named("a")} == {f"#{section}" for section in sections}


def test_pictures_have_words(make_results: Any) -> None:
    html = page_html(make_results())
    page = Page(html)
    pictures = [svg for svg in page.named("svg") if svg.get("aria-hidden") != "true"]
    assert len(pictures) == len(page.named("figcaption")) == 7
    ids = {attributes.get("id") for _, attributes in page.elements}
    for picture in pictures:
        assert picture["role"] == "img"
        assert set((picture["aria-labelledby"] or "").split()) <= ids
    assert all(region.get("aria-label") for region in page.named("div") if region.get("role") == "region")


def test_every_number_of_an_arm_is_told(make_results: Any) -> None:
    results = make_results()
    text = Page(page_html(results)).text
    for arm in results["arms"]:
        for told in (
            f"{arm['bits_per_byte']:.4f}", f"{arm['low']:.4f} – {arm['high']:.4f}", f"{arm['loss']:.3f}",
            f"{arm['parameters']:,}", f"{arm['tokens'] / arm['seconds']:,.0f}", arm["longest_tokens"][0],
            arm["samples"][1]["text"],
        ):  # fmt: skip
            assert told in text
    for row in results["differences"]:
        assert f"{row['a']} − {row['b']}" in text
    for told in (results["command"], results["corpus"]["fingerprint"], results["git_commit"], "jax 0.10.2", "2 cores"):
        assert told in text
    for measure in results["measures"]:
        assert measure["definition"] in text and measure["source"] in text


def test_tokens_make_up_the_paragraph(make_results: Any) -> None:
    results = make_results()
    html = page_html(results)
    total = sum(len(tokens) for paragraph in results["paragraphs"] for tokens in paragraph["tokens"].values())
    assert html.count("<b data-i=") == total
    first = re.search(r'<div class="tokens".*?</div>', html)
    assert first is not None
    shown = Page(first[0]).text
    assert shown == results["paragraphs"][0]["text"].replace(" ", "·")


def test_failed_and_left_out_arms_are_told(make_results: Any) -> None:
    results = make_results()
    results["arms"].append({
        "name": "bpe-99999", "family": "bpe", "tokenizer": "bpe", "vocab_size": 99_999, "size": "2x128",
        "status": "failed", "reason": "The text reaches 8,412 ids.",
    })  # fmt: skip
    results["arms"].append({**results["arms"][-1], "name": "bpe-7", "status": "unfinished", "reason": None})
    text = Page(page_html(results)).text
    for told in (
        "bpe-99999 failed",
        "The text reaches 8,412 ids.",
        "bpe-7 unfinished",
        "No reason is recorded.",
        "words left",
    ):
        assert told in text
    assert "3 of the arms asked for" in re.sub(r"\s+", " ", text)


def test_one_seed(make_results: Any) -> None:
    results = make_results(seeds=(7,))
    for arm in results["arms"]:
        arm |= {"low": None, "high": None}
    text = Page(page_html(results)).text
    assert "one seed: not judged" in text
    assert "None" not in text and "nan" not in text


def test_no_arm_done(make_results: Any) -> None:
    results = make_results()
    results["arms"] = [
        {
            **{key: arm[key] for key in ("name", "family", "tokenizer", "vocab_size", "size")},
            "status": "failed",
            "reason": "NaN",
        }
        for arm in results["arms"]
    ]
    results |= {"differences": [], "evaluations": [], "overlap": {"names": [], "shared": []}, "claims": []}
    page = Page(page_html(results))
    assert "No arm has finished" in page.text and page.text.count("NaN") == 3
    assert not page.named("svg")
    anchors = {f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes}
    assert {link["href"] for link in page.named("a")} <= anchors


def test_one_arm_done_and_unequal_sizes(make_results: Any) -> None:
    results = make_results()
    results["arms"][1] |= {"status": "failed", "reason": "out of memory"}
    results["arms"][2] |= {"size": "4x256", "grid": []}
    results["differences"] = results["differences"][1:2]
    text = Page(page_html(results)).text
    assert "4 × 256" in text and "out of memory" in text


def test_the_edge_of_the_grid_is_told(make_results: Any) -> None:
    results = make_results()
    assert "at the edge of the grid" not in page_html(results)
    results["arms"][0]["learning_rate"] = results["arms"][0]["grid"][0]["learning_rate"]
    html = page_html(results)
    assert html.count("at the edge of the grid") == 1
    assert f"<strong>{results['arms'][0]['grid'][0]['bits_per_byte']:.4f}</strong>" in html


def test_another_version_is_refused(make_results: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="version 2"):
        write_page(make_results() | {"version": 2}, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


# ---- in a browser


PATIENCE = 180_000  # ms; a busy machine is no failure
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, from $CHROMIUM or the path."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives the browser, is not installed"
    )
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    path = path or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium found: install it, or name it in $CHROMIUM, to test the page in a browser")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS, timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, make_results: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens the page of some results at a width, in light or dark; whatever it complains of fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_(results: dict[str, Any], *, width: int = 1280, scheme: str = "light") -> Any:
        write_page(results, tmp_path / "report.html")
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda request: complaints.append(request.url) if not request.url.startswith("file:") else None
        )
        page.goto((tmp_path / "report.html").as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not [complaint for complaint in complaints if complaint != "data:,"]


def luminance(page: Any, selector: str, name: str) -> float:
    colour = page.eval_on_selector(selector, f"element => getComputedStyle(element)['{name}']")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 765


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_a_phone(open_page: Any, make_results: Any, scheme: str) -> None:
    results = poisoned(make_results(), "a" * 300)
    results["command"] = "python " + "--flag=value" * 50
    page = open_page(results, width=390, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    page.evaluate("document.querySelectorAll('[data-choice]').forEach(box => box.checked || box.click())")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    letters = page.eval_on_selector_all(
        "figure > svg text",
        "all => all.map(e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a)",
    )
    assert letters and min(letters) > 9.9
    paper, ink = luminance(page, "body", "backgroundColor"), luminance(page, "body", "color")
    words = luminance(page, "figure > svg text", "fill")
    assert (paper > 0.9 and max(ink, words) < 0.2) if scheme == "light" else (paper < 0.15 and min(ink, words) > 0.8)


def test_tokens_by_keyboard(open_page: Any, make_results: Any) -> None:
    results = make_results()
    page = open_page(results)
    tokens = results["paragraphs"][0]["tokens"]["bpe-300"]
    row = page.locator(".paragraph").first.locator(".row").nth(1).locator(".tokens")
    tip = page.locator("#tip")
    previous = page.locator(".paragraph").first.locator(".row").nth(0).locator("b").first
    previous.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == tokens[0]["text"], "Tab leads from row to row"

    def told(index: int) -> None:
        assert tip.is_visible()
        plural = "" if tokens[index]["bytes"] == 1 else "s"
        assert (
            tip.inner_text()
            == f"id {tokens[index]['id']}: “{tokens[index]['text']}”, {tokens[index]['bytes']} byte{plural}"
        )
        assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 1280 and box["y"] >= 0 and box["y"] + box["height"] <= 800

    told(0)
    for key, index in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", len(tokens) - 1), ("Home", 0)):
        page.keyboard.press(key)
        told(index)
    top = row.locator("b").first.bounding_box()["y"]
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") > top
    page.keyboard.press("ArrowUp")
    told(0)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    told(1)  # a row remembers where one was
    assert row.locator('[tabindex="0"]').count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.row').dataset.row") == "2"


def test_tokens_by_pointer_and_choice(open_page: Any, make_results: Any) -> None:
    results = make_results(sizes=(300, 320, 340, 500))
    page = open_page(results)
    paragraph = page.locator(".paragraph").first
    assert [row.is_visible() for row in paragraph.locator(".row").all()] == [True] * 4 + [False]
    paragraph.locator("b").nth(3).hover()
    assert page.locator("#tip").inner_text().startswith(f"id {results['paragraphs'][0]['tokens']['char'][3]['id']}:")

    def marks(name: str, others: list[str]) -> list[bool]:
        """The plain way: at which tokens another tokenizer has no boundary."""
        begins = {}
        for arm in [name, *others]:
            ends = [0]
            for token in results["paragraphs"][0]["tokens"][arm]:
                ends.append(ends[-1] + token["bytes"])
            begins[arm] = ends[:-1]
        return [any(begin not in begins[other] for other in others) for begin in begins[name]]

    def shown(row: int) -> list[bool]:
        return paragraph.locator(f'[data-row="{row}"] b').evaluate_all(
            "all => all.map(b => b.classList.contains('mark'))"
        )

    assert shown(0) == marks("char", ["bpe-300", "bpe-320", "bpe-340"])
    assert any(shown(0)) and not all(shown(0))
    for choice in (1, 2, 3):
        page.locator(f'[data-choice="{choice}"]').uncheck()
    assert not any(shown(0)), "alone a tokenizer differs from none"
    page.locator('[data-choice="4"]').check()
    assert paragraph.locator('[data-row="4"]').is_visible()
    assert shown(0) == marks("char", ["bpe-500"])
    assert shown(4) == marks("bpe-500", ["char"])


def test_an_arm_is_brought_out(open_page: Any, make_results: Any) -> None:
    page = open_page(make_results())

    def opacity(arm: int) -> float:
        return float(
            page.eval_on_selector(f'.charts [data-arm="{arm}"]', "element => getComputedStyle(element).opacity")
        )

    assert opacity(0) == opacity(1) == 1
    page.locator('.legend [data-arm="1"]').press("Enter")
    assert opacity(0) < 0.5 and opacity(1) == 1
    page.locator('.legend [data-arm="1"]').press("Enter")
    assert opacity(0) == 1


def test_print_is_light_and_fits(open_page: Any, make_results: Any) -> None:
    page = open_page(make_results(), scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert luminance(page, "body", "backgroundColor") > 0.9
    page.set_viewport_size({"width": 1009, "height": 700})  # A4 across, less the margins
    assert page.evaluate("document.documentElement.scrollWidth") <= 1009
    assert not page.locator("nav").is_visible()
