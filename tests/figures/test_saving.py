import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.io
import pytest

import melens.figures
from melens import MelensError
from melens.figures.attention import attention_change
from melens.figures.curves import Curve, Panel, curves_by_block
from melens.figures.fitting import in_columns
from melens.figures.heatmaps import Heatmap, heatmaps, shares
from melens.figures.saving import check_images, for_screens, in_notebook, page
from melens.figures.scores import score_table
from melens.figures.style import FIRST, finish
from melens.report.record import write_tables_and_figures
from melens.report.result import Figure


def panels(*titles):
    points = pd.DataFrame({"layer": range(30), "mean": np.arange(1.0, 31.0)})
    return [Panel(title, "L2 norm", [Curve("token 0", points, FIRST)], 11, log_scale=True) for title in titles]


@pytest.fixture
def figure():
    return curves_by_block(panels(*"abcd"), title="Norms: tiny, 3 prompts", note="Lines: means.", scale_buttons=True)


@pytest.fixture
def drawn(monkeypatch):
    """What was given to kaleido, which is not installed here."""
    given = []

    def write_images(figures, paths, *, width, height, scale):
        for one in zip(figures, paths, width, height, scale, strict=True):
            given.append(one)
            one[1].write_bytes(b"image")

    monkeypatch.setattr(plotly.io, "write_images", write_images)
    monkeypatch.setattr(melens.figures.saving, "check_images", lambda purpose: None)
    return given


def sizes_of_text(figure):
    figure = figure.to_dict()["layout"]
    texts = [figure, *figure["annotations"], *(figure[axis]["title"] for axis in figure if axis.startswith("xaxis"))]
    return {round(text["font"]["size"] * 72 / 96, 3) for text in texts}  # points


@pytest.mark.parametrize(("columns", "inches", "side_by_side"), [(1, 3.25, 1), (2, 6.75, 2)])
def test_a_figure_fills_the_columns_of_a_paper_in_8_points(figure, columns, inches, side_by_side):
    fitted = in_columns(figure, columns)
    assert (fitted.layout.width / 96, sizes_of_text(fitted)) == (inches, {8})
    assert (fitted.layout.title.text, len(fitted.layout.updatemenus)) == (None, 0)
    tops = [round(axis.domain[1], 6) for axis in fitted.select_yaxes()]
    assert len(set(tops)) == 4 / side_by_side
    assert tops == sorted(tops, reverse=True)
    assert all(axis.domain[0] >= 0 for axis in fitted.select_yaxes())
    titles = {note.text: (note.x, note.y) for note in fitted.layout.annotations}
    axes = zip("abcd", fitted.select_xaxes(), fitted.select_yaxes(), strict=True)
    assert titles == {name: (sum(x.domain) / 2, y.domain[1]) for name, x, y in axes}  # they went with the panels
    n_titled = sum(axis.title.text == "block (0-based)" for axis in fitted.select_xaxes())
    assert n_titled == side_by_side  # the lowest of each column
    np.testing.assert_array_equal(fitted.data[0].y, figure.data[0].y)
    assert figure.layout.title.text.startswith("Norms")  # the figure itself is as it was


def test_long_titles_of_narrow_panels_are_broken_into_lines():
    fitted = in_columns(curves_by_block(panels("Output of RMSNorm post_attention_layernorm (ln2)"), title="A"), 1)
    assert fitted.layout.annotations[0].text == "Output of RMSNorm<br>post_attention_layernorm (ln2)"


def test_a_column_of_panels_leaves_room_for_a_caption(figure):
    fitted = in_columns(figure, 1)
    assert fitted.layout.height <= 8 * 96
    heights = [axis.domain[1] - axis.domain[0] for axis in fitted.select_yaxes()]
    assert np.ptp(heights) < 1e-9
    assert min(heights) * fitted.layout.height > 8 * 8  # of each panel, in lines of text


