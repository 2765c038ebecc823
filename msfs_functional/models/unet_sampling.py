"""The UNet for sampling: `unet`'s function, arranged for many calls with the same prompts.

    prepared = prepare(config, params)             # of the weights alone, once
    memory = memory_of(config, prepared, context)  # of the prompts, once for all steps
    y = predict(config, prepared, x, t, memory)    # unet(config).apply(params, x, t, context)

The same sums, in another order, and without gradients. To what `arranged` says of blocks it adds:

- Keys and values of the prompts are not computed again at each step; the time's shifts of all
  ResNet blocks are one product, q, k and v one, up and gate one.
- Between a feed-forward's last matrix and the projection out is no nonlinearity: one matrix.
- Biases along a transformer's residuals are added where they count, in its norms and at its end:
  products without them are faster, those of 320 channels by a third.
- What lies between products is one pass each, and nothing is compiled.

`unet` is the definition, which trains and transforms; tests hold the two equal.

Dimension key: B images, N contexts, H height, W width, C channels, T pixels, S context tokens,
X width of the context, K head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from msfs_kernels import image_passes as passes
from torch import Tensor

from msfs_functional.attention import Implementation, attention
from msfs_functional.models import arranged
from msfs_functional.models.arranged import Image, convolve, enlarge, normalized, resnet
from msfs_functional.models.convolutions import linear
from msfs_functional.models.denoising import lane, time_embedding
from msfs_functional.models.unet import UNetConfig
from msfs_functional.params import Params

Memory = dict[str, Float[Tensor, "N S 2 heads K"]]


def suits(config: UNetConfig) -> bool:
    """Whether this arrangement is of that UNet: a text-conditioned one, as Stable Diffusion's."""
    return (
        config.context is not None
        and config.classes is None
        and not config.interval
        and not config.scale_shift
    )


def resnet_names(config: UNetConfig) -> list[str]:
    last = len(config.widths) - 1
    down = [f"down.{i}.resnets.{j}" for i in range(last + 1) for j in range(config.depth)]
    middle = [f"middle.resnets.{j}" for j in range(2 if config.middle_attention else 1)]
    up = [f"up.{i}.resnets.{j}" for i in range(last + 1) for j in range(config.depth + 1)]
    return down + middle + up


def transformer_heads(config: UNetConfig) -> dict[str, int]:
    """Names of the transformers, in order, and their heads."""
    found, last = {}, len(config.widths) - 1
    for i in range(last + 1):
        count = config.depth if config.attention[i] else 0
        found |= {f"down.{i}.transformers.{j}": config.heads[i] for j in range(count)}
    if config.middle_attention:
        found["middle.transformers.0"] = config.heads[-1]
    for i in range(last, -1, -1):
        count = config.depth + 1 if config.attention[i] else 0
        found |= {f"up.{last - i}.transformers.{j}": config.heads[i] for j in range(count)}
    return found


def as_it_is(x: Tensor, width: int) -> bool:
    """Whether the op's forward wants no zeros beside heads of this width, of x's dtype and device.
    Its backward does, and so `lane` adds them in training."""
    if not x.is_cuda:
        return False
    from msfs_kernels import gluon_support

    return gluon_support.reads(x, width)


def padded(weight: Tensor, heads: int, width: int) -> Tensor:
    """Rows of each head, zeros added up to `width` (`denoising.lane`)."""
    weight = weight.unflatten(0, (heads, -1))
    return F.pad(weight, (0, 0, 0, width - weight.shape[1])).flatten(0, 1)


