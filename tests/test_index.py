import math
import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recblocks as rb
from recblocks.evaluation.index import ItemIndex

IDS = st.integers(-(2**63), 2**63 - 1)


@given(
    st.lists(IDS, min_size=1, max_size=12, unique=True),
    st.integers(1, 3),
    st.integers(1, 14),
    st.sampled_from(["euclidean", "inner_product"]),
    st.data(),
)
def test_a_flat_index_finds_what_an_exact_search_finds(ids, num_queries, k, metric, data):
    number = st.integers(-3, 3)  # products and distances are exact
    vector = st.lists(number, min_size=2, max_size=2)
    corpus = torch.tensor(data.draw(st.lists(vector, min_size=len(ids), max_size=len(ids))), dtype=torch.float32)
    queries = torch.tensor(data.draw(st.lists(vector, min_size=num_queries, max_size=num_queries))).float()
    pair = st.tuples(st.integers(0, num_queries - 1), st.sampled_from(ids) | IDS)
    excluded = data.draw(st.lists(pair, max_size=12))
    index = ItemIndex(torch.tensor(ids), corpus, metric=metric)
    pairs = tuple(torch.tensor([one[side] for one in excluded], dtype=torch.int64) for side in (0, 1))
    found = index.search(queries, k=k, excluded=pairs)
    rows = [(q, ids.index(i)) for q, i in excluded if i in ids]
    want = rb.retrieve(
        queries,
        corpus,
        k=k,
        metric=metric,
        excluded=tuple(torch.tensor([one[side] for one in rows], dtype=torch.int64) for side in (0, 1)),
    )
    assert torch.equal(found.valid, want.valid)
    assert torch.equal(found.scores, want.scores)  # ties may stand in another order, their scores may not
    for q in range(num_queries):
        items = found.items[q][found.valid[q]].tolist()
        assert len(set(items)) == len(items)
        assert not {(q, item) for item in items} & set(excluded)
        for item, score in zip(items, found.scores[q].tolist(), strict=False):
            query, vector = queries[q].tolist(), corpus[ids.index(item)].tolist()
            if metric == "euclidean":
                assert score == -sum((a - b) ** 2 for a, b in zip(query, vector, strict=True))
            else:
                assert score == sum(a * b for a, b in zip(query, vector, strict=True))
        assert found.items[q][~found.valid[q]].eq(0).all()


def unit(count, dim, seed):
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
def test_the_graph_finds_most_of_the_exact_answer_and_more_with_a_longer_search(metric):
    """Random unit vectors in 16 dimensions, ten nearest of 5000."""
    ids, corpus, queries = torch.randperm(5000) - 2500, unit(5000, 16, 0), unit(200, 16, 1)
    exact = ItemIndex(ids, corpus, metric=metric).search(queries, k=10).items
    recall = {}
    for ef_search in (10, 64):
        index = ItemIndex(ids, corpus, kind="hnsw", metric=metric, ef_search=ef_search)
        found = index.search(queries, k=10)
        assert found.valid.all()
        recall[ef_search] = (found.items[:, :, None] == exact[:, None]).any(2).double().mean().item()
    assert recall[10] < recall[64]
    assert recall[64] > 0.95


def test_the_graph_respects_exclusions():
    ids, corpus, queries = torch.arange(1000) * 7, unit(1000, 8, 0), unit(50, 8, 1)
    index = ItemIndex(ids, corpus, kind="hnsw")
    first = index.search(queries, k=10)
    rows = torch.arange(50)[:, None].expand(50, 10)
    second = index.search(queries, k=10, excluded=(rows.flatten(), first.items.flatten()))
    assert second.valid.all()
    assert not (second.items[:, :, None] == first.items[:, None]).any()


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
def test_a_loaded_index_answers_alike(tmp_path, kind, metric):
    ids, corpus, queries = torch.randperm(500) - 250, unit(500, 8, 0) * 2, unit(20, 8, 1)
    index = ItemIndex(ids, corpus, kind=kind, metric=metric, ef_search=17)
    index.save(tmp_path / "items.faiss")
    index.save(tmp_path / "items.faiss")
    assert [path.name for path in tmp_path.iterdir()] == ["items.faiss"]
    loaded = ItemIndex.load(tmp_path / "items.faiss")
    assert len(loaded) == 500
    excluded = (torch.arange(20), ids[:20])
    for before, after in zip(
        index.search(queries, excluded=excluded), loaded.search(queries, excluded=excluded), strict=True
    ):
        assert torch.equal(before, after)


