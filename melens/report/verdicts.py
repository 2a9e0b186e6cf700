"""The verdicts on several models, or on one under several options, side by side: what a sweep shows of the claims.

claims = melens.judge([emergence, direction])       # results, or what result.json holds, of any number of models
result = melens.analysis.verdicts(claims)
result.figures["verdicts"], result.tables["claims_by_model"]
"""

from __future__ import annotations

import pandas as pd

from melens.errors import MelensError
from melens.figures import scores
from melens.report.ledger import claims_by_model
from melens.report.result import Figure, Metrics, Result
from melens.report.terminal import verdicts_in_words

__all__ = ["of_what_was_run", "verdicts"]


def verdicts(claims: pd.DataFrame) -> Result:
    """Lay the verdicts of one or several models side by side, and say which claims hold in all of them.

    Args:
        claims: of `melens.judge`; those whose experiment was not run are left out.

    Returns:
        The figure `verdicts`, a column a model, and the tables `claims`, and `claims_by_model` with a row a claim:
        `holds_in` (how many models), `of` (in how many it was measured), and a column a model.

    Raises:
        MelensError: nothing was run that a claim is about.

    Example:
        >>> claims = melens.judge([melens.analysis.emergence(study), melens.analysis.direction(study)])
        >>> result = melens.analysis.verdicts(claims)
        >>> result.tables["claims_by_model"].columns[3:].tolist()
        ['holds_in', 'of', 'tiny']
    """
    claims = of_what_was_run(claims)
    if claims.empty:
        raise MelensError("Nothing was run that a claim is about: give what melens.judge says of some results.")
    models = [model for model in claims["model"].unique() if model != "all models"]
    counts = {model: verdicts_in_words(claims.loc[claims["model"] == model, "verdict"]) for model in models}
    across = claims[(claims["model"] == "all models") & (claims["verdict"] != "not measured")]
    findings = [*counts.items()]
    findings += [(claim["claim"], f"{claim['verdict']}. {claim['note']}") for claim in across.to_dict("records")]
    ledger = claims_by_model(claims)
    if len(models) > 1:
        in_all = ledger[(ledger["holds_in"] == ledger["of"]) & (ledger["of"] > 1)]["claim"].tolist()
        findings.insert(0, ("holds in all runs", "\n".join(in_all) or "no claim"))
    places = {name: place for place, name in enumerate(ledger["id"])}
    in_order = claims.sort_values("id", key=lambda ids: ids.map(places), kind="stable")  # that of families comes last
    expected = "The paper makes its claims of every model it looks at."
    observed = " ".join(f"{model}: {words}" for model, words in counts.items())
    figure = Figure(scores.verdicts(in_order), "every figure", expected, observed)
    tables = {"claims": claims, "claims_by_model": ledger}
    return Result("the paper's claims in each", {}, Metrics(), tables, {"verdicts": figure}, findings)


def of_what_was_run(claims: pd.DataFrame) -> pd.DataFrame:
    """Return the claims of a model whose experiment was run, and those across models beside some; maybe none."""
    claims = claims[~((claims["verdict"] == "not measured") & claims["note"].str.endswith("was not run."))]
    return claims[:0] if set(claims["model"]) <= {"all models"} else claims
