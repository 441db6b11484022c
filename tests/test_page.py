"""The page of a report: whole with whatever is known, safe with whatever is named, and good to read everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tersely.errors import DataError
from tersely.report.charts import breadth, front, log_ticks, number, shorten, ticks
from tersely.report.page import Dossier, dossiers_from_json, dossiers_json, render
from tersely.results import Report, Row
from tests import facts
from tests.browser import Browser, chromium

EVIL = '</script></style></title><img src=x onerror="document.owned=1"><script>document.owned=1</script>" \'&amp;'
VOID = {"meta", "link", "br", "rect", "line", "path", "circle"}


def unbounded() -> Dossier:
    """Measured on one document: no interval has bounds."""
    whole = facts.whole()
    assert whole.evaluation is not None
    assert whole.evaluation.text is not None
    assert whole.evaluation.text.divergence is not None
    d = whole.evaluation.text.divergence
    lone = facts.estimate(0.06, math.inf)
    text = replace(whole.evaluation.text, loss=lone, divergence=replace(d, kl=lone, loss_difference=lone, lost=lone))
    compared = tuple(replace(c, difference=lone, detectable=math.inf) for c in whole.evaluation.comparisons)
    assert whole.blame is not None
    sites = tuple(replace(s, cost=lone) for s in whole.blame.sites)
    evaluation = replace(whole.evaluation, text=text, comparisons=compared)
    return replace(whole, evaluation=evaluation, blame=replace(whole.blame, sites=sites))


def named(name: str) -> Dossier:
    """Every text that comes from outside is this one."""
    whole = facts.whole(name, folder=name, format=name, versions={name: name})
    assert whole.evaluation is not None
    assert whole.evaluation.text is not None
    assert whole.report is not None
    assert whole.blame is not None
    e, text = whole.evaluation, whole.evaluation.text
    setting = facts.setting(hardware=name, created=name, device=name, versions={name: name})
    evaluation = replace(
        e,
        model=facts.subject(name, dtype=name),
        base=facts.subject(name),
        setting=setting,
        text=replace(text, text=name),
        tasks=tuple(
            replace(
                t,
                name=name,
                title=name,
                group=name,
                metric=name,
                harness={name: 1.0},
                parts=tuple(replace(p, name=name) for p in t.parts),
            )
            for t in e.tasks
        ),
        comparisons=tuple(replace(c, name=name, sentence=name, test=name) for c in e.comparisons),
        samples=tuple(replace(s, prompt=name, model=name + "x", base=name) for s in e.samples),
        notes=(name,),
    )
    step = {"where": name, "method": name, name: name}
    report = replace(
        whole.report,
        source=name,
        format=name,
        recipe={"seed": name, "steps": [step]},
        calibration={"name": name, "sha256": name, "kind": name, "sequences": name, "tokens": name},
        rows=tuple(
            replace(r, role=name, method=name, note=name, name=f"{name}.{r.block}.{name}{i % 7}")
            for i, r in enumerate(whole.report.rows)
        ),
        notes=(name,),
    )
    blame = replace(
        whole.blame,
        text=name,
        notes=(name,),
        setting=setting,
        sites=tuple(replace(s, name=name, role=name) for s in whole.blame.sites),
        depth=tuple(replace(d, name=name) for d in whole.blame.depth),
    )
    speed = replace(whole.speeds[0], engine=name, format=name, notes=(name,), setting=setting)
    return replace(whole, report=report, evaluation=evaluation, blame=blame, speeds=(speed,), base_speeds=(speed,))


def experts(blocks: int = 6, count: int = 128) -> Report:
    made = [
        Row(f"model.layers.{b}.mlp.experts.{e}.{w}.weight", b, "expert", "rtn", 4096, 8192, 2304, 0.1 + e / 1000, 0)
        for b in range(blocks)
        for e in range(count)
        for w in ("gate_proj", "up_proj", "down_proj")
    ]
    size = sum(r.bytes_before for r in made)
    return replace(facts.report(blocks=1), rows=tuple(made), bytes_before=size, parameters=size // 2)


PAGES: dict[str, tuple[Dossier, ...]] = {
    "everything": (facts.whole(),),
    "only a report": (facts.fresh(),),
    "several": facts.several(),
    "one block": (facts.whole(report=facts.report(blocks=1), blame=facts.blame(1)),),
    "eighty blocks": (facts.whole(report=facts.report(blocks=80, bits=(4, 3), width=8192), blame=facts.blame(80)),),
    "unbounded": (unbounded(),),
    "evil": (named(EVIL), named(EVIL)),
    "huge names": (named("name " * 2000), named("n" * 10_000)),
    "no names": (named(""), named("")),
    "only an evaluation": (
        Dossier("plain", None, {}, None, facts.evaluation(base=False), None, (), (), "path with blanks"),
    ),
    "nothing": (Dossier("unknown", None, {}, None, None, None, (), (), ""),),
    "experts": (facts.fresh("mixture", experts()),),
}


class Tree(HTMLParser):
    """Tags that must close in order, and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, f"<{tag}/>"
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> stands inside <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: render(dossiers) for name, dossiers in PAGES.items()}


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_balanced_small_and_points_nowhere(pages: dict[str, str], name: str) -> None:
    tree = Tree(pages[name])
    assert tree.open == []
    assert len(pages[name].encode()) < 5_000_000
    for tag, attribute, value in tree.attributes:
        assert attribute not in ("src", "srcset", "action", "data", "style", "xlink:href"), (tag, attribute)
        assert not attribute.startswith("on"), (tag, attribute)
        if attribute == "href":
            assert value.startswith("#") or value == "data:,"
    ids = [value for _, attribute, value in tree.attributes if attribute == "id"]
    assert len(ids) == len(set(ids))
    used = [v.removeprefix("#") for _, a, v in tree.attributes if a == "href" and v.startswith("#")]
    used += [each for _, a, v in tree.attributes if a == "aria-labelledby" for each in v.split()]
    assert set(used) <= set(ids)


