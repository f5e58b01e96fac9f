"""The benchmark inside this host: every way runs at toy size, and what it counts is what happened."""

from __future__ import annotations

import clearsr_rig as rig
import comfy.model_management
import pytest
import torch

measure = rig.module("bench.measure")
clocks = rig.module("bench.clocks")
subjects = rig.module("bench.subjects")
ways = rig.module("bench.ways")


@pytest.fixture(scope="module")
def result():
    """128 x 128 pixels without guidance in two rounds, 192 x 192 with it in one."""
    settings = {"steps": 3, "tile": 128, "vae_pixels": 128}
    small = measure.run(measure.Request("toy", "cpu", (128,), (1.0,), rounds=2, **settings))
    large = measure.run(measure.Request("toy", "cpu", (192,), (2.0,), rounds=1, **settings))
    return small["series"] + large["series"]


def test_every_way_runs_in_every_round(result) -> None:
    small, large = result
    always = {ways.BARE, ways.HOST, ways.NAIVE, ways.EACH, ways.ONCE, "ours, control every 2"}
    assert set(small["ways"]) == always | {ways.IMPORTED}
    assert set(large["ways"]) == always | {ways.IMPORTED_TWO_TEXTS, ways.INTERVAL, ways.TILED}
    assert all(len(turns) == 2 for turns in small["ways"].values())
    assert all(len(turns) == 1 for turns in large["ways"].values())
    assert all(turn["seconds"] > 0 for turns in large["ways"].values() for turn in turns)
    assert set(small["parts"]) == set(measure.PARTS)
    assert set(large["parts"]) == set(measure.PARTS[:3]), "the VAE is measured up to vae_pixels"
    assert all(count > 0 for count in small["operations"].values())


def test_control_calls_of_every_way(result) -> None:
    calls = {name: turns[0]["calls"] for name, turns in result[1]["ways"].items()}
    dpm = {name: count["DPM"] for name, count in calls.items()}
    tiles = 4 * 3
    assert dpm == {
        ways.BARE: 0,
        ways.HOST: 0,
        ways.NAIVE: 3,
        ways.EACH: 3,
        "ours, control every 2": 2,
        ways.ONCE: 1,
        ways.IMPORTED_TWO_TEXTS: 3,
        ways.INTERVAL: 3,
        ways.TILED: tiles,
    }
    assert all(count["UNet"] == (tiles if name == ways.TILED else 3) for name, count in calls.items())


def test_time_inside_of_networks_is_a_part_of_the_whole(result) -> None:
    for one in result:
        for turns in one["ways"].values():
            assert all(0.2 * turn["seconds"] < sum(turn["inside"].values()) <= turn["seconds"] for turn in turns)


def test_the_bare_loop_is_the_hosts_ddpm(tiny) -> None:
    """The loop that everything is compared with samples; it does not only call the UNet."""
    scene = ways.prepare(tiny["model"], tiny["vae"], tiny["clearsr"], 128, 1, 1.0, 128)
    ways.load(scene)
    base = scene.model.model
    x, _, text = ways.unet_inputs(scene, 1)
    sigma = ways._sigmas(scene)[0]
    eps = base.diffusion_model(x, base.model_sampling.timestep(sigma[None]).float(), context=text)
    expected = x * torch.sqrt(1 + sigma**2) - sigma * eps  # one step to zero noise is the estimate of x_0
    torch.testing.assert_close(ways.bare(scene), expected, rtol=1e-4, atol=1e-4)


# Only Linux tells a process its peak of memory this way; elsewhere the benchmark leaves the column empty.
@pytest.mark.skipif(clocks._resident("VmRSS") is None, reason="memory is read from /proc, which is not here")
def test_peak_memory_is_that_of_the_work() -> None:
    """80 MiB that are freed before the end count; what was there before does not."""
    held = torch.ones(30 * 2**18)
    clocks.measure(torch.device("cpu"), lambda: torch.ones(2**18).sum())
    turn = clocks.measure(torch.device("cpu"), lambda: torch.ones(80 * 2**18).sum())
    assert held.numel()
    assert 75 * 2**20 < turn.peak < 100 * 2**20


def test_naive_control_is_evaluated_for_every_row(tiny) -> None:
    scene = ways.prepare(tiny["model"], tiny["vae"], tiny["clearsr"], 128, 2, 2.0, 128)
    ways.load(scene)
    with rig.count_calls(tiny["clearsr"].control.model.dpm, "forward") as calls:
        ways.naive(scene)
    assert [args[0].shape[0] for args, _options in calls] == [2, 2]


@pytest.mark.parametrize(("cfg", "rows"), [(1.0, 1), (4.0, 2)])
def test_imported_control_is_evaluated_for_both_texts(tiny, cfg, rows) -> None:
    """It reads x_t and the text of each conditioning, so guidance takes a pass for each of the two."""
    imported = subjects.imported(tiny["model"], tiny["clearsr"])
    control = imported.config.control
    assert (control.control_input, control.control_text) == ("lr+xt", "conditioning")
    assert not (control.use_spm or control.window_attention or imported.config.lora_rank)
    scene = ways.prepare(tiny["model"], tiny["vae"], tiny["clearsr"], 128, 2, cfg, 128)
    scene.imported = imported
    way = next(way for name, way in ways.ways(scene).items() if name in (ways.IMPORTED, ways.IMPORTED_TWO_TEXTS))
    ways.load(scene)
    with rig.count_calls(imported.control.model.dpm, "forward") as calls:
        way(scene)
    assert [args[0].shape[0] for args, _options in calls] == [rows, rows]
    texts = calls[0][0][2]
    assert len(texts) == rows and len(texts.unique(dim=0)) == rows


def test_counts_of_an_imported_control(monkeypatch) -> None:
    # The kernel that the tests' host takes asks for the free memory of the device, which is none here.
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: (2**40, 2**40))
    found = {row["way"]: row for row in rig.module("bench.counts").run("toy", [128])["rows"]}
    ours, imported = found["one piece"], found["imported control"]
    assert imported["unet"] == ours["unet"] and imported["spm"] == 0
    assert 0 < imported["dpm"] < ours["dpm"]  # without window attention
    guided, both = found["one piece, guidance"], found["imported control, guidance, two texts"]
    assert (guided["unet"], guided["dpm"], guided["spm"]) == (2 * ours["unet"], ours["dpm"], ours["spm"])
    assert (both["unet"], both["dpm"]) == (2 * ours["unet"], 2 * imported["dpm"])


def test_the_full_size_is_the_papers() -> None:
    """865.9, 375.1 and 232.4 million parameters, told without making them."""
    shapes = rig.module("clearsr_core.shapes").checkpoint_shapes(subjects._CONFIGS["full"])
    millions = {
        part: round(sum(torch.Size(shape).numel() for shape in shapes[part].values()) / 1e6, 1)
        for part in ("base.unet", "dpm", "spm")
    }
    assert millions == {"base.unet": 865.9, "dpm": 375.1, "spm": 232.4}
