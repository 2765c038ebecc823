"""Feature extractors for `fidelity`: functions of uint8 pictures, each with a name to report.

    extractor = cifar_resnet("resnet56-4bfd9763.th")     CIFAR-10: 64 features of a ResNet-56
    extractor = inception("pt_inception-2015-12-05.pth") the 2048 of published FIDs, if installed
    extractor = trained(pictures, targets, names)        anything labelled or captioned: 64 features
                                                         of a classifier trained here and now
    frechet_distance(*(features_of(x, extractor.feature_fn) for x in (real, fake)))

Dimension key: N pictures, C channels, K targets.
"""

import functools
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from msfs_functional import optim, random, schedules
from msfs_functional.fidelity import FeatureFn
from msfs_functional.models import cifar_resnet as resnet
from msfs_functional.models.convolutions import Norm, group_norm
from msfs_functional.models.weight_files import read_tensors
from msfs_functional.params import (
    Functional,
    Params,
    functional,
    kaiming_uniform,
    ones,
    zeros,
)
from msfs_functional.train import init_state, make_step


class Extractor(NamedTuple):
    """A feature function, and what to write beside a figure that it gave."""

    feature_fn: FeatureFn
    name: str


def cifar_resnet(path: str | Path, *, device: torch.device | str = "cpu") -> Extractor:
    """The 64 features under the last layer of a ResNet that was trained to classify CIFAR-10."""
    params = resnet.load(path, device=device)
    return Extractor(
        functools.partial(resnet.features, params), f"64 features of {Path(path).stem}"
    )


def inception(
    weights: str | Path | None = None, *, device: torch.device | str = "cpu"
) -> Extractor:
    """Inception's 2048 pooled features: those of published FIDs where torch-fidelity is installed,
    else torchvision's network, whose figures are near but not comparable.

    Args:
        weights: their file; None lets the package fetch it.

    Raises:
        ValueError: neither package is installed.
    """
    if importlib.util.find_spec("torch_fidelity"):
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore
            FeatureExtractorInceptionV3,
        )

        with tempfile.TemporaryDirectory() as folder:
            where = None
            if weights is not None:  # read as data alone: the package would unpickle anything
                where = f"{folder}/inception.pth"
                torch.save(read_tensors(weights), where)
            net: Any = FeatureExtractorInceptionV3("inception", ["2048"], where)
        net = net.to(device).eval()
        return Extractor(lambda x: net(_colour(x))[0], "Inception of torch-fidelity")
    if importlib.util.find_spec("torchvision"):
        from torchvision.models import Inception_V3_Weights, inception_v3  # pyright: ignore

        if weights is None:
            net = inception_v3(weights=Inception_V3_Weights.DEFAULT)
        else:
            net = inception_v3(weights=None, init_weights=False)
            net.load_state_dict(read_tensors(weights))
        net.fc = nn.Identity()
        net = net.to(device).eval()

        def features(x: Tensor) -> Tensor:
            x = F.interpolate(_colour(x).float() / 255, (299, 299), mode="bilinear", antialias=True)
            return net(x * 2 - 1)

        return Extractor(features, "Inception of torchvision")
    raise ValueError(
        "no torch_fidelity and no torchvision is installed: pip install torch-fidelity, or take "
        "another extractor"
    )


def _colour(pictures: Tensor) -> Tensor:
    return pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures


class Classifier(nn.Module):
    """Convolutions to an eighth of the picture, its quarters' means, 64 features, K logits."""

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        widths = (32, 64, 128, 128)
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i - 1] if i else channels
            self.convolutions.append(nn.Conv2d(before, width, 3, 2 if i else 1, padding=1))
            self.norms.append(Norm(width))
        self.features = nn.Linear(4 * widths[-1], 64)
        self.output = nn.Linear(64, outputs)

    def inside(self, pictures: UInt8[Tensor, "N C H W"]) -> Float[Tensor, "N 64"]:
        x = pictures.float() / 127.5 - 1
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            params: Params = dict(norm.named_parameters("norm"))
            x = F.silu(group_norm(params, "norm", convolution(x), 8, 1e-5))
        return F.silu(self.features(F.adaptive_avg_pool2d(x, 2).flatten(1)))

    def forward(self, pictures: UInt8[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        return self.output(self.inside(pictures))


def classifier(channels: int, outputs: int) -> Functional:
    """`Classifier` as pure functions; method="inside" gives the features."""
    rules = [(r"norms\..*weight$", ones), (r"bias$", zeros), (r"weight$", kaiming_uniform())]
    return functional(lambda: Classifier(channels, outputs), rules, strict=False)


def trained(
    pictures: UInt8[Tensor, "N C H W"],
    targets: Float[Tensor, "N K"],
    what: str,
    *,
    seed: int = 0,
    steps: int = 300,
    batch: int = 64,
) -> Extractor:
    """The 64 features of a small classifier of these very pictures, trained in seconds.

    The same pictures, targets and seed give the same extractor on one machine, so its figures
    compare runs there; across machines they move by what rounding does to a training.

    Args:
        targets: 1 where a picture has an attribute (a class, a word of its caption), else 0.
        what: they are, for the name: "classes", "words of the captions".

    Raises:
        ValueError: as many targets as pictures are needed, and two kinds of picture at least.
    """
    if len(targets) != len(pictures) or targets.ndim != 2:
        raise ValueError(
            f"targets {tuple(targets.shape)} must be ({len(pictures)}, K): one row for each picture"
        )
    if not bool((targets != targets[:1]).any()):
        raise ValueError("targets must differ: all pictures have the same, so nothing is learnt")
    model = classifier(pictures.shape[1], targets.shape[1])

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        given = model.apply(params, batch["pictures"])
        return F.binary_cross_entropy_with_logits(given, batch["targets"]), {}

    device = pictures.device
    rate = schedules.warmup_stable_decay(2e-3, steps, warmup=steps // 10, decay=steps // 2)
    optimizer, key = optim.adamw(rate, weight_decay=0.01), random.key(seed, device=device)
    state = init_state(model.init(seed, device=device), optimizer, key)
    step = make_step(loss_fn, optimizer, compile=False)
    for i in range(steps):
        rows = random.integers(random.fold_in(key, i), (batch,), 0, len(pictures))
        state, _ = step(state, {"pictures": pictures[rows], "targets": targets[rows]})
    params = state.params
    name = f"64 features of a classifier of {targets.shape[1]} {what}, {steps} steps, seed {seed}"
    return Extractor(lambda x: model.apply(params, x, method="inside"), name)


def words_of(captions: Sequence[str], *, most: int = 64) -> Float[Tensor, "N K"]:
    """Which of the commonest words each caption holds, leaving out those that all hold."""
    rows = [set(caption.lower().split()) for caption in captions]
    counts: dict[str, int] = {}
    for row in rows:
        for word in row:
            counts[word] = counts.get(word, 0) + 1
    telling = [word for word, n in counts.items() if n < len(rows)]
    chosen = sorted(telling, key=lambda word: (-counts[word], word))[:most]
    return torch.tensor([[float(word in row) for word in chosen] for row in rows])
