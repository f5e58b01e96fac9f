"""DPM and SPM: sizes, the zero start, every option of the configuration, and what hosts demand of the modules."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clearsr_core.config import NANO, SD21_BASE, TINY
from clearsr_core.control import ClearSRControl
from clearsr_core.initialise import initialise_fresh, initialise_from_unet
from clearsr_core.shapes import unet_shapes


def network(config=TINY, seed=0, zero_start=False, **options):
    """A control network; unless `zero_start`, with random numbers everywhere, so that every part shows."""
    control = ClearSRControl(config, **options)
    generator = torch.Generator().manual_seed(seed)
    initialise_fresh(control, generator)
    if not zero_start:
        with torch.no_grad():
            for parameter in control.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return control


def inputs(height=16, width=16, batch=2, config=TINY, seed=1):
    """(lr_latent, timestep, context, x_t)."""
    generator = torch.Generator().manual_seed(seed)
    lr_latent, x_t = (torch.randn(batch, 4, height, width, generator=generator) for _ in range(2))
    context = torch.randn(batch, 7, config.context_dim, generator=generator)
    return lr_latent, torch.tensor([3, 900])[:batch], context, x_t


def flat(residuals):
    return [*residuals.down, residuals.mid]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))


def changed(config, **values):
    return dataclasses.replace(config, **values)


OPTIONS = {
    "paper": {},
    "no windows": {"query_windows": (), "relative_bias": "none"},
    "constant windows": {"query_windows": (8, 8, 8, 8)},
    "no bias": {"relative_bias": "none"},
    "plain ControlNet": {"window_attention": False},
    "x_t too": {"control_input": "lr+xt"},
    "fixed time": {"control_time": "fixed"},
    "DPM alone": {"use_spm": False},
    "SPM alone": {"use_dpm": False},
}


def test_sizes_at_stable_diffusion_2_1():
    """12 skips and a middle at a 64 x 64 latent; 375.1 M and 232.4 M parameters; seven window attentions."""
    control = ClearSRControl(SD21_BASE, device="meta")
    context = torch.zeros(1, 77, 1024, device="meta")
    residuals = control(torch.zeros(1, 4, 64, 64, device="meta"), torch.zeros(1, device="meta"), context)
    sizes = [(320, 64)] * 3 + [(320, 32)] + [(640, 32)] * 2 + [(640, 16)] + [(1280, 16)] * 2 + [(1280, 8)] * 3
    assert [tuple(residual.shape) for residual in residuals.down] == [(1, c, side, side) for c, side in sizes]
    assert residuals.mid.shape == (1, 1280, 8, 8)
    assert sum(p.numel() for p in control.dpm.parameters()) / 1e6 == pytest.approx(375.1, abs=0.05)
    assert sum(p.numel() for p in control.spm.parameters()) / 1e6 == pytest.approx(232.4, abs=0.05)
    assert sum(name.endswith("window_attention") for name, _ in control.named_modules()) == 7


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_an_untrained_network_adds_exactly_nothing(option):
    """Zero-initialised outputs: every residual is zero, bit for bit, whatever the options."""
    control = network(changed(TINY, **OPTIONS[option]), zero_start=True)
    assert not any(residual.any() for residual in flat(control(*inputs())))


@torch.no_grad()
def test_every_option_changes_the_result():
    """No option is a stub: with equal seeds, each gives residuals of its own."""
    results = [flat(network(changed(TINY, **values))(*inputs()))[-1] for values in OPTIONS.values()]
    for index, result in enumerate(results):
        assert result.isfinite().all()
        assert not any(torch.allclose(result, other) for other in results[index + 1 :])


@functools.cache
def network_of(option):
    # Two channels per norm group: torch refuses to normalise the single pixel of the smallest grids otherwise.
    return network(changed(TINY, norm_groups=16, **OPTIONS[option]))


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 23), width=st.integers(1, 23), option=st.sampled_from(list(OPTIONS)))
@torch.no_grad()
def test_any_size_gives_the_sizes_of_the_unet(height, width, option):
    """Grids halve and round up, as the UNet's own Downsample does, and nothing becomes NaN."""
    residuals = network_of(option)(*inputs(height, width, batch=1))
    rows, columns = height, width
    for level in range(4):
        of_level = residuals.down[3 * level : 3 * level + 3]
        assert [r.shape[2:] for r in of_level] == [(rows, columns)] * 3
        if level < 3:
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
            assert residuals.down[3 * level + 3].shape[2:] == (rows, columns)
    assert residuals.mid.shape[2:] == (rows, columns)
    assert all(residual.isfinite().all() for residual in flat(residuals))