@torch.no_grad()
def prepare(config: UNetConfig, params: Params, implementation: Implementation = "flash") -> Params:
    """What `predict` reads, of the parameters of `unet(config)`; sums of them are made in float64.

    Raises:
        ValueError: a configuration that `suits` does not know.
    """
    if not suits(config):
        raise ValueError(
            f"{config} is no plain text-conditioned UNet: take unet(config).apply, which knows all"
        )
    made, names = params | arranged.merged(params), resnet_names(config)
    bias = [params[f"{name}.time.bias"] + params[f"{name}.conv_in.bias"] for name in names]
    made["shifts.weight"] = torch.cat([params[f"{name}.time.weight"] for name in names])
    made["shifts.bias"] = torch.cat(bias)
    for transformer, heads in transformer_heads(config).items():
        norm = params[f"{transformer}.norm.weight"]
        width = norm.shape[0] // heads
        lanes = width if as_it_is(norm, width) else lane(width, norm, implementation)
        for i in range(config.transformer_depth):
            block = f"{transformer}.blocks.{i}"
            for which, joined in (("self", "qkv"), ("cross", "kv")):
                name = f"{block}.{which}_attention"
                rows = {p: padded(params[f"{name}.{p}.weight"], heads, lanes) for p in "qkv"}
                made[f"{name}.{joined}.weight"] = torch.cat([rows[part] for part in joined])
                made[f"{name}.q.weight"] = rows["q"]
                columns = padded(params[f"{name}.o.weight"].T, heads, lanes)
                made[f"{name}.o.weight"] = columns.T.contiguous()
        shift = params[f"{transformer}.project_in.bias"].double()
        for i in range(config.transformer_depth):
            block = f"{transformer}.blocks.{i}"
            for norm, then in (
                ("self", "self_attention.o"),
                ("cross", "cross_attention.o"),
                ("feed_forward", "feed_forward.down"),
            ):
                made[f"{block}.{norm}_norm.shift"] = shift.float()
                shift = shift + params[f"{block}.{then}.bias"]
        last = f"{block}.feed_forward.down"
        out = params[f"{transformer}.project_out.weight"].flatten(1).double()
        both = torch.cat([out, out @ params[f"{last}.weight"].double()], 1)
        bias = params[f"{transformer}.project_out.bias"] + out @ shift
        dtype = params[f"{last}.weight"].dtype
        made[f"{transformer}.out.weight"] = both.to(dtype)
        made[f"{transformer}.out.bias"] = bias.to(dtype)
    return made


@torch.no_grad()
def memory_of(config: UNetConfig, prepared: Params, context: Float[Tensor, "N S X"]) -> Memory:
    """Keys and values of N contexts in each cross-attention."""
    memory = {}
    for transformer, heads in transformer_heads(config).items():
        for i in range(config.transformer_depth):
            name = f"{transformer}.blocks.{i}.cross_attention"
            both = linear(prepared, f"{name}.kv", context)
            memory[name] = both.unflatten(-1, (2, heads, -1))
    return memory


