"""The accuracy ladder: its statistics, its store, its order of runs, and a small ladder from end to end."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))

import accuracy
import ladder.methods
import ladder.plan
import ladder.run
import ladder.store
import ladder.tasks
from ladder.again import again
from ladder.plan import Cell, next_rate, queue
from ladder.pool import Pool
from ladder.stats import half_width, paired
from ladder.store import Job, Store, key_of
from ladder.summary import recovered, summary, verdict
from ladder.tables import leaderboard, table

from lightning_quant.estimators import ESTIMATORS

JOB = Job("digits", "w2", "pege", "{}", "adamw", 1e-3, 100, 0)


def figures(held: float, test: float | None = None, born: str = "b", step: float = 0.01) -> dict:
    """A run's figures as a worker returns them."""
    test = held if test is None else test
    accuracy = {"held_accuracy": 0.9, "test_accuracy": 0.9}
    return {"held_loss": held, "test_loss": test, **accuracy, "born": born, "step": step, "wall": 1.0, "bytes": 0.5}


def fill(store: Store, cell: Cell, best: float, losses: dict[int, float]) -> None:
    """A finished cell: ``best`` has the lowest held-out loss of the sweep."""
    for rate in ladder.tasks.TASKS[cell.task].rates[cell.optimizer]:
        held = 0.1 + abs(math.log10(rate / best))
        store.add(cell.job(rate, ladder.methods.SWEEP_SEED), figures(held))
    for seed, loss in losses.items():
        store.add(cell.job(best, seed), figures(loss))


def cell(label: str = "ste", method: str = "ste", scheme: str = "w2", **more) -> Cell:
    return Cell("digits", "adamw", scheme, label, method, 100, **more)


# statistics


def test_interval_by_hand():
    """Differences 1, 2, 3: mean 2, s = 1, t(2, 97.5 %) = 4.3027."""
    pair = paired({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0}, more_is_better=True)
    assert (pair.n, pair.difference, pair.wins, pair.losses) == (3, 2.0, 3, 0)
    assert pair.interval == pytest.approx(4.302652 / math.sqrt(3), rel=1e-6)


def test_interval_is_scipys():
    from scipy.stats import ttest_rel

    a, b = [0.91, 0.87, 0.93, 0.90, 0.88], [0.89, 0.88, 0.90, 0.86, 0.87]
    pair = paired(dict(enumerate(a)), dict(enumerate(b)), more_is_better=True)
    low, high = ttest_rel(a, b).confidence_interval(0.95)
    assert pair.difference - pair.interval == pytest.approx(low)
    assert pair.difference + pair.interval == pytest.approx(high)


def test_a_lower_loss_wins_and_ties_count_for_nobody():
    pair = paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 2.0, 2: 2.0}, more_is_better=False)
    assert (pair.wins, pair.losses) == (1, 1)


def test_only_common_seeds_count_and_one_has_no_interval():
    pair = paired({0: 1.0, 5: 9.0}, {0: 2.0, 6: 1.0}, more_is_better=False)
    assert (pair.n, pair.difference, pair.interval) == (1, -1.0, None)
    assert paired({0: 1.0}, {1: 1.0}, more_is_better=True) is None
    assert half_width([1.0]) is None


def test_a_run_that_diverged_loses_and_leaves_no_difference():
    pair = paired({0: math.inf, 1: 1.0}, {0: 2.0, 1: 2.0}, more_is_better=False)
    assert (pair.wins, pair.losses, pair.interval) == (1, 1, None)
    assert math.isnan(pair.difference)


# store


def test_what_is_kept_comes_back_and_is_short(tmp_path):
    store = Store(tmp_path / "a" / "runs.jsonl")
    store.add(JOB, {**figures(1 / 3), "test_loss": math.inf})
    row = Store(store.path).get(JOB)
    assert row["held_loss"] == 0.333333
    assert row["test_loss"] is None
    assert row["method"] == "pege"
    assert Store(store.path).get(JOB._replace(seed=1)) is None


