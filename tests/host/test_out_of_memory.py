"""Memory that runs out, at every stage: the picture is finished with less at a time, and the user is told."""

from __future__ import annotations

import clearsr_rig as rig
import comfy.model_management
import pytest
import torch
from clearsr_runs import SIDE, SMALL, apply, sample, textured

tiled = rig.module("nodes.tiled_diffusion")


def test_out_of_memory_is_told_from_other_errors() -> None:
    known = rig.module("nodes.compat").out_of_memory
    assert known(comfy.model_management.OOM_EXCEPTION("CUDA out of memory")) and known(MemoryError())
    for text in ("MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory: you tried to"):
        assert known(RuntimeError(text))
    interrupted = comfy.model_management.InterruptProcessingException()
    assert not any(map(known, (RuntimeError("sizes differ"), ValueError("out of memory"), interrupted)))


def test_out_of_memory_goes_on_with_less(tiny, wide, caplog, monkeypatch) -> None:
    """Fewer tiles at a time, then smaller tiles; the result is what those settings give, and the next run is new."""
    model = apply(tiny, wide, tile_size=192, tile_overlap=64, tiles_per_batch=4)
    expected = sample(apply(tiny, wide, **SMALL, tiles_per_batch=1), wide, cfg=2.0)
    monkeypatch.setattr(tiled, "_SMALLER_SIDES", (24, SIDE))
    network = tiny["clearsr"].control.model
    inner, shapes = network.forward, []

    def forward(x_lr, *more, **options):
        shapes.append(tuple(x_lr.shape))
        if x_lr.shape[-1] > SIDE:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return inner(x_lr, *more, **options)

    for _ in range(2):
        shapes.clear(), caplog.clear()
        monkeypatch.setattr(network, "forward", forward)
        assert torch.equal(sample(model, wide, cfg=2.0), expected)
        monkeypatch.setattr(network, "forward", inner)
        assert [shape for shape in shapes if shape[-1] > SIDE] == [(4, 4, 24, 24), (2, 4, 24, 24)]
        said = [record.message for record in caplog.records if "out of memory" in record.message]
        assert len(said) == 2 and "tiles at a time (1)" in said[0] and "128 x 128 pixels" in said[1]


@pytest.mark.parametrize("overlap", [64, 192])
def test_out_of_memory_in_one_piece_goes_on_in_tiles(tiny, wide, monkeypatch, overlap) -> None:
    """With the overlap that was asked for, but no more than half of a smaller tile."""
    expected = sample(apply(tiny, wide, **SMALL), wide)
    monkeypatch.setattr(tiled, "_SMALLER_SIDES", (SIDE,))
    network = tiny["clearsr"].control.model
    inner = network.forward

    def forward(x_lr, *more, **options):
        if x_lr.shape[-1] > SIDE:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return inner(x_lr, *more, **options)

    monkeypatch.setattr(network, "forward", forward)
    assert torch.equal(sample(apply(tiny, wide, tile_overlap=overlap), wide), expected)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (SMALL, r"out of memory even for a tile of 128 x 128 pixels, the least .* --lowvram or --novram"),
        ({}, r"out of memory even for 192 x 256 pixels, the least"),
    ],
)
def test_too_little_memory_for_the_smallest_tile(tiny, wide, monkeypatch, settings, text) -> None:
    """A clear text, of the kind of error upon which the host frees all models; and the next run works."""
    model = apply(tiny, wide, **settings)
    expected = sample(model, wide)
    network = tiny["clearsr"].control.model
    with monkeypatch.context() as patch:
        patch.setattr(network, "forward", failing(comfy.model_management.OOM_EXCEPTION("CUDA: 7 GiB wanted")))
        with pytest.raises(comfy.model_management.OOM_EXCEPTION, match=text) as caught:
            sample(model, wide)
    assert "7 GiB wanted" in str(caught.value.__cause__)
    assert torch.equal(sample(model, wide), expected)


