import json

import pytest
import torch
from planted import bridge, plain_model

from melens import MelensError
from melens.texts import cut_texts, read_text


def test_every_machine_has_a_text():
    assert len(read_text()) > 100_000


def test_a_users_file(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n\ntwo")
    lines.write_text(json.dumps({"body": "one"}) + "\n" + json.dumps({"body": "two"}))
    assert read_text(str(plain)) == "one\n\ntwo" == read_text(str(lines), column="body")
    with pytest.raises(MelensError, match="line 1: expected"):
        read_text(str(lines))
    for wrong in ("nowhere.txt", "nowhere", "./nowhere/at/all"):
        with pytest.raises(MelensError, match="there is no such file"):
            read_text(wrong)


def test_pieces_are_of_one_length_and_begin_differently(embedded):
    texts = cut_texts(embedded, read_text(), n_texts=12, n_tokens=40)
    assert texts.shape == (12, 40)
    assert len(set(texts[:, 0].tolist())) == 12
    with_bos = cut_texts(embedded, read_text(), n_texts=12, n_tokens=40, bos="true")
    assert with_bos.shape == (12, 40)
    assert set(with_bos[:, 0].tolist()) == {embedded.tokenizer.bos_token_id}
    assert torch.equal(with_bos[:, 1:], texts[:, :39])


def test_too_little_text_and_too_long_pieces_are_told(embedded):
    with pytest.raises(MelensError, match="too few for 3 of 50"):
        cut_texts(embedded, "a few words only", n_texts=3, n_tokens=50)
    with pytest.raises(MelensError, match="more than the model's context"):
        cut_texts(embedded, read_text(), n_texts=3, n_tokens=100_000)


def test_a_model_without_a_tokenizer_gets_random_tokens():
    texts = cut_texts(bridge(plain_model("llama")), "", n_texts=5, n_tokens=9, seed=1)
    assert texts.shape == (5, 9)
    assert len(set(texts[:, 0].tolist())) == 5