def test_a_killed_write_costs_one_run_and_no_other(tmp_path):
    path = tmp_path / "runs.jsonl"
    Store(path).add(JOB, figures(0.1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    again = Store(path)
    assert len(again.rows) == 1
    again.add(JOB._replace(seed=1), figures(0.2))
    assert [Store(path).get(JOB._replace(seed=s))["held_loss"] for s in (0, 1)] == [0.1, 0.2]
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"lr": 3e-3}, {"steps": 99}, {"scheme": "w1"}, {"optimizer": "sgd"}, {"method": "ste"}]
)
def test_key_sees_all_that_decides(change):
    assert key_of(JOB._replace(**change)) != key_of(JOB)


def test_key_sees_the_scheme_in_full(monkeypatch):
    whole, task = JOB._replace(scheme="w2a2"), ladder.tasks.TASKS["digits"]
    keys = [key_of(whole)]
    for change in ({"group": "-g32"}, {"first_last": "inherit"}):
        monkeypatch.setitem(ladder.tasks.TASKS, "digits", replace(task, **change))
        key_of.cache_clear()
        keys.append(key_of(whole))
    key_of.cache_clear()
    assert len(set(keys)) == 3


def test_key_sees_what_options_mean():
    """A default that is spelled out is the same run; one that is changed is another."""
    same = JOB._replace(options='{"initial":0.0}')
    assert key_of(same) == key_of(JOB)
    assert key_of(JOB._replace(options='{"initial":0.5}')) != key_of(JOB)
    assert key_of(JOB._replace(options='{"learn_scale":false}')) != key_of(JOB)


def test_key_sees_the_task(monkeypatch):
    before = key_of(JOB)
    key_of.cache_clear()
    changed = replace(ladder.tasks.TASKS["digits"], pretrain=7)
    monkeypatch.setitem(ladder.tasks.TASKS, "digits", changed)
    assert key_of(JOB) != before
    key_of.cache_clear()


# plan


def test_the_sweep_comes_first_and_seeds_go_breadth_first(tmp_path):
    store, cells = Store(tmp_path / "runs.jsonl"), [cell(), cell("lsq", "lsq")]
    todo = queue(cells, store, 2)
    assert [job.seed for _, job in todo] == [ladder.methods.SWEEP_SEED] * 6
    assert [c.label for c, _ in todo] == ["ste"] * 3 + ["lsq"] * 3
    for c in cells:
        fill(store, c, 1e-3, {})
    todo = [(c.label, job.seed, job.lr) for c, job in queue(cells, store, 2)]
    assert todo == [("ste", 0, 1e-3), ("lsq", 0, 1e-3), ("ste", 1, 1e-3), ("lsq", 1, 1e-3)]


def test_a_best_rate_at_the_edge_extends_the_grid(tmp_path):
    store, one = Store(tmp_path / "runs.jsonl"), cell()
    rates = ladder.tasks.TASKS["digits"].rates["adamw"]
    for rate in rates:
        store.add(one.job(rate, ladder.methods.SWEEP_SEED), figures(rate))  # the smaller the better
    assert one.sweep(store) == ([1e-4], None)
    store.add(one.job(1e-4, ladder.methods.SWEEP_SEED), figures(1.0))
    assert one.sweep(store) == ([], 3e-4)


def test_extensions_end(tmp_path):
    store, one = Store(tmp_path / "runs.jsonl"), cell()
    tried = 0
    while missing := one.sweep(store)[0]:
        for rate in missing:
            store.add(one.job(rate, ladder.methods.SWEEP_SEED), figures(1 / rate))  # the larger the better
            tried += 1
    assert tried == 3 + ladder.plan.EXTENSIONS
    assert one.sweep(store) == ([], 3e-2)
    assert next_rate([0.3, 1.0], 1.0) is None


def test_a_diverged_rate_is_never_the_best(tmp_path):
    store, one = Store(tmp_path / "runs.jsonl"), cell()
    for rate in ladder.tasks.TASKS["digits"].rates["adamw"]:
        store.add(one.job(rate, ladder.methods.SWEEP_SEED), figures(2.0 if rate == 1e-3 else math.inf))
    assert one.sweep(store) == ([], 1e-3)


