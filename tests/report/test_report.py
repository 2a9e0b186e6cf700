"""The report, as a file and in a real browser."""

import json
import re
import shutil

import pandas as pd
import pytest
from markupsafe import escape
from planted import bridge, gains_apart, plain_model, plant
from test_experiments import BLOCK, DIM, TOKEN, prompts_of, study
from test_index import write_run

import melens
from experiments.runner.study import run_experiments
from melens.report import record as recording
from melens.report.index import write_index
from melens.report.page import write_report
from melens.report.record import Record
from melens.report.result import plain
from melens.storage.cache import RunCache
from melens.storage.results import load_result, save_result

CONFIG = {"exp": {"name": "all"}, "model": {"name": "tiny"}, "seed": 0}


@pytest.fixture(scope="module")
def parts():
    network = gains_apart(plain_model("llama"))
    plant(network, block=BLOCK, token=TOKEN, dim=DIM)
    return list(run_experiments(study(bridge(network), prompts_of())))


@pytest.fixture(scope="module")
def figures(parts):
    return {name: figure for part in parts for name, figure in part.figures.items()}


@pytest.fixture(scope="module")
def record(parts, tmp_path_factory):
    return recorded(parts, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(record):
    return report_of(record, command="python experiments/run.py exp=all note='<b>'")


def recorded(parts, folder):
    record = Record(folder, config=CONFIG, experiments=[part.experiment for part in parts])
    for part in parts:
        record.add(part)
    record.finish()
    return record


def report_of(record, command=""):
    return write_report(record.parts, record.content, record.folder, command=command)


def test_the_report_is_one_file_that_needs_no_network(report):
    page = report.read_text("utf-8")
    without_plotly = re.sub(r"<script>/\*.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#|data:)', without_plotly)
    assert report.stat().st_size < 6 * 2**20


def test_the_report_tells_what_was_found_and_how(report, record, figures):
    page = report.read_text("utf-8")
    assert f"Block {BLOCK} lifts the token at position 0" in page
    assert "note=&#39;&lt;b&gt;&#39;" in page  # the command, as text
    assert len(record.claims) > 10
    for claim in record.claims.itertuples():
        row = "li" if claim.verdict == "not measured" else "tr"
        assert f'<{row} id="claim-{claim.id}">' in page
        assert f'href="#{claim.figure}"' in page
    for name, figure in figures.items():
        assert f'<section id="{name}"' in page
        assert str(escape(figure.expected)) in page
    order = [
        page.index(part) for part in ('class="summary"', '<section id="emergence"', 'id="claims"', "<details class")
    ]
    assert order == sorted(order)
    assert abs(float(re.search(r"about ([\d.]+) MB", page)[1]) - report.stat().st_size / 1e6) < 0.3


def test_a_text_in_a_figure_ends_no_script(parts, record, tmp_path):
    figure = next(figure for part in parts for figure in part.figures.values())
    name = figure.plot.layout.xaxis.title.text
    try:
        figure.plot.layout.xaxis.title.text = "</script><!--<script>"
        page = write_report(record.parts, record.content, tmp_path, command="").read_text("utf-8")
    finally:
        figure.plot.layout.xaxis.title.text = name
    assert "</script><!--" not in page
    texts = re.findall(r'<script type="application/json">(.*?)</script>', page)
    assert any("</script><!--<script>" in json.dumps(json.loads(text)) for text in texts)


def test_what_does_not_apply_is_in_the_report(tmp_path):
    model = melens.load_model("random", model_type="mamba", config={"hidden_size": 32, "num_hidden_layers": 3})
    parts = list(run_experiments(study(model, prompts_of())))
    page = report_of(recorded(parts, tmp_path)).read_text("utf-8")
    assert "<b>ffn</b> does not apply: No FFN can be measured: there is no block with an FFN." in page


def test_a_result_that_was_cached_is_what_it_was(parts, tmp_path):
    for part in parts:
        save_result(part, tmp_path / part.experiment)
        found = load_result(tmp_path / part.experiment)
        assert type(found.metrics) is type(part.metrics)
        assert plain(found.metrics.plain()) == plain(part.metrics.plain())
        assert found.claims.equals(part.claims)
        assert list(map(tuple, part.findings)) == found.findings
        for name, figure in part.figures.items():
            again = found.figures[name]
            assert json.loads(again.plot.to_json()) == json.loads(figure.plot.to_json())
            assert (again.source, again.expected, again.observed) == (figure.source, figure.expected, figure.observed)
        for name, table in part.tables.items():
            pd.testing.assert_frame_equal(found.tables[name], table, check_dtype=False)
        assert list(found.tables) == list(part.tables)
        assert (found.experiment, found.documents, found.model) == (part.experiment, {}, plain(part.model))


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_report_of_a_part_says_what_is_missing(parts, tmp_path, monkeypatch, goes_on):
    monkeypatch.setattr(recording, "RUN_CACHE", RunCache(has_trace=goes_on))
    record = Record(tmp_path, config=CONFIG, experiments=["ffn", "sinks", "ablation"])
    record.add(next(part for part in parts if part.experiment == "ffn"))
    for words in ("This run has not finished.", "This run was stopped."):
        page = report_of(record).read_text("utf-8")
        assert f"<b>{words}</b>\nMissing: sinks, ablation." in page
        assert ("ablation. Run the same command again to go on with them.</p>" in page) == goes_on
        record.stop()
    record.experiments = ["ffn"]
    record.finish()
    assert 'class="missing"' not in report_of(record).read_text("utf-8")


def test_the_claims_are_in_the_result_too(report):
    content = json.loads((report.parent / "result.json").read_text())
    claims = {claim["id"]: claim for claim in content["claims"]}
    assert claims["exists"]["verdict"] == "holds in part"  # a few prompts have an interval that reaches far down
    assert {"statistic", "criterion", "why", "value", "low", "high", "figure"} <= set(claims["magnification"])
    assert content["metrics"]["predict"]["predicted_dim"] == DIM
    assert content["figures"]["ffn"]["source"] == "figure 4"


# --- In Chromium ------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        graphics = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *graphics])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[LAPTOP, PHONE], ids=["laptop", "phone"])
def page(chromium, report, request):
    page = chromium.new_page(viewport=request.param)
    page.mistakes = []
    page.on("console", lambda message: page.mistakes.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.mistakes.append(str(error)))
    page.on("request", lambda request: page.mistakes.append(request.url) if request.url.startswith("http") else None)
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-drawn=all]", timeout=120_000)
    yield page
    page.close()


@pytest.mark.browser
@in_browser
def test_the_keyboard_reaches_the_claims_first_and_the_page_does_not_scroll_sideways(page):
    page.keyboard.press("Tab")  # the first test of the page, as a click moves where Tab begins
    assert page.evaluate("document.activeElement.textContent") == "To the claims"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.browser
@in_browser
def test_every_figure_is_drawn_without_an_error(page, figures):
    drawn = page.evaluate(
        "[...document.querySelectorAll('.figure')]"
        ".map(figure => figure.querySelectorAll('.main-svg').length > 0 && figure._fullData.length)"
    )
    assert len(drawn) == len(figures)
    assert all(drawn)
    assert page.mistakes == []


@pytest.mark.browser
@in_browser
def test_a_head_can_be_chosen_in_the_attention_maps(page):
    page.locator("summary", has_text="sinks: ").click()

    def shown():
        return page.evaluate("document.querySelector('#attention_maps .figure')._fullData.map(t => t.visible === true)")

    mean = shown()
    page.locator("#attention_maps .updatemenu-header").click()
    page.locator("#attention_maps .updatemenu-dropdown-button").nth(1).click()
    page.wait_for_timeout(300)
    head = shown()
    assert sum(head) == sum(mean)
    assert not any(was and now for was, now in zip(mean, head, strict=True))


@pytest.mark.browser
@in_browser
def test_links_lead_to_sections_that_are_there(page):
    broken = page.evaluate(
        "[...document.querySelectorAll('a')].map(a => a.getAttribute('href')).filter(to => !document.querySelector(to))"
    )
    assert broken == []
    assert not page.locator("#ffn").is_visible()  # folded until somebody wants it
    page.locator("#claim-amplification a").click()
    page.wait_for_timeout(300)
    assert page.evaluate("Math.abs(document.querySelector('#ffn').getBoundingClientRect().top) < 60")
    widths = (
        "[document.querySelector('#ffn .figure').clientWidth, document.querySelector('#ffn .main-svg').clientWidth]"
    )
    shown, drawn = page.evaluate(widths)
    assert abs(shown - drawn) < 2  # as wide as the page, though it was drawn while it was folded


@pytest.mark.browser
@in_browser
def test_the_index_of_all_runs_is_sorted_by_a_click(chromium, tmp_path):
    for name, layer in (("a", 2), ("b", 10), ("c", 1)):
        write_run(tmp_path / name, name, metrics={"me_layer": layer, "n_layers": 12, "magnification": 3.0})
    page = chromium.new_page()
    page.goto(write_index(tmp_path).page.as_uri())
    column = page.locator(".sortable").first.locator("button", has_text="ME layer")
    orders = []
    for _ in range(2):
        column.click()
        orders.append(page.locator(".sortable").first.locator("tbody th").all_text_contents())
    page.close()
    assert orders == [["c", "a", "b"], ["b", "a", "c"]]
