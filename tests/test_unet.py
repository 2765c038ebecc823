"""The UNet: diffusers' numbers, both ways, and what a pure function of it allows."""

import contextlib

import diffusers
import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from msfs_functional import diffusion as df
from msfs_functional import noise_schedules as ns
from msfs_functional import random, samplers
from msfs_functional.models import denoising, diffusers_format
from msfs_functional.models.unet import (
    PRESETS,
    UNetConfig,
    pixels_32,
    stable_diffusion_1,
    stable_diffusion_2,
    unet,
)
from msfs_functional.models.weight_files import take, translate
from msfs_functional.regions import Regions

SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
}
ONE = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
CASES = {
    "1.5: 4 heads at each level": {"attention_head_dim": 4},
    "2.1: heads by level, linear": {"attention_head_dim": (2, 4), "use_linear_projection": True},
    "plain levels, plain middle": {
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2D",
    },
    "three levels, two blocks": {
        "attention_head_dim": 2,
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    },
    "deeper transformers, other options": {
        "attention_head_dim": (4, 8),
        "transformer_layers_per_block": 2,
        "resnet_time_scale_shift": "scale_shift",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 9,
        "norm_eps": 1e-3,
    },
    "classes": {"attention_head_dim": 4, "num_class_embeds": 5},
    "one level": {"attention_head_dim": 4, "block_out_channels": (16,), **ONE},
}


