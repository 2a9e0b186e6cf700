"""How benchmarks are put to a model; light to import, as checking the options of the command line needs it."""

from __future__ import annotations

from dataclasses import dataclass

from melens.benchmarks.catalog import Benchmark

__all__ = ["BenchmarkOptions"]


@dataclass(frozen=True)
class BenchmarkOptions:
    """How benchmarks are put to a model: the node `benchmark` of the command line, without what selects them.

    Attributes:
        generates: let the model write its answers where a benchmark leaves the choice, and draw samples; else the
            choices' log-likelihoods are compared, and replies are written greedily.
        limit: only the first so many items of each benchmark.
        seeds: of samples; without samples only the first counts.
        data_dir: a folder with local data; None loads data from the hub.
        chat: use the chat template; None uses it where the model writes freely.
        thinking: let the model think, in a template that has such a switch; None does not.
        temperature, top_p: of samples; None takes the model's own.
        max_new_tokens: of a reply; None takes the benchmark's own.
        batch_size: replies written together.
        judge: a chat model that decides which replies refuse; None goes by phrases.
        judge_device: where the judge is loaded.
    """

    generates: bool = False
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    data_dir: str | None = None
    chat: bool | None = None
    thinking: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    judge: str | None = None
    judge_device: str = "auto"

    def in_chat(self, benchmark: Benchmark) -> bool:
        """Return whether a benchmark's prompts are put into the chat template."""
        if benchmark.config is None:
            return False
        writes = self.generates or benchmark.kind == "safety"
        return writes if self.chat is None else self.chat
