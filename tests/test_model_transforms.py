"""The Transformer under torch.func, against the reference attention in float64."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from msfs_functional import random
from msfs_functional.losses import cross_entropy, linear_cross_entropy
from msfs_functional.models.transformer import TransformerConfig, output_weight, transformer

CONFIG = TransformerConfig(
    11, width=8, depth=1, heads=2, hidden=12, dropout=0.2, attention_dropout=0.1, max_length=8
)
MODEL = transformer(CONFIG)
BATCH = {
    "source": torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [0, 0, 0, 0]]),
    "lengths": torch.tensor([4, 2, 0]),
    "target": torch.tensor([[1, 5, 6, 2], [1, 9, 2, 0], [0, 0, 0, 0]]),
}


def build(seed: int, dtype=torch.float64):
    params = MODEL.init(seed, dtype=dtype)
    keys = random.split(random.key(seed + 100), len(params))
    return {
        name: value + 0.1 * random.normal(key, value.shape, dtype=dtype)
        for key, (name, value) in zip(keys, params.items(), strict=True)
    }


def loss_with(implementation: str, fused: bool = False, key=None):
    """(params, batch) -> summed loss of a batch, or of one example without batch dim."""

    def loss(params, batch):
        batch = {
            name: x.reshape(-1, *x.shape[n:])
            for (name, x), n in zip(
                batch.items(),
                (batch["source"].ndim - 1, batch["lengths"].ndim, batch["target"].ndim - 1),
                strict=True,
            )
        }
        arguments = (params, batch["source"], batch["target"][:, :-1])
        options = {
            "source_lengths": batch["lengths"],
            "key": key,
            "implementation": implementation,
        }
        labels = batch["target"][:, 1:]
        if fused:
            states = MODEL.apply(*arguments, **options, method="hidden")
            weight = output_weight(params)
            return linear_cross_entropy(states, weight, labels, label_smoothing=0.1)[0]
        return cross_entropy(MODEL.apply(*arguments, **options), labels, label_smoothing=0.1)[0]

    return loss


PARAMS, TANGENT = build(0), build(1)
EXAMPLES = {"source": 0, "lengths": 0, "target": 0}
COMPOSITIONS = {
    "grad": lambda loss: grad(loss)(PARAMS, BATCH),
    "vmap(grad)": lambda loss: vmap(grad(loss), in_dims=(None, EXAMPLES))(PARAMS, BATCH),
    "jvp": lambda loss: jvp(lambda p: loss(p, BATCH), (PARAMS,), (TANGENT,)),
    "jvp(grad)": lambda loss: jvp(lambda p: grad(loss)(p, BATCH), (PARAMS,), (TANGENT,)),
    "vmap over members": lambda loss: vmap(grad(loss), in_dims=(0, None))(
        {name: torch.stack([PARAMS[name], TANGENT[name]]) for name in PARAMS}, BATCH
    ),
}


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused_loss"])
def test_flash_equals_reference_under_transforms(composition, fused):
    key = random.key(3)
    compose = COMPOSITIONS[composition]
    close(compose(loss_with("flash", fused, key)), compose(loss_with("reference", False, key)))


@pytest.mark.parametrize("composition", ["grad", "vmap(grad)", "vmap over members"])
def test_sdpa_equals_reference_where_torch_can(composition):
    """torch's fused SDPA has neither a tangent nor a double backward."""
    compose = COMPOSITIONS[composition]
    close(compose(loss_with("sdpa")), compose(loss_with("reference")))


def test_reference_gradients_are_right_by_finite_differences():
    loss, step = loss_with("reference", key=random.key(3)), 1e-6
    moved = [
        loss({name: PARAMS[name] + sign * step * TANGENT[name] for name in PARAMS}, BATCH)
        for sign in (1, -1)
    ]
    slope = (moved[0] - moved[1]) / (2 * step)
    value, tangent = jvp(lambda p: loss(p, BATCH), (PARAMS,), (TANGENT,))
    torch.testing.assert_close(tangent, slope, rtol=1e-6, atol=1e-6)
    grads = grad(loss)(PARAMS, BATCH)
    product = torch.stack([(grads[name] * TANGENT[name]).sum() for name in grads]).sum()
    torch.testing.assert_close(product, slope, rtol=1e-6, atol=1e-6)
    assert value.isfinite()


def test_examples_gradients_add_up():
    loss = loss_with("flash")
    each = vmap(grad(loss), in_dims=(None, EXAMPLES))(PARAMS, BATCH)
    close({name: value.sum(0) for name, value in each.items()}, grad(loss)(PARAMS, BATCH))
    assert all((value[2] == 0).all() for value in each.values())  # the empty example


@pytest.mark.parametrize("composition", ["grad", "jvp(grad)"])
def test_traced_transforms_equal_eager(composition):
    """Traced whole, where a derivative rule can get lost; code generation is the kernels' test."""
    compose = COMPOSITIONS[composition]
    loss = loss_with("flash", True)
    traced = torch.compile(lambda: compose(loss), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(traced, compose(loss_with("reference")), atol=1e-9, rtol=1e-8)
