"""The paper sentence by sentence: each statement of fact, in our words, is judged by claims or says why by none.

    melens.claims.sentences.sentences(result.claims)   # with the verdicts on a model

`sentences.csv` has them in the order of the paper: abstract, contributions, sections with their takeaways, appendices.
Definitions, descriptions of related work and of the authors' settings are no statements about models, and are left out.
"""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

__all__ = ["sentences"]


def sentences(claims: pd.DataFrame | None = None) -> pd.DataFrame:
    """Read the statements of the paper.

    Args:
        claims: of `melens.judge`, of one model.

    Returns:
        `where` (the section), `says`, `claims` (a tuple of the ids of the claims that judge it) and `why_not` (why none
        does); with `claims` also `verdicts`, by id the verdict of each of them that was judged.
    """
    with files("melens.claims").joinpath("sentences.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file, keep_default_na=False)
    table["claims"] = [tuple(ids.split()) for ids in table["claims"]]
    if claims is not None:
        found = dict(zip(claims["id"], claims["verdict"], strict=True))
        verdicts = [{name: found[name] for name in ids if name in found} for ids in table["claims"]]
        table["verdicts"] = pd.Series(verdicts, dtype=object)
    return table
