"""The paper's tables made again: the rule of the verdicts, the committed document, and the whole chain at tiny size."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from training import config, evaluate, reproduce, restore, sweep, train
from training.reproduction import document, experiments, results, sampling, work
from training.reproduction.results import Stored
from training.reproduction.verdicts import judge, overall, side
from training.tables import EvaluationError, Summary

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = DOCS / "reproduction" / "results"


# The rule.


@pytest.mark.parametrize(
    ("values", "direction", "least", "expected"),
    [
        ([1.0, 1.1, 0.9], 1, 0.0, "agrees"),
        ([1.0, 1.1, 0.9], -1, 0.0, "disagrees"),
        ([-1.0, -1.1, -0.9], -1, 0.0, "agrees"),
        ([-1.0, -1.1, -0.9], 1, 0.0, "disagrees"),
        ([1.0, -1.0, 0.5], 1, 0.0, "too close to call"),
        ([2.5, 2.6, 2.4], 1, 2.0, "agrees"),
        ([1.0, 1.1, 0.9], 1, 2.0, "disagrees"),
        ([2.0, 2.1, 1.9], 1, 2.0, "too close to call"),
        ([-2.5, -2.6, -2.4], -1, 2.0, "agrees"),
        ([5.0], 1, 0.0, "too close to call"),  # one picture has no interval
        ([math.nan, math.inf], 1, 0.0, "too close to call"),
        ([1.0, 1.1, 0.9, math.nan], 1, 0.0, "agrees"),
        ([0.0, 0.0, 0.0], 1, 0.0, "too close to call"),
    ],
)
def test_a_claim_is_judged_by_its_interval(values: list[float], direction: int, least: float, expected: str) -> None:
    table = {str(index): value for index, value in enumerate(values)}
    assert judge([table], direction, least).verdict == expected  # type: ignore[arg-type]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0, 3))
def test_the_opposite_claim_has_the_opposite_verdict(values: list[float], least: float) -> None:
    """Whatever agrees with a sign does not agree with the other one; with no threshold they are each other's mirror."""
    table = {str(index): value for index, value in enumerate(values)}
    up, down = judge([table], 1).verdict, judge([table], -1).verdict
    mirror = {"agrees": "disagrees", "disagrees": "agrees", "too close to call": "too close to call"}
    assert down == mirror[up]
    assert {judge([table], 1, least).verdict, judge([table], -1, least).verdict} != {"agrees"}


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((1.0, 1.1, 0.9), "agrees"),
        ((1.0, 1.1), "too close to call"),  # two trainings
        ((3.0, 0.1, -0.1), "too close to call"),  # pictures agree, trainings do not
        ((-1.0, -1.1, -0.9), "disagrees"),
    ],
)
def test_trained_models_differ_only_if_their_trainings_do(means: tuple[float, ...], expected: str) -> None:
    tables = [{str(picture): mean + 0.01 * picture for picture in range(5)} for mean in means]
    one = judge(tables, 1, trained=True)
    assert one.verdict == expected
    assert one.seeds is not None
    assert one.seeds.count == len(means)
    assert judge(tables, 1).seeds is None


def test_a_table_is_as_good_as_its_worst_claim() -> None:
    assert overall(["agrees", "agrees"]) == "agrees"
    assert overall(["agrees", "too close to call"]) == "too close to call"
    assert overall(["agrees", "too close to call", "disagrees"]) == "disagrees"
    assert overall([]) == "too close to call"
    assert side(Summary(1.0, 1.0, 5), 0.0) == 0


# What is committed.


def test_the_document_is_what_its_results_make() -> None:
    """`python -m training.reproduce --render` writes it; by hand, or after a change of settings, it would differ."""
    written = (DOCS / document.DOCUMENT).read_text(encoding="utf-8")
    assert document.text(RESULTS) == written
    plots = {path.name for path in (DOCS / document.PLOTS).glob("*")}
    assert plots == {f"{name}.png" for name in experiments.names() if results.shown(RESULTS, name) is not None}
    for path in (DOCS / document.PLOTS).glob("*"):
        assert path.stat().st_size < 250_000


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_a_committed_result_is_small_whole_and_of_the_full_budget(path: Path) -> None:
    stored = results.read(path)
    assert path.name == f"{stored.experiment}.{stored.split}.json"
    assert path.stat().st_size < 250_000
    assert stored.made.budget == "full"
    assert len(stored.made.sha256) == 64
    assert len(stored.seeds) == len(stored.runs)
    found = document.judged(experiments.experiment(stored.experiment), stored)
    assert all(judgement is not None for _, judgement in found)
    settings = experiments.experiment(stored.experiment).settings("full")
    assert {key: stored.made.settings[key] for key in settings} == settings, "run it again: its settings have changed"


