"""How time and memory grow with the length of a prompt, up to where each way of measuring runs out.

    python tests/benchmarks/growth.py growth.json                            # on a GPU, a Qwen3-4B-shaped model
    python tests/benchmarks/growth.py growth.json --tiny                     # on the CPU: to try this script
    python tests/benchmarks/growth.py growth.json --draw .github/growth.png  # the figure, or as .svg or .html

At each length the ways run in turns; the shortest time of each counts, and the peak of the GPU's memory over the
weights, which all of them share. A way ends at the length at which it is out of memory, or behind the first one that
takes longer than 20 s. Exits with 1 if a trace ends before the plain forward pass does.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trace_cost import QWEN3_4B, peak_resident

sys.path.insert(0, str(Path(__file__).parents[1]))

from planted import plant

import melens
from melens.figures.style import COLORS, FIRST, ME_LINE, OTHERS, finish, panels_in_rows
from melens.models.twins import plain_twin, twin_of

PLAIN, TRACE = "plain forward pass", "melens.trace, ME layer, tables"
CACHE, OUTPUTS = "run_with_cache", "output_hidden_states, output_attentions"
LONGEST = 20.0
"""Seconds of a point behind which a way ends."""
ENOUGH = 5.0
"""Seconds of a point after which it is not repeated."""
TINY = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip

KEPT = ("hook_resid_post", "ln2.hook_out", "hook_mlp_out", "attn.hook_pattern")
"""What a cache needs for the figures that a trace with the default probes is for."""
FIRST_TOKEN = 7
"""The one that is massive, and first in every prompt."""

Way = Callable[[Tensor], object]
"""Called with the tokens of one prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=Path, help="the .json file that is written, or drawn")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--longest", type=int, help="tokens; by default 262,144, of the tiny model 2,048")
    parser.add_argument("--draw", type=Path, help="draw what was measured into this file")
    asked = parser.parse_args()
    if asked.draw is not None:
        draw(json.loads(asked.numbers.read_text()), asked.draw)
        return
    lengths = lengths_up_to(asked.longest or (2048 if asked.tiny else 262_144))
    device = "cpu" if asked.tiny else "cuda"
    shape = (TINY if asked.tiny else QWEN3_4B) | {"max_position_embeddings": lengths[-1]}
    found = measure(ways_of(shape, device), lengths, shape["vocab_size"], device)
    found |= {
        "model": "tiny, fp32" if asked.tiny else "Qwen3-4B-shaped, bf16",
        "device": "CPU" if asked.tiny else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer_lens")},
        "free": None
        if asked.tiny
        else torch.cuda.get_device_properties(0).total_memory - torch.cuda.memory_allocated(),
    }
    asked.numbers.write_text(json.dumps(found, indent=1))
    show(found)
    reached = [last_of(found, way) for way in (PLAIN, TRACE)]
    sys.exit(0 if reached[1] >= reached[0] else 1)