def transformer(
    params: Params,
    name: str,
    image: Image,
    memory: Memory,
    heads: int,
    config: UNetConfig,
    implementation: Implementation,
) -> Image:
    """`unet.blocks` behind its norm; from the first cross-attention on for each context."""
    x, _ = image
    C, scale = x.shape[-1], (x.shape[-1] // heads) ** -0.5
    T = x.shape[1] * x.shape[2]

    def product(at: str, x: Tensor) -> Tensor:  # its bias is in the norms behind it
        return F.linear(x, params[f"{at}.weight"].flatten(1))

    def add_norm(at: str, y: Tensor, more: Tensor | None, out: Tensor | None = None) -> Any:
        gain, bias, shift = (params[f"{at}_norm.{part}"] for part in ("weight", "bias", "shift"))
        return passes.add_norm(y, more, gain, bias, 1e-5, out, shift)

    def attend(at: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = attention(q, k, v, scale=scale, implementation=implementation)
        return product(f"{at}.o", out.transpose(1, 2).flatten(2).flatten(0, 1))

    normed = normalized(params, f"{name}.norm", [image], config.groups, 1e-6, silu=False)
    y = wide = product(f"{name}.project_in", normed.flatten(0, 2))
    y, inside = add_norm(f"{name}.blocks.0.self", y, None)
    for i in range(config.transformer_depth):
        block = f"{name}.blocks.{i}"
        at = f"{block}.self_attention"
        qkv = linear(params, f"{at}.qkv", inside).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.unflatten(0, (-1, T)).unbind(2)
        y, inside = add_norm(f"{block}.cross", y, attend(at, q, k, v))
        at = f"{block}.cross_attention"
        k, v = memory[at].unbind(2)
        q = linear(params, f"{at}.q", inside).unflatten(-1, (heads, -1)).unflatten(0, (-1, T))
        more = attend(at, passes.repeated(q, len(k)), k, v)
        wide = more.new_empty(len(more), 5 * C)  # y beside the feed-forward's hidden layer
        y, inside = add_norm(f"{block}.feed_forward", y, more, wide[:, :C])
        passes.geglu(linear(params, f"{block}.feed_forward.up_gate", inside), wide[:, C:])
        if i + 1 < config.transformer_depth:
            more = product(f"{block}.feed_forward.down", wide[:, C:])
            y, inside = add_norm(f"{name}.blocks.{i + 1}.self", y.contiguous(), more)
    y = F.linear(wide, params[f"{name}.out.weight"]).view(-1, *x.shape[1:])
    return Image(*passes.add(y, params[f"{name}.out.bias"], x))


@torch.no_grad()
def predict(
    config: UNetConfig,
    params: Params,
    x: Float[Tensor, "B C H W"],
    t: Float[Tensor, "B"],
    memory: Memory,
    implementation: Implementation = "flash",
) -> Float[Tensor, "N C H W"]:
    """The prediction of `unet(config).apply` for x at time t and the contexts of `memory`.

    Args:
        params: of `prepare`, for the same implementation.
        memory: of B contexts, or of several times as many (`unet.UNet`).

    Raises:
        ValueError: an x of other channels.
    """
    sizes = {"cosine_first": config.cosine_first, "frequency_shift": config.frequency_shift}
    time = time_embedding(t, config.widths[0], dtype=x.dtype, **sizes)
    time = F.silu(linear(params, "time.down", F.silu(linear(params, "time.up", time))))
    names = resnet_names(config)
    widths = [params[f"{name}.norm_out.weight"].shape[0] for name in names]
    shifts = dict(zip(names, linear(params, "shifts", time).split(widths, -1), strict=True))
    heads, options = transformer_heads(config), (config.groups, config.norm_eps)
    skips: list[Image] = []

    def run(level: str, image: Image, count: int, *, joined: bool, leaves: bool) -> Image:
        for i in range(count):
            images = [image, skips.pop()] if joined else [image]
            name = f"{level}.resnets.{i}"
            image = resnet(params, name, images, shifts[name], *options)
            name = f"{level}.transformers.{i}"
            if name in heads:
                given = (memory, heads[name], config, implementation)
                image = transformer(params, name, image, *given)
            if leaves:
                skips.append(image)
        return image

    y = convolve(params["input.weight"], x.permute(0, 2, 3, 1).contiguous())
    image = Image(*passes.add(y, params["input.bias"]))
    skips.append(image)
    last = len(config.widths) - 1
    for i in range(last + 1):
        image = run(f"down.{i}", image, config.depth, joined=False, leaves=True)
        if i < last:
            y = convolve(params[f"down.{i}.shrink.weight"], image.x, stride=2)
            image = Image(*passes.add(y, params[f"down.{i}.shrink.bias"]))
            skips.append(image)
    count = 2 if config.middle_attention else 1
    image = run("middle", image, count, joined=False, leaves=False)
    for i in range(last + 1):
        image = run(f"up.{i}", image, config.depth + 1, joined=True, leaves=False)
        if i < last:
            image = enlarge(params, f"up.{i}.enlarge", image.x, skips[-1].x.shape[1:3])
    y = normalized(params, "output_norm", [image], *options)
    y = convolve(params["output.weight"], y)
    return (y + params["output.bias"]).permute(0, 3, 1, 2)
