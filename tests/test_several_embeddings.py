import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recblocks as rb
from recblocks.evaluation.several_embeddings import closest_embedding, round_robin


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 60), st.data())
def test_the_oracle_takes_the_closest_embedding_and_ranks_by_its_distances(users, num, items, dim, size, data):
    number = st.integers(-3, 3)
    vector = st.lists(number, min_size=dim, max_size=dim)
    embeddings = data.draw(st.lists(st.lists(vector, min_size=num, max_size=num), min_size=users, max_size=users))
    corpus = data.draw(st.lists(vector, min_size=items, max_size=items))
    valid = data.draw(st.lists(st.lists(st.booleans(), min_size=num, max_size=num), min_size=users, max_size=users))
    for row in valid:
        row[data.draw(st.integers(0, num - 1))] = True
    asked = [(user, item) for user in range(users) for item in range(items)]
    pairs = tuple(torch.tensor(side) for side in zip(*asked, strict=True))
    table, vectors = torch.tensor(embeddings, dtype=torch.float32), torch.tensor(corpus, dtype=torch.float32)
    table[~torch.tensor(valid)] = float("nan")  # what is not valid is absent
    chosen = closest_embedding(table, vectors, pairs, valid=torch.tensor(valid), max_elements=size)
    for (user, item), flat in zip(asked, chosen.tolist(), strict=True):
        assert flat // num == user
        assert valid[user][flat % num]
        distances = [
            oracles.euclidean_distance(embeddings[user][c], corpus[item]) for c in range(num) if valid[user][c]
        ]
        assert oracles.euclidean_distance(embeddings[user][flat % num], corpus[item]) == min(distances)
    ranks = rb.retrieval_ranks(table.flatten(0, 1), vectors, (chosen, pairs[1]))
    for (user, item), flat, rank in zip(asked, chosen.tolist(), ranks.tolist(), strict=True):
        scores = [-oracles.euclidean_distance(embeddings[user][flat % num], one) for one in corpus]
        assert rank == oracles.positive_rank(scores, item)


def test_the_inner_product_may_choose_another_embedding():
    embeddings = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])
    corpus, pairs = torch.tensor([[1.0, 0.1]]), (torch.tensor([0]), torch.tensor([0]))
    assert closest_embedding(embeddings, corpus, pairs).tolist() == [0]
    assert closest_embedding(embeddings, corpus, pairs, metric="inner_product").tolist() == [1]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 12), st.data())
def test_round_robin_takes_turns_and_shows_an_item_once(num_lists, length, k, data):
    ids = st.integers(-3, 8)
    lists = data.draw(st.lists(st.lists(ids, max_size=length), min_size=num_lists, max_size=num_lists))
    filled = [one + [data.draw(ids)] * (length - len(one)) for one in lists]
    valid = [[place < len(one) for place in range(length)] for one in lists]
    got = round_robin(torch.tensor([filled, filled]), k=k, valid=torch.tensor([valid, valid]))
    want = oracles.round_robin(lists, k)
    for row in range(2):
        assert got.items[row][got.valid[row]].tolist() == want
        assert got.valid[row].tolist() == [place < len(want) for place in range(k)]
        assert got.scores[row].tolist() == [-place if place < len(want) else float("-inf") for place in range(k)]


def test_bad_input():
    embeddings, corpus = torch.ones(2, 3, 4), torch.ones(5, 4)
    pairs = (torch.tensor([1]), torch.tensor([0]))
    cases = [
        (lambda: closest_embedding(embeddings[0], corpus, pairs), ValueError, "embeddings"),
        (lambda: closest_embedding(embeddings, corpus[:, :3], pairs), ValueError, "corpus"),
        (lambda: closest_embedding(embeddings, corpus, (pairs[0] + 1, pairs[1])), ValueError, "positives"),
        (
            lambda: closest_embedding(embeddings, corpus, pairs, valid=torch.zeros(2, 3, dtype=torch.bool)),
            ValueError,
            "valid must leave every user",
        ),
        (lambda: round_robin(torch.ones(1, 2, 3), k=1), TypeError, "items"),
        (lambda: round_robin(torch.ones(1, 2, 3, dtype=torch.int64), k=0), ValueError, "k must"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