@pytest.mark.parametrize("name", PAGES)
def test_no_number_is_left_unwritten(pages: dict[str, str], name: str) -> None:
    words = " ".join(Tree(pages[name]).words)
    assert not re.search(r"\b(nan|inf|None|Estimate|Undefined)\b", words)
    assert not re.search(r'="[^"]*\b(nan|inf)\b[^"]*"', re.sub(r"<script>.*?</script>", "", pages[name], flags=re.S))


@pytest.mark.parametrize("name", PAGES)
def test_equal_facts_give_equal_bytes(pages: dict[str, str], name: str) -> None:
    moved = [replace(d, report=d.report and replace(d.report, out="elsewhere", seconds=99.0)) for d in PAGES[name]]
    assert render(moved) == pages[name]
    assert dossiers_json(moved) == dossiers_json(PAGES[name])


@pytest.mark.parametrize("name", PAGES)
def test_the_json_holds_all_facts(name: str) -> None:
    text = dossiers_json(PAGES[name])
    read = dossiers_from_json(text)
    expected = tuple(replace(d, report=d.report and replace(d.report, out="")) for d in PAGES[name])
    assert read == expected
    assert dossiers_json(read) == text


def test_other_json_is_refused() -> None:
    with pytest.raises(DataError, match="Dossiers"):
        dossiers_from_json('{"models": [{"name": 3}]}')


def test_a_page_needs_a_model() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        render([])


def test_the_usual_page_is_light(pages: dict[str, str]) -> None:
    assert len(pages["only a report"].encode()) < 150_000
    assert len(pages["everything"].encode()) < 300_000


def test_what_is_not_known_yet_is_said_with_the_command_that_measures_it(pages: dict[str, str]) -> None:
    words = " ".join(Tree(pages["only a report"]).words)
    for command in ("evaluate OUT --against base-1b --text FILE", "blame OUT --against", "speed OUT base-1b"):
        assert command in words
    assert "Size and KL" not in words
    assert "tersely evaluate 'path with blanks'" in " ".join(
        Tree(render([replace(PAGES["only an evaluation"][0], evaluation=None)])).words
    )


