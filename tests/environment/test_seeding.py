"""Code of others that draws at random leaves the user's generators as they were."""

import random

import numpy as np
import pytest
import torch

import melens
from melens.environment.seeding import seeded


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_what_is_seeded_is_the_same_every_time_and_changes_no_draw_of_the_user():
    seed_all(3)
    alone = drawn(), drawn()
    seed_all(3)
    before = drawn()
    for _ in range(2):
        with seeded(5):
            inside = drawn()
    assert (before, drawn()) == alone
    seed_all(5)
    assert inside == drawn()


def test_an_error_gives_the_states_back_too():
    seed_all(3)
    alone = drawn()
    seed_all(3)
    with pytest.raises(ZeroDivisionError), seeded(5):
        raise ZeroDivisionError
    assert drawn() == alone


def test_the_seed_of_gpus_that_were_never_used_comes_back(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    torch.manual_seed(3)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with seeded(5):
        pass
    assert seeds[-1] == 3


def test_a_random_model_is_drawn_apart_from_the_user_s_numbers():
    seed_all(3)
    alone = drawn()
    seed_all(3)
    melens.load_model("random", config={"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 20})
    assert drawn() == alone