def test_rounding_of_the_fine_tuned_model_takes_its_rate(tmp_path):
    store = Store(tmp_path / "runs.jsonl")
    cells = ladder.plan.ladder(["topics"], ["w2"], ["ste"], None)
    control = next(c for c in cells if c.label == ladder.plan.CONTROL)
    after = next(c for c in cells if c.label == f"gptq of {ladder.plan.CONTROL}")
    assert list(after.jobs(store, 2)) == []
    fill(store, control, 1e-3, {})
    assert {job.lr for _, job in after.jobs(store, 2)} == {1e-3}
    assert next(c for c in cells if c.label == f"gptq of {ladder.plan.ORIGINAL}").steps == 0


def test_search_and_confirmation_share_neither_tasks_nor_seeds():
    first = ladder.methods.FIRST_SEED
    assert not set(ladder.methods.SEARCH_TASKS) & set(ladder.methods.CONFIRM_TASKS)
    assert {first[t] for t in ladder.methods.SEARCH_TASKS} == {0}
    assert {first[t] for t in ladder.methods.CONFIRM_TASKS} == {100}


def test_every_label_has_a_method_and_a_key():
    entries = [(e.method, e.options) for e in ladder.methods.METHODS.values()]
    for method, options in [*entries, *ladder.methods.SEARCH.values()]:
        assert method in ESTIMATORS
        key_of(JOB._replace(method=method, options=ladder.store.canonical(options)))


def test_left_out_methods_are_few_and_known():
    """A new method comes to the leaderboard, or is named here with the others that it has no place for."""
    compared = {entry.method for entry in ladder.methods.METHODS.values()}
    beside = {"tsq", "iao", "floor", "power"}  # w1.58a2 in two steps, 8 bits, and robustness
    assert set(ESTIMATORS) - compared == beside


# figures


@pytest.fixture
def filled(tmp_path):
    """A store with two methods on the digits."""
    store = Store(tmp_path / "runs.jsonl")
    control = Cell("digits", "adamw", "float", ladder.plan.CONTROL, "float", 100)
    cells = [control, cell(), cell("pege", "pege"), cell("lsq", "lsq")]
    fill(store, cells[0], 1e-3, {0: 0.1})
    fill(store, cells[1], 1e-3, {0: 0.40, 1: 0.50, 2: 0.45})
    fill(store, cells[2], 1e-3, {0: 0.30, 1: 0.41, 2: 0.35})
    fill(store, cells[3], 1e-3, {0: 0.41, 1: 0.48, 2: 0.45})
    return store, cells


def test_summary_pairs_by_seed(filled):
    store, cells = filled
    found = {c["label"]: c for c in summary(cells, store, 3)}
    pair = found["pege"]["against_ste"]
    assert pair["difference"] == pytest.approx((-0.10 - 0.09 - 0.10) / 3, rel=1e-5)
    assert (pair["n"], pair["wins"], pair["losses"]) == (3, 3, 0)
    assert (verdict(found["pege"]), verdict(found["lsq"]), verdict(found["ste"])) == (1, 0, 0)
    assert found["lsq"]["against_default"]["difference"] == pytest.approx((0.11 + 0.07 + 0.10) / 3, rel=1e-5)
    assert verdict(found["lsq"], "against_default") == -1
    assert "against_default" not in found["pege"]
    assert found["pege"]["seconds"] == 1.0
    assert not found["pege"]["edge"]


def test_runs_from_other_checkpoints_are_not_paired(filled):
    store, cells = filled
    store.add(cells[2].job(1e-3, 3), figures(0.1, born="other"))
    store.add(cells[1].job(1e-3, 3), figures(0.2))
    found = {c["label"]: c for c in summary(cells, store, 4)}
    assert found["pege"]["n"] == 4
    assert found["pege"]["against_ste"]["n"] == 3


def test_tables_say_what_the_runs_say(filled):
    store, cells = filled
    results = accuracy.summarised(cells, store, 3)
    json.dumps(results)
    text = table(results)
    assert "| pege | 1 | 1 | 0 | 0 | 3/0 | 1.00 | 0.5 |" in text
    assert "| lsq | 1 | 0 | 1 | 0 | 1/1 | 1.00 | 0.5 |" in text
    assert "**-0.0967 +- 0.0143**" in text
    whole = leaderboard(results)
    assert whole.index("| pege | 3 |") < whole.index("| lsq | 3 |") < whole.index("| ste | 3 |")


