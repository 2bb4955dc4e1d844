"""The benchmarks' runner: what is wrong is not timed, and turns a run red."""

import contextlib
import importlib
import importlib.util
import itertools
import json
import math
import pathlib
import types

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import (
    _comparison,
    _machine,
    bench_action_transformer,
    bench_auc,
    bench_import,
    bench_objectives,
    bench_retrieval,
    bench_sampled_softmax,
    bench_simulator,
    bench_sketch,
    bench_time,
    draw,
)
from benchmarks._comparison import Comparison, extra_bytes, is_wrong, measure, missed
from benchmarks._timing import Table, three_digits
from recblocks import ActionTransformer

CPU = torch.device("cpu")
RATES = _machine.Rates(flops=1e9, bytes=1e9)


def squares(**changed):
    def ours(x):
        return [x * x, x.sum()]

    given = {
        "op": "squares",
        "sizes": {"numbers": 1000},
        "dtype": "float32",
        "batches": [torch.rand(1000, generator=torch.Generator().manual_seed(seed)) + 1 for seed in range(3)],
        "exact": lambda x: [x.double() ** 2, x.double().sum()],
        "forms": {"ours": ours, "theirs": lambda x: [x.pow(2), x.sum()]},
        "allowed": 1e-6,
        "moved": 8000.0,
    }
    return Comparison(**{**given, **changed})


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(runner, "measure_rates", lambda *_: RATES)
    monkeypatch.setattr(runner, "keep_memory", lambda: None)


def test_what_is_right_is_timed():
    ours, theirs = measure(squares(), RATES, CPU)
    for row in (ours, theirs):
        assert row.error <= 1e-6
        assert row.spread[0] <= row.seconds <= row.spread[1]
        assert row.of_floor == pytest.approx(8000 / 1e9 / row.seconds)
    assert ours.extra_bytes == 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: [x * x * 1.001, x.sum()],
        lambda x: [x * x, x.sum() + 1],
        lambda x: [torch.where(x == x[7], torch.nan, x * x), x.sum()],
        lambda x: [(x * x)[:-1], x.sum()],
        lambda x: [x * x],
        lambda x: [torch.where(x == x.max(), x.min(), x) ** 2, x.sum()],
    ],
)
def test_what_is_wrong_is_not_timed(wrong, monkeypatch, capsys):
    timed = []
    monkeypatch.setattr(_comparison, "runs", lambda calls, **_: timed.extend(calls) or {name: [1, 2] for name in calls})
    one = squares(forms={"ours": wrong, "theirs": lambda x: [x.pow(2), x.sum()]})
    rows = measure(one, RATES, CPU)
    assert timed == ["theirs"]
    assert is_wrong(rows)
    assert "ours is wrong" in missed(one, rows)[0]
    _comparison.show(one, rows)
    assert "not timed" in capsys.readouterr().out


def test_a_form_that_is_wrong_on_one_batch_alone_is_wrong():
    right = squares()
    last = right.batches[-1]
    one = right._replace(forms={"ours": lambda x: [x * x * (2 if x is last else 1), x.sum()]})
    assert is_wrong(measure(one, RATES, CPU))


def test_a_peer_that_is_wrong_is_not_timed_and_turns_nothing_red(capsys):
    one = squares(forms={"ours": lambda x: [x * x, x.sum()], "theirs": lambda x: [x, x.sum()]}, bars={"theirs": 2.0})
    rows = measure(one, RATES, CPU)
    assert not is_wrong(rows)
    assert rows[1].seconds is None
    assert missed(one, rows) == []
    _comparison.show(one, rows)
    assert "theirs  wrong by" in capsys.readouterr().out


def test_a_bar_that_is_not_met_is_said(capsys):
    one = squares(bars={"theirs": 1e9}, absent={"Liger": "not installed"})
    rows = measure(one, RATES, CPU)
    (said,) = missed(one, rows)
    assert said.endswith("times theirs, not 1e+09")
    _comparison.show(one, rows)
    out = capsys.readouterr().out
    assert f"missed: {said}" in out
    assert "absent: not installed" in out


def test_forms_are_given_the_batches_in_turn():
    given = []
    one = squares(forms={"ours": lambda x: given.append(id(x)) or [x * x, x.sum()]})
    measure(one, RATES, CPU)
    in_turn = given[len(one.batches) :]
    assert all(one != other for one, other in itertools.pairwise(in_turn))


def test_extra_bytes_are_those_held_at_once_and_not_given_back():
    def call():
        first, second = torch.zeros(1000), torch.zeros(2000)
        third = first + 1
        del first, second
        fourth = third + 1
        return [fourth, fourth[:10]]

    assert 12000 <= extra_bytes(call, CPU) < 12064  # torch makes tensors of a few bytes of numbers


