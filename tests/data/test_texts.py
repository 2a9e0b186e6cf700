import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import pytest
import torch
from planted import bridge, plain_model
from tokenizers.processors import TemplateProcessing

from melens import MelensError
from melens.data.texts import bos_prefix, cut_texts, read_text


def test_every_machine_has_a_text():
    assert len(read_text()) > 100_000


def test_a_users_file(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n\ntwo")
    lines.write_text(json.dumps({"body": "one"}) + "\n" + json.dumps({"body": "two"}))
    assert read_text(str(plain)) == "one\n\ntwo" == read_text(str(lines), column="body")
    with pytest.raises(MelensError, match="line 1: there is no column 'text', only body"):
        read_text(str(lines))
    for wrong in ("nowhere.txt", "nowhere.CSV", "./nowhere/at/all"):
        with pytest.raises(MelensError, match=f"There is no file {Path(wrong)}"):
            read_text(wrong)
    for wrong in ("nowhere", "no/where/at/all"):
        with pytest.raises(MelensError, match=f"data.text is '{wrong}'; it must be an existing file or a dataset"):
            read_text(wrong)


def test_blank_rows_are_texts_and_null_and_numbers_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    assert read_text(str(path)) == "one\n\n\n\ntwo"
    for value in ("null", "3", '["two"]'):
        path.write_text(f'{{"text": "one"}}\n\n{{"text": {value}}}\n')
        with pytest.raises(MelensError, match=re.escape(f"a.jsonl, line 3: 'text' is {value}; it must be a text")):
            read_text(str(path))


def test_a_datasets_column_holds_texts(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "label": [1, 2], "gap": ["one", None]})
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=TimeoutError))
    with pytest.raises(MelensError, match="The dataset org/name could not be loaded from the hub \\(TimeoutError"):
        read_text("org/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    assert read_text("org/name") == "onetwo"
    for column, message in (
        ("body", "The dataset org/name has no column 'body'.*text, label, gap"),
        ("label", "org/name, row 1: 'label' is 1; it must be a text"),
        ("gap", "org/name, row 2: 'gap' is None"),
    ):
        with pytest.raises(MelensError, match=message):
            read_text("org/name", column=column)


def test_pieces_are_of_one_length_and_begin_differently(embedded):
    texts = cut_texts(embedded, read_text(), n_texts=12, n_tokens=40)
    assert texts.shape == (12, 40)
    assert len(set(texts[:, 0].tolist())) == 12
    with_bos = cut_texts(embedded, read_text(), n_texts=12, n_tokens=40, bos="true")
    assert with_bos.shape == (12, 40)
    assert set(with_bos[:, 0].tolist()) == {embedded.tokenizer.bos_token_id}
    assert torch.equal(with_bos[:, 1:], texts[:, :39])


def test_too_little_text_and_too_long_pieces_are_told(embedded):
    with pytest.raises(MelensError, match="too few for 3 pieces of 50"):
        cut_texts(embedded, "a few words only", n_texts=3, n_tokens=50)
    with pytest.raises(MelensError, match="lower it to the model's context"):
        cut_texts(embedded, read_text(), n_texts=3, n_tokens=100_000)


def test_a_model_without_a_tokenizer_gets_random_tokens():
    texts = cut_texts(bridge(plain_model("llama")), "", n_texts=5, n_tokens=9, seed=1)
    assert texts.shape == (5, 9)
    assert len(set(texts[:, 0].tolist())) == 5


def test_texts_begin_as_prompts_do(embedded):
    tokenizer = copy.deepcopy(embedded.tokenizer)
    first, second = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert bos_prefix(tokenizer, "auto") == bos_prefix(tokenizer, "false") == bos_prefix(None, "true") == []
    assert bos_prefix(tokenizer, "true") == [first]
    special = [(tokenizer.bos_token, first), (tokenizer.eos_token, second)]
    for template, prefix in (("{0} $A", [first]), ("{0} {1} $A", [first, second]), ("{0} $A {1}", [first])):
        single = template.format(tokenizer.bos_token, tokenizer.eos_token)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
        assert bos_prefix(tokenizer, "auto") == prefix
        assert bos_prefix(tokenizer, "false") == []
    model = SimpleNamespace(tokenizer=tokenizer, cfg=embedded.cfg)
    assert set(cut_texts(model, read_text(), n_texts=3, n_tokens=9)[:, 0].tolist()) == {first}
    tokenizer.bos_token = None
    with pytest.raises(MelensError, match="no BOS token"):
        bos_prefix(tokenizer, "true")
