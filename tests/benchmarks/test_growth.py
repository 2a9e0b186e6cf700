"""Each way of measuring goes on until it is out of memory or takes too long, and the figure shows where it ended."""

import growth
import pytest
import torch
from growth import CACHE, OUTPUTS, PLAIN, TRACE, growth_figure, last_of, lengths_up_to, measure

ENDS = {CACHE: {"tokens": 2048, "why": "memory"}, OUTPUTS: {"tokens": 1024, "why": "memory"}}


@pytest.fixture
def found(monkeypatch):
    """A cache that holds 1,024 tokens, outputs that hold 512, and a trace that takes 25 s for 2,048."""

    def way(name):
        def run(tokens):
            if len(tokens) >= ENDS.get(name, {"tokens": 10**6})["tokens"]:
                raise torch.OutOfMemoryError
            return 25.0 if name == TRACE and len(tokens) == 2048 else len(tokens) * next(times)

        times = iter([1e-5, *[1e-4, 3e-4, 2e-4, 4e-4, 4e-4, 4e-4] * 4])  # the first, and one a length, warm up
        return run

    monkeypatch.setattr(growth, "run_once", lambda run, *, with_peak: (run(), 2**20 if with_peak else 0))
    ways = {name: way(name) for name in (PLAIN, TRACE, CACHE, OUTPUTS)}
    return measure(ways, [512, 1024, 2048, 4096], vocabulary=100, device="cpu")


def test_each_way_ends_where_it_is_out_of_memory_or_behind_a_point_that_took_too_long(found):
    assert found["ends"] == ENDS | {TRACE: {"tokens": 2048, "why": "time"}}
    assert [last_of(found, way) for way in (PLAIN, TRACE, CACHE, OUTPUTS)] == [4096, 2048, 1024, 512]


def test_the_shortest_time_counts_without_the_run_that_warms_up(found):
    first, *_ = found["points"]
    assert first == {"way": PLAIN, "tokens": 512, "seconds": pytest.approx(512 * 2e-4), "bytes": 2**20}


def test_lengths_are_finer_where_the_ways_that_keep_everything_end():
    lengths = lengths_up_to(65_536)
    assert lengths == [512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384, 32_768, 65_536]


def test_a_curve_that_ended_for_memory_has_a_cross_at_its_last_point(found):
    figure = growth_figure(found | {"model": "tiny", "device": "CPU", "versions": {"torch": "2"}, "free": 2**40})
    curves = {curve.name: curve.marker.symbol for curve in figure.data if curve.name}
    assert {name for name, symbols in curves.items() if symbols[-1] == "x"} == {CACHE, OUTPUTS}
    assert (
        {note.text.replace("<br>", " ") for note in figure.layout.annotations}
        >= set(curves)
        == {PLAIN, TRACE, CACHE, OUTPUTS}
    )
