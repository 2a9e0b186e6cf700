"""The verdicts as a document: by hand-made claims, and the documents against what they rest on."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from melens import MelensError
from melens.claims.paper import CLAIMS
from melens.report.ledger import KEPT, claims_by_model, claims_in_markdown, marked_parts, update_findings
from melens.report.terminal import number_with_interval
from melens.report.verdicts import verdicts

ROOT = Path(__file__).parents[2]
CLAIM = {
    "id": "a", "claim": "It is large", "source": "section 3", "statistic": "size", "criterion": "≥ 3",
    "value": 4.0, "low": 3.5, "high": 4.5, "verdict": "holds", "note": "", "former_verdict": None,
}  # fmt: skip


RATIOS = {
    "me_layer_by_ratio": {"500": 2, "1000": 11, "2000": None},
    "changed_by_ratio": {"500": ["a", "b"], "2000": []},
}


def test_it_is_said_what_another_ratio_changes():
    assert claims_in_markdown({"claims": [], "metrics": {"stability": RATIOS}}).splitlines()[2] == (
        "By how many medians an entry must exceed to be massive: at 500 the ME layer is block 2, and 2 verdicts "
        "change; at 1,000 the ME layer is block 11; at 2,000 there is no ME layer."
    )


def test_claims_are_written_by_verdict_with_what_was_measured():
    unlike = CLAIM | {"id": "b", "claim": "a|b", "verdict": "does not hold", "low": None, "former_verdict": "holds"}
    unmeasured = CLAIM | {"id": "c", "verdict": "not measured", "value": None, "note": "It was not run."}
    assert claims_in_markdown({"claims": [unlike, unmeasured, CLAIM]}) == (
        "Of 3 claims, 1 holds, 1 does not hold, 1 not measured.\n\n"
        "| holds | measured here |\n| --- | --- |\n"
        "| It is large (section 3) | **4 (3.5 to 4.5)**: size. Threshold: ≥ 3. |\n\n"
        "| does not hold | measured here |\n| --- | --- |\n"
        "| a\\|b (section 3) | **4**: size. Threshold: ≥ 3. By the former threshold: holds. |\n\n"
        "| not measured | measured here |\n| --- | --- |\n"
        "| It is large (section 3) | size. Threshold: ≥ 3. It was not run. |\n"
    )


@pytest.mark.parametrize(
    ("value", "words"), [(0.999978, "0.999978 (0.9999 to 1)"), (1.0, "1 (1 to 1)"), (0.9912, "0.991 (1 to 1)")]
)
def test_a_cosine_near_1_is_not_rounded_to_it(value, words):
    assert number_with_interval({"value": value, "low": 0.9999, "high": 1.0}) == words


def test_what_holds_in_all_models_comes_first_then_what_holds_in_most():
    by_model = {
        "a": ("does not hold", "does not hold"), "b": ("holds", "holds in part"), "c": ("holds", "holds"),
        "d": ("not measured", "holds"), "e": ("not measured", "not measured"),
    }  # fmt: skip
    rows = [
        {"model": model, "id": name, "claim": name, "source": "", "verdict": of_model[place]}
        for place, model in enumerate(("x", "y"))
        for name, of_model in by_model.items()
    ]
    rows.append({"model": "all models", "id": "family", "claim": "family", "source": "", "verdict": "holds"})
    table = claims_by_model(pd.DataFrame(rows))
    assert table["id"].tolist() == ["c", "d", "b", "a", "e"]
    assert table["holds_in"].tolist() == [2, 1, 1, 0, 0]
    assert table["of"].tolist() == [2, 1, 2, 2, 0]
    assert table.loc[2, ["x", "y"]].tolist() == ["holds", "holds in part"]
    result = verdicts(pd.DataFrame(rows).assign(note=""))
    assert result.findings[0] == ("holds in all runs", "c")
    assert [name for name, _ in result.findings[1:]] == ["x", "y", "family"]
    assert list(result.figures["verdicts"].plot.data[0].x) == ["x", "y", "all models"]
    with pytest.raises(MelensError, match="Nothing was run that a claim is about"):
        verdicts(pd.DataFrame(rows).assign(verdict="not measured", note="exp=sinks was not run."))


def test_the_documents_are_filled_from_a_result_and_what_they_rest_on_is_kept(tmp_path):
    run, readme, findings = tmp_path / "run", tmp_path / "README.md", tmp_path / "experiments" / "FINDINGS.md"
    for folder in (run, tmp_path / ".github", tmp_path / "experiments"):
        folder.mkdir()
    content = {
        "experiment": "all", "status": "ok", "model": {"name": "m", "n_layers": 3, "dtype": "float32", "path": "/x"},
        "figures": {"emergence": {"here": "It rises."}, "sink_mass": {"here": "They sink."}, "norms": {}},
        "claims": [CLAIM], "metrics": {"emergence": {}, "sinks": {}, "stability": RATIOS}, "config": {},
        "environment": {"git_commit": "abc", "finished": "now", "versions": {}},
    }  # fmt: skip
    (run / "result.json").write_text(json.dumps(content))
    readme.write_text("A\n<!-- findings: caption -->\nold\n<!-- end -->\nB\n<!-- findings: summary -->\n<!-- end -->\n")
    findings.write_text("<!-- findings: claims -->\nold\n<!-- end -->\nC\n")
    update_findings(run, tmp_path)
    assert readme.read_text() == (
        "A\n<!-- findings: caption -->\n*m. It rises. They sink.*\n<!-- end -->\nB\n"
        "<!-- findings: summary -->\n**m**: Of 1 claim, 1 holds.\n<!-- end -->\n"
    )
    assert (
        "| It is large (section 3) | **4 (3.5 to 4.5)**: size. Threshold: ≥ 3. |\n<!-- end -->" in findings.read_text()
    )
    assert "/x" not in (tmp_path / KEPT).read_text()
    before = readme.read_text()
    update_findings(run, tmp_path)
    assert readme.read_text() == before
    findings.write_text("no mark\n")
    with pytest.raises(MelensError, match="has no part between <!-- findings: claims -->"):
        update_findings(run, tmp_path)
    assert readme.read_text() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ({"experiment": "ffn"}, "is of exp=ffn"),
        ({"experiment": "all", "metrics": {"emergence": {}}}, "has no sinks and stability"),
    ],
)
def test_what_is_no_result_of_all_experiments_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "result.json").write_text(json.dumps({"status": "ok", **content}))
    with pytest.raises(MelensError, match=words):
        update_findings(tmp_path, tmp_path)


def test_the_documents_say_what_was_measured():
    kept = json.loads((ROOT / KEPT).read_text("utf-8"))
    for file, parts in marked_parts(kept).items():
        document = (ROOT / file).read_text("utf-8")
        for name, part in parts.items():
            marked = re.search(rf"<!-- findings: {name} -->\n(.*?)<!-- end -->", document, re.DOTALL)
            assert marked is not None
            assert marked[1] == part
    claims = {claim.id: claim for claim in CLAIMS}
    for claim in kept["claims"]:  # a claim that was reworded or a threshold that was moved makes the documents anew
        assert (claim["claim"], claim["criterion"]) == (claims[claim["id"]].claim, claims[claim["id"]].criterion)