def test_spm_has_no_attention_and_the_outputs_of_dpm():
    control = network()
    assert not any("attention" in name or "attn" in name for name, _ in control.spm.named_modules())
    shared = {id(parameter) for parameter in control.dpm.parameters()} & {id(p) for p in control.spm.parameters()}
    assert not shared
    both = [name for name, _ in control.dpm.named_parameters() if "attentions" not in name]
    assert both == [name for name, _ in control.spm.named_parameters()]


@torch.no_grad()
def test_the_control_is_the_sum_and_strengths_scale_it():
    """x_c = DPM + SPM; strength 0 leaves a module out; all strengths 0 give zeros."""
    control, given_inputs = network(), inputs()
    both, detail, structure, none = (
        flat(control(*given_inputs, dpm_strength=d, spm_strength=s)) for d, s in [(1, 1), (1, 0), (0, 1), (0, 0)]
    )
    mixed = flat(control(*given_inputs, dpm_strength=0.5, spm_strength=2.0))
    for x, d, s, zero, mix in zip(both, detail, structure, none, mixed, strict=True):
        assert torch.equal(x, d + s)
        assert not zero.any()
        torch.testing.assert_close(mix, 0.5 * d + 2.0 * s)


@torch.no_grad()
def test_fixed_time_makes_the_control_independent_of_the_step():
    """What allows a control computed once per image; with the real timestep it differs."""
    lr_latent, timestep, context, _ = inputs()
    fixed = network(changed(TINY, control_time="fixed"))
    assert same(fixed(lr_latent, timestep, context), fixed(lr_latent, timestep + 50, context))
    at_zero = network()(lr_latent, torch.zeros_like(timestep), context)
    assert same(fixed(lr_latent, timestep, context), at_zero)
    assert not same(network()(lr_latent, timestep, context), at_zero)


@torch.no_grad()
def test_the_fixed_timestep_is_the_one_of_the_configuration():
    lr_latent, timestep, context, _ = inputs()
    later = network(changed(TINY, control_time="fixed", fixed_timestep=300))
    assert same(later(lr_latent, timestep, context), network()(lr_latent, torch.tensor([300, 300]), context))
    assert not same(later(lr_latent, timestep, context), network()(lr_latent, timestep * 0, context))


@torch.no_grad()
def test_the_copied_convolution_reads_what_it_read_in_the_unet():
    """x_t where the control has it, x_lr otherwise; what is added for x_lr starts at zero (METHOD 3.1)."""

    def note(seen, name, _module, arguments):
        seen[name] = arguments[0]

    lr_latent, timestep, context, x_t = inputs()
    for control_input, expected in (
        ("lr", {"conv_in": lr_latent}),
        ("lr+xt", {"conv_in": x_t, "conv_in_lr": lr_latent}),
    ):
        control = network(changed(TINY, control_input=control_input))
        for encoder in (control.dpm, control.spm):
            seen = {}
            for name in expected:
                getattr(encoder, name).register_forward_pre_hook(functools.partial(note, seen, name))
            control(lr_latent, timestep, context, x_t)
            assert all(torch.equal(seen[name], value) for name, value in expected.items())


