"""The report, as a file and in a real browser."""

import json
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from planted import bridge, gains_apart, plain_model, plant
from test_experiments import BLOCK, DIM, TOKEN, prompts_of, study

import melens
from experiments.runner.study import run_experiments
from melens.report import record as results
from melens.report.page import write_report
from melens.report.record import Record, claims_of, write_result
from melens.report.result import combine, plain
from melens.storage.cache import RunCache
from melens.storage.results import load_result, save_result

CONFIG = {"exp": {"name": "all"}, "model": {"name": "tiny"}, "seed": 0}


@pytest.fixture(scope="module")
def planted_result():
    network = gains_apart(plain_model("llama"))
    plant(network, block=BLOCK, token=TOKEN, dim=DIM)
    return combine(run_experiments(study(bridge(network), prompts_of())))


@pytest.fixture(scope="module")
def report(planted_result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_result(planted_result, folder, config=CONFIG, duration=1.0)
    return write_report(planted_result, folder, command="python experiments/run.py exp=all note='<b>'")


def test_the_report_is_one_file_that_needs_no_network(report):
    page = report.read_text("utf-8")
    without_plotly = re.sub(r"<script>/\*.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#|data:)', without_plotly)
    assert report.stat().st_size < 12 * 2**20


def test_the_report_tells_what_was_found_and_how(report, planted_result):
    page = report.read_text("utf-8")
    assert f"Block {BLOCK} lifts the token at position 0" in page
    assert "note=&#x27;&lt;b&gt;&#x27;" in page  # the command, as text
    for claim in claims_of(planted_result).itertuples():
        assert f'<tr id="claim-{claim.id}">' in page
        assert f'href="#{claim.figure}"' in page
    for name, picture in planted_result.figures.items():
        assert f'<section id="{name}"' in page
        assert picture.expected.replace("'", "&#x27;") in page


def test_what_does_not_apply_is_in_the_report(tmp_path):
    model = melens.load_model("random", model_type="mamba", config={"hidden_size": 32, "num_hidden_layers": 3})
    result = combine(run_experiments(study(model, prompts_of())))
    write_result(result, tmp_path, config=CONFIG, duration=1.0)
    page = write_report(result, tmp_path, command="").read_text("utf-8")
    assert "<b>ffn</b> does not apply: No FFN can be listened to: there is no block with an FFN." in page


def test_a_result_that_was_kept_is_what_it_was(planted_result, tmp_path):
    save_result(planted_result, tmp_path / "kept")
    found = load_result(tmp_path / "kept")
    assert plain(found.metrics) == plain(planted_result.metrics)
    assert claims_of(found).equals(claims_of(planted_result))
    assert list(map(tuple, planted_result.findings)) == found.findings
    for name, picture in planted_result.figures.items():
        assert json.loads(found.figures[name].plot.to_json()) == json.loads(picture.plot.to_json())
        told = found.figures[name]
        assert (told.source, told.expected, told.observed) == (picture.source, picture.expected, picture.observed)
    for name, table in planted_result.tables.items():
        pd.testing.assert_frame_equal(found.tables[name], table, check_dtype=False)
    assert list(found.tables) == list(planted_result.tables)
    assert (found.experiment, found.documents, found.model) == ("all", {}, plain(planted_result.model))


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_report_of_a_part_says_what_is_not_there(planted_result, tmp_path, monkeypatch, goes_on):
    monkeypatch.setattr(results, "RUN_CACHE", RunCache(has_trace=goes_on))
    found = replace(planted_result, experiment="all", metrics={"ffn": planted_result.metrics["ffn"]})
    record = Record(tmp_path, config=CONFIG, experiments=["all", "sinks", "ablation"])
    record.parts.append(found)
    for status, words in (("running", "This run goes on."), ("stopped", "This run was stopped.")):
        record._note(status)
        page = write_report(found, tmp_path, command="").read_text("utf-8")
        assert f"<b>{words}</b> Not here are: sinks, ablation." in page
        assert ("ablation. The same command goes on with them.</p>" in page) == goes_on
    record.experiments = ["all"]
    record.finish()
    assert "goes on" not in write_report(found, tmp_path, command="").read_text("utf-8")


def test_the_claims_are_in_the_result_too(report):
    content = json.loads((report.parent / "result.json").read_text())
    claims = {claim["id"]: claim for claim in content["claims"]}
    assert claims["exists"]["verdict"] == "holds"
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


@pytest.fixture(params=[LAPTOP, PHONE], ids=["laptop", "phone"])
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
def test_every_figure_is_drawn_without_an_error(page, planted_result):
    drawn = page.evaluate(
        "[...document.querySelectorAll('.figure')]"
        ".map(figure => figure.querySelectorAll('.main-svg').length > 0 && figure._fullData.length)"
    )
    assert len(drawn) == len(planted_result.figures)
    assert all(drawn)
    assert page.mistakes == []


@pytest.mark.browser
@in_browser
def test_the_slider_moves_through_the_blocks(page):
    def shown():
        return page.evaluate(
            "document.querySelector('#cosine_by_block .figure')._fullData.map(t => t.visible === true)"
        )

    assert shown().index(True) == BLOCK
    handle = page.locator("#cosine_by_block .slider-grip-rect")
    handle.scroll_into_view_if_needed()
    box = page.locator("#cosine_by_block .slider-rail-touch-rect").bounding_box()
    page.mouse.move(*(handle.bounding_box()[axis] + 3 for axis in "xy"))
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    page.wait_for_timeout(300)
    assert shown().index(True) > BLOCK
    assert sum(shown()) == 1


@pytest.mark.browser
@in_browser
def test_links_lead_to_sections_that_are_there(page):
    broken = page.evaluate(
        "[...document.querySelectorAll('a')].map(a => a.getAttribute('href')).filter(to => !document.querySelector(to))"
    )
    assert broken == []
    page.locator("#claim-amplification a").click()
    page.wait_for_timeout(300)
    assert page.evaluate("Math.abs(document.querySelector('#ffn').getBoundingClientRect().top) < 60")


@pytest.mark.browser
@in_browser
def test_the_keyboard_reaches_the_claims_first_and_the_page_does_not_scroll_sideways(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the claims"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