def published(case: str) -> diffusers.UNet2DConditionModel:
    """A random UNet of diffusers whose every part matters to its output."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**{**SMALL, **CASES[case]}).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
        else:
            nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    return model


def inputs(case: str, height: int = 8, width: int = 6) -> tuple:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, CASES[case].get("in_channels", 4), height, width, generator=generator)
    context = torch.randn(2, 7, 12, generator=generator)
    classes = torch.tensor([3, 0]) if "num_class_embeds" in CASES[case] else None
    return x, torch.tensor([981.0, 3.0]), context, classes


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_predictions_equal_diffusers(case):
    theirs = published(case)
    config, params = diffusers_format.unet_from(theirs.config, theirs.state_dict())
    for size in ((8, 6), (12, 4)):
        x, t, context, classes = inputs(case, *size)
        expected = theirs(x, t, context, class_labels=classes).sample
        assert expected.std() > 0.1
        for implementation in ("flash", "reference"):
            out = unet(config).apply(
                params, x, t, context, classes=classes, implementation=implementation
            )
            close(out, expected)


@torch.no_grad()
def test_attention_alone_is_ddpm_s_unet_as_diffusers_has_it():
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=5,
    )
    sizes = {"widths": (8, 16), "attention": (False, True), "heads": (2, 4), "groups": 4}
    config = pixels_32(depth=1, classes=5, **sizes)
    words = {"transformers": "attentions", "norm": "group_norm"}
    words |= {
        f"attention.{ours}": to for ours, to in zip("qkv", ("to_q", "to_k", "to_v"), strict=True)
    }
    words |= {"attention.o": "to_out.0"}

    def name(ours: str) -> str:
        inside = "transformers" in ours
        return diffusers_format.unet_name(translate(ours, words) if inside else ours)

    params = take(unet(config).shapes, theirs.state_dict(), name, kind="UNet")
    x, classes = random.normal(random.key(1), (2, 3, 8, 8)), torch.tensor([3, 0])
    t = torch.tensor([981.0, 3.0])
    expected = theirs(x, t, classes).sample
    assert expected.std() > 0.01
    close(unet(config).apply(params, x, t, classes=classes), expected)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_saved_models_load_into_diffusers(case, tmp_path):
    theirs = published(case)
    config, params = diffusers_format.unet_from(theirs.config, theirs.state_dict())
    diffusers_format.save_unet(tmp_path, config, params)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    x, t, context, classes = inputs(case)
    torch.testing.assert_close(
        again(x, t, context, class_labels=classes).sample,
        theirs(x, t, context, class_labels=classes).sample,
    )
    loaded, values = diffusers_format.load_unet(tmp_path)
    assert loaded == config and values.keys() == params.keys()
    assert all(torch.equal(value, params[name]) for name, value in values.items())


@torch.no_grad()
def test_odd_sizes_equal_diffusers():
    theirs = published("1.5: 4 heads at each level")
    config, params = diffusers_format.unet_from(theirs.config, theirs.state_dict())
    x, t, context, _ = inputs("1.5: 4 heads at each level", 7, 5)
    close(unet(config).apply(params, x, t, context), theirs(x, t, context).sample)


@pytest.mark.parametrize(
    ("config", "options", "count"),
    (
        (stable_diffusion_1(), {"attention_head_dim": 8, "cross_attention_dim": 768}, 859520964),
        (
            stable_diffusion_2(),
            {
                "attention_head_dim": (5, 10, 20, 20),
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
            },
            865910724,
        ),
    ),
)
def test_stable_diffusion_presets_have_the_published_names_and_sizes(config, options, count):
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(sample_size=64, **options)
    expected = {name: value.shape for name, value in theirs.named_parameters()}
    shapes = {diffusers_format.unet_name(n): s for n, s in unet(config).shapes.items()}
    assert shapes == expected
    assert sum(shape.numel() for shape in shapes.values()) == count
    assert diffusers_format.read_unet(theirs.config) == config
    assert diffusers_format.read_unet(diffusers_format.write_unet(config)) == config


TINY = UNetConfig(
    channels=2,
    widths=(8, 16),
    depth=1,
    attention=(True, False),
    heads=(2, 2),
    context=6,
    interval=True,
    groups=4,
)


def tiny(config: UNetConfig = TINY, dtype: torch.dtype = torch.float64):
    """A small UNet of random weights, none of them zero, and its inputs."""
    model = unet(config)
    keys = random.split(random.key(3), len(model.shapes) + 2)
    params = {
        name: random.normal(key, shape, dtype=dtype) * (0.5 if len(shape) == 1 else 0.2)
        for (name, shape), key in zip(model.shapes.items(), keys[2:], strict=True)
    }
    x = random.normal(keys[0], (2, 2, 6, 6), dtype=dtype)
    context = random.normal(keys[1], (2, 5, 6), dtype=dtype)
    return model, params, x, context


def test_fresh_models_predict_zero_and_learn():
    model = unet(TINY)
    params = model.init(0)
    _, _, x, context = tiny(dtype=torch.float32)
    t = torch.tensor([5.0, 800.0])
    options = {"interval": t}
    assert model.apply(params, x, t, context, **options).abs().max() == 0
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    loss = (model.apply(leaves, x, t, context, **options) - x).square().mean()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    moved = [n for n, g in zip(leaves, grads, strict=True) if g is not None and g.abs().max() > 0]
    assert moved == ["output.weight", "output.bias"]


def test_padding_of_the_context_changes_nothing():
    model, params, x, context = tiny()
    t, lengths = torch.tensor([5.0, 800.0]), torch.tensor([3, 5])
    out = model.apply(params, x, t, context, interval=t, context_lengths=lengths)
    changed = context.clone()
    changed[0, 3:] = 7.0
    again = model.apply(params, x, t, changed, interval=t, context_lengths=lengths)
    assert torch.equal(out, again)
    changed[0, 2] = 7.0
    moved = model.apply(params, x, t, changed, interval=t, context_lengths=lengths)
    assert not torch.allclose(out[0], moved[0]) and torch.equal(out[1], moved[1])


def test_an_image_with_several_contexts_is_the_image_repeated():
    model, params, x, context = tiny()
    context = torch.cat([context, context.flip(1)])
    t, lengths = torch.tensor([5.0, 800.0]), torch.tensor([3, 5, 5, 2])

    def out(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model.apply(params, x, t, context, interval=t, context_lengths=lengths)

    once = x.clone().requires_grad_()
    found = out(once, t)
    repeated = x.clone().requires_grad_()
    right = out(torch.cat([repeated, repeated]), torch.cat([t, t]))
    torch.testing.assert_close(found, right)
    (ours,) = torch.autograd.grad(found.square().sum(), once)
    (theirs,) = torch.autograd.grad(right.square().sum(), repeated)
    torch.testing.assert_close(ours, theirs)


def test_tangents_through_flash_equal_the_reference_and_finite_differences():
    model, params, x, context = tiny()
    t, v = torch.tensor([300.0, 800.0], dtype=torch.float64), torch.ones_like(x).cumsum(-1) / 6

    def along(x, t, implementation):
        options = {"interval": 0.5 * t, "implementation": implementation}
        return model.apply(params, x, t, context, **options)

    tangents = {
        name: jvp(lambda x, t, name=name: along(x, t, name), (x, t), (v, torch.ones_like(t)))[1]
        for name in ("flash", "reference")
    }
    torch.testing.assert_close(tangents["flash"], tangents["reference"], rtol=1e-9, atol=1e-10)
    h = 1e-5
    ahead, behind = (along(x + s * v, t + s, "reference") for s in (h, -h))
    torch.testing.assert_close(tangents["flash"], (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)


def test_meanflow_trains_a_unet():
    model, params, x, context = tiny()

    def loss_of(params, implementation):
        def model_fn(z, r, t):
            options = {"interval": 1000 * (t - r), "implementation": implementation}
            return model.apply(params, z, 1000 * t, context, **options)

        r, t = torch.tensor([0.2, 0.5]).double(), torch.tensor([0.9, 0.5]).double()
        return df.meanflow_loss(df.meanflow_errors(model_fn, x, x.flip(-1), r, t))

    names = ["down.0.transformers.0.blocks.0.self_attention.q.weight", "interval.up.weight"]
    grads = []
    for implementation in ("flash", "reference"):
        leaves = {name: params[name].clone().requires_grad_() for name in names}
        loss = loss_of({**params, **leaves}, implementation)
        grads.append(torch.autograd.grad(loss, list(leaves.values())))
    for ours, reference in zip(*grads, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("levels", (1, 2))
def test_regions_compile_one_block_of_each_shape(levels, monkeypatch):
    """Transformers of one shape are one graph; ResNet blocks need none, nor does a transformer of
    a shape that only the middle has."""
    options = {"widths": (8, 8), "attention": (True, False), "heads": (2, 2)}
    options = {name: sizes[:levels] for name, sizes in options.items()}
    config = UNetConfig(channels=2, depth=1, context=6, groups=4, **options)
    model, params, x, context = tiny(config, torch.float32)
    params = {name: value.requires_grad_() for name, value in params.items()}
    compiled, original = [], torch.compile

    def by_autograd_alone(fn, **options):  # traced and differentiated, but no code generated
        compiled.append(fn)
        return original(fn, fullgraph=True, dynamic=False, backend="aot_eager")

    def gradients():
        y = model.apply(params, x, torch.tensor([5.0, 800.0]), context)
        return torch.autograd.grad((y - 1).square().mean(), list(params.values()))

    expected = gradients()
    monkeypatch.setattr(torch, "compile", by_autograd_alone)
    with Regions(dynamic=False).compiled():
        for ours, value in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(ours, value, rtol=1e-3, atol=1e-5)
    assert len(compiled) == 1


@torch.no_grad()
def test_one_key_gives_one_image_in_any_batch():
    config = UNetConfig(
        channels=2, widths=(8,), depth=1, attention=(True,), heads=(2,), context=6, groups=4
    )
    model, params, _, context = tiny(config)
    grid = ns.alpha_bars_at(ns.scaled_linear(), ns.spaced_steps(1000, 3))
    keys = random.split(random.key(1), 2)

    def sample(rows):
        def model_fn(x, t):
            return model.apply(params, x, t, context[rows])

        fn = df.denoiser(model_fn, ns.variance_preserving, "v", alpha_bar=ns.scaled_linear())
        x = samplers.draw(keys[rows], context.new_empty(len(context[rows]), 2, 4, 4))
        return samplers.ddpm(fn, x, grid, keys[rows])

    whole = sample(slice(0, 2))
    for i in range(2):
        torch.testing.assert_close(sample(slice(i, i + 1))[0], whole[i], rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", (40, 80, 160, 512))
def test_published_head_dims_equal_the_reference_on_a_gpu(head_dim):
    """Those of Stable Diffusion 1.5's levels, and that of its autoencoder's one head."""
    heads = 1 if head_dim == 512 else 2
    config = UNetConfig(
        channels=2,
        widths=(heads * head_dim,),
        depth=1,
        attention=(True,),
        heads=(heads,),
        context=6,
        groups=8,
    )
    model, params, x, context = tiny(config, torch.float32)
    params = {name: value.cuda() / head_dim**0.5 for name, value in params.items()}
    x = x.cuda().to(memory_format=torch.channels_last)
    outs = []
    for implementation in ("flash", "reference"):
        leaf = x.clone().requires_grad_()
        t, options = torch.tensor([5.0, 800.0]).cuda(), {"implementation": implementation}
        y = model.apply(params, leaf, t, context.cuda(), **options)
        outs.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    for flash, reference in zip(*outs, strict=True):
        assert (flash - reference).abs().max() <= 1e-3 * reference.abs().max()


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_heads_in_wider_lanes_are_the_same_heads(compiled, monkeypatch):
    """As a GPU pads them: heads of 6 in lanes of 8, to itself and to a memory, with gradients."""
    torch._dynamo.reset()
    sizes = {"q": (12, 5), "k": (12, 7), "v": (12, 7), "o": (5, 12)}
    generator = torch.Generator().manual_seed(0)
    new = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    x, memory, lengths = new(2, 9, 5), new(2, 4, 7), torch.tensor([4, 2])
    weights = {f"a.{part}.weight": new(*size) for part, size in sizes.items()}
    own = weights | {f"a.{part}.weight": new(12, 5) for part in "kv"}
    biases = {f"a.{part}.bias": new(size[0]) for part, size in sizes.items()}
    ends = {"a.o.bias": biases["a.o.bias"]}

    def both(x, memory, weights, own):
        to_itself = denoising.attend({**own, **biases}, "a", x, None, 2, "reference")
        of = denoising.attend({**weights, **ends}, "a", x, memory, 2, "reference", lengths)
        return (to_itself.sin() + of.square()).sum()

    found = []
    for width in (6, 8):
        monkeypatch.setattr(denoising, "lane", lambda head_dim, x, how, width=width: width)
        fn = torch.func.grad_and_value(both, (0, 1, 2, 3))
        fn = torch.compile(fn, backend="aot_eager", fullgraph=True) if compiled else fn
        found.append(fn(x, memory, weights, own))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name):
    config = PRESETS[name]()
    shapes = unet(config).shapes
    assert shapes["input.weight"][1] == config.channels
    skeleton = unet(config).skeleton
    x = torch.empty(1, config.channels, 32, 32, device="meta")
    context = None if config.context is None else x.new_empty(1, 4, config.context)
    values = {n: torch.empty(s, device="meta") for n, s in shapes.items()}
    out = functional_call(
        skeleton, values, (x, x.new_empty(1), context), {"implementation": "sdpa"}
    )
    assert out.shape == x.shape


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: UNetConfig(widths=()), "at least one level"),
        (lambda: UNetConfig(heads=(8, 8)), r"heads \(8, 8\) must have one element for each of"),
        (lambda: UNetConfig(heads=(8, 8, 8, 7)), r"heads \(7\) must divide .* \(1280\)"),
        (lambda: UNetConfig(groups=48), r"groups \(48\) must divide each width, got 320"),
        (lambda: UNetConfig(depth=0), r"depth \(0\) must be at least 1"),
        (lambda: UNetConfig(context=0), r"context \(0\) must be at least 1, or None"),
        (lambda: apply(context=None), "context must be given"),
        (lambda: apply(classes=torch.zeros(2).long()), "classes must not be given"),
        (lambda: apply(context=torch.zeros(2, 3, 5)), r"must end in 6: take the text encoder"),
        (
            lambda: apply(context=torch.zeros(3, 3, 6)),
            r"\(3, 3, 6\) must be for a multiple of 2 im",
        ),
        (lambda: apply(x=torch.zeros(2, 3, 4, 4)), r"x \(2, 3, 4, 4\) must be \(B, 2, H, W\)"),
        (lambda: diffusers_format.read_unet({**HUB, "act_fn": "mish"}), "'mish'.*must be 'silu'"),
        (
            lambda: diffusers_format.read_unet({**HUB, "up_block_types": ["UpBlock2D"] * 2}),
            "mirror image",
        ),
        (lambda: diffusers_format.read_unet({**HUB, "mid_block_type": None}), "mid_block_type"),
        (lambda: diffusers_format.unet_from({}, {}), "lacks 'block_out_channels'"),
        (lambda: diffusers_format.unet_from(HUB, {}), "missing .*conv_in.weight"),
        (lambda: diffusers_format.write_unet(UNetConfig(context=None)), "no such UNet"),
    ),
)
def test_bad_input_says_value_rule_remedy(call, words):
    with pytest.raises(ValueError, match=words):
        call()


HUB = {**SMALL, "attention_head_dim": 4}


def apply(**changed):
    model, params, x, context = tiny()
    t = torch.ones(2)
    given = {"x": x, "context": context, "interval": t, **changed}
    return model.apply(params, given.pop("x"), t, given.pop("context"), **given)


def test_weights_of_another_configuration_are_named():
    theirs = published("1.5: 4 heads at each level")
    weights = theirs.state_dict()
    with pytest.raises(ValueError, match=r"conv_in.weight has shape .* do not belong together"):
        diffusers_format.unet_from({**HUB, "in_channels": 3}, weights)
    with pytest.raises(ValueError, match=r"unexpected \['extra'\]"):
        diffusers_format.unet_from(HUB, {**weights, "extra": torch.ones(1)})


@pytest.mark.gpu
@pytest.mark.parametrize("regions", (False, True))
def test_kernels_of_a_gpu_give_the_formulas_prediction_and_gradients(regions):
    """ResNet blocks, heads of 40 in lanes of 64, skips: channels_last beside plain layout on the
    CPU, in float32."""
    config = UNetConfig(
        widths=(80, 160), depth=1, attention=(True, False), heads=(2, 2), context=24, groups=8
    )
    model = unet(config)
    params = {n: x + 0.02 * random.normal(random.key(i), x.shape)
              for i, (n, x) in enumerate(model.init(0).items())}  # fmt: skip
    keys = random.split(random.key(1), 2)
    x, context = random.normal(keys[0], (2, 4, 16, 16)), random.normal(keys[1], (2, 7, 24))

    def gradients(params, x, context):
        params = {name: value.requires_grad_() for name, value in params.items()}
        y = model.apply(params, x, torch.tensor([5.0, 800.0]).to(x.device), context)
        return y, *torch.autograd.grad(y.square().mean(), list(params.values()))

    def there(x):
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        return x.cuda().contiguous(memory_format=layout)

    wide = {name: value.double() for name, value in params.items()}
    expected = gradients(wide, x.double(), context.double())
    own = {name: there(value) for name, value in params.items()}
    with torch.backends.cudnn.flags(allow_tf32=False):
        with Regions(False).compiled() if regions else contextlib.nullcontext():
            found = gradients(own, there(x), there(context))
    for one, other in zip(found, expected, strict=True):
        error = (one.cpu().double() - other).detach().abs().max() / other.detach().abs().max()
        assert float(error) < 1e-3
