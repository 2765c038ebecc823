"""The arrangements for sampling: the numbers of the networks that they arrange."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from msfs_kernels import doubled

from msfs_functional import random, stable_diffusion
from msfs_functional.models import arranged, decoder_sampling, unet_sampling
from msfs_functional.models.autoencoder import AutoencoderConfig, autoencoder
from msfs_functional.models.unet import UNetConfig, unet
from msfs_functional.params import Functional, Params

UNETS = {
    "two levels": UNetConfig(
        widths=(16, 32), depth=1, attention=(True, True), heads=(2, 4), context=12, groups=8
    ),
    "deep transformers, one level without": UNetConfig(
        widths=(16, 32, 48),
        attention=(True, True, False),
        heads=(2, 4, 4),
        context=12,
        groups=8,
        transformer_depth=2,
        cosine_first=False,
    ),
    "first level without, plain middle, linear projections": UNetConfig(
        widths=(16, 32),
        attention=(False, True),
        heads=(2, 4),
        context=12,
        groups=8,
        linear_projection=True,
        middle_attention=False,
    ),
}


def some(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(network: Functional) -> Params:
    """Parameters none of which is zero."""
    params = network.init(0)
    return {n: p + 0.05 * some(*p.shape, seed=i) for i, (n, p) in enumerate(params.items())}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", ((8, 12), (7, 10)))  # the latter is not doubled on the way up
@pytest.mark.parametrize("repeats", (1, 2))
@pytest.mark.parametrize("name", UNETS)
def test_arranged_unet_is_the_unet(name, repeats, size):
    config = UNETS[name]
    network, B = unet(config), 2
    params = trained(network)
    x, context = some(B, 4, *size, seed=1), some(repeats * B, 5, 12, seed=2)
    t = torch.tensor([3.0, 700.0])
    with torch.no_grad():
        expected = network.apply(params, x, t, context)
    prepared = unet_sampling.prepare(config, params)
    memory = unet_sampling.memory_of(config, prepared, context)
    close(unet_sampling.predict(config, prepared, x, t, memory), expected)


@pytest.mark.parametrize("mixed", (False, True))
def test_arranged_decoder_is_the_decoder(mixed):
    config = AutoencoderConfig(widths=(8, 16), depth=1, groups=4, mixed=mixed)
    network = autoencoder(config)
    params, z = trained(network), some(2, 4, 4, 6, seed=1)
    with torch.no_grad():
        expected = network.apply(params, z, method="images")
    close(decoder_sampling.images(config, decoder_sampling.prepare(params), z), expected)


def test_doubled_pixels_are_convolved_as_four_windows_of_two():
    x, weight = some(2, 3, 5, 4, seed=0).double(), some(6, 3, 3, 3, seed=1).double()
    params = {"up.bias": some(6, seed=2).double(), "up.doubling": doubled.kernel(weight)}
    image, _ = arranged.enlarge(params, "up", x.permute(0, 2, 3, 1).contiguous(), (10, 8))
    expected = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, padding=1)
    expected = expected + params["up.bias"][:, None, None]
    torch.testing.assert_close(image.permute(0, 3, 1, 2), expected)


def test_configurations_that_are_not_arranged_are_refused():
    config = UNetConfig(widths=(16, 32), attention=(True, True), heads=(2, 4), classes=3, groups=8)
    with pytest.raises(ValueError, match=r"unet\(config\).apply"):
        unet_sampling.prepare(config, {})


def tiny_model(config: UNetConfig) -> stable_diffusion.StableDiffusion:
    decoder = AutoencoderConfig(widths=(8, 16), depth=1, groups=4)
    nothing: Any = None
    return stable_diffusion.StableDiffusion(
        (config, trained(unet(config))),
        (decoder, trained(autoencoder(decoder))),
        (nothing, {}),
        nothing,
        stable_diffusion.read_process({"beta_schedule": "scaled_linear"}),
        0,
    )


def test_images_of_an_arranged_model_are_the_model_s_and_see_new_parameters(monkeypatch):
    model = tiny_model(UNETS["two levels"])
    given = (model, some(2, 5, 12, seed=1), some(2, 5, 12, seed=2), random.key(0))

    def both(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images = []
        for arranges in (False, True):
            monkeypatch.setattr(stable_diffusion, "_arranges", lambda *_, a=arranges: a)
            sizes: Any = {"steps": 2, "height": 16, "width": 16}
            images.append(stable_diffusion.images_of(*given, **sizes, **options))
        return images[0].int(), images[1].int()

    first, found = both()
    assert (first - found).abs().max() <= 1
    several: Any = (
        {"guidance": 1.5},
        {"guidance": 1.5, "sampler": "ddim"},
        {"rescale": 0.5},
        {"interval": (0.0, 100.0)},  # the last of two steps alone
    )
    for options in several:
        other, found = both(**options)
        assert (other - found).abs().max() <= 1 and (first - other).abs().max() > 5
    with torch.no_grad():
        for value in model.unet[1].values():
            value.mul_(0.8)
    second, found = both()
    assert (second - found).abs().max() <= 1 and (first - second).abs().max() > 5


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ("flash", "sdpa"))
def test_a_gpu_draws_the_same_images_arranged_recorded_and_replayed(implementation):
    config = UNetConfig(
        widths=(80, 160), depth=1, attention=(True, True), heads=(2, 2), context=24, groups=8
    )
    model = stable_diffusion.place(tiny_model(config), torch.float32, "cuda")
    prompts, negative = some(3, 7, 24, seed=1).cuda(), some(3, 7, 24, seed=2).cuda()
    options: Any = {"steps": 3, "height": 32, "width": 32, "implementation": implementation}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for these, those, scale, interval in (
            (prompts, negative, 7.5, None),
            (negative, prompts, 7.5, None),
            (prompts, negative, 1.5, None),
            (prompts, negative, 7.5, (100.0, 600.0)),  # the second of three steps alone
        ):
            given = (model, these, those, random.key(0))
            options |= {"guidance": scale, "interval": interval}
            plain = stable_diffusion.images_of(*given, **options).int()
            for _ in range(2):
                found = stable_diffusion.images_of(*given, **options, compile=True).int()
                assert (found - plain).abs().max() <= 1


@pytest.mark.gpu
def test_heads_of_40_and_80_in_16_bits_are_as_near_as_torch_s():
    config = UNetConfig(
        widths=(80, 160), depth=1, attention=(True, True), heads=(2, 2), context=24, groups=8
    )
    network, t = unet(config), torch.tensor([700.0], device="cuda")
    params = {name: value.cuda() for name, value in trained(network).items()}
    x, context = some(1, 4, 64, 64, seed=1).cuda(), some(2, 7, 24, seed=2).cuda()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = network.apply(params, x, t, context, implementation="reference")
        params, x, context = ({n: p.bfloat16() for n, p in params.items()}, x.bfloat16(),
                              context.bfloat16())  # fmt: skip
        plain = network.apply(params, x, t, context, implementation="sdpa")
        prepared = unet_sampling.prepare(config, params)
        memory = unet_sampling.memory_of(config, prepared, context)
        found = unet_sampling.predict(config, prepared, x, t, memory)
    if torch.cuda.get_device_capability() == (9, 0):  # nothing lies beside a head
        assert prepared["down.0.transformers.0.blocks.0.self_attention.q.weight"].shape[0] == 80
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()
