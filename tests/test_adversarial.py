"""An autoencoder against a discriminator: each term moves what it shall, and both learn."""

import functools

import pytest
import torch

from msfs_functional import adversarial, optim, random, train
from msfs_functional.models.autoencoder import AutoencoderConfig, autoencoder, kl, sample
from msfs_functional.models.discriminator import DiscriminatorConfig, discriminator

KEY = random.key(3)
MODEL = autoencoder(AutoencoderConfig(widths=(8, 8), depth=1, groups=4, middle_attention=False))
CRITIC = discriminator(DiscriminatorConfig(width=8, depth=2, groups=4))
LOSS = functools.partial(adversarial.autoencoder_loss, MODEL, CRITIC)
BATCH = {"image": random.uniform(KEY, (3, 3, 12, 12), low=-1.0)}


def parameters() -> dict[str, torch.Tensor]:
    parts = {"autoencoder": MODEL.init(0), "discriminator": CRITIC.init(1)}
    return {f"{part}.{n}": value for part, params in parts.items() for n, value in params.items()}


def gradients(loss_fn, params) -> dict[str, torch.Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    grads = torch.autograd.grad(loss_fn(leaves), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(params[name]) if value is None else value
        for name, value in zip(params, grads, strict=True)
    }


def test_hinge_by_hand():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 1.0])
    assert adversarial.hinge(real, fake).item() == pytest.approx((0.25 + 1.0) / 2)


def parts_by_hand(params, adaptive: bool = True):
    """The two losses, each a function of all parameters, written out with autograd."""
    ours = adversarial.part(params, "autoencoder")
    theirs = adversarial.part(params, "discriminator")
    image = BATCH["image"]
    posterior = MODEL.apply(ours, image, method="encode")
    out = MODEL.apply(ours, sample(posterior, KEY), method="decode")
    error = (out - image).abs().mean()
    fooled = -CRITIC.apply(theirs, out).mean()
    last = ours["decoder.output.weight"]
    lengths = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (error, fooled)]
    weight = (lengths[0] / (lengths[1] + 1e-4)).detach()
    divergence = kl(posterior).mean() / image[0].numel()
    generator = error + 1e-3 * divergence + 0.5 * weight * fooled
    real, fake = CRITIC.apply(theirs, image), CRITIC.apply(theirs, out.detach())
    return generator, 0.5 * adversarial.hinge(real, fake)


def test_each_network_gets_the_gradient_of_its_own_loss():
    params = parameters()
    both = gradients(lambda p: LOSS(p, BATCH, KEY, kl_weight=1e-3)[0], params)
    generator = gradients(lambda p: parts_by_hand(p)[0], params)
    critic = gradients(lambda p: parts_by_hand(p)[1], params)
    for name, value in both.items():
        expected = (generator if name.startswith("autoencoder") else critic)[name]
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-7)
    assert any(value.abs().max() > 0 for n, value in both.items() if n.startswith("discr"))


def test_without_the_adversarial_weight_the_discriminator_stays():
    moved = gradients(lambda p: LOSS(p, BATCH, KEY, gan_weight=0.0)[0], parameters())
    for name, value in moved.items():
        assert name.startswith("autoencoder") or value.abs().max() == 0


def test_a_perceptual_loss_is_added():
    params = parameters()
    plain, metrics = LOSS(params, BATCH, KEY, gan_weight=0.0)
    more, _ = LOSS(
        params, BATCH, KEY, gan_weight=0.0, perceptual_fn=lambda x, y: x[:, 0, 0, 0] * 0 + 2
    )
    assert (more - plain).item() == pytest.approx(2.0)
    assert {"reconstruction", "kl"} == set(metrics)


def test_one_step_function_trains_both():
    optimizer = optim.by_group(
        [
            ("^autoencoder", optim.adamw(1e-3, weight_decay=0.0)),
            ("", optim.adamw(4e-3, weight_decay=0.0)),
        ]
    )
    params = parameters()
    before = {name: value.clone() for name, value in params.items()}
    state = train.init_state(params, optimizer, KEY)
    step = train.make_step(LOSS, optimizer, compile=False)
    told = []
    for _ in range(40):
        state, metrics = step(state, BATCH)
        told.append(float(metrics["discriminator"]))
    assert told[-1] < 0.7 * told[0]  # it tells real patches from the others
    assert float(metrics["real"]) > float(metrics["fake"])
    still = [n for n, value in state.params.items() if torch.equal(value, before[n])]
    assert not still


def test_the_default_discriminator_has_the_published_size_and_field():
    critic = discriminator(DiscriminatorConfig())
    assert sum(s.numel() for s in critic.shapes.values()) / 1e6 == pytest.approx(2.77, abs=0.02)
    params = {name: torch.ones(shape) * 0.01 for name, shape in critic.shapes.items()}
    logits = critic.apply(params, torch.zeros(1, 3, 256, 256))
    assert logits.shape == (1, 30, 30)


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: DiscriminatorConfig(width=5), r"groups \(32\) must divide twice the width \(10\)"),
        (lambda: DiscriminatorConfig(depth=0), r"depth \(0\) must be at least 1"),
        (lambda: CRITIC.apply(CRITIC.init(0), torch.zeros(1, 3, 4, 4)), "at least 12 x 12"),
        (lambda: LOSS({}, BATCH, KEY, gan_weight=-1.0), r"gan_weight \(-1.0\)"),
    ),
)
def test_bad_input_says_value_rule_remedy(call, words):
    with pytest.raises(ValueError, match=words):
        call()