@torch.no_grad()
def test_a_transformer_block_is_written_down_in_its_order():
    """Self-attention, text, window attention to x_lr, feed-forward; each on its norm, each with its residual."""
    block = network().dpm.down_blocks[0].attentions[0].transformer_blocks[0]
    generator = torch.Generator().manual_seed(2)
    x, x_lr = torch.randn(1, 64, 32, generator=generator), torch.randn(1, 8, 8, 4, generator=generator)
    context = torch.randn(1, 7, 16, generator=generator)
    expected = x + block.attn1(block.norm1(x))
    expected = expected + block.attn2(block.norm2(expected), context)
    expected = expected + block.window_attention(block.norm_window(expected), (8, 8), x_lr)
    expected = expected + block.ff(block.norm3(expected))
    assert torch.equal(block(x, (8, 8), context, x_lr), expected)


@torch.no_grad()
def test_x_t_is_read_only_where_the_configuration_says_so():
    lr_latent, timestep, context, x_t = inputs()
    assert same(network()(lr_latent, timestep, context, x_t), network()(lr_latent, timestep, context))
    both = network(changed(TINY, control_input="lr+xt"))
    assert not same(both(lr_latent, timestep, context, x_t), both(lr_latent, timestep, context, x_t + 1))
    assert not same(both(lr_latent, timestep, context, x_t), both(lr_latent + 1, timestep, context, x_t))
    with pytest.raises(ValueError, match="control_input is 'lr"):
        both(lr_latent, timestep, context)


@torch.no_grad()
def test_one_timestep_and_one_prompt_serve_the_whole_batch():
    control = network()
    lr_latent, _, context, _ = inputs()
    shared = control(lr_latent, torch.tensor([500]), context[:1])
    assert same(shared, control(lr_latent, torch.tensor([500, 500]), context[:1].expand(2, -1, -1)))


@torch.no_grad()
def test_items_of_a_batch_do_not_mix():
    """Windows of one image never meet another image's, padded or not."""
    control = network()
    lr_latent, timestep, context, _ = inputs(9, 13)
    together = flat(control(lr_latent, timestep, context))
    for item in range(2):
        part = slice(item, item + 1)
        alone = flat(control(lr_latent[part], timestep[part], context[part]))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[part], b, rtol=1e-4, atol=1e-5)


def test_wrong_shapes_are_refused_in_words():
    control = network()
    lr_latent, timestep, context, _ = inputs()
    with pytest.raises(ValueError, match=r"lr_latent \(2, 3, 16, 16\) must be \(B, 4, h, w\)"):
        control(lr_latent[:, :3], timestep, context)
    with pytest.raises(ValueError, match=r"context \(2, 7, 15\) must be \(B, n, 16\)"):
        control(lr_latent, timestep, context[..., :15])