def small(monkeypatch):
    monkeypatch.setattr(bench_time, "NUM_USERS", 2)
    monkeypatch.setattr(bench_time, "SLOTS", 8)
    monkeypatch.setattr(bench_time, "compiled", lambda *_: {})


def test_a_run_is_written_down_and_set_beside_an_earlier_one(monkeypatch, tmp_path, capsys):
    small(monkeypatch)
    path = tmp_path / "new" / "run.json"
    assert runner.main(["time", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["machine"]["commit"] != ""
    (one,) = found["results"]
    assert one["sizes"] == {"users": 2, "slots": 8}
    assert [row["form"] for row in one["rows"]] == ["recblocks", "float64"]
    found["machine"]["threads"] += 1
    path.write_text(json.dumps(found))
    capsys.readouterr()
    assert runner.main(["time", "--against", str(path)]) == 0
    out = capsys.readouterr().out
    assert "now of before" in out
    assert "another threads" in out


def test_a_run_that_is_stopped_has_written_what_it_saw(monkeypatch, tmp_path):
    small(monkeypatch)
    right = bench_time.comparisons

    def stopped(device):
        yield from right(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_time, "comparisons", stopped)
    path = tmp_path / "run.json"
    with pytest.raises(KeyboardInterrupt):
        runner.main(["time", "--json", str(path)])
    assert len(json.loads(path.read_text())["results"]) == 1


def test_tables_are_printed_written_down_and_drawn(monkeypatch, tmp_path, capsys):
    rows = [("one", 0.00012345), ("two", 7)]
    table = Table("import, ms", ("what", "ms"), rows, ["7 ms two, not 5"])
    monkeypatch.setattr(bench_import, "tables", lambda: iter([table]))
    path = tmp_path / "run.json"
    assert runner.main(["import", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "one   0.000123" in out
    assert "missed: 7 ms two, not 5" in out
    found = json.loads(path.read_text())
    assert found["results"] == []
    written = {"title": "import, ms", "header": ["what", "ms"], "rows": [list(row) for row in rows]}
    assert found["tables"] == [written | {"missed": table.missed}]
    draw.main([str(path), str(tmp_path)])
    page = (tmp_path / "index.md").read_text()
    drawn = "## Import, ms\n\n| what | ms |\n| --- | --- |\n| one | 0.000123 |\n| two | 7 |\n"
    assert page.endswith(f"{drawn}\nMissed: 7 ms two, not 5.\n")
    assert Table(**written).missed == ()  # as an older run wrote it


def test_every_benchmark_begins_with_seed_0(monkeypatch):
    drawn = []
    for module in (bench_import, bench_simulator):
        monkeypatch.setattr(module, "tables", lambda: drawn.append(torch.rand(3)) or ())
    assert runner.main(["import", "simulator"]) == 0
    want = torch.rand(3, generator=torch.Generator().manual_seed(0))
    for one in drawn:
        torch.testing.assert_close(one, want, rtol=0, atol=0)
    assert len(drawn) == 2


def test_rates_are_measured_without_a_draw_of_the_benchmarks(monkeypatch):
    monkeypatch.setattr(_machine, "SIDE", 8)
    monkeypatch.setattr(_machine, "COPIED", 64)
    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        rates = _machine.measure_rates(CPU, dtype)
        assert rates.flops > 0
        assert rates.bytes > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("module", "met", "short", "said"),
    [
        (bench_import, ("anew", 90.0, 100.0, 900.0), ("anew", 90.0, 101.0, 102.0), ["101 ms anew, not 100"]),
        (
            bench_sketch,
            (8192, "5 x 27", 10.0, 50.0, 50.0, 5.0, 5.0),
            (8192, "5 x 27", 10.0, 49.0, 40.0, 4.9, 4.0),
            [f"{times} times Apache, from a {given}, not 5: 8,192 ids a call, 5 x 27"
             for times, given in (("4.90", "tensor"), ("4.00", "list"))],
        ),
        (
            bench_objectives,
            ("dense all action", 7000, 1.0, 1.0, 500, ">= 500"),
            ("dense all action", 7000, 1.0, 1.0, 499, ">= 500"),
            ["499 thousand pairs/s of dense all action, not 500"],
        ),
        (bench_objectives, ("next action", 61, 1.0, 1.0, 15, ""), ("SASRec", 61, 1.0, 1.0, 15, ""), []),
        (
            bench_simulator,
            ("markov", 3000, 9000, 0.01, 300.0),
            ("markov", 2990, 9000, 0.01, 299.0),
            ["299 thousand actions/s of markov, not 300"],
        ),
    ],
)  # fmt: skip
def test_a_table_says_which_bars_its_rows_miss(module, met, short, said):
    assert module.missed([met]) == []
    assert module.missed([met, short]) == said


@pytest.mark.parametrize(
    "path", sorted((pathlib.Path(runner.__file__).parent / "results").glob("*.json")), ids=lambda path: path.stem
)
def test_what_is_on_record_says_which_bars_were_missed(path):
    judges = {
        "import": bench_import,
        "anchors": bench_objectives,
        "Simulator,": bench_simulator,
        "sketch": bench_sketch,
    }
    judged = 0
    for table in json.loads(path.read_text())["tables"]:
        judge = judges.get(table["title"].split()[0])
        assert table["missed"] == (judge.missed(table["rows"]) if judge else [])
        judged += judge is not None
    assert judged == len(judges)


def test_every_benchmark_compares_or_has_tables():
    for path in pathlib.Path(runner.__file__).parent.glob("bench_*.py"):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        assert hasattr(module, "comparisons") or hasattr(module, "tables")


def test_a_kernel_that_is_broken_on_purpose_turns_the_run_red(monkeypatch, capsys):
    small(monkeypatch)
    right = bench_time.encode_action_times
    monkeypatch.setattr(bench_time, "encode_action_times", lambda t, *how: right(t + 1, *how))
    assert runner.main(["time"]) == 1
    assert "recblocks is wrong by" in capsys.readouterr().out


def seen(op, **sizes):
    """A result of a run: ours, a slower peer, and one that is wrong."""
    seconds = 1e-6 * math.prod(sizes.values())
    rows = [
        {
            "form": name,
            "error": 1e-7,
            "seconds": time,
            "spread": [0.9 * time, 1.2 * time],
            "extra_bytes": 2**21,
            "of_floor": 0.5,
        }
        for name, time in (("ours", seconds), ("peer", 2 * seconds))
    ]
    rows.append(
        {"form": "broken", "error": 3.0, "seconds": None, "spread": None, "extra_bytes": None, "of_floor": None}
    )
    kept = {"dtype": "float32", "allowed": 1e-6, "bars": {"peer": 3.0}, "absent": {"Liger": "not installed"}}
    return {"op": op, "sizes": sizes, "rows": rows, "missed": ["2.00 times peer, not 3"], **kept}


def test_what_was_seen_becomes_a_page_of_tables_and_pictures(tmp_path):
    machine = {"processor": "a CPU", "threads": 2, "versions": {"torch": "2.13"}, "commit": "0123456789abcdef"}
    results = [seen("loss", rows=4096, columns=100)]
    results += [seen("loss as rows double", rows=1024 * 2**at, columns=100) for at in range(4)]
    found = {"machine": machine, "rates": {"float32": {"flops": 2e11, "bytes": 2e10}}, "results": results}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(found))
    draw.main([str(path), str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.md").read_text()
    assert "a CPU, 2 threads; torch 2.13; commit 0123456789ab. products of float32 200 GFLOP/s" in page
    assert "above 100% something was faster than the rates measured first" in page
    assert "| rows 4,096, columns 100 | ours | 410 | 1.00 | 50% | 2 | 1.0e-07 |" in page
    assert "| rows 4,096, columns 100 | peer | 819 | 2.00 | 50% | 2 | 1.0e-07 |" in page
    assert "| broken | wrong: not timed |" in page
    assert "| Liger | absent: not installed |" in page
    assert page.count("Missed: 2.00 times peer, not 3.") == 5
    for name in ("loss-0.svg", "loss-as-rows-double-0.svg"):
        assert name in page
        picture = (tmp_path / "page" / name).read_text()
        assert picture.startswith("<?xml")
    assert len(list((tmp_path / "page").iterdir())) == 3


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs the interpreter"
)
def test_what_is_for_a_gpu_is_right_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(bench_sampled_softmax, "compiled", lambda *_: {})
    one = bench_sampled_softmax.in_bfloat16(CPU, num_rows=48, num_columns=80)
    triton, *others = measure(one._replace(rounds=2), RATES, CPU)
    assert triton.form == "triton"
    assert triton.seconds is not None
    assert [row.form for row in others if row.seconds is not None] == ["chunked", "eager"]


def test_what_peers_compute_is_ours_where_a_row_owns_its_target(monkeypatch):
    monkeypatch.setattr(bench_sampled_softmax, "compiled", lambda *_: {})
    monkeypatch.setattr(bench_sampled_softmax, "PEERS", {"nobody": ("no_such_module", None)})
    one = bench_sampled_softmax.plain(CPU, num_rows=48, num_columns=80)
    assert one.absent == {"nobody": "not installed"}
    rows = measure(one._replace(rounds=2), RATES, CPU)
    assert [row.form for row in rows if row.seconds is not None] == ["recblocks", "eager"]


def test_what_is_compressed_on_a_gpu_is_right_by_either_way(monkeypatch):
    monkeypatch.setattr(bench_action_transformer, "NUM_OF_A_BATCH", 3)
    torch.manual_seed(0)
    model = ActionTransformer(item_dim=32, num_action_types=6, type_dim=32).eval()
    rows = measure(bench_action_transformer.in_bfloat16(model, CPU)._replace(rounds=2), RATES, CPU)
    assert [row.form for row in rows if row.seconds is not None] == ["the user once", "a row a candidate"]


@pytest.mark.parametrize("here", [True, False])
def test_what_is_retrieved_is_right_in_every_form(here, monkeypatch):
    if here:
        settings = pytest.importorskip("faiss").cvar
        threshold = settings.distance_compute_blas_threshold
    else:
        monkeypatch.setattr(bench_retrieval.importlib.util, "find_spec", lambda _: None)
    for name, small in {"NUM_QUERIES": 9, "NUM_ITEMS": 3000, "LENGTHS": (3, 20), "NUM_BATCHES": 2}.items():
        monkeypatch.setattr(bench_retrieval, name, small)
    faiss = ["faiss", "faiss, its own threshold", "faiss, items added in the call"] if here else []
    for one, k in zip(bench_retrieval.comparisons(CPU), (3, 20), strict=True):
        assert one.exact(one.batches[0])[0].shape == (9, k)
        assert one.absent == ({} if here else {"faiss": "not installed"})
        rows = measure(one._replace(rounds=2), RATES, CPU)
        assert [row.form for row in rows if row.seconds is not None] == ["recblocks", "topk of all scores", *faiss]
    assert not here or settings.distance_compute_blas_threshold == threshold  # others in the process rely on it


def test_auc_within_chunks_is_the_same_in_every_form(monkeypatch):
    monkeypatch.setattr(bench_auc, "NUM_CHUNKS", 20)
    (one,) = bench_auc.comparisons(CPU)
    rows = measure(one._replace(rounds=2), RATES, CPU)
    assert [row.form for row in rows if row.seconds is not None] == ["recblocks", *bench_auc.PEERS]
    monkeypatch.setattr(bench_auc.importlib.util, "find_spec", lambda _: None)
    (one,) = bench_auc.comparisons(CPU)
    assert list(one.forms) == ["recblocks"]
    assert one.absent == dict.fromkeys(bench_auc.PEERS, "not installed")


class Graph:
    """What a CUDA graph does here: it runs what was called while it was being captured."""

    def __init__(self):
        self.calls = 0

    def replay(self):
        self.calls += 1


def test_on_a_gpu_graphs_are_replayed_and_kernels_counted(monkeypatch, capsys):
    graphs, called = [], []

    @contextlib.contextmanager
    def capture(graph):
        graphs.append(graph)
        before = len(called)
        yield
        assert len(called) == before + 1
        if called[-1] == "waits":
            raise RuntimeError("operation not permitted when stream is capturing")

    stream = types.SimpleNamespace(wait_stream=lambda _: None)
    fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda _: contextlib.nullcontext()}
    fakes |= {"CUDAGraph": Graph, "graph": capture, "synchronize": lambda *_: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(_comparison, "_num_kernels", lambda *_: 3)
    one = squares(forms={
        name: lambda x, name=name: called.append(name) or [x * x, x.sum()] for name in ("ours", "waits")
    })  # fmt: skip
    found = _comparison._on_a_gpu(one, one.forms, CPU)
    assert found["ours"][0] > 0
    assert found["waits"] == (None, 3)
    assert [graph.calls for graph in graphs[:3]] == [3, 3, 2]  # once to warm up and seven times, in turn
    rows = [row._replace(replayed=found[row.form][0], kernels=3) for row in measure(one, RATES, CPU)]
    _comparison.show(one, rows)
    out = capsys.readouterr().out
    assert "ms replayed  kernels" in out
    assert "cannot" in out
    result = seen("loss", rows=9)
    for row in result["rows"]:
        row |= {"replayed": row["seconds"] and 5e-7, "kernels": row["seconds"] and 3}
    table = draw._table([result])
    assert "| error | ms replayed | kernels |" in table
    assert "| 1.0e-07 | 0.0005 | 3 |" in table


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_of_a_call_are_counted_and_replayed():
    one = squares()
    batches = [batch.cuda() for batch in one.batches]
    one = one._replace(batches=batches)
    for row in measure(one, RATES, torch.device("cuda")):
        assert row.kernels >= 2
        assert row.replayed > 0


def test_a_benchmark_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        runner.main(["nothing"])
    assert "no benchmark named nothing" in capsys.readouterr().err


def test_numbers_are_printed_without_an_exponent_where_they_are_large():
    printed = [three_digits(one) for one in (0.0123456, 12.34, 999.4, 999.6, 2250.4, 1.5e6)]
    assert printed == ["0.0123", "12.3", "999", "1,000", "2,250", "1,500,000"]
