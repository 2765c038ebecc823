"""Contrastive losses: formulas, gradients, chunks, ranks. Zero-shot classes and retrieval."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from msfs_functional import random
from msfs_functional.contrastive import cut, gradient_cache, in_chunks, sigmoid_loss, softmax_loss
from msfs_functional.meshes import mesh
from msfs_functional.models.clip import CLIPConfig, TextConfig, clip, unit
from msfs_functional.models.vit import clip_vision
from msfs_functional.transforms import value_and_grad
from msfs_functional.zero_shot import class_vectors, classify, exact_match, ranks, recall


def vectors(n: int = 6, width: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, n, width, dtype=torch.float64, generator=generator)
    image, text = unit(pair)
    return image, text


def softmax_formula(image, text, scale):
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    both = (F.cross_entropy(x, labels, reduction="sum") for x in (logits, logits.T))
    return sum(both) / 2


def sigmoid_formula(image, text, scale, bias):
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum()


SCALE = torch.tensor(4.0, dtype=torch.float64)
BIAS = torch.tensor(-2.0, dtype=torch.float64)


@given(n=st.integers(1, 9), chunk=st.integers(1, 10))
def test_losses_and_gradients_equal_the_formulas(n, chunk):
    image, text = vectors(n)
    for ours, formula, more in (
        (softmax_loss, softmax_formula, ()),
        (lambda *x: sigmoid_loss(*x, chunk=chunk), sigmoid_formula, (BIAS,)),
    ):
        inputs = (image, text, SCALE, *more)
        loss, count = ours(*inputs)
        assert count == n
        torch.testing.assert_close(loss, formula(*inputs))
        which = tuple(range(len(inputs)))
        _, engine = value_and_grad(lambda *x, f=ours: f(*x)[0], argnums=which)(*inputs)
        expected = grad(formula, argnums=which)(*inputs)
        torch.testing.assert_close(engine, expected)
        torch.testing.assert_close(grad(lambda *x, f=ours: f(*x)[0], which)(*inputs), expected)


def test_hand_worked_numbers():
    """Orthogonal pairs: softmax log(1 + e^-s) each; sigmoid log(1 + e^-(s+b)) + log(1 + e^b)."""
    image = text = torch.eye(2, dtype=torch.float64)
    loss, _ = softmax_loss(image, text, 3.0)
    assert math.isclose(loss, 2 * math.log1p(math.exp(-3.0)))
    loss, _ = sigmoid_loss(image, text, 3.0, -1.0)
    expected = 2 * (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(-1.0)))
    assert math.isclose(loss, expected)


def test_half_precision_vectors_are_compared_in_single():
    image, text = vectors(8)
    for loss in (softmax_loss, lambda *x: sigmoid_loss(*x, -1.0)):
        half = [x.bfloat16() for x in (image, text)]
        wide = [x.double() for x in half]
        got, expected = loss(*half, 10.0)[0], loss(*wide, 10.0)[0]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def small() -> tuple:
    """A model of both towers with dropout, its parameters and a batch of seven pairs."""
    text = TextConfig(8, 1, 2, 8, dropout=0.1, vocab=20, max_length=5, eos=19, projection=6)
    image = clip_vision(
        width=8, depth=1, heads=2, hidden=8, image=4, patch=2, projection=6, dropout=0.1
    )
    model = clip(CLIPConfig(image, text, scale=4.0, bias=-2.0))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(7, 3, 4, 4, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, 20, (7, 5), generator=generator)
    return model, model.init(0, dtype=torch.float64), {"pixels": pixels, "ids": ids}


def embed_with(model):
    def embed(params, batch, key=None):
        keys = (None, None) if key is None else random.split(key)
        image = model.apply(params, batch["pixels"], key=keys[0], method="embed_image")
        return image, model.apply(params, batch["ids"], key=keys[1], method="embed_text")

    return embed


def loss_of(params, embedded, group=None):
    scale = params["logit_scale"].exp()
    first, count = softmax_loss(*embedded, scale, group=group)
    second, _ = sigmoid_loss(*embedded, scale, params["logit_bias"], group=group, chunk=2)
    return (first + second) / count, {"first": first.detach()}


@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_gradient_cache_and_chunks_equal_the_whole_batch(size):
    model, params, batch = small()
    embed = embed_with(model)

    def whole(params, batch):
        return loss_of(params, embed(params, batch))

    (loss, aux), grads = value_and_grad(whole, has_aux=True)(params, batch)
    cached = gradient_cache(embed, loss_of, size)(params, batch)
    torch.testing.assert_close(cached, ((loss, aux), grads))

    def chunked(params, batch):
        return loss_of(params, in_chunks(embed, size)(params, batch))

    torch.testing.assert_close(value_and_grad(chunked, has_aux=True)(params, batch), cached)


def test_replayed_chunks_drop_what_they_dropped_before():
    model, params, batch = small()
    embed, key = embed_with(model), random.key(3)

    def chunked(params, batch):
        return loss_of(params, in_chunks(embed, 2)(params, batch, key))

    expected = value_and_grad(chunked, has_aux=True)(params, batch)
    cached = gradient_cache(embed, loss_of, 2)(params, batch, key)
    torch.testing.assert_close(cached, expected)
    plain = gradient_cache(embed, loss_of, 2)(params, batch)
    assert not torch.allclose(cached[0][0], plain[0][0])


def saved_bytes(run) -> int:
    """Bytes that autograd keeps between a forward and its backward pass."""
    seen: dict[int, int] = {}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(seen.values())


def test_logits_are_never_kept():
    """What is kept grows with the pairs, not with their square."""
    sizes = {}
    for n in (64, 256):
        image, text = (x.requires_grad_() for x in vectors(n))
        for name, loss in (
            ("softmax", lambda u, v: softmax_loss(u, v, SCALE)[0]),
            ("sigmoid", lambda u, v: sigmoid_loss(u, v, SCALE, BIAS, chunk=32)[0]),
        ):
            sizes[name, n] = saved_bytes(lambda u=image, v=text, f=loss: f(u, v))
    for name in ("softmax", "sigmoid"):
        assert sizes[name, 256] < 5 * sizes[name, 64]


def shares_equal_the_whole():
    on = mesh(dp_replicate=2, device="cpu")
    group, rank = on.get_group("dp_replicate").group_name, on.get_local_rank("dp_replicate")
    model, params, batch = small()
    batch = {name: value[:6] for name, value in batch.items()}
    embed = embed_with(model)
    (loss, _), expected = value_and_grad(
        lambda params: loss_of(params, embed(params, batch)), has_aux=True
    )(params)
    share = cut(batch, 3)[rank]

    def local(params, embedded):
        return loss_of(params, embedded, group)

    for form in (
        lambda params: value_and_grad(lambda p: local(p, embed(p, share)), has_aux=True)(params),
        lambda params: gradient_cache(embed, local, 2)(params, share),
    ):
        (own, _), grads = form(params)
        values = torch.stack([own, *(g.sum() for g in grads.values())])
        torch.distributed.all_reduce(values)
        torch.testing.assert_close(values[0] / 2, loss)
        for name, value in grads.items():
            torch.distributed.all_reduce(value)
            torch.testing.assert_close(value / 2, expected[name])


TWO = [shares_equal_the_whole]  # for test_ranks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: softmax_loss(torch.ones(2, 3), torch.ones(3, 3), 1.0), r"must be \(pairs, width"),
        (lambda: softmax_loss(torch.ones(0, 3), torch.ones(0, 3), 1.0), "not empty"),
        (lambda: sigmoid_loss(*torch.ones(2, 2, 3), 1.0, 0.0, chunk=0), r"chunk \(0\)"),
        (lambda: cut({"a": torch.ones(2), "b": torch.ones(3)}, 1), r"one length, got \[2, 3\]"),
        (lambda: cut(torch.ones(2), 0), r"chunk size \(0\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_class_is_the_mean_of_its_sentences():
    texts = {"a cat": [3.0, 0.0], "the cat": [0.0, 1.0]}
    texts |= {"a dog": [0.0, -1.0], "the dog": [0.0, -2.0]}
    seen = []

    def embed(batch):
        seen.append(len(batch))
        return torch.tensor([texts[text] for text in batch])

    classes = class_vectors(embed, ["cat", "dog"], ["a {}", "the {}"], batch=3)
    assert seen == [3, 1]
    torch.testing.assert_close(classes, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))
    images = torch.tensor([[1.0, 0.1], [0.1, -1.0]])
    assert classify(images, classes).tolist() == [[0], [1]]
    assert classify(images, classes, 2).tolist() == [[0, 1], [1, 0]]


def test_recall_counts_any_of_an_images_texts():
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8], [0, 0.9, 0], [0.9, 0, 0.5]])
    ids = torch.tensor([0, 1, 1, 2])
    assert ranks(images, texts, torch.arange(3), ids).tolist() == [0, 0, 1]
    found = recall(images, texts, None, ids, ks=(1, 2))
    assert math.isclose(found["image_to_text@1"], 2 / 3, rel_tol=1e-6)
    assert found["image_to_text@2"] == 1
    assert found["text_to_image@1"] == 0.5 and found["text_to_image@2"] == 1


@given(n=st.integers(1, 12), chunk=st.integers(1, 5))
def test_ranks_are_those_of_a_sorted_list(n, chunk):
    image, text = vectors(n, seed=n)
    ids = torch.arange(n)
    expected = [
        sorted(range(n), key=lambda j, i=i: -(image[i] @ text[j]).item()).index(i) for i in range(n)
    ]
    assert ranks(image, text, ids, ids, chunk=chunk).tolist() == expected


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    same = torch.ones(4, 2)
    assert set(recall(same, same, ks=(1, 3)).values()) == {0.0}


def test_answers_match_but_for_case_space_and_full_stop():
    assert exact_match(["Red. ", "two  squares", "no"], ["red", "two squares", "yes"]) == 2 / 3
    assert exact_match(["grey"], [["gray", "grey"]]) == 1


def nothing(texts):
    raise AssertionError("embeds nothing before it has checked")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: class_vectors(nothing, []), r"names \(\[\]\) must be a list"),
        (lambda: class_vectors(nothing, ["a", " "]), "hold an empty name"),
        (lambda: class_vectors(nothing, "cat"), "names .'cat'. must be a list"),
        (lambda: class_vectors(nothing, ["a", "b", "a"]), r"\['a'\] are named more than once"),
        (lambda: class_vectors(nothing, ["a"], []), "templates"),
        (lambda: class_vectors(nothing, ["a"], ["a photo"]), r"'a photo' must hold {}"),
        (lambda: classify(torch.ones(2, 3), torch.ones(4, 3), 5), r"k \(5\)"),
        (lambda: ranks(*torch.ones(2, 2, 3), torch.tensor([1, 2]), torch.tensor([1, 1])), "no key"),
        (lambda: ranks(*torch.ones(2, 2, 3), torch.ones(1), torch.ones(2)), "one id"),
        (lambda: exact_match(["a"], []), "1 answers"),
    ],
)
def test_evaluations_that_make_no_sense_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