def test_every_parameter_learns():
    """A gradient reaches every weight of both modules once the outputs have left zero."""
    control = network(changed(TINY, control_input="lr+xt"))
    sum(residual.square().mean() for residual in flat(control(*inputs()))).backward()
    assert [name for name, p in control.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_hosts_can_move_every_weight():
    """No buffers, and no parameter in a module that has children: hosts move and cast leaves only."""
    control = ClearSRControl(changed(TINY, control_input="lr+xt"), device="meta")
    assert not list(control.buffers())
    for _, module in control.named_modules():
        assert not (list(module.children()) and list(module.parameters(recurse=False)))


@torch.no_grad()
def test_layers_of_a_host_that_cast_on_the_fly():
    """Weights in bfloat16, computation in the dtype of the input; layers are only ever called."""

    def casting(base, apply):
        def forward(self, x):
            bias = None if self.bias is None else self.bias.to(x)
            return apply(self, x, self.weight.to(x), bias)

        return type(base.__name__, (base,), {"forward": forward, "reset_parameters": lambda self: None})

    functional = torch.nn.functional
    ops = SimpleNamespace(
        Linear=casting(nn.Linear, lambda self, x, w, b: functional.linear(x, w, b)),
        Conv2d=casting(nn.Conv2d, lambda self, x, w, b: self._conv_forward(x, w, b)),
        GroupNorm=casting(
            nn.GroupNorm, lambda self, x, w, b: functional.group_norm(x, self.num_groups, w, b, self.eps)
        ),
        LayerNorm=casting(nn.LayerNorm, lambda self, x, w, b: functional.layer_norm(x, self.normalized_shape, w, b)),
        Embedding=nn.Embedding,
    )
    plain = network().bfloat16().float()
    hosted = ClearSRControl(TINY, ops=ops, dtype=torch.bfloat16)
    hosted.load_state_dict(plain.state_dict())
    results = flat(hosted(*inputs()))
    for a, b in zip(flat(plain(*inputs())), results, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b)


def test_initialisation_is_the_generators_alone():
    """Same seed, same weights, and torch's global state stays where it was."""
    first, second = ClearSRControl(NANO), ClearSRControl(NANO)
    before = torch.get_rng_state()
    for control in (first, second):
        initialise_fresh(control, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    table = first.dpm.down_blocks[0].attentions[0].transformer_blocks[0].window_attention.relative_bias.weight
    assert 0 < float(table.detach().abs().max()) <= 0.04


@torch.no_grad()
def test_new_layers_begin_uniform_in_the_bound_of_their_fan_in():
    """+-1 / sqrt(fan_in), filled to its ends; norms at identity."""
    control = ClearSRControl(TINY)
    initialise_fresh(control, torch.Generator().manual_seed(5))
    block = control.dpm.down_blocks[0].attentions[0].transformer_blocks[0]
    resnet = control.spm.down_blocks[0].resnets[0]
    for layer, fan_in in ((resnet.conv1, 32 * 9), (resnet.time_emb_proj, 128), (block.window_attention.to_k, 4)):
        bound = fan_in**-0.5
        assert 0.9 * bound < float(layer.weight.abs().max()) <= bound
        assert float(layer.weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert layer.bias is None or 0 < float(layer.bias.abs().max()) <= bound
    assert (resnet.norm1.weight == 1).all() and not resnet.norm1.bias.any()


def test_weights_of_a_unet_are_copied_into_both_modules():
    """All of the UNet's encoder and middle block goes to DPM, its ResBlocks to SPM; the new parts start as said."""
    generator = torch.Generator().manual_seed(3)
    unet = {name: torch.randn(shape, generator=generator) for name, shape in unet_shapes(TINY).items()}
    control = ClearSRControl(changed(TINY, control_input="lr+xt"))
    initialise_from_unet(control, unet)
    dpm, spm = control.dpm.state_dict(), control.spm.state_dict()
    encoder = [name for name in unet if name.startswith(("conv_in.", "time_", "down_blocks.", "mid_block."))]
    assert all(torch.equal(dpm[name], unet[name]) for name in encoder)
    assert all(torch.equal(spm[name], unet[name]) for name in encoder if ".attentions." not in name)
    for name in dpm.keys() - set(encoder):
        zero = ("controlnet_" in name) or ("conv_in_lr" in name) or ("window_attention.to_out" in name)
        assert zero != bool(dpm[name].any()) or name.endswith("norm_window.bias"), name


def test_a_unet_that_does_not_fit_is_refused_before_anything_changes():
    control = network()
    before = [parameter.clone() for parameter in control.parameters()]
    unet = {name: torch.zeros(shape) for name, shape in unet_shapes(TINY).items()}
    with pytest.raises(ValueError, match=r"no 'conv_in\.weight'"):
        initialise_from_unet(control, {f"unet.{name}": value for name, value in unet.items()})
    with pytest.raises(ValueError, match=r"\(32, 9, 3, 3\) in the UNet, \(32, 4, 3, 3\) in dpm"):
        initialise_from_unet(control, unet | {"conv_in.weight": torch.zeros(32, 9, 3, 3)})
    assert all(torch.equal(a, b) for a, b in zip(before, control.parameters(), strict=True))
