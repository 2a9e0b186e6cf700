import pandas as pd
import pytest

from melens import figures


@pytest.fixture
def norms():
    rows = [
        {"prompt": prompt, "layer": layer, "site": site, "pos": pos, "norm": 100.0 * prompt + 10 * layer + pos}
        for prompt in (0, 1)
        for layer in (0, 1)
        for site in figures.PANELS
        for pos in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


def test_the_first_token_is_set_against_the_mean_of_the_others(norms):
    summary = figures.norm_by_block(norms).set_index(["site", "layer", "token"])
    first, others = (summary.loc[("hook_resid_post", 1, token)] for token in ("first", "others"))
    assert (first["mean"], others["mean"]) == (60, 61.5)
    assert (first["low"], first["high"]) == (pytest.approx(20), pytest.approx(100))


def sink_mass():
    return pd.DataFrame({"layer": [0, 1], "mean": [0.1, 0.5], "low": [0.0, 0.4], "high": [0.2, 0.6]})


def test_the_emergence_figure_shows_every_panel_and_marks_the_me_layer(norms):
    figure = figures.emergence_figure(figures.norm_by_block(norms), sink_mass(), me_layer=1, title="A model")
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert set(figures.PANELS.values()) <= set(titles)
    assert titles.count("ME layer 1") == 4
    assert {trace.name for trace in figure.data if trace.showlegend} == {
        "token 0",
        "other tokens",
        "sink mass, mean of heads",
    }
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis4.title.text == "share of attention"
    assert all(figure.layout[axis].title.text for axis in ("xaxis", "yaxis", "xaxis4"))


def test_norms_are_drawn_linear_on_demand_and_without_a_me_layer(norms):
    figure = figures.emergence_figure(
        figures.norm_by_block(norms), sink_mass(), me_layer=None, title="A model", log_scale=False
    )
    assert figure.layout.yaxis.type == "linear"
    assert not [annotation for annotation in figure.layout.annotations if "ME layer" in annotation.text]


def test_models_are_compared_side_by_side(norms):
    curves = {name: figures.norm_by_block(norms) for name in ("a", "b", "c", "d")}
    figure = figures.compare_norms(curves, {"a": 1, "b": None, "c": 0, "d": 1}, log_scale=True)
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles[:4] == ["a", "b", "c", "d"]
    assert sorted(titles[4:]) == ["ME layer 0", "ME layer 1", "ME layer 1"]


def test_the_largest_dim_comes_first_in_the_heatmap():
    activations = pd.DataFrame(
        {"layer": [0, 1, 0, 1], "dim": [9, 9, 4, 4], "abs_activation": [1.0, 10.0, 1.0, 10_000.0]}
    )
    heatmap = figures.dims_heatmap(activations, me_layer=1, title="A model").data[0]
    assert list(heatmap.y) == ["4", "9"]
    assert heatmap.z.tolist() == [[0, 4], [0, 1]]
    assert figures.dims_surface(activations, title="A model").data[0].z.max() == 10_000