def test_the_page_says_what_the_facts_say(pages: dict[str, str]) -> None:
    words = " ".join(" ".join(Tree(pages["everything"]).words).split())
    dossier = PAGES["everything"][0]
    assert dossier.evaluation is not None
    for comparison in dossier.evaluation.comparisons:
        assert comparison.sentence in words
    for note in dossier.evaluation.notes:
        assert note in words
    for known in (
        "0.0620",
        "89.1",
        "5e" * 32,
        "ab" * 32,
        "cd" * 32,
        "Example CPU",
        "2 threads",
        "2025-03-14",
        "2.13.0",
    ):
        assert known in words
    assert dossier.report is not None
    for row in dossier.report.rows:
        assert row.name.removesuffix(".weight") in words


def test_models_measured_on_other_data_are_not_compared(pages: dict[str, str]) -> None:
    first, second = facts.whole("first"), facts.whole("second")
    assert second.evaluation is not None
    assert second.evaluation.text is not None
    other = replace(second.evaluation, text=replace(second.evaluation.text, sha256="00" * 32), tasks=())
    text = render([first, replace(second, evaluation=other)])
    assert "pareto-kl" not in text
    assert "not compared in KL and loss: second" in text
    assert "pareto-kl" in render([first, second])
    assert pages["several"].count('id="pareto-kl-wide-t"') == 1


def test_control_characters_are_taken_out() -> None:
    text = render([facts.fresh("a\x00b\x1b[31m\u202ec\ud800")])
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)
    text.encode()


def test_experts_of_a_block_share_a_line(pages: dict[str, str]) -> None:
    assert "model.layers.3.mlp.experts.*.up_proj (128)" in pages["experts"]
    assert len(pages["experts"]) < 300_000


def test_the_pareto_front_holds_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 2.0), (2.0, 3.0), (3.0, 2.5), (4.0, 1.0), (5.0, 1.0)]
    kept = front(points)
    assert kept == [0, 1, 4]
    for i, (x, y) in enumerate(points):
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        assert (i in kept) != beaten


@pytest.mark.parametrize("low", [-3.7e-9, -41.0, 0.0, 0.31, 1e12])
@pytest.mark.parametrize("breadth_of", [1e-7, 0.4, 3.3, 7e5])
def test_ticks_are_few_round_and_inside(low: float, breadth_of: float) -> None:
    high = low + breadth_of
    made = ticks(low, high, 5)
    if low + breadth_of > low * (1 + 1e-9):
        assert 2 <= len(made) <= 8
    assert all(low - 1e-6 * breadth_of <= t <= high + 1e-6 * breadth_of for t in made)
    assert all(1 < t < 3e4 for t in log_ticks(2.0, 2e4))


def test_numbers_keep_their_digits() -> None:
    shown = [number(v) for v in (0.17789, 0.00031, 1234.5, 12.345, 0.0, -4.16, math.inf, 2.5e12)]
    minus = "\N{MINUS SIGN}"
    assert shown == ["0.178", "0.000310", "1,234", "12.3", "0", f"{minus}4.16", "∞", "2.50e+12"]


def test_a_shortened_text_fits_and_keeps_its_ends() -> None:
    name = "model.layers.31.block_sparse_moe.experts.7.down_proj"
    short = shorten(name, 150)
    assert breadth(short) <= 150 < breadth(name)
    start, _, end = short.partition("…")
    assert name.startswith(start)
    assert name.endswith(end)


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pages: dict[str, str]) -> Path:
    made = tmp_path_factory.mktemp("pages")
    for name, text in pages.items():
        (made / f"{name}.html").write_text(text, "utf-8")
    return made


@pytest.mark.parametrize(
    ("name", "width"), [*((name, 390) for name in PAGES), ("everything", 1280), ("several", 1280), ("evil", 1280)]
)
def test_a_page_fits_its_window_and_asks_for_nothing(browser: Browser, folder: Path, name: str, width: int) -> None:
    path = folder / f"{name}.html"
    browser.open(path, width=width)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.messages() == []
    asked = [url for url in browser.requests() if url != "data:,"]
    assert asked == [path.as_uri()]
    assert browser.run("return [document.images.length, document.scripts.length, document.owned ?? 0]") == [0, 1, 0]