def test_a_saved_index_has_the_mode_of_any_new_file(tmp_path):
    index, path = ItemIndex(torch.arange(3), torch.eye(3)), tmp_path / "items.faiss"
    before = os.umask(0o027)
    try:
        index.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_save_killed_leaves_the_old_file_or_the_new_one(tmp_path, when):
    path = tmp_path / "items.faiss"
    ItemIndex(torch.arange(3), torch.eye(3)).save(path)
    code = (
        "import os, pathlib, signal, sys, torch, recblocks\n"
        "replace, fsync, synced = pathlib.Path.replace, os.fsync, []\n"
        "os.fsync = lambda number: (fsync(number), synced.append(os.fstat(number).st_ino))\n"
        "def replace_and_die(source, target):\n"
        "    assert synced == [source.stat().st_ino], 'the file must be on the disk before its name is'\n"
        "    if sys.argv[2] == 'after':\n"
        "        replace(source, target)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pathlib.Path.replace = replace_and_die\n"
        "recblocks.ItemIndex(torch.arange(5), torch.eye(5)).save(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), when], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(ItemIndex.load(path)) == (3 if when == "before" else 5)


def test_a_reader_of_the_old_file_keeps_it(tmp_path):
    path = tmp_path / "items.faiss"
    ItemIndex(torch.arange(3), torch.eye(3)).save(path)
    old = path.read_bytes()
    with path.open("rb") as reader:
        ItemIndex(torch.arange(5), torch.eye(5)).save(path)
        assert reader.read() == old
    assert len(ItemIndex.load(path)) == 5


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "items.faiss"
    ItemIndex(torch.arange(50), unit(50, 8, 0)).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="whole index"):
        ItemIndex.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="whole index"):
        ItemIndex.load(path)
    with pytest.raises(FileNotFoundError, match="path"):
        ItemIndex.load(tmp_path / "none")
    import faiss

    faiss.write_index(faiss.IndexFlatL2(3), str(path))
    with pytest.raises(ValueError, match="IndexFlat"):
        ItemIndex.load(path)


def test_empty_index_and_no_queries():
    index = ItemIndex(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3))
    found = index.search(torch.ones(2, 3), k=4, excluded=(torch.zeros(1, dtype=torch.int64),) * 2)
    assert found.items.shape == (2, 4)
    assert not found.valid.any()
    assert (found.scores == -math.inf).all()
    assert ItemIndex(torch.arange(2), torch.eye(2)).search(torch.ones(0, 2), k=1).items.shape == (0, 1)


def test_without_faiss_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "import torch, recblocks\n"
        "try:\n    recblocks.ItemIndex(torch.arange(2), torch.eye(2))\n"
        "except ImportError as error:\n    assert 'recblocks[retrieval]' in str(error), error\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


GOOD = {"ids": torch.arange(3), "vectors": torch.eye(3)}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ItemIndex(**{**GOOD, "ids": torch.ones(3)}), TypeError, ["ids", "int64"]),
        (lambda: ItemIndex(**{**GOOD, "ids": torch.zeros(3).long()}), ValueError, ["ids", "once", "2 repeats"]),
        (lambda: ItemIndex(**{**GOOD, "vectors": torch.eye(2)}), ValueError, ["vectors", "(3, D)", "(2, 2)"]),
        (lambda: ItemIndex(**{**GOOD, "vectors": torch.eye(3) / 0}), ValueError, ["vectors", "finite"]),
        (lambda: ItemIndex(**GOOD, kind="ivf"), ValueError, ["kind", "'hnsw'", "'ivf'"]),
        (lambda: ItemIndex(**GOOD, metric="cosine"), ValueError, ["metric", "'cosine'"]),
        (lambda: ItemIndex(**GOOD, num_links=0), ValueError, ["num_links"]),
        (lambda: ItemIndex(**GOOD).search(torch.ones(2, 2)), ValueError, ["queries", "(Q, 3)", "(2, 2)"]),
        (lambda: ItemIndex(**GOOD).search(torch.ones(2, 3) / 0), ValueError, ["queries", "finite"]),
        (lambda: ItemIndex(**GOOD).search(torch.ones(2, 3), k=0), ValueError, ["k", "at least 1"]),
        (lambda: ItemIndex(**GOOD).search(torch.ones(2, 3), excluded=3), TypeError, ["excluded", "(query, id)"]),
        (
            lambda: ItemIndex(**GOOD).search(torch.ones(2, 3), excluded=(torch.arange(3), torch.arange(3))),
            ValueError,
            ["excluded[0]", "[0, 2)", "2"],
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