@pytest.mark.parametrize("name", experiments.names())
def test_an_experiment_can_be_run_and_judged(name: str) -> None:
    one = experiments.experiment(name)
    assert one.kind in reproduce.RUNNERS
    assert all(check.measure in document.MEASURES for check in one.checks)
    run = one.settings("full")
    methods = {method for check in one.checks for method in (check.method, check.against)}
    if one.trained:
        assert methods <= set(run["variants"]) <= set(experiments.training(run["training"], "full").variants)
    if one.kind == "grid":
        places = {sweep.setting_name(alpha, beta) for alpha in run["alphas"] for beta in run["betas"]}
        assert methods <= places | set(run.get("baselines", ()))
    if one.kind == "steps":
        steps = {1, *range(run["every"], run["steps"] + 1, run["every"])}
        assert methods <= {"HR", *(f"step {step}" for step in steps)}
    if one.kind == "sampling":
        assert methods <= set(sampling.ways(run))
        assert set(sampling.ways(one.settings("tiny"))) <= set(sampling.ways(run))


def test_what_has_not_been_run_says_so_with_its_command(tmp_path: Path) -> None:
    text = document.text(tmp_path)
    assert text.count("**Not run yet.**") == len(experiments.names())
    assert "Verdict:" not in text
    assert "--run=table2 --hr=HR --lr=LR --data=PHOTOGRAPHS --work=FOLDER" in text


def test_a_wrong_name_is_told_with_the_right_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [f"--{name}={tmp_path}" for name in ("hr", "lr", "work")]
    assert reproduce.main(["--run=table9", *folders]) == 1
    assert "table1, table2" in caplog.text
    assert reproduce.main(["--run=table2", *folders]) == 1
    assert "--data=FOLDER" in caplog.text
    assert reproduce.main(["--run=fig4", *folders, "--split=all"]) == 1
    assert "held_out" in caplog.text
    assert reproduce.main([]) == 1
    assert "--render" in caplog.text
    assert reproduce.main(["--run=fig4", *folders, "--seeds=-1"]) == 1
    assert "whole numbers from 0 on" in caplog.text
    with pytest.raises(config.ConfigError, match="no way 'quick'"):
        experiments.training("quick", "full")
    with pytest.raises(config.ConfigError, match="There is no table"):
        experiments.experiment(experiments.SHARED)


# Results and the work folder.


def stored_of(runs: tuple, split: str = results.TUNING, experiment: str = "table4") -> Stored:
    made = results.Made("a.safetensors", "0" * 64, {}, "full", "2026-01-01", "2 CPU cores", {"torch": "2"})
    return Stored(experiment, split, made, tuple(range(len(runs))), runs)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = {"HR": {"niqe": {"a": 6.123456789, "b": math.inf}}, "x": {"psnr": {"a": 1.0}, "niqe": {"a": 5.0}}}
    path = results.write(tmp_path, stored_of((run,)))
    read = results.read(path)
    assert read.runs[0]["HR"]["niqe"]["a"] == 6.12346
    assert math.isnan(read.runs[0]["HR"]["niqe"]["b"])
    assert read.pictures == ["a", "b"]
    assert read.differences("niqe", "x", "HR") == [{"a": pytest.approx(-1.12346)}]
    assert read.differences("psnr", "x", "HR") is None
    path.write_text('{"runs": []}')
    with pytest.raises(EvaluationError, match="no result"):
        results.read(path)


def test_held_out_results_are_shown_before_those_of_tuning(tmp_path: Path) -> None:
    assert results.shown(tmp_path, "table4") is None
    for split in (results.TUNING, results.HELD_OUT):
        results.write(tmp_path, stored_of(({"x": {"psnr": {"a": 1.0}}},), split))
        shown = results.shown(tmp_path, "table4")
        assert shown is not None
        assert shown.split == split