def test_too_little_memory_where_tiles_are_forbidden(tiny, wide, monkeypatch) -> None:
    """The text names what is in the way of tiles."""
    monkeypatch.setattr(tiled, "_SMALLER_SIDES", (SIDE,))
    monkeypatch.setattr(tiled, "obstacle", lambda _conds: "a thing in the graph")
    monkeypatch.setattr(tiny["clearsr"].control.model, "forward", failing(MemoryError("out of memory")))
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match="because there is a thing in the graph"):
        sample(apply(tiny, wide), wide)


def test_other_errors_come_through(tiny, wide, monkeypatch) -> None:
    monkeypatch.setattr(tiny["clearsr"].control.model, "forward", failing(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        sample(apply(tiny, wide, **SMALL), wide)


def failing(error):
    """A forward that only raises."""

    def forward(*_more, **_options):
        raise error

    return forward


# ---- every stage of a whole picture ---------------------------------------------------------------------------------


def finished(loaded):
    """Encode, a step, decode, colours: a narrow picture that is longer than one tile at every stage."""
    latent, enlarged = rig.run("ClearSRLREncode", clearsr=loaded["clearsr"], image=rig.images(1, 130, 4), scale=4.0)
    samples = sample(apply(loaded, latent, tile_overlap=64), latent, steps=1)
    decoded = rig.run("VAEDecode", samples={"samples": samples}, vae=loaded["vae"])
    return rig.run("ClearSRColorFix", image=decoded, reference=enlarged)


@pytest.fixture(scope="module")
def picture(tiny):
    return finished(tiny)


def fails_once(monkeypatch, network, method, longest):
    """Let the first call with more rows than `longest` run out of memory; return what it was called with."""
    inner, failures = getattr(network, method), []

    def limited(values, *more, **options):
        if values.shape[-2] > longest and not failures:
            failures.append(values.shape)
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return inner(values, *more, **options)

    monkeypatch.setattr(network, method, limited)
    return failures


STAGES = {
    # stage: (its network, the method, rows that fit, what says so to the user)
    "encode": (lambda it: it["vae"].first_stage_model, "encode", 512, "retrying with tiled VAE encoding"),
    "control": (lambda it: it["clearsr"].control.model, "forward", 64, "goes on with tiles of 512 x 512 pixels"),
    "UNet": (lambda it: it["model"].model.diffusion_model, "forward", 64, "goes on with tiles of 512 x 512 pixels"),
    "decode": (lambda it: it["vae"].first_stage_model, "decode", 64, "retrying with tiled VAE decoding"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_picture_is_finished_whatever_stage_runs_out_of_memory(tiny, picture, caplog, monkeypatch, stage) -> None:
    """Exact size, finite, the user is told; the next run is what it was before."""
    monkeypatch.setattr(tiled, "_SMALLER_SIDES", (64,))
    find, method, longest, said = STAGES[stage]
    with monkeypatch.context() as patch:
        failures = fails_once(patch, find(tiny), method, longest)
        result = finished(tiny)
    assert failures and said in caplog.text
    assert result.shape == (1, 520, 16, 3) and result.isfinite().all()
    assert float(result.std()) > 0.01 and not torch.equal(result, picture)
    assert torch.equal(finished(tiny), picture)


def test_the_hosts_tiled_decoding_is_the_same_picture(monkeypatch) -> None:
    """Nano: VAE Decode where memory runs out, against one piece. Colours drift a little; Color Fix brings them back."""
    _, vae, clearsr = rig.run("ClearSRLoader", checkpoint="clearsr-nano.safetensors")
    latent, enlarged = rig.run("ClearSRLREncode", clearsr=clearsr, image=textured(1, 144, 16), scale=4.0)
    pictures = [rig.run("VAEDecode", samples=latent, vae=vae)]
    failures = fails_once(monkeypatch, vae.first_stage_model, "decode", 64)
    pictures.append(rig.run("VAEDecode", samples=latent, vae=vae))
    assert failures and pictures[0].shape == pictures[1].shape
    fixed = [rig.run("ClearSRColorFix", image=picture, reference=enlarged) for picture in pictures]
    for (one, other), most in ((pictures, 0.02), (fixed, 1 / 255)):
        assert 0.0 < float((one - other).abs().mean()) < most
