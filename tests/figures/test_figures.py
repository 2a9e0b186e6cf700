import json

import numpy as np
import pandas as pd
import pytest

from melens import judge
from melens.analysis.emergence_norms import norm_by_block
from melens.figures.attention import attention_maps
from melens.figures.curves import Curve, Panel, curves_by_block, ffn_figure, over_steps, vectors_by_dim
from melens.figures.heatmaps import Heatmap, dims_heatmap, heatmap_by_block, heatmaps, loss_changes, shares
from melens.figures.scores import verdicts
from melens.figures.style import COLORS, FIRST, SINK, block_ticks, log_ticks, signed_log, signed_ticks, whiskers


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
    assert texts(figure) == ["Norms", "Sinks", "More norms"]
    assert [(line.x0, line.name, line.showlegend) for line in figure.layout.shapes] == [
        (1, "ME layer 1", True),
        (1, "ME layer 1", False),
    ]
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


def test_lines_without_colours_are_told_apart_by_their_markers_and_dashes():
    curves = [Curve(name, points(1, 2), color) for name, color in zip("abc", COLORS, strict=False)]
    lines = [trace for trace in curves_by_block([Panel("", "y", curves, None)], title="A").data if trace.showlegend]
    assert len({trace.marker.symbol for trace in lines}) == len({trace.line.dash for trace in lines}) == 3
    faint = curves_by_block([Panel("", "y", [Curve("a", points(1, 2), FIRST, thin=True)], None)], title="A").data[-1]
    assert (faint.mode, faint.line.color) == ("lines", "rgba(193,39,45,0.6)")


def test_the_axis_of_the_blocks_has_whole_numbers_and_room_for_the_markers_at_its_ends():
    axis = curves_by_block([Panel("", "y", [Curve("a", points(1, 2, 3), FIRST)], 1)], title="A").layout.xaxis
    assert (axis.dtick, axis.range[0] < -0.4, axis.range[1] > 2.4) == (1, True, True)
    assert [block_ticks(n)["dtick"] for n in (4, 12, 30, 64, 80, 1000)] == [1, 2, 5, 10, 10, 100]


def test_panels_of_models_with_other_me_layers_share_one_entry_of_the_legend():
    panels = [Panel(name, "y", [Curve("a", points(1, 2, 3), FIRST)], layer) for name, layer in (("x", 1), ("y", 2))]
    lines = curves_by_block(panels, title="Models").layout.shapes
    assert [(line.x0, line.name, line.showlegend) for line in lines] == [(1, "ME layer", True), (2, "ME layer", False)]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.5, 50), ["0.1", "1", "10", "100"]),
        ((0.01, 0.3), ["0.01", "0.03", "0.1", "0.3"]),
        ((0.02, 20_000), ["10<sup>-2</sup>", "10<sup>-1</sup>", "10<sup>0</sup>", "10<sup>1</sup>", "10<sup>2</sup>"]),
        ((1, 9, float("nan"), 0), ["1", "2", "5", "10", "20", "50"]),
        ((3, 7), [str(n) for n in (*range(1, 10), *range(10, 100, 10))]),
    ],
)
def test_the_numbers_on_a_logarithmic_axis_are_written_in_one_format(values, ticks):
    assert log_ticks(values)["ticktext"][: len(ticks)] == ticks
    assert log_ticks([5, 5.1]) == log_ticks([]) == {"tickmode": "auto"}


@pytest.mark.parametrize(
    ("values", "reach"),
    [([-0.07, 0.02], "+0.1"), ([0.4, -12], "+10"), ([0.0004], "+0.001"), ([float("nan")], "+0.001")],
)
def test_the_ticks_of_signed_values_reach_as_far_as_these(values, reach):
    ticks = signed_ticks(values)
    assert ticks["ticktext"][-1] == reach
    assert ticks["ticktext"][::-1] == [text.translate({43: "−", 8722: "+"}) for text in ticks["ticktext"]]
    assert min(np.diff(ticks["tickvals"])) > 0.1 * max(ticks["tickvals"])


