"""What the benchmarks compute from their seconds, and how they show it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weightsync.errors import EngineError
from weightsync_client.bench import models
from weightsync_client.bench.figures import Figures, Target, run_rounds
from weightsync_client.bench.loopback import judge
from weightsync_client.bench.plot import draw
from weightsync_client.bench.prediction import descriptor_seconds
from weightsync_client.bench.view import markdown, tables
from weightsync_client.cli import app

NBYTES = {"push": 800, "write": 800, "raw_nixl_write": 1600}


def measured(series: Mapping[str, list[float]]) -> Figures:
    figures = Figures("loopback", facts={"rounds": 3, "warmup": 1})
    for name, values in series.items():
        for value in values:
            figures.add({name: value}, NBYTES)
    return figures


def test_ratios_are_rates_of_the_medians() -> None:
    # means would be 4 and 4.33 s; of twice the bytes in the same time the rate is twice as high
    figures = measured({"write": [1.0, 2.0, 9.0], "raw_nixl_write": [2.0, 2.0, 9.0]})
    assert figures.set_ratio("write_vs_raw_nixl", "write", "raw_nixl_write") == pytest.approx(0.5)
    told = figures.to_dict()["seconds"]["write"]
    assert (told["median"], told["low"], told["high"]) == (2.0, 1.0, 9.0)
    assert told["values"] == [1.0, 2.0, 9.0]
    assert told["gbytes_per_s"] == pytest.approx(400e-9)


def test_a_ratio_without_its_baseline_is_null_and_its_target_is_not_judged() -> None:
    figures = measured({"write": [1.0], "push": [2.0]})
    judge(figures)
    assert set(figures.ratios.values()) == {None}
    assert {target.met for target in figures.targets} == {None}
    assert json.loads(json.dumps(figures.to_dict()))["ratios"]["write_vs_raw_nixl"] is None


def test_a_ratio_is_met_from_its_goal_up_and_seconds_down_from_it() -> None:
    assert Target("rate", 0.9, 0.9).met is True
    assert Target("rate", 0.9, 0.89).met is False
    assert Target("pause", 0.03, 0.03, "s").met is True
    assert Target("pause", 0.03, 0.031, "s").met is False


def test_warm_up_does_not_count_and_no_case_is_always_first() -> None:
    figures, order = Figures("x"), []

    def case(name: str):
        def run() -> dict[str, float]:
            order.append(name)
            return {name: float(len(order))}

        return run

    cases = {name: case(name) for name in "abc"}
    run_rounds(figures, cases, rounds=3, warmup=1, nbytes={})
    assert order == [*"abc", *"bca", *"cab", *"abc"]
    assert figures.series["a"].values == [6.0, 8.0, 10.0]


def test_a_failing_baseline_is_named_and_left_out() -> None:
    calls = []

    def fails() -> dict[str, float]:
        calls.append(1)
        raise EngineError("no such wire")

    figures = Figures("x")
    cases = {"bad": fails, "good": lambda: {"good": 1.0}}
    run_rounds(figures, cases, rounds=2, warmup=1, nbytes={})
    assert figures.failed == {"bad": "no such wire"}
    assert (len(calls), figures.series["good"].values) == (1, [1.0, 1.0])
    with pytest.raises(EngineError):
        run_rounds(Figures("x"), cases, rounds=1, warmup=0, nbytes={}, essential=["bad"])


def test_tables_hold_every_figure_and_the_reasons() -> None:
    figures = measured({"write": [0.001], "raw_nixl_write": [0.004], "push": [0.1]})
    figures.failed["gloo_broadcast"] = "no | peer\nsecond line"
    figures.notes.append("a note")
    judge(figures)
    text = markdown(figures.to_dict())
    assert "| write, of a raw NIXL write in one descriptor | ≥ 0.90 | 2.00 | yes |" in text
    assert "| gloo_broadcast | no \\| peer |" in text
    assert (
        "| whole push, of a gloo broadcast of the same tensors | ≥ 1.00 | – | not measured |"
        in (text)
    )
    assert "| push | 100.0 ms |" in text
    assert text.endswith("- a note\n")
    assert len(list(tables(figures.to_dict()))) == text.count("\n|---|") > 3


@pytest.mark.parametrize("nbytes", [1_000_000, 8_000_000, 256_000_000, 4_000_000_000])
def test_a_model_has_about_the_bytes_that_were_asked_for(nbytes: int) -> None:
    config = models.dense(nbytes)
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    made = 2 * (layers * 11.5 * width * width + 2 * config["vocab_size"] * width)
    assert made == pytest.approx(nbytes, rel=0.3) or layers == 1


def test_planning_is_measured_for_parts_of_a_model(tmp_path: Path) -> None:
    path = models.write_config(tmp_path, models.shrunk(models.many_experts(), layers=8))
    options = ["--model-config", str(path), "--trainer", "fsdp=4,ep=2", "--inference", "tp=2,dp=2"]
    run = CliRunner().invoke(app, ["bench", "plan", *options, "--rounds", "2", "--json"])
    assert run.exit_code == 0, run.stderr
    said = json.loads(run.stdout)
    assert [size["layers"] for size in said["sizes"]] == [1, 2, 4, 8]
    first, last = said["sizes"][0], said["sizes"][-1]
    assert last["tensors"] > 4 * first["tensors"]
    assert len(last["plan"]["values"]) == len(last["proof"]["values"]) == 2
    assert said["ratios"]["tensors_planned_per_s_all_layers_vs_fewest"] == pytest.approx(
        last["tensors"] / last["plan"]["median"] / (first["tensors"] / first["plan"]["median"])
    )


def test_a_stored_answer_gives_the_same_tables(tmp_path: Path) -> None:
    figures = measured({"write": [0.001], "raw_nixl_write": [0.004]})
    judge(figures)
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(figures.to_dict()))
    run = CliRunner().invoke(app, ["bench", "report", str(path)])
    assert (run.exit_code, run.stdout) == (0, markdown(figures.to_dict()))


@pytest.mark.parametrize("text", ["", "[]", '{"ratios": {}}'])
def test_a_file_without_figures_ends_with_2(text: str, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text(text)
    run = CliRunner().invoke(app, ["bench", "report", str(path)])
    assert (run.exit_code, run.stdout) == (2, "")
    assert str(path) in run.stderr


def test_a_plot_needs_matplotlib_and_says_so_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsync_client.bench.plot.find_spec", lambda _: None)
    run = CliRunner().invoke(app, ["bench", "loopback", "--plot", str(tmp_path / "out.png")])
    assert (run.exit_code, run.stdout) == (2, "")
    assert "pip install 'weightsync[bench]'" in run.stderr


def test_every_kind_of_figures_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = measured({"write": [0.001, 0.002], "raw_nixl_write": [0.004], "push": [0.1]})
    figures.descriptors = [{"nbytes": 1 << k, "gbytes_per_s": float(k)} for k in (16, 18)]
    path = tmp_path / "out.png"
    draw(figures.to_dict(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_descriptor_costs_what_many_take_longer_than_few() -> None:
    sweep = [
        {"nbytes": 1, "count": 1000, "seconds": 3.0},
        {"nbytes": 10, "count": 100, "seconds": 9.0},
        *({"nbytes": 1000 // n, "count": n, "seconds": 1.0} for n in (10, 1)),
    ]
    assert descriptor_seconds(sweep) == pytest.approx(2e-3)
    assert descriptor_seconds([{"nbytes": 9, "count": 1, "seconds": 1.0}]) == 0


def test_a_prediction_is_met_within_a_fifth_either_way() -> None:
    figures = measured({"write": [1.0]})
    figures.predicted = [
        {"what": what, "predicted": predicted, "measured": 1.0}
        for what, predicted in (("low", 0.79), ("near", 0.81), ("above", 1.24), ("high", 1.26))
    ]
    judge(figures)
    told = {t.what.partition(",")[0]: t.met for t in figures.targets if "predicted" in t.what}
    assert told == {"low": False, "near": True, "above": True, "high": False}
    assert "| low | 790.0 ms | 1.00 s |" in markdown(figures.to_dict())
