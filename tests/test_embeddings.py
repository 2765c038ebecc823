"""Members of an ensemble never read one another's rows: an id that is no row is refused.

torch's rule for F.embedding under vmap over matrices looks up in all of them side by side: id V of
member 1 is the first row of member 2. Every module that looks up by an id is asked here.
"""

from dataclasses import replace

import pytest
import torch
from test_every_model_transforms import CASES, DIT, IDS, PICTURES, PROMPTS, TEXT, TIMES, WORDS
from torch import Tensor, nn
from torch.func import jvp, vmap

from msfs_functional.layers import Embedding
from msfs_functional.models.clip import text_tower
from msfs_functional.models.decoder import decoder
from msfs_functional.models.dit import dit
from msfs_functional.models.transformer import tiny, transformer
from msfs_functional.models.unet import UNetConfig, unet
from msfs_functional.models.vlm import vlm
from msfs_functional.params import stack

V = 20  # of all vocabularies here
LEARNED = replace(WORDS, positions="learned")
CLASSES = torch.tensor([0, 2])
LATENTS = torch.ones(2, 2, 4, 4)
LABELLED = UNetConfig(
    channels=2,
    widths=(4,),
    depth=1,
    attention=(False,),
    middle_attention=False,
    heads=(1,),
    context=None,
    groups=2,
    classes=3,
)
PAIR = transformer(tiny(V, width=8, depth=1, heads=2, hidden=8))
TIMES = TIMES.float()

CALLS = {  # model, what it gives for ids, good ids, rows that there are
    "text_tower": (text_tower(TEXT), lambda apply, ids: apply(ids), IDS, V),
    "decoder": (decoder(LEARNED), lambda apply, ids: apply(ids), IDS, V),
    "positions": (
        decoder(LEARNED),
        lambda apply, ids: apply(IDS, positions=ids),
        torch.arange(4).expand(2, 4),
        LEARNED.max_length,
    ),
    "vlm": (vlm(PICTURES), lambda apply, ids: apply(ids, torch.ones(2, 3, 4, 4)), PROMPTS, V),
    "source": (PAIR, lambda apply, ids: apply(ids, IDS), IDS, V),
    "target": (PAIR, lambda apply, ids: apply(IDS, ids), IDS, V),
    "dit": (
        dit(DIT),
        lambda apply, ids: apply(LATENTS, TIMES, torch.ones(2, 3, 6), classes=ids),
        CLASSES,
        3,
    ),
    "unet": (unet(LABELLED), lambda apply, ids: apply(LATENTS, TIMES, classes=ids), CLASSES, 3),
}


def members(name: str, how: str):
    """A function of ids: what three members with parameters of their own give for them."""
    model, call, *_ = CALLS[name]
    params = stack([model.init(seed) for seed in range(3)])

    def value(p, ids: Tensor):
        return call(lambda *args, **options: model.apply(p, *args, **options), ids)

    def tangent(p, ids: Tensor):
        return jvp(lambda p: value(p, ids), (p,), (p,))[1]

    fn = vmap(tangent if how == "forward mode" else value)
    if how == "compiled":
        # With "eager" torch 2.11 answers any error in a compiled vmap with an INTERNAL ASSERT.
        fn = torch.compile(fn, backend="aot_eager")
    return lambda ids: fn(params, ids)


# Whole models take long to compile: one of each kind of text, the others share its module.
COMPILED = ("decoder", "text_tower", "target")


@pytest.mark.parametrize(
    "name, how",
    [(name, how) for name in CALLS for how in ("eager", "forward mode")]
    + [(name, "compiled") for name in COMPILED],
)
def test_an_id_beyond_a_member_s_rows_is_refused(name, how):
    *_, good, rows = CALLS[name]
    of_members = members(name, how)
    ids = torch.stack([good] * 3)
    assert bool(of_members(ids).isfinite().all())
    for id in (-1, rows):
        bad = ids.clone()
        bad[1].view(-1)[0] = id  # of the member in the middle: the others' rows lie around its own
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            of_members(bad)


def test_compiled_for_real_members_refuse_it_too():
    """Where Inductor with torch's own rule reads the neighbour's row for -1 and V."""
    weights, ids = torch.randn(3, 5, 2), torch.tensor([[0, 4], [1, 2], [4, 3]])
    module = Embedding(5, 2)
    compiled = torch.compile(
        vmap(lambda weight, ids: torch.func.functional_call(module, {"weight": weight}, (ids,)))
    )
    assert torch.equal(
        compiled(weights, ids), torch.stack([w[i] for w, i in zip(weights, ids, strict=True)])
    )
    for id in (-1, 5):
        ids[1, 0] = id
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            compiled(weights, ids)


def test_no_model_looks_up_by_torch_s_own_module():
    models = [model for model, *_ in [*CASES.values(), *CALLS.values()]]
    kinds = [type(m) for model in models for m in model.skeleton.modules()]
    assert nn.Embedding not in kinds and kinds.count(Embedding) > 8