def test_a_second_measurement_agrees_or_does_not(filled):
    store, cells = filled
    results = accuracy.summarised(cells, store, 3)
    text, same = again(results, results)
    assert same
    assert text.startswith("2 of 2 paired differences are found again.")

    def moved(label, by):
        other = json.loads(json.dumps(results))
        pair = next(c for c in other["cells"] if c["label"] == label)["against_ste"]
        pair["difference"] += by
        return again(other, results)

    assert moved("pege", 0.0142)[1]  # its interval is 0.0143
    text, same = moved("pege", 0.0144)
    assert not same
    assert "| **-0.0967 +- 0.0143** | **-0.0823 +- 0.0143** | **no** |" in text
    assert "| lsq | -0.0033" in text
    apart = {**results, "cells": [c for c in results["cells"] if c["label"] in ("ste", "float, fine-tuned")]}
    assert not again(apart, results)[1]  # nothing is compared


def test_the_ladder_that_readme_shows_ends(tmp_path):
    args = accuracy.parsed(["--tasks", "digits", "topics"])
    kept = accuracy.chosen(args)
    assert {(c.task, c.scheme) for c in kept if c.task == "digits"} == {
        ("digits", s) for s in ("float", "w2", "w1", "w2a2")
    }
    assert {c.label for c in kept if c.scheme == "w1"} == {"ste", "pege", "lsq", "ewgs"}
    assert any(c.method == "brecq" for c in kept)
    quick = accuracy.chosen(accuracy.parsed(["--quick"]))
    assert {c.method for c in quick} == {"float", "ste", "pege", "lsq", "ewgs"}
    assert len(accuracy.chosen(accuracy.parsed(["--tasks", "digits", "--all"]))) > 200
    asked = accuracy.chosen(accuracy.parsed(["--tasks", "digits", "--methods", "dsq", "--schemes", "w4"]))
    assert {(c.label, c.scheme) for c in asked if c.scheme != "float"} == {("dsq", "w4")}


def test_results_are_not_compared_with_themselves(filled, tmp_path, monkeypatch):
    """What ``--against`` names is read before ``--out``, which may be the same file, is written."""
    store, cells = filled
    results = accuracy.summarised(cells, store, 3)
    next(c for c in results["cells"] if c["label"] == "pege")["against_ste"]["difference"] = 1.0
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    monkeypatch.setattr(accuracy, "chosen", lambda args: cells)
    monkeypatch.setattr(accuracy, "every", lambda: cells)
    monkeypatch.setattr(accuracy, "Pool", lambda *args: type("Done", (), {"measure": lambda *args: None}))
    where = ["--store", str(store.path), "--out", str(path), "--against", str(path), "--tasks", "digits"]
    with pytest.raises(SystemExit) as ended:
        accuracy.main([*where, "--seeds", "3"])
    assert ended.value.code


def test_parts_of_a_text_are_of_one_kind(tmp_path):
    task = replace(ladder.tasks.TASKS["shakespeare"], rows=(30, 10, 10), sizes={"vocab": 300, "tokens": 16})
    (tmp_path / "tinyshakespeare").mkdir()
    text = " ".join(f"word{i}" for i in range(600))
    (tmp_path / task.files[0]).write_text(text)
    data = task.read(task, tmp_path)
    parts = [{tuple(row) for row in part[0].tolist()} for part in data]
    assert [len(part) for part in parts] == [30, 10, 10]
    assert len(set.union(*parts)) == 50
    assert all((a == b).all() for a, b in zip(data.test, task.read(task, tmp_path).test, strict=True))


def test_recovered_share_of_the_gap():
    def of(label, method, scheme, loss):
        return {"task": "topics", "part": "ladder", "label": label, "method": method, "scheme": scheme, "loss": loss}

    cells = [
        of(ladder.plan.ORIGINAL, "float", "float", 2.2),
        of(ladder.plan.CONTROL, "float", "float", 2.0),
        of("rtn of float", "rtn", "w2", 4.0),
        of("gptq of float", "gptq", "w2", 3.0),
        of("pege", "pege", "w2", 2.25),
    ]
    (case,) = recovered(cells)
    assert case["best"] == "gptq of float"
    assert case["recovered"] == {"pege": 0.75}