PICTURES = """
const shown = [...document.querySelectorAll('svg')].filter(s => getComputedStyle(s).display !== 'none');
const missing = [...document.querySelectorAll('figure')].filter(f => !shown.some(s => f.contains(s)));
const wrong = { missing: missing.length, small: [], cut: [], overlapping: [] };
for (const svg of shown) {
  const box = svg.getBoundingClientRect();
  if (box.width < 200 || box.height < 20 || 12 * box.width / svg.viewBox.baseVal.width < 11) wrong.small.push(box);
  const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent);
  const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
  for (const [text, b] of boxes)
    if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1)
      wrong.cut.push(text);
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    if (across > 2 && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4) wrong.overlapping.push([a, b]);
  }));
}
return [shown.length, wrong];
"""


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("everything", 390),
        ("everything", 1280),
        ("several", 390),
        ("several", 1280),
        ("unbounded", 390),
        ("huge names", 390),
        ("eighty blocks", 1280),
    ],
)
def test_pictures_are_seen_and_their_words_are_whole(browser: Browser, folder: Path, name: str, width: int) -> None:
    browser.open(folder / f"{name}.html", width=width)
    count, wrong = browser.run(PICTURES)
    assert count >= 10
    assert wrong == {"missing": 0, "small": [], "cut": [], "overlapping": []}


CONTRAST = """
const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
const over = (top, a, below) => [0, 1, 2].map(i => top[i] * a + below[i] * (1 - a));
const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255; return v <= .03928 ? v / 12.92
  : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
const paper = parse(getComputedStyle(document.body).backgroundColor);
const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
  if (c[3] > 0) return over(c, c[3], paper); } return paper; };
const poor = [];
for (const e of document.querySelectorAll('body *:not(script):not(title):not(desc)')) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.getClientRects().length) continue;
  const style = getComputedStyle(e), svg = e.namespaceURI.includes('svg');
  const ink = parse(svg ? style.fill : style.color);
  let ground = behind(e);
  const cell = svg && e.parentElement.querySelector(':scope > rect.heat');
  if (cell) ground = over(parse(getComputedStyle(cell).fill), Number(getComputedStyle(cell).fillOpacity), ground);
  const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) poor.push([e.tagName, e.className.baseVal ?? e.className, e.textContent.slice(0, 40),
    (a + .05) / (b + .05)]);
}
return [light(paper), poor];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_in_light_and_dark(browser: Browser, folder: Path, scheme: str) -> None:
    browser.open(folder / "everything.html", scheme=scheme)
    ground, poor = browser.run(CONTRAST)
    assert (ground > 0.5) == (scheme == "light")
    assert poor == []
    browser.run("document.getElementById('theme').click()")
    turned, poor = browser.run(CONTRAST)
    assert (turned > 0.5) != (ground > 0.5)
    assert poor == []


def test_a_print_is_white_and_shows_what_was_folded(browser: Browser, folder: Path) -> None:
    folded = (
        "return [...document.querySelectorAll('details:not([open])')].map(d => "
        "[...d.children].slice(1).every(c => { const box = c.getBoundingClientRect(); return box.height > 10 && "
        "c.checkVisibility({contentVisibilityAuto: true}) && box.bottom <= d.getBoundingClientRect().bottom + 1; }))"
    )
    browser.open(folder / "everything.html", scheme="dark")
    on_screen = browser.run(folded)
    assert len(on_screen) > 5
    assert not any(on_screen)
    browser.open(folder / "everything.html", width=690, scheme="dark", media="print")
    assert all(browser.run(folded))
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    ground, poor = browser.run(CONTRAST)
    assert ground == pytest.approx(1)
    assert poor == []


def test_a_table_sorts_by_a_click(browser: Browser, folder: Path) -> None:
    column: Any = (
        "const t = document.querySelector('#sites table.sortable'), heads = [...t.tHead.rows[0].cells];"
        "const i = heads.findIndex(h => h.textContent.startsWith('error'));"
        "heads[i].querySelector('button').click();"
        "return [...t.tBodies[0].rows].map(r => Number(r.cells[i].textContent))"
    )
    browser.open(folder / "everything.html")
    first, second = browser.run(column), browser.run(column)
    assert first == sorted(first, reverse=True)
    assert second == sorted(second)
    assert len(first) == 112
