"""Matrices begun by their fan-in: the variance asked for, nothing else changed."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from msfs_functional.fan_in import by_fan_in
from msfs_functional.models import clip, vlm


def test_matrices_of_blocks_and_projector_begin_by_their_inputs_and_depth():
    config = vlm.tiny(40, 40)
    plain = vlm.vlm(replace(config, decoder=replace(config.decoder, qk_norm=True)))
    before, after = plain.init(0), by_fan_in(plain, 0.5).init(0)
    depth = {"vision": 4, "decoder": 4}
    for name, value in after.items():
        own = ".blocks." in name and value.ndim == 2
        if not own and not (name.startswith("projector.") and value.ndim == 2):
            assert torch.equal(value, before[name])
            continue
        expected = 0.5 / value.shape[1] ** 0.5
        if name.endswith(("o.weight", "down.weight")) and own:
            expected /= math.sqrt(2 * depth[name.split(".")[0]])
        assert value.std().item() == pytest.approx(expected, rel=0.05), name
    assert after["decoder.blocks.0.attention.q.weight"].std() > 2 * 0.02


def test_each_tower_of_clip_has_a_depth_of_its_own():
    options: dict[str, Any] = {"width": 64, "heads": 2, "hidden": 128, "projection": 8}
    text = clip.TextConfig(**options, vocab=30, max_length=8, depth=2, eos=29)
    image = clip.clip_vision(**options, image=16, patch=8, depth=4)
    params = by_fan_in(clip.clip(clip.CLIPConfig(image, text)), 1.0).init(0)
    found = [v.std().item() for n, v in params.items() if n.endswith("0.attention.o.weight")]
    assert sorted(found) == pytest.approx([0.125 / 8**0.5, 0.125 / 4**0.5], rel=0.05)


def test_a_gain_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"gain \(0\) must be above 0"):
        by_fan_in(vlm.vlm(vlm.tiny(40, 40)), 0)
