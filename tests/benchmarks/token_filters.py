"""What each way to leave massive tokens out misses, and what it throws away, in every block of the embedded model.

    python tests/benchmarks/token_filters.py  # three minutes of processor time

The thresholds of `melens.massive_tokens` come from the project's prompts; they are tried on texts cut from Python's
documentation, whole and changed so that massive tokens stand elsewhere than first. Massive is what Sun et al.'s
criterion says of each text by itself. Of a block that `massive_tokens` refuses, its filter is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import melens
from melens.analysis.metrics import abs_max, abs_median
from melens.data.texts import cut_texts, read_text

N_TEXTS, N_TOKENS, PER_BATCH = 64, 128, 8
CRITERION = melens.Criterion()
END_OF_TEXT = "<|endoftext|>"
"""The token that separated documents in SmolLM2's pretraining; the BOS of its tokenizer, `<|im_start|>`, is another."""

COUNTS = ["massive", "massive_dropped", "others_dropped"]

Filter = Callable[[Tensor, Tensor, int], Tensor | None]
"""Called with tokens `[batch, pos]`, states `[batch, pos, d]` and the block; True for what is kept."""


@torch.no_grad()
def main() -> None:
    model = melens.load_model("smollm2-135m")
    keep = melens.massive_tokens(model)
    print(keep)
    filters = filters_of(model, keep)
    told = [layer for layer, block in keep.blocks.items() if block.threshold is not None]
    counts = pd.DataFrame(counted(model, filters))
    is_told = counts["layer"].isin(told)
    shown = Table("texts", "filter", "massive a text", "missed", "others dropped a text", "the same elsewhere")
    shown.title = f"{N_TEXTS} texts of {N_TOKENS} tokens, blocks {told[0]} to {told[-1]}, and elsewhere"
    for (texts, name), rows in counts.groupby(["texts", "filter"], sort=False):
        here, elsewhere = rows[is_told[rows.index]], rows[~is_told[rows.index]]
        means = (here["massive"].mean(), here["others_dropped"].mean(), elsewhere["others_dropped"].mean())
        massive, others, others_elsewhere = (f"{mean / PER_BATCH:.3f}" for mean in means)
        missed = f"{1 - here['massive_dropped'].sum() / here['massive'].sum():.1%}"
        shown.add_row(texts, name, massive, missed, others, others_elsewhere)
    Console(width=160).print(shown)
    plain = counts[counts["texts"] == "plain"].groupby(["layer", "filter"], sort=False)[COUNTS].sum().reset_index()
    print(plain.pivot(index="layer", columns="filter", values=COUNTS).to_string())


def filters_of(model: Any, keep: melens.MassiveTokens) -> dict[str, Filter]:
    special = torch.tensor(model.tokenizer.all_special_ids)

    def first_dropped(tokens: Tensor, hidden: Tensor, layer: int) -> Tensor:
        return torch.arange(tokens.shape[1]).expand(tokens.shape) > 0

    def by_norm(tokens: Tensor, hidden: Tensor, layer: int) -> Tensor:
        norms = hidden.norm(dim=-1)
        return norms <= 10 * norms.median()

    def by_state(tokens: Tensor, hidden: Tensor, layer: int) -> Tensor | None:
        block = keep.blocks.get(layer)
        return None if block and block.threshold is None else keep(hidden, layer)

    return {
        "special tokens by id": lambda tokens, hidden, layer: ~torch.isin(tokens, special),
        "first token": first_dropped,
        "norm > 10 × batch median": by_norm,
        "massive_tokens": by_state,
    }


def counted(model: Any, filters: dict[str, Filter]) -> Iterator[dict[str, Any]]:
    """Count what each filter drops in each block of each kind of text."""
    for texts, tokens in kinds_of_texts(model).items():
        for batch in tokens.split(PER_BATCH):
            _, cache = model.run_with_cache(batch, names_filter=lambda name: name.endswith("hook_resid_post"))
            for layer in range(len(model.blocks)):
                hidden = cache[f"blocks.{layer}.hook_resid_post"]
                largest, median = abs_max(hidden), abs_median(hidden)[:, None]
                massive = (largest > CRITERION.min_abs) & (largest > CRITERION.min_ratio * median)
                for name, keep in filters.items():
                    if (kept := keep(batch, hidden, layer)) is not None:
                        yield {
                            "texts": texts, "layer": layer, "filter": name,
                            "massive": int(massive.sum()), "massive_dropped": int((massive & ~kept).sum()),
                            "others_dropped": int((~massive & ~kept).sum()),
                        }  # fmt: skip


def kinds_of_texts(model: Any) -> dict[str, Tensor]:
    """The same texts plain, packed as two trainers of autoencoders do, and with a token 0 that is repeated."""
    plain = cut_texts(model, read_text(), n_texts=N_TEXTS, n_tokens=N_TOKENS)
    packed = {}
    for name in (model.tokenizer.bos_token, END_OF_TEXT):
        ids = plain.clone()
        ids[:, ::32] = model.tokenizer.convert_tokens_to_ids(name)  # four documents a row
        packed[f"four documents, {name} before each"] = ids
    repeated = plain.clone()
    repeated[:, :8] = plain[:, :1]
    return {"plain": plain, **packed, "token 0 eight times": repeated}


if __name__ == "__main__":
    main()