def picture(folder: Path, name: str, size: tuple[int, int], seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (24, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of 96 x 192 and 24 x 48, the smallest that NIQE takes."""
    root = tmp_path_factory.mktemp("reproduced")
    for index, name in enumerate("ab"):
        picture(root / "hr", f"{name}_HR", (192, 96), index)
        picture(root / "lr", f"{name}_LR4", (48, 24), index)
    return root


def test_a_split_takes_its_own_pictures_only(tmp_path: Path) -> None:
    for index in range(work.TUNED_ON + 2):
        for kind in ("hr", "lr"):
            picture(tmp_path / kind, f"{index:02d}", (4, 2), index)
    folders = tmp_path / "hr", tmp_path / "lr"
    tuning = [pair.name for pair in work.choose(*folders, results.TUNING)]
    held_out = [pair.name for pair in work.choose(*folders, results.HELD_OUT)]
    assert tuning == [f"{index:02d}" for index in range(20)]
    assert held_out == ["20", "21"]
    assert [pair.name for pair in work.choose(*folders, results.PHOTOGRAPHS)] == tuning + held_out
    assert len(work.choose(*folders, results.TUNING, limit=3)) == 3
    for index in (20, 21):
        (tmp_path / "hr" / f"{index}.png").unlink()
        (tmp_path / "lr" / f"{index}.png").unlink()
    with pytest.raises(EvaluationError, match="nothing is left"):
        work.choose(*folders, results.HELD_OUT)


def command(chain: Path, pairs: Path, out: Path, *more: str) -> list[str]:
    folders = [f"--hr={pairs}/hr", f"--lr={pairs}/lr", f"--work={out}", f"--data={chain}/photographs"]
    file = f"--checkpoint={chain}/nano/clearsr.safetensors"
    return [*folders, file, "--budget=tiny", "--seeds=0,1", "--efflite=false", "--threads=1", *more]


def test_the_whole_chain_stops_goes_on_and_repeats_nothing(
    chain: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All at tiny budget, stopped in the middle of the trainings; then once more from what is kept."""
    caplog.set_level("INFO")
    done: list[str] = []
    real_train = train.train

    def counted_train(kind: object, settings: train.loop.LoopSettings) -> bool:
        if len(done) == 2:
            done.append("stopped")
            return False  # as after Ctrl-C, with a snapshot
        done.append(settings.out.name)
        return real_train(kind, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "train", counted_train)
    arguments = command(chain, pairs, tmp_path / "work", f"--document={tmp_path}/docs/R.md")
    assert reproduce.main([*arguments, "--run=table2,fig8"]) == 130
    assert "goes on where this was" in caplog.text
    assert done == ["full_seed0", "no_spm_seed0", "stopped"]
    # A whole seed is a result already, whatever becomes of the others.
    first = results.read(tmp_path / "work" / "results" / "table2.tuning.json")
    assert first.seeds == (0,)
    assert reproduce.main([*arguments, "--run=table2,fig8,fig4,fig5,fig7,table4,table1,open_sampler", "--render"]) == 0
    trained = [name for name in done if name != "stopped"]
    assert len(set(trained)) == len(trained) == 6  # three variants at two seeds, none of them twice

    # Everything is in the work folder now.
    kept = (tmp_path / "work" / "results" / "table2.tuning.json").read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("done twice")

    for owner, name in (
        (train, "train"),
        (restore, "restore"),
        (sweep, "over_betas"),
        (sampling, "restored"),
        (evaluate, "measure"),
        (evaluate, "measure_alone"),
    ):
        monkeypatch.setattr(owner, name, never)
    assert reproduce.main([*arguments, "--run=table2,fig8,fig4,fig5,fig7,table4,table1,open_sampler"]) == 0
    assert (tmp_path / "work" / "results" / "table2.tuning.json").read_bytes() == kept

    # Elsewhere, with nothing but the results: their seeds are not trained again, and asking for one loses none.
    elsewhere = command(chain, pairs, tmp_path / "elsewhere", f"--results={tmp_path}/work/results", "--seeds=1")
    assert reproduce.main([*elsewhere, "--run=table2,fig8"]) == 0
    assert (tmp_path / "work" / "results" / "table2.tuning.json").read_bytes() == kept
    with pytest.raises(AssertionError, match="done twice"):  # but a result of fewer pictures is another one
        reproduce.main([*elsewhere, "--run=table2", "--limit=1"])
    assert "is of another pictures" in caplog.text

    stored = results.read(tmp_path / "work" / "results" / "table2.tuning.json")
    assert (stored.seeds, stored.pictures, stored.made.budget) == ((0, 1), ["a", "b"], "tiny")
    assert set(stored.runs[1]) == {"HR", "full", "no_spm"}
    assert stored.runs[0]["full"]["psnr"] != stored.runs[1]["full"]["psnr"]
    verdicts = [one for _, one in document.judged(experiments.experiment("table2"), stored)]
    assert {one.verdict for one in verdicts if one is not None} == {"too close to call"}  # of two trainings

    text = (tmp_path / "docs" / "R.md").read_text(encoding="utf-8")
    assert text.count("no result, a trial of the machinery") == 8
    assert text.count("**Not run yet.**") == len(experiments.names()) - 8
    assert str(tmp_path) not in text + json.dumps(stored.made.settings)
    for name in ("table1", "table2", "table4", "fig4", "fig5", "fig7", "fig8", "open_sampler"):
        assert Image.open(tmp_path / "docs" / document.PLOTS / f"{name}.png").size > (300, 200)


def test_trainings_of_other_photographs_or_presets_are_not_taken_for_these(
    chain: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = command(chain, pairs, tmp_path / "work", "--run=fig8", "--seeds=0")
    assert reproduce.main(arguments) == 0
    more, turned = tmp_path / "more", tmp_path / "turned"
    for folder in (more, turned):
        shutil.copytree(chain / "photographs", folder)
    shutil.copy(more / "0.png", more / "2.png")
    with Image.open(turned / "0.png") as picture:  # another one of the same name and size
        picture.transpose(Image.Transpose.ROTATE_180).save(turned / "0.png")
    others = [argument for argument in arguments if not argument.startswith("--data=")]
    for folder in (more, turned):
        caplog.clear()
        assert reproduce.main([*others, f"--data={folder}"]) == 1
        assert "another photographs" in caplog.text
    real = config.read_preset
    monkeypatch.setattr(config, "read_preset", lambda name: {**real(name), "learning_rate": 0.5})
    assert reproduce.main(arguments) == 1
    assert "another learning_rate" in caplog.text
