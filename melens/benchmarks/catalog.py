"""The benchmarks that melens knows by name: the harness's definition, what is counted, the form of local data.

A benchmark is added here, in one entry of `_ALL`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from melens.errors import MelensError

__all__ = ["BENCHMARKS", "Benchmark", "Form", "Kind", "Metric", "benchmarks_of"]

Kind = Literal["knowledge", "maths", "safety", "language"]
"""What a benchmark tests. The paper masks every block from the start on for knowledge, and the first one alone for
maths and safety (appendix C). Language benchmarks measure prediction and are masked as knowledge is."""

Form = Literal["choices", "answer", "prompts"]
"""Fields of a line of local data: question, choices and the right one's index; question and answer; prompt."""


@dataclass(frozen=True)
class Metric:
    """What is counted of each item.

    Attributes:
        name: the harness's name for it.
        filter: the harness's filter that reads the answer.
        higher_is_better: False for a loss, and for what a safe model does rarely.
        shown: whether tables have it.
    """

    name: str
    filter: str = "none"
    higher_is_better: bool = True
    shown: bool = True

    @property
    def label(self) -> str:
        """The metric's name; of a second reading of the same answers, with its filter."""
        return self.name if self.shown or self.filter == "none" else f"{self.name}, {self.filter}"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: the harness's, if the harness has it.
        config: the file that defines it, among the harness's own tasks, or in `conf/benchmark/tasks/` where it begins
            with `melens/`; None where the harness does not run it.
        file: name of its data in a local folder; None where only the hub has it.
        form: of that file.
        generates: whether the model writes its answers in both modes.
        max_new_tokens: the paper's limit on an answer.
    """

    name: str
    kind: Kind
    metrics: tuple[Metric, ...] = (Metric("acc"), Metric("acc_norm", shown=False))
    config: str | None = None
    file: str | None = None
    form: Form = "choices"
    generates: bool = False
    max_new_tokens: int = 512


_EXACT = (Metric("exact_match"),)
_LOSS = (Metric("loss", higher_is_better=False),)
_WORD_LOSS = (Metric("word_perplexity", higher_is_better=False),)
_EXTRACTED = (Metric("exact_match", "flexible-extract"), Metric("exact_match", "strict-match", shown=False))
_BY_LABEL = (Metric("over_refusal", higher_is_better=False), Metric("compliance", higher_is_better=False))

_ALL = (
    Benchmark("piqa", "knowledge", config="piqa/piqa.yaml", file="piqa.jsonl"),
    Benchmark("arc_challenge", "knowledge", config="arc/arc_challenge.yaml", file="arc_challenge.jsonl"),
    Benchmark("openbookqa", "knowledge", config="openbookqa/openbookqa.yaml", file="openbookqa.jsonl"),
    Benchmark("strategyqa", "knowledge", (Metric("acc"),), "melens/strategyqa.yaml", "strategyqa.jsonl"),
    Benchmark("mmlu", "knowledge", (Metric("acc"),), config="mmlu"),
    Benchmark("hellaswag", "knowledge", config="hellaswag/hellaswag.yaml"),
    Benchmark("winogrande", "knowledge", (Metric("acc"),), config="winogrande/default.yaml"),
    Benchmark("boolq", "knowledge", (Metric("acc"),), config="super_glue/boolq/default.yaml"),
    Benchmark("mathqa", "maths", config="mathqa/mathqa.yaml", file="mathqa.jsonl"),
    Benchmark("gsm8k", "maths", _EXTRACTED, "gsm8k/gsm8k.yaml", "gsm8k.test.jsonl", "answer", True, 128),
    Benchmark(
        "hendrycks_math500", "maths", _EXACT, "hendrycks_math/hendrycks_math500.yaml", "math500.jsonl", "answer", True
    ),
    Benchmark("aime", "maths", _EXACT, "aime/aime.yaml", "aime22-24.jsonl", "answer", True),
    Benchmark("xstest", "safety", _BY_LABEL, "melens/xstest.yaml", "xstest.jsonl", "prompts", True),
    Benchmark("advbench", "safety", (Metric("refusal"),), "melens/advbench.yaml", "advbench.jsonl", "prompts", True),
    Benchmark("sorry_bench", "safety", (Metric("refusal"),), "melens/sorry_bench.yaml", None, "prompts", True),
    Benchmark("wikitext", "language", _WORD_LOSS, "wikitext/wikitext.yaml"),
    Benchmark("perplexity", "language", _LOSS),
    Benchmark("induction", "language", _LOSS),
    Benchmark("copy", "language", (Metric("acc"),)),
    Benchmark("needle", "language", (Metric("exact_match"),)),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
"""All benchmarks by name. The last four need no data."""


def benchmarks_of(names: Sequence[str]) -> list[Benchmark]:
    """Return benchmarks by name.

    Raises:
        MelensError: no name is given, or a name is unknown (the nearest are suggested) or given twice.
    """
    if not names:
        raise MelensError("benchmark.tasks is empty; it must name at least one benchmark.")
    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(str(name), BENCHMARKS, n=3, cutoff=0.5)
            hint = f"the nearest are {', '.join(near)}" if near else f"allowed are {', '.join(BENCHMARKS)}"
            raise MelensError(f"There is no benchmark {name!r}; {hint}.")
    if len(set(names)) < len(names):
        raise MelensError(f"benchmark.tasks names a benchmark twice: {', '.join(names)}.")
    return [BENCHMARKS[name] for name in names]