def test_a_figure_for_a_paper_says_what_bands_are_and_a_page_says_it_in_its_note(figure):
    bands = "Bands: 10% to 90% of prompts (token 0) or tokens, and more of them"
    figure.layout.title.text = (
        f"Norms: <i>tiny</i><br><sub>Lines: means. {bands.replace('prompts ', 'prompts<br>')}.</sub>"
    )
    without = curves_by_block(panels(*"abcd"), title="Norms: tiny", scale_buttons=True)
    for columns, n_lines in ((1, 2), (2, 1)):
        fitted, plain = in_columns(figure, columns), in_columns(without, columns)
        assert fitted.layout.title.text.replace("<br>", " ") == bands
        assert fitted.layout.title.text.count("<br>") == n_lines - 1
        assert fitted.layout.meta["title"].split() == ["Norms:", "tiny"]
        room = fitted.layout.legend.y * fitted.layout.height  # below the legend
        assert room == pytest.approx(n_lines * 1.4 * 8 * 96 / 72)
        assert fitted.layout.height == pytest.approx(min(plain.layout.height + room, 8 * 96), abs=1)
    assert "Bands:" not in for_screens(figure)


def test_a_name_that_is_longer_than_the_legend_is_broken_into_lines():
    (panel,) = panels("a")
    panel = replace(panel, curves=[replace(panel.curves[0], name="rate=0.1 random attn_in start=12 layers=all seed=0")])
    fitted = in_columns(curves_by_block([panel], title="A"), 1)
    assert "<br>" in fitted.data[0].name


def test_rows_of_a_table_are_as_high_as_their_names():
    names = [f"a beginning that is rather long, number {n} (n = 8)" for n in range(6)]
    figure = shares(pd.DataFrame({"same": 1.0}, index=names), names=["same"], title="A")
    fitted = in_columns(figure, 1)
    assert fitted.layout.yaxis.ticktext[0] == "a beginning that is<br>rather long, number 0<br>(n = 8)"
    assert fitted.layout.height > 6 * 3 * 8 * 96 / 72


def test_panels_below_one_another_all_have_their_labels():
    """Side by side the first one's are those of all three."""
    maps = np.ones((1, 2, 2))
    figure = attention_change(maps, maps / 2, ["a", "b"], title="A", note="")
    assert [axis.showticklabels for axis in figure.select_yaxes()] == [None, False, False]
    assert all(axis.showticklabels for axis in in_columns(figure, 1).select_yaxes())


def test_attention_maps_have_their_list_of_heads_on_a_phone_and_where_it_can_be_used_alone(monkeypatch):
    maps = np.ones((2, 2, 2))
    figure = attention_change(maps, maps / 2, ["a", "b"], title="A", note="")
    on_phone = json.loads(for_screens(figure))["narrow"]["layout"]
    assert [button["label"] for button in on_phone["updatemenus"][0]["buttons"]] == [
        "mean over heads",
        "head 0",
        "head 1",
    ]
    assert on_phone["dragmode"] is False  # a finger scrolls the page
    assert not in_columns(figure, 1).layout.updatemenus
    for renderer, n_lists in (("png", 0), ("plotly_mimetype", 1)):
        monkeypatch.setattr("plotly.io.renderers.default", renderer)
        assert len(in_notebook(figure).layout.updatemenus) == n_lists


def test_the_colours_of_the_difference_stand_beside_it_in_maps_below_one_another():
    maps = np.ones((1, 2, 2))
    figure = in_columns(attention_change(maps, maps / 2, ["a", "b"], title="A", note=""), 1)
    upper, lower = (axis.colorbar for axis in (figure.layout.coloraxis, figure.layout.coloraxis2))
    assert (upper.y, upper.yanchor, lower.y, lower.yanchor) == (1, "top", 0, "bottom")
    first, _, difference = (axis.domain for axis in figure.select_yaxes())
    room = figure.layout.height - figure.layout.margin.t
    assert upper.len == lower.len < room * min(first[1] - first[0], difference[1] - difference[0])


def test_what_has_no_axes_fits_too():
    table = score_table(["PIQA"], ["base"], [["0.5"]], [[True]], title="Scores")
    assert in_columns(table, 1).layout.height > 60


