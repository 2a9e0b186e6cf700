import json

import numpy as np
import pandas as pd
import pytest

from melens import judge
from melens.analysis.emergence_norms import norm_by_block
from melens.figures.attention import attention_maps
from melens.figures.curves import Curve, Panel, curves_by_block, ffn_figure
from melens.figures.heatmaps import Heatmap, dims_heatmap, dims_surface, heatmap_with_slider, heatmaps
from melens.figures.scores import verdicts
from melens.figures.style import FIRST, SINK


def points(*means):
    return pd.DataFrame({"layer": range(len(means)), "mean": means, "low": np.array(means) - 1, "high": means})


def texts(figure):
    return [annotation.text for annotation in figure.layout.annotations]


def test_the_first_token_is_set_against_the_mean_of_the_others():
    norms = pd.DataFrame(
        [
            {
                "prompt": prompt,
                "layer": layer,
                "site": "hook_resid_post",
                "pos": pos,
                "norm": 100.0 * prompt + 10 * layer + pos,
            }
            for prompt in (0, 1)
            for layer in (0, 1)
            for pos in (0, 1, 2)
        ]
    )
    summary = norm_by_block(norms).set_index(["site", "layer", "token"])
    first, others = (summary.loc[("hook_resid_post", 1, token)] for token in ("first", "others"))
    assert (first["mean"], others["mean"]) == (60, 61.5)
    assert (first["low"], first["high"]) == (pytest.approx(20), pytest.approx(100))


def test_panels_of_curves_name_their_axes_and_mark_the_me_layer():
    panels = [
        Panel("Norms", "L2 norm", [Curve("token 0", points(1, 2000), FIRST)], 1, log_scale=True),
        Panel("Sinks", "share", [Curve("sinks", points(0.1, 0.5), SINK)], 1, y_range=(0, 1)),
        Panel("More norms", "L2 norm", [Curve("token 0", points(3, 4), FIRST)], None),
    ]
    figure = curves_by_block(panels, title="A model", note="Means.", scale_buttons=True)
    assert texts(figure) == ["Norms", "Sinks", "More norms", "ME layer 1", "ME layer 1"]
    assert figure.layout.title.text == "A model<br><sub>Means.</sub>"
    assert [figure.layout[axis].title.text for axis in ("yaxis", "yaxis2", "yaxis3")] == ["L2 norm", "share", "L2 norm"]
    assert all(figure.layout[axis].title.text == "block (0-based)" for axis in ("xaxis", "xaxis2", "xaxis3"))
    assert [trace.name for trace in figure.data if trace.showlegend] == ["token 0", "sinks"]
    assert (figure.layout.yaxis.type, figure.layout.yaxis3.type) == ("log", "linear")
    changes = figure.layout.updatemenus[0].buttons[1].args[0]
    assert set(changes) >= {"yaxis.type", "yaxis3.type"}  # a share stays as it is
    assert "yaxis2.type" not in changes


def test_a_curve_without_intervals_has_no_band():
    panel = Panel("", "y", [Curve("a", points(1, 2).drop(columns=["low", "high"]), FIRST)], None)
    assert len(curves_by_block([panel], title="A model").data) == 1


def test_the_largest_dim_comes_first_in_the_heatmap():
    activations = pd.DataFrame(
        {"layer": [0, 1, 0, 1], "dim": [9, 9, 4, 4], "abs_activation": [1.0, 10.0, 1.0, 10_000.0]}
    )
    heatmap = dims_heatmap(activations, me_layer=1, title="A model").data[0]
    assert list(heatmap.y) == ["4", "9"]
    assert heatmap.z.tolist() == [[0, 4], [0, 1]]
    surface, me_line = dims_surface(activations, me_layer=1, title="A model").data
    assert surface.z.max() == 10_000
    assert (set(me_line.x), me_line.name) == ({1}, "ME layer 1")
    assert len(dims_surface(activations, me_layer=None, title="A model").data) == 1


