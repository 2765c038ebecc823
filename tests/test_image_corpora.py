"""Images with texts: made here, easy-VQA's layout, folders; the unreadable are counted."""

import json
import zipfile

import datasets
import pytest
import torch
from PIL import Image

from msfs_functional import image_corpora as corpora
from msfs_functional.synthetic import shapes


def picture(path, colour="red", size=(8, 8)):
    Image.new("RGB", size, colour).save(path)
    return path


def test_the_shapes_world_keeps_combinations_and_their_names_from_training():
    data, scenes = corpora.shapes_world(0, 200)
    assert data.images.shape == (200, 3, 32, 32) and data.images.dtype == torch.uint8
    assert data.captions[3] == shapes.captions(scenes[3])
    said = [text for pairs in data.questions for pair in pairs for text in pair]
    said += [text for captions in data.captions for text in captions]
    names = [f"{colour} {kind}" for colour, kind in shapes.HELD_OUT]
    assert not any(name in text for text in said for name in names)
    unseen, _ = corpora.shapes_world(0, 200, "unseen")
    asked = [question for pairs in unseen.questions for question, _ in pairs]
    assert any(name in question for question in asked for name in names)


def test_lessons_come_to_the_questions_and_leave_one_caption():
    plain, scenes = corpora.shapes_world(0, 20)
    data, _ = corpora.shapes_world(0, 20, lessons=True)
    for scene, few, more, captions in zip(
        scenes, plain.questions, data.questions, data.captions, strict=True
    ):
        assert more == [*few, *shapes.lessons(scene)]
        assert captions == [shapes.caption(shapes.in_order(scene))]


def test_no_wording_of_a_question_gives_its_answer_away():
    """What is not there is asked for in every colour, as what is there."""
    data, _ = corpora.shapes_world(1, 600)
    answers: dict[str, set[str]] = {}
    for pairs in data.questions:
        for question, answer in pairs:
            answers.setdefault(question, set()).add(answer)
    several = [question for question, found in answers.items() if len(found) > 1]
    assert len(several) > 0.97 * len(answers)


def test_a_filter_of_scenes_still_gives_as_many():
    alone = lambda scene: len(scene.shapes) == 1  # noqa: E731
    data, scenes = corpora.shapes_world(0, 30, "unseen", scene_filter=alone)
    assert len(data) == len(scenes) == 30 and all(map(alone, scenes))


@pytest.mark.parametrize("packed", [False, True])
def test_easy_vqa_is_read_as_it_is_and_what_is_broken_is_named(tmp_path, packed):
    asked = [["what color?", "red", 0], ["a circle?", "no", 0], ["what color?", "blue", 2]]
    (tmp_path / "train_questions.json").write_text(json.dumps([*asked, ["lost?", "yes", 7]]))
    folder = tmp_path / "train" / "images"
    folder.mkdir(parents=True)
    picture(folder / "0.png"), picture(folder / "2.png", "blue")
    if packed:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for number in (0, 2):
                name = f"train/images/{number}.png"
                archive.write(tmp_path / name, name)
        (tmp_path / "train").rename(tmp_path / "elsewhere")
    data = corpora.easy_vqa(tmp_path, "train", 4)
    assert corpora.is_easy_vqa(tmp_path)
    assert data.questions == [
        [("what color?", "red"), ("a circle?", "no")],
        [("what color?", "blue")],
    ]
    assert data.images[:, 2, 0, 0].tolist() == [0, 255]
    assert data.unreadable.count == 1 and "7.png" in data.unreadable.first[0]


def test_a_folder_with_metadata_gives_captions_and_questions(tmp_path):
    rows = []
    for i in range(14):
        rows.append({"file_name": f"{i}.png", "caption": f"number {i}"})
        rows[-1] |= {"question": "which?", "answer": str(i)}
        picture(tmp_path / f"{i}.png", (i, 0, 0))
        if i > 2:  # eleven are broken
            (tmp_path / f"{i}.png").write_bytes(b"nothing")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metadata.jsonl").write_text(lines)
    table = corpora.load_table(str(tmp_path))
    data = corpora.from_table(table, 4)
    assert data.captions == [["number 0"], ["number 1"], ["number 2"]]
    assert data.questions[1] == [("which?", "1")]
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert data.unreadable.count == 11 and len(data.unreadable.first) == 10
    assert "and 1 more" in str(data.unreadable)
    with pytest.raises(ValueError, match=r"no column of texts \('title'\) among .*: name it"):
        corpora.from_table(table, 4, text="title")
    with pytest.raises(ValueError, match="has no split 'test', only"):
        corpora.load_table(str(tmp_path), split="test")


def test_conversations_about_lone_images_become_questions(tmp_path):
    paths = [str(picture(tmp_path / f"{i}.png", (i, 0, 0))) for i in range(3)]
    turns = [{"user": " what? ", "assistant": "this"}, {"user": "and?", "assistant": "that"}]
    rows = {"images": [paths[:1], paths[1:]], "texts": [turns, turns]}
    kinds = datasets.Features(
        {
            "images": datasets.Sequence(datasets.Image()),
            "texts": [{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
        }
    )
    data = corpora.from_table(datasets.Dataset.from_dict(rows, features=kinds), 4)
    assert data.questions == [[("what?", "this"), ("and?", "that")]] and data.captions == [[]]
    assert data.unreadable.count == 1  # two images in one row


def test_no_image_is_in_both_parts():
    data, _ = corpora.shapes_world(0, 20)
    rest, held = corpora.hold_out(data, 0.2, 0)
    assert len(held) == 4 and len(rest) == 16
    keys = [{image.numpy().tobytes() for image in part.images} for part in (rest, held)]
    assert keys[0].isdisjoint(keys[1])
    assert held.captions == corpora.hold_out(data, 0.2, 0)[1].captions


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corpora.from_entries([], 4), "holds no image that can be read"),
        (lambda: corpora.Pictured(torch.zeros(2, 3, 1, 1), [], []), "each image needs one of both"),
        (lambda: corpora.hold_out(corpora.shapes_world(0, 3)[0], 0.1, 0), "0.1 of 3 images are 0"),
    ],
)
def test_bad_input_says_value_rule_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_easy_vqa_file_of_another_form_is_named(tmp_path):
    (tmp_path / "train_questions.json").write_text("[[1, 2]]")
    with pytest.raises(ValueError, match="must hold"):
        corpora.easy_vqa(tmp_path, "train", 4)
    (tmp_path / "train_questions.json").write_text('[["a?", "b", 0]]')
    with pytest.raises(ValueError, match="no images of train"):
        corpora.easy_vqa(tmp_path, "train", 4)