def test_dims_are_in_the_order_of_what_they_hold_after_the_me_layer():
    """Dim 7 is the largest of all in the last block."""
    activations = pd.DataFrame(
        {
            "layer": [0, 1, 2] * 3,
            "dim": [9] * 3 + [4] * 3 + [7] * 3,
            "abs_activation": [1.0, 10.0, 1.0, 1.0, 10_000.0, 1.0, 1.0, 1.0, 1e5],
        }
    )
    figure = dims_heatmap(activations, me_layer=1, title="A model")
    assert list(figure.data[0].y) == ["4", "9", "7"]
    assert figure.data[0].z.tolist() == [[0, 4, 0], [0, 1, 0], [0, 0, 5]]
    assert texts(figure) == ["ME layer 1"]
    assert {(frame.x0, frame.x1) for frame in figure.layout.shapes} == {(0.5, 1.5)}
    assert list(dims_heatmap(activations, me_layer=None, title="A model").data[0].y) == ["7", "4", "9"]


def test_the_me_layer_is_seen_on_dark_and_on_light_cells():
    figure = heatmap_by_block(
        Heatmap("", np.eye(2), [0, 1], ["a", "b"], "block", "input"), me_layer=1, title="A", z_title="z", z_range=(0, 1)
    )
    assert [frame.line.color for frame in figure.layout.shapes] == ["white", "#222"]


def test_ratios_are_coloured_by_their_logarithm_and_shown_as_they_are():
    cells = Heatmap("Left", np.array([[1.0, 0.01], [np.nan, 100.0]]), [0, 1], [0, 1], "effect", "cause")
    trace = heatmaps([cells], title="A model", z_title="left", me_layer=1, text=True).data[0]
    np.testing.assert_allclose(trace.z, [[0, -2], [np.nan, 2]], atol=1e-6)
    assert trace.customdata[0][1] == pytest.approx(0.01)
    assert np.array(trace.text).tolist() == [["1", "0.01"], ["", "100"]]
    assert "customdata" in trace.hovertemplate


@pytest.mark.parametrize(
    ("largest", "ends"), [(828, ["0.001", "1,000"]), (8, ["0.1", "10"]), (1e9, ["≤ 0.001", "≥ 1,000"])]
)
def test_the_colours_of_ratios_reach_as_far_as_these_and_say_what_lies_beyond(largest, ends):
    cells = Heatmap("Left", np.array([[1.0, largest]]), [0, 1], [0], "effect", "cause")
    axis = heatmaps([cells], title="A model", z_title="left").layout.coloraxis
    assert [axis.colorbar.ticktext[0], axis.colorbar.ticktext[-1]] == ends
    assert (axis.cmin, axis.cmax) == (axis.colorbar.tickvals[0], axis.colorbar.tickvals[-1])


def test_the_colours_of_small_changes_of_a_loss_are_not_those_of_large_ones():
    cells = Heatmap("", np.array([[0.07, -0.02]]), ["0.1", "0.2"], ["weight"], "rate", "")
    assert loss_changes([cells], title="A").layout.coloraxis.cmax == pytest.approx(float(signed_log(0.1)))


def test_shares_are_a_table():
    table = pd.DataFrame({"same": [1.0, 0.75], "other": [0.0, 0.25]}, index=["maths", "logic"])
    (cells,) = shares(table, names=("ME layer 3", "another layer"), title="A").data
    assert (cells.z.tolist(), cells.texttemplate) == ([[1.0, 0.0], [0.75, 0.25]], "%{z:.0%}")
    assert (list(cells.x), list(cells.y)) == (["ME layer 3", "another<br>layer"], ["maths", "logic"])
    assert cells.xgap is cells.ygap is None  # which would print as a coarse image


def test_the_dims_of_the_me_layer_stand_out_and_are_not_joined():
    figure = vectors_by_dim({"block 1": np.eye(3)[0], "block 2": np.eye(3)[1]}, highlighted="block 2", title="A")
    assert [line.line.color for line in figure.data] == ["#444444", FIRST]
    assert {(line.line.shape, line.fill) for line in figure.data} == {("hvh", "tozeroy")}
    np.testing.assert_array_equal(figure.data[1].y, np.eye(3)[1])