def test_ratios_are_coloured_by_their_logarithm_and_shown_as_they_are():
    cells = Heatmap("Left", np.array([[1.0, 0.01], [np.nan, 100.0]]), [0, 1], [0, 1], "effect", "cause")
    trace = heatmaps([cells], title="A model", z_title="left", me_layer=1, text=True).data[0]
    np.testing.assert_allclose(trace.z, [[0, -2], [np.nan, 2]], atol=1e-6)
    assert trace.customdata[0][1] == pytest.approx(0.01)
    assert np.array(trace.text).tolist() == [["1", "0.01"], ["", "100"]]
    assert "customdata" in trace.hovertemplate


def test_the_slider_shows_one_block_at_a_time():
    maps = {str(layer): Heatmap("", np.eye(2), ["a", "b"], ["a", "b"], "x", "y") for layer in range(3)}
    figure = heatmap_with_slider(maps, title="A model", z_title="cosine", z_range=(0, 1), start="1")
    assert [trace.visible for trace in figure.data] == [False, True, False]
    assert [step.args[0]["visible"].index(True) for step in figure.layout.sliders[0].steps] == [0, 1, 2]


def test_attention_maps_show_the_mean_and_offer_each_head():
    patterns = np.stack([np.eye(3), np.full((3, 3), 0.5)])
    figure = attention_maps({"block 1": patterns, "block 2": patterns}, ["a", "b", "c"], title="A", note="")
    shown = [trace for trace in figure.data if trace.visible]
    assert len(shown) == 2
    np.testing.assert_allclose(shown[0].z, [[0.75, np.nan, np.nan], [0.25, 0.75, np.nan], [0.25, 0.25, 0.75]])
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["mean over heads", "head 0", "head 1"]
    assert np.flatnonzero(buttons[2].args[0]["visible"]).tolist() == [2, 5]


def test_figure_4_has_the_amplification_on_an_axis_of_its_own():
    figure = ffn_figure(
        {name: points(0.1, 0.9) for name in ("gate", "up", "down")}, points(2, 4000), me_layer=1, title="A model"
    )
    (bars,) = (trace for trace in figure.data if trace.type == "bar")
    assert (bars.yaxis, figure.layout.yaxis2.type) == ("y2", "log")
    assert {trace.name for trace in figure.data if trace.showlegend} == {"after gate", "after up", "after down"}


def test_an_interval_that_reaches_below_zero_is_cut_on_a_logarithmic_axis():
    """The interval of a mean of 0.5 is -0.5 to 0.5 here: the axis has no place for its low end."""
    curve = Curve("token 0", points(0.5, 100), FIRST)
    for panel, buttons, lowest in (
        (Panel("norm", "", [curve], None, log_scale=True), False, 0.05),
        (Panel("norm", "", [curve], None), True, 0.05),  # whose reader may choose a logarithmic axis
        (Panel("difference", "", [curve], None), False, -0.5),
    ):
        band = curves_by_block([panel], title="A model", scale_buttons=buttons).data[0]
        assert list(band.y) == pytest.approx([0.5, 100, 99, lowest])
    bars = ffn_figure({}, points(0.5, 100), me_layer=None, title="A model").data[0]
    assert list(bars.error_y.arrayminus) == pytest.approx([0.45, 1])


def test_whiskers_reach_from_the_mean_to_the_ends_of_its_interval():
    interval = pd.DataFrame({"layer": [0], "mean": [5.0], "low": [4.0], "high": [8.0]})
    bars = ffn_figure({}, interval, me_layer=None, title="A model").data[0]
    assert (list(bars.error_y.array), list(bars.error_y.arrayminus), bars.error_y.symmetric) == ([3], [1], False)


def test_verdicts_are_drawn_by_claim_and_model():
    metrics = {"me_layer": 3, "norm_drift": 0.01}
    claims = judge([{"experiment": "direction", "model": {"name": name}, "metrics": metrics} for name in ("a", "b")])
    trace = verdicts(claims).data[0]
    assert list(trace.x) == ["a", "b", "all models"]
    assert trace.text[list(trace.y).index("Once the massive state is formed, its norm barely changes")][0] == "holds"


def test_figures_are_valid_json_without_nan():
    panel = Panel("", "y", [Curve("a", points(1, float("nan")), FIRST)], 0)
    json.loads(curves_by_block([panel], title="A model").to_json(), parse_constant=pytest.fail)