# from end to end


@pytest.fixture
def tiny(monkeypatch):
    """The digits with few steps."""
    changed = replace(ladder.tasks.TASKS["digits"], pretrain=60, steps=20, rates={"adamw": (1e-3, 3e-3)})
    monkeypatch.setitem(ladder.tasks.TASKS, "digits", changed)
    key_of.cache_clear()
    yield changed
    key_of.cache_clear()


def test_a_small_ladder_and_its_resumption(tiny, tmp_path, capsys):
    store = Store(tmp_path / "runs.jsonl")
    cells = ladder.plan.ladder(["digits"], ["w2"], ["ste", "pege"], ["adamw"])
    start = ladder.run.prepare("digits", None, tmp_path)
    while todo := queue(cells, store, 2):
        for c, job in todo:
            store.add(job, ladder.run.run(job, start, curves=job.seed == c.seeds(1)[0]))
    results = accuracy.summarised(cells, store, 2)
    found = {c["label"]: c for c in results["cells"]}
    assert set(found) == {ladder.plan.ORIGINAL, ladder.plan.CONTROL, "ste", "pege"}
    assert found["ste"]["n"] == found["pege"]["n"] == 2
    assert found["pege"]["against_ste"]["n"] == 2
    assert min(c["accuracy"] for c in found.values()) > 0.7
    assert found["pege"]["bytes"] > found["ste"]["bytes"]
    curves = [row["curves"] for row in store.rows.values() if row["method"] == "pege" and "curves" in row]
    assert len(curves) == 1
    assert set(curves[0]) >= {"step", "loss", "lam", "theta"}
    assert curves[0]["lam"][0] == 0 < curves[0]["lam"][-1]
    # the same command again measures nothing, and the same run again gives the same figures
    assert queue(cells, Store(store.path), 2) == []
    job = cells[-1].job(1e-3, 0)
    first, second = (ladder.run.run(job, ladder.run.prepare("digits", None, tmp_path)) for _ in range(2))
    assert first["test_loss"] == second["test_loss"]
    from ladder.plots import draw

    files = draw(results, store, tmp_path / "plots")
    assert {f.name for f in files} == {"digits-bits.png", "digits-steps.png", "digits-theta.png"}
    assert all(f.stat().st_size > 5000 for f in files)


def test_processes_measure_what_can_be_measured(tmp_path, capsys):
    """A cell that fails is named and costs nothing else; a second call has nothing to do."""
    store = Store(tmp_path / "runs.jsonl")
    cells = [replace(cell("odd"), options={"observer": "nonsense"}), cell()]
    cells = [replace(c, steps=3) for c in cells]
    pool = Pool(store, None, tmp_path, workers=1)
    pool.measure(cells, 1)
    assert {row["options"] == {} for row in store.rows.values()} == {True}
    assert cells[1].left(Store(store.path), 1) == 0 < cells[1].left(Store(tmp_path / "none"), 1)
    assert len(pool.failed) == 3
    assert "digits w2 odd: " in capsys.readouterr().err
    assert "nonsense" in next(iter(pool.failed.values()))


def test_seeds_pair_the_order_of_the_data(tiny, tmp_path):
    start = ladder.run.prepare("digits", None, tmp_path)
    orders = [[b[0] for b, _ in ladder.run.batches(start.data.train, 50, 30, seed)] for seed in (1, 1, 2)]
    assert all((a == b).all() for a, b in zip(orders[0], orders[1], strict=True))
    assert any((a != b).any() for a, b in zip(orders[0], orders[2], strict=True))


def test_tasks_without_data_are_left_out_with_a_line(tmp_path, capsys):
    args = accuracy.parsed(["--data", str(tmp_path)])
    assert args.tasks == ["digits", "topics", "bert"]
    assert "shakespeare is left out: no tinyshakespeare/input.txt below --data" in capsys.readouterr().err
    assert ladder.store.FLOAT == "float"