def lengths_up_to(longest: int) -> list[int]:
    """Return 512 doubled again and again, and in between up to 16,384 tokens, where the ways that keep all end."""
    doubled = [512 * 2**step for step in range(int(math.log2(longest / 512)) + 1)]
    between = [length * 3 // 2 for length in doubled if length * 3 // 2 < min(16_384, longest)]
    return sorted(doubled + between)


def ways_of(shape: dict[str, Any], device: str) -> dict[str, Way]:
    """Return what is compared, each called with one prompt's tokens, all on the weights of one model."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    bridge = melens.load_model("random", model_type="qwen3", config=shape, dtype=dtype, device=device)
    plain = plain_twin(bridge)
    eager = twin_of(bridge.original_model, "eager").eval()  # the only attention that returns its pattern
    plant(plain, block=2, token=FIRST_TOKEN, dim=21)
    names = {f"blocks.{layer}.{site}" for layer in range(bridge.cfg.n_layers) for site in KEPT}

    def plain_forward(tokens: Tensor) -> object:
        return plain.model(tokens[None], use_cache=False)

    def traced(tokens: Tensor) -> object:
        trace = melens.trace(bridge, [tokens], max_batch_tokens=len(tokens))
        return melens.find_me_layer(trace), trace["norm"], trace["sink_mass"]

    def with_cache(tokens: Tensor) -> object:
        return bridge.run_with_cache(tokens[None], names_filter=lambda name: name in names)

    def with_outputs(tokens: Tensor) -> object:
        return eager.model(tokens[None], use_cache=False, output_hidden_states=True, output_attentions=True)

    return {PLAIN: plain_forward, TRACE: traced, CACHE: with_cache, OUTPUTS: with_outputs}


def measure(ways: Mapping[str, Way], lengths: Sequence[int], vocabulary: int, device: str) -> dict[str, Any]:
    """Return `points`, a row for each way and length that it reached, and `ends`: where and why each of them ended."""
    points: list[dict[str, Any]] = []
    ends: dict[str, dict[str, Any]] = {}
    for way in ways.values():  # its first run of all checks itself, and compiles kernels
        run_once(partial(way, prompt_of(lengths[0], vocabulary).to(device)), with_peak=False)
    for length in lengths:
        tokens = prompt_of(length, vocabulary)
        left = {name: way for name, way in ways.items() if name not in ends}
        for point in measure_point(left, tokens.to(device)):
            if point["seconds"] is None:
                ends[point["way"]] = {"tokens": length, "why": "memory"}
                continue
            points.append(point)
            if point["seconds"] > LONGEST and length != lengths[-1]:
                ends[point["way"]] = {"tokens": length, "why": "time"}
    return {"points": points, "ends": ends}


def prompt_of(length: int, vocabulary: int) -> Tensor:
    tokens = torch.randint(8, vocabulary, (length,), generator=torch.Generator().manual_seed(length))
    tokens[0] = FIRST_TOKEN
    return tokens


def measure_point(ways: Mapping[str, Way], tokens: Tensor, turns: int = 6) -> list[dict[str, Any]]:
    """Run the ways in turns on one prompt, first to warm up; a way that is out of memory has `seconds` None."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {}
    ended = set()
    for turn in range(turns):
        for name, way in ways.items():
            if name in ended or sum(times[name][1:]) > ENOUGH:  # the first warms up
                continue
            try:
                seconds, peak = run_once(lambda way=way: way(tokens), with_peak=turn == 0)
            except torch.OutOfMemoryError:
                ended.add(name)
                continue
            times[name].append(seconds)
            peaks[name] = max(peak, peaks.get(name, 0))
    rows = []
    for name, taken in times.items():
        seconds = None if name in ended else min(taken[1:] or taken)
        rows.append({"way": name, "tokens": len(tokens), "seconds": seconds, "bytes": peaks.get(name)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def run_once(run: Callable[[], object], *, with_peak: bool) -> tuple[float, int]:
    """Return the seconds of a run and, if it is wanted, the bytes at the peak over those before (else 0)."""
    on_gpu = torch.cuda.is_available()
    gc.collect()
    before = 0
    if on_gpu:
        if with_peak:
            torch.cuda.empty_cache()  # what another way left would be free for this one, but not in one piece
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    with torch.no_grad():
        run()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if on_gpu:
        return seconds, torch.cuda.max_memory_allocated() - before
    return seconds, peak_resident(run) if with_peak else 0


# --- What was measured ------------------------------------------------------------------------------------------------


def last_of(found: Mapping[str, Any], way: str) -> int:
    """Return the most tokens that a way has run."""
    return max((point["tokens"] for point in found["points"] if point["way"] == way), default=0)


def show(found: Mapping[str, Any]) -> None:
    points = pd.DataFrame(found["points"])
    table = Table("tokens", *points["way"].unique(), title=f"{found['model']}, {found['device']}: time, peak memory")
    for length, of_length in points.groupby("tokens"):
        cells = {row["way"]: f"{row['seconds']:.3f} s  {in_bytes(row['bytes'])}" for _, row in of_length.iterrows()}
        table.add_row(f"{length:,}", *(cells.get(way, "") for way in points["way"].unique()))
    Console(width=160).print(table)
    for way, end in found["ends"].items():
        print(f"{way}: out of {end['why']} at {end['tokens']:,} tokens")


def in_bytes(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def draw(found: Mapping[str, Any], file: Path) -> None:
    figure = growth_figure(found)
    if file.suffix == ".html":
        figure.write_html(file)
    else:
        figure.write_image(file, width=1100, height=figure.layout.height, scale=2)


def growth_figure(found: Mapping[str, Any]) -> go.Figure:
    """Draw time and memory by the number of tokens, with a name at each curve and a cross where memory ran out."""
    points = pd.DataFrame(found["points"]).assign(gib=lambda rows: rows["bytes"] / 2**30)
    figure, places = panels_in_rows(["Time", "Peak memory over the weights"], 2, gap=0.1, row_gap=0.3)
    for quantity, at in zip(("seconds", "gib"), places, strict=True):
        for way, line in _LINES.items():
            curve = points[points["way"] == way]
            is_out = found["ends"].get(way, {}).get("why") == "memory"
            symbols = ["circle"] * (len(curve) - 1) + ["x" if is_out else "circle"]
            scatter = go.Scatter(x=curve["tokens"], y=curve[quantity], mode="lines+markers", line=line, name=way)
            marker = {"symbol": symbols, "size": [10 if symbol == "x" else 6 for symbol in symbols]}
            figure.add_trace(scatter.update(marker=marker, showlegend=False), **at)
            where, label = _LABELS[quantity][way]
            named = curve.iloc[int(where * (len(curve) - 1))]
            label = label | {"x": math.log10(named["tokens"]), "y": math.log10(named[quantity])}
            label["font"] = {"size": 12, "color": line["color"]}
            figure.add_annotation(text=way.replace(", output", ",<br>output"), showarrow=False, **label, **at)
    ticks = [512 * 4**power for power in range(6)]
    figure.update_xaxes(title_text="tokens of one prompt", type="log")
    figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks])
    figure.update_yaxes(type="log", dtick=1, exponentformat="none")
    figure.update_yaxes(title_text="seconds", **places[0])
    figure.update_yaxes(title_text="GiB", **places[1])
    if found["free"] is not None:
        limit = go.Scatter(x=[ticks[0], points["tokens"].max()], y=[found["free"] / 2**30] * 2, mode="lines+text")
        limit.update(text=["", "all that the weights leave free"], textposition="top left", textfont={"size": 12})
        figure.add_trace(limit.update(line=ME_LINE, showlegend=False), **places[1])
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    note = f"{found['model']}, {found['device']}. Cross: out of memory at the next length. {versions}."
    return finish(figure, "What one prompt costs by its length", note, height=430)


_LINES: dict[str, dict[str, Any]] = {
    PLAIN: {"color": COLORS[6], "dash": "dot", "width": 4},
    TRACE: {"color": FIRST, "width": 2},
    CACHE: {"color": OTHERS, "width": 2},
    OUTPUTS: {"color": COLORS[4], "width": 2},
}
_LABELS: dict[str, dict[str, tuple[float, dict[str, Any]]]] = {
    "seconds": {
        PLAIN: (0.8, {"xanchor": "left", "xshift": 10, "yshift": -8}),
        TRACE: (1, {"xanchor": "right", "xshift": -12, "yshift": 6}),
        CACHE: (0, {"xanchor": "left", "yshift": 22}),
        OUTPUTS: (1, {"xanchor": "right", "xshift": -14, "yshift": 10, "align": "right"}),
    },
    "gib": {
        PLAIN: (0.8, {"xanchor": "left", "xshift": 10, "yshift": -8}),
        TRACE: (1, {"xanchor": "right", "xshift": -12, "yshift": 6}),
        CACHE: (1, {"xanchor": "left", "xshift": 10, "yshift": 4}),
        OUTPUTS: (1, {"xanchor": "left", "xshift": 10, "yshift": -20, "align": "left"}),
    },
}
"""Where a curve's name stands: at which share of its points, and how far from there."""


if __name__ == "__main__":
    main()