def test_a_number_that_hardly_changes_in_a_training_is_not_blown_up():
    def steps(*values):
        return {"": pd.DataFrame({"step": range(len(values)), "value": values})}

    panels = {"sink mass": steps(0.5, 0.50001), "loss": steps(3, 1)}
    figure = over_steps(panels, title="SFT", y_titles={"sink mass": "share", "loss": "loss (nats)"})
    assert [axis.title.text for axis in figure.select_yaxes()] == ["share", "loss (nats)"]
    assert list(figure.layout.yaxis.range) == pytest.approx([0.45, 0.55], rel=1e-4)
    assert figure.layout.yaxis2.range is None
    assert figure.layout.xaxis.dtick == 1  # no half steps


def test_an_axis_of_nothing_but_zeros_begins_there():
    nothing = pd.DataFrame({"step": [0, 10], "value": [0.0, 0.0]})
    figure = over_steps({"sink rate": {"": nothing}}, title="SFT", y_titles={"sink rate": "share of heads"})
    assert figure.layout.yaxis.range == (-0.05, 1.0)


def test_attention_maps_show_the_mean_and_offer_each_head():
    patterns = np.stack([np.eye(3), np.full((3, 3), 0.5)])
    figure = attention_maps({"block 1": patterns, "block 2": patterns}, ["a", "b", "c"], title="A", note="")
    shown = [trace for trace in figure.data if trace.visible]
    assert len(shown) == 2
    np.testing.assert_allclose(shown[0].z, [[0.75, np.nan, np.nan], [0.25, 0.75, np.nan], [0.25, 0.25, 0.75]])
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["mean over heads", "head 0", "head 1"]
    assert np.flatnonzero(buttons[2].args[0]["visible"]).tolist() == [2, 5]


def test_attention_maps_have_square_cells():
    axes = attention_maps({"a": np.ones((1, 2, 2)), "b": np.ones((1, 2, 2))}, ["x", "y"], title="A", note="").layout
    assert (axes.yaxis.scaleanchor, axes.yaxis2.scaleanchor, axes.xaxis2.constrain) == ("x", "x2", "domain")


def test_long_tokens_are_cut_where_attention_maps_name_them():
    tokens = ["0 'The'", "1 '********************'"]
    assert list(attention_maps({"a": np.ones((1, 2, 2))}, tokens, title="A", note="").data[0].x) == [
        "0 'The'",
        "1 '**********…",
    ]


def test_what_the_title_of_a_panel_says_is_not_said_again_by_its_axis():
    figure = curves_by_block([Panel("Sink mass", "sink mass", [Curve("a", points(1, 2), FIRST)], None)], title="A")
    assert figure.layout.yaxis.title.text == ""


def test_figure_4_has_the_amplification_in_a_panel_of_its_own():
    figure = ffn_figure(
        {name: points(0.1, 0.9) for name in ("gate", "up", "down")}, points(2, 4000), me_layer=1, title="A model"
    )
    (amplification,) = (trace for trace in figure.data if trace.name == "FFN" and trace.showlegend)
    assert (amplification.yaxis, figure.layout.yaxis2.type, list(amplification.y)) == ("y2", "log", [2, 4000])
    assert {trace.yaxis for trace in figure.data if trace.name in ("after gate", "after up", "after down")} == {"y"}


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
    band = ffn_figure({}, points(0.5, 100), me_layer=None, title="A model").data[0]
    assert list(band.y) == pytest.approx([0.5, 100, 99, 0.05])


def test_whiskers_reach_from_the_mean_to_the_ends_of_its_interval():
    bars = whiskers(pd.Series([5.0]), pd.Series([4.0]), pd.Series([8.0]))
    assert (list(bars["array"]), list(bars["arrayminus"]), bars["symmetric"]) == ([3], [1], False)


def test_verdicts_are_drawn_by_claim_and_model():
    metrics = {"me_layer": 3, "norm_drift": 0.01}
    claims = judge([{"experiment": "direction", "model": {"name": name}, "metrics": metrics} for name in ("a", "b")])
    trace = verdicts(claims).data[0]
    assert list(trace.x) == ["a", "b", "all models"]
    assert trace.text[list(trace.y).index("Once the massive state is formed, its norm barely changes")][0] == "holds"


def test_figures_are_valid_json_without_nan():
    panel = Panel("", "y", [Curve("a", points(1, float("nan")), FIRST)], 0)
    json.loads(curves_by_block([panel], title="A model").to_json(), parse_constant=pytest.fail)
