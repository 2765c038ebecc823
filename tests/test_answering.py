"""Samples of questions: packed rows learn what each sample alone learns; answers see the image."""

import numpy as np
import pytest
import torch

from msfs_functional import image_figures
from msfs_functional.answering import (
    Answerer,
    cut_tiles,
    gaze,
    pack_samples,
    prompt_ids,
    sample_of,
    turns_apart,
)
from msfs_functional.generation import Generator
from msfs_functional.images import tiles
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.models.decoder import DecoderConfig
from msfs_functional.models.vit import ViTConfig
from msfs_functional.models.vlm import IGNORED, VLMConfig, language_model, output_weight, vlm
from msfs_functional.tokenizer import BOS, EOS, PAD, train_word_level

WORDS = ["what is it ?", "red", "blue", "how many ?", "a b c d e f g"]
SIZES = {"width": 16, "depth": 2, "heads": 2, "hidden": 24}


def small(prefix=False):
    vision = ViTConfig(**SIZES, image=8, patch=4, class_token=False, pooling=None)
    config = VLMConfig(vision, DecoderConfig(30, **SIZES, max_length=64), 30, prefix=prefix)
    model = vlm(config)
    return model, model.init(0, dtype=torch.float64), config


def test_a_sample_learns_its_answers_and_their_ends():
    _, _, config = small()
    sample = sample_of(3, [([7, 8], [9]), ([10], [11, 12])], config)
    image = [config.image_token] * 4
    assert sample.ids == [BOS, *image, 7, 8, BOS, 9, EOS, 10, BOS, 11, 12, EOS]
    learned = [i for i, yes in zip(sample.ids, sample.learned, strict=True) if yes]
    assert sample.image == 3 and learned == [9, EOS, 11, 12, EOS]
    assert prompt_ids([7, 8], config) == sample.ids[:8]


def test_rows_hold_every_sample_once():
    _, _, config = small()
    samples = [sample_of(i, [([5] * (1 + i), [6, 7])], config) for i in range(5)]
    packed = pack_samples(samples, 32, multiple=2)
    R, T = packed["tokens"].shape
    assert T == 32 and R % 2 == 0
    found = []
    for r in range(R):
        for segment in range(1, int(packed["segments"][r].max()) + 1):
            here = packed["segments"][r] == segment
            ids, labels = packed["tokens"][r][here].tolist(), packed["labels"][r][here].tolist()
            assert packed["positions"][r][here].tolist() == list(range(len(ids)))
            assert packed["turns"][r][here].tolist() == [0] * 5 + [1] * (len(ids) - 5)
            sample = samples[packed["images"][len(found)]]
            assert ids == sample.ids[:-1]
            assert labels == [IGNORED] * (len(ids) - 3) + [6, 7, EOS]
            found.append(sample.image)
    assert sorted(found) == list(range(5))
    nothing = packed["segments"] == 0
    labels, learned = packed["labels"].flatten(), packed["learned"]
    assert labels[learned].tolist() == [*labels[labels != IGNORED], *[IGNORED] * (128 - 15)]
    assert (packed["labels"][nothing] == IGNORED).all() and (packed["tokens"][nothing] == PAD).all()


def test_packed_samples_of_shared_images_learn_what_each_learns_alone():
    model, params, config = small()
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    turns = [[([5, 6], [7])], [([8], [9, 10]), ([11], [12])], [([5, 13], [14])]]
    samples = [sample_of(i, turn, config) for i, turn in zip((1, 0, 1), turns, strict=True)]
    seen = model.apply(params, pixels, method="image_tokens")

    def loss_of(some):
        packed = pack_samples(some, 40, multiple=1)
        states = model.apply(
            params,
            packed["tokens"],
            images=seen[packed["images"]],
            visible=turns_apart(packed["segments"], packed["turns"]),
            positions=packed["positions"],
            method="hidden",
        )
        weight, labels = output_weight(params), packed["labels"]
        return linear_cross_entropy(states, weight, labels, ignore_index=IGNORED)[0]

    assert len(pack_samples(samples, 40, multiple=1)["tokens"]) == 1
    apart = [(i, [turn]) for i, some in zip((1, 0, 1), turns, strict=True) for turn in some]
    alone = sum(loss_of([sample_of(i, turn, config)]) for i, turn in apart)
    torch.testing.assert_close(loss_of(samples), alone)
    ids = torch.tensor([samples[0].ids])
    whole = model.apply(params, ids, pixels[1:]), model.apply(params, ids, images=seen[1:])
    torch.testing.assert_close(*whole)