@pytest.mark.parametrize(("suffix", "scale"), [("pdf", 1), ("svg", 1), ("png", 4)])
def test_a_figure_of_a_result_is_saved_by_its_suffix(figure, drawn, tmp_path, suffix, scale):
    path = tmp_path / f"norms.{suffix}"
    assert Figure(figure, "figure 1", "", "").save(path, columns=2) == path
    assert path.read_bytes() == b"image"
    ((fitted, _, width, height, given_scale),) = drawn
    assert (width, height, given_scale) == (648, fitted.layout.height, scale)
    assert plotly.io.defaults.plotlyjs is None  # as it was before


def test_a_run_writes_each_figure_for_one_column_and_for_two(figure, drawn, tmp_path):
    paths = write_tables_and_figures({}, {"norms": figure}, tmp_path, images="pdf")
    assert [path.name for path in paths] == ["norms.html", "norms-1col.pdf", "norms-2col.pdf"]
    assert [width for *_, width, _, _ in drawn] == [312, 648]
    assert not [path for path in write_tables_and_figures({}, {"norms": figure}, tmp_path) if path.suffix != ".html"]


def test_a_figure_that_kaleido_cannot_draw_leaves_no_file(figure, drawn, monkeypatch, tmp_path):
    def write_images(*args, **kwargs):
        raise RuntimeError("Error 525: no such font.")

    monkeypatch.setattr(plotly.io, "write_images", write_images)
    with pytest.raises(MelensError, match=re.escape("norms.pdf could not be drawn: Error 525: no such font.")):
        melens.figures.save(figure, tmp_path / "norms.pdf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "columns", "said"),
    [
        ("a.eps", 1, "a.eps must end in .pdf, .svg, .png or .html: the suffix says what to write."),
        ("a.pdf", 3, "columns is 3; it must be 1 or 2."),
    ],
)
def test_what_cannot_be_saved_is_refused_in_a_sentence(figure, tmp_path, path, columns, said):
    with pytest.raises(MelensError, match=re.escape(said)):
        melens.figures.save(figure, tmp_path / path, columns=columns)
    assert not list(tmp_path.iterdir())


def test_a_missing_browser_is_told_with_what_installs_it(monkeypatch):
    def to_image(*args, **kwargs):
        raise RuntimeError("\n\nKaleido requires Google Chrome to be installed.\n\nEither download")

    monkeypatch.setattr("melens.environment.extras.find_spec", lambda name: True)
    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", to_image)
    said = (
        "figures=png needs a Chrome or Chromium that starts (Kaleido requires Google Chrome to be installed): install "
    )
    with pytest.raises(MelensError, match=re.escape(said)):
        check_images("figures=png")


def test_the_page_of_a_figure_has_its_title_once_and_a_layout_for_narrow_screens(figure):
    html = page(figure, plotlyjs="plotly.min.js")
    assert html.count("Norms: tiny, 3 prompts") == 2  # in the title of the window and in the heading
    assert "<p>Lines: means.</p>" in html
    drawn = json.loads(re.search("const figure = (.*);\n", html)[1])
    assert "title" not in drawn["wide"]["layout"]
    columns = {side: {tuple(drawn[side]["layout"][f"xaxis{n}"]["domain"]) for n in ("", 2, 3, 4)} for side in drawn}
    assert (len(columns["wide"]), len(columns["narrow"])) == (2, 1)
    assert "https://" not in html.split("const figure")[0]


def test_a_text_in_a_figure_ends_no_script_of_its_page():
    cells = Heatmap("</script>", np.eye(2), [0, 1], [0, 1], "x", "y")
    html = page(heatmaps([cells], title="<b>", z_title="z"), plotlyjs="plotly.min.js")
    assert html.count("</script>") == 2
    assert "<title>&lt;b&gt;</title>" in html


def test_a_long_title_is_broken_into_lines_for_which_there_is_room():
    short, long = (finish(curves_by_block(panels("a"), title=""), title, height=300) for title in ("T", "word " * 40))
    assert "<br>" in long.layout.title.text
    lines = long.layout.title.text.count("<br>")
    assert long.layout.margin.t - short.layout.margin.t == long.layout.height - short.layout.height == 23 * lines
