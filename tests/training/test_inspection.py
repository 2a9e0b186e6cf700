"""What an inspection measures of a model in training, worked out on paper, and on which weights."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from handmade import study_by_hand, table

from melens import WeMask
from melens.models.twins import plain_twin
from melens.training import inspection
from melens.training.inspection import Inspector

NORMS = pd.concat(
    [
        table("hook_resid_post", 0, norm=[[5.0, 2.0, 20.0, 20.0], [5.0, 4.0, 80.0, 80.0]]),
        table("hook_resid_post", 1, norm=[[7.0, 7.0, 7.0, 7.0]] * 2),
    ]
)
LARGEST = table("hook_resid_post", 0, rank=0, value=[[3.0, -40.0, 7.0], [6.0, 20.0, -90.0]])
MEDIANS = table("hook_resid_post", 0, abs_median=[[1.0, 2.0, 1.0], [1.0, 1.0, 3.0]])
IMPORTANCE = table(head=0, importance=[[0.1, 0.4, 0.9], [0.2, float("nan"), 0.3]])
SINKS = table(head=0, sink_mass=[[0.0, 0.0, 0.9, 0.2, 0.6, 0.1, 0.1], [0.0, 0.0, 0.9, 0.4, 0.8, 0.1, 0.1]])
TABLES = {"norm": NORMS, "sink_mass": SINKS, "largest": LARGEST, "abs_median": MEDIANS, "importance": IMPORTANCE}


@pytest.fixture
def traced(monkeypatch):
    """Trace nothing: the bridges that would have been traced, with a weight of each as it was then."""
    seen = []

    def trace(bridge, *_, **__):
        seen.append((bridge, bridge.blocks[2].mlp.out.original_component.weight.detach().clone()))
        return replace(study_by_hand(2).trace, tables=TABLES)

    monkeypatch.setattr(inspection, "trace", trace)
    monkeypatch.setattr(inspection, "find_me_layer", lambda *_: SimpleNamespace(layer=3, magnification=9.0))
    return seen


def test_an_inspection_by_hand(tmp_path, traced):
    study = study_by_hand(2)
    inspector = Inspector(study, None, tmp_path)
    inspector.inspect(4, plain_twin(study.model))
    (row,) = inspector.table().to_dict("records")
    assert (row["step"], row["masked"], row["me_layer"], row["magnification"]) == (4, False, 3, 9.0)
    assert row["magnification_there"] == pytest.approx((20 / 2 + 80 / 4) / 2)  # block 2, as before the training
    assert row["sink_mass"] == pytest.approx((0.3 + 0.7) / 2)  # blocks 3 and 4, means over prompts
    assert row["largest"] == (40 + 90) / 2
    assert row["largest_over_median"] == (20 + 30) / 2  # the largest of 3, 20 and 7; of 6, 20 and 30
    assert row["sink_rate"] == 2 / 5  # 0.3 is not over 0.3; a prompt that is too short does not count


def test_an_inspection_is_of_the_weights_as_they_are(tmp_path, traced):
    study = study_by_hand(2)
    model = plain_twin(study.model)
    inspector = Inspector(study, WeMask(rate=0.5, start=1).on(model), tmp_path)
    weight = model.model.layers[2].mlp.down_proj.weight
    before = weight.detach().clone()
    inspector.inspect(0, model)
    with torch.no_grad():
        weight.mul_(2)
        inspector.inspect(1, model)
        weight.data = weight.data / 4  # another tensor, as some optimisers make it
        inspector.inspect(2, model)
    assert inspector.table()["masked"].tolist() == [False, True] * 3
    for (_, found), factor in zip(traced, (1, 1, 2, 2, 0.5, 0.5), strict=True):
        assert torch.equal(found, before * factor)
    bridges = [bridge for bridge, _ in traced]
    assert bridges[0] is bridges[3]  # made once, as it shares the weights
    assert bridges[3] is not bridges[4]


def test_a_training_that_resumes_keeps_the_inspections_before_its_step(tmp_path, traced):
    study = study_by_hand(2)
    model = plain_twin(study.model)
    before = Inspector(study, None, tmp_path)
    for step in (0, 2, 4):
        before.inspect(step, model)
    resumed = Inspector(study, None, tmp_path, resume=True)
    resumed.inspect(2, model)
    assert resumed.table()["step"].tolist() == [0, 2]
    assert Inspector(study, None, tmp_path).table().empty