@pytest.mark.parametrize("prefix", [False, True])
def test_answers_are_those_of_one_question_after_another(prefix):
    model, params, config = small(prefix)
    tokenizer = train_word_level(WORDS, 30)
    generate = Generator(language_model(config, params), compile=False)
    pixels = lambda images: images.double() / 255  # noqa: E731
    answer = Answerer(model, params, generate, tokenizer, pixels, longest=3, batch=2)
    images = torch.randint(0, 255, (3, 3, 8, 8), dtype=torch.uint8)
    seen = answer.image_tokens(images)
    asked = [(2, "what is it ?"), (0, "how many ?"), (2, "how many ?"), (1, "red")]
    together = answer(seen, asked)
    for (i, question), found in zip(asked, together, strict=True):
        assert answer(answer.image_tokens(images[i : i + 1]), [(0, question)]) == [found]


def test_tiles_of_many_images_are_those_of_each_after_its_thumbnail():
    pictures = torch.randint(0, 255, (3, 3, 8, 8), dtype=torch.uint8)
    cut = cut_tiles(pictures, 2).unflatten(0, (3, 5))
    for picture, own in zip(pictures, cut, strict=True):
        assert torch.equal(own, tiles(picture, 4, most=4))
    assert cut_tiles(pictures, 1) is pictures
    with pytest.raises(ValueError, match="3 tiles must divide"):
        cut_tiles(pictures, 3)


def test_gaze_is_the_attention_that_the_answer_pays_to_the_image():
    model, params, config = small()
    seen = torch.randn(1, 4, 16, dtype=torch.float64)
    prompt = prompt_ids([5, 6], config)
    weights = gaze(model, params, prompt, [7, 8], seen)
    assert weights.shape == (2, 4) and (weights > 0).all() and (weights.sum(1) < 1).all()
    # Keys of nothing but zeros are all alike: attention is then even over what is seen.
    flat = {n: x * 0 if ".k." in n and "decoder" in n else x for n, x in params.items()}
    even = gaze(model, flat, prompt, [7, 8], seen)
    torch.testing.assert_close(even[0], torch.full((4,), 1 / len(prompt)).double())
    torch.testing.assert_close(even[1], torch.full((4,), 1 / (len(prompt) + 1)).double())


def test_pictures_show_images_answers_and_looks():
    image = np.zeros((4, 4, 3), np.uint8)
    figure = image_figures.answers([image] * 3, ["a?"] * 3, ["x", "y", "x"], ["x"] * 3, columns=2)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["a?\nx", "a?\ny (truth: x)", "a?\nx"]
    assert len(image_figures.gaze(image, [np.ones((2, 2))] * 2, ["a", "b"]).axes) == 3
    cosines = np.eye(2)
    assert image_figures.similarity_matrix(cosines, np.stack([image] * 2), ["a", "b"]).axes
    with pytest.raises(ValueError, match=r"must be \(2 images, 1 texts\)"):
        image_figures.similarity_matrix(cosines, np.stack([image] * 2), ["a"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p, c: pack_samples([], 4), "0 samples"),
        (lambda m, p, c: pack_samples([sample_of(0, [([5], [6])], c)], 4), "rows of 4"),
        (lambda m, p, c: prompt_ids([5] * 70, c), "the decoder takes 64"),
        (
            lambda m, p, c: m.apply(
                p, torch.tensor([[30] * 4]), torch.zeros(1, 3, 8, 8), images=torch.zeros(1, 4, 16)
            ),
            "pixels or images",
        ),
        (
            lambda m, p, c: m.apply(
                p, torch.tensor([[30] * 4]), torch.zeros(1, 3, 8, 8), implementation=print
            ),
            "decoder's alone",
        ),
    ],
)
def test_bad_input_says_value_rule_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call(*small())
