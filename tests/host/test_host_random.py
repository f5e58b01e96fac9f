"""The global generators of a card, without one: what torch is asked for, in which order, as its signatures allow."""

from __future__ import annotations

import contextlib
import inspect

import clearsr_rig as rig
import pytest
import torch

host_random = rig.module("nodes.host_random")


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_generator_of_the_device_is_seeded_and_put_back(kind, monkeypatch) -> None:
    module, calls = getattr(torch, kind), []

    def record(name: str) -> None:
        signature = inspect.signature(getattr(module, name))

        def recorded(*arguments):
            signature.bind(*arguments)
            calls.append((name, *arguments))
            return torch.tensor([7]) if name == "get_rng_state" else contextlib.nullcontext()

        monkeypatch.setattr(module, name, recorded)

    for name in ("get_rng_state", "set_rng_state", "manual_seed", *(() if kind == "mps" else ("device",))):
        record(name)
    device = torch.device(kind, 0)
    place = () if kind == "mps" else (device,)
    before = torch.get_rng_state()

    with pytest.raises(KeyboardInterrupt), host_random.seeded(5, device):
        drawn = torch.rand(3)
        raise KeyboardInterrupt

    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(torch.get_rng_state(), before)
    entered = [] if kind == "mps" else [("device", device)]
    asked = [("get_rng_state", *place), *entered, ("manual_seed", 5), ("set_rng_state", torch.tensor([7]), *place)]
    assert calls == asked
