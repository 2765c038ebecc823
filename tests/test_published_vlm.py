"""Published vision-language models answer from a folder as in transformers; bad input is named."""

import json
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from test_vlm import published
from tokenizers import pre_tokenizers

from msfs_functional import errors, images
from msfs_functional.published_vlm import PublishedVLM

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import caption

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "USER",
    ":",
    "ASSISTANT",
    "what",
    "colour",
    "is",
    "it",
    "?",
]


def saved(case: str, folder: Path) -> transformers.PreTrainedModel:
    """A random small model in a folder, with a tokenizer of words whose last id is an image's."""
    theirs = published(case)
    theirs.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    vocabulary |= {f"w{i}": i for i in range(len(WORDS), theirs.config.image_token_index)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    marks = [tokenizers.AddedToken(mark, special=True) for mark in ("<image>", "<bos>")]
    backend.add_special_tokens(marks[:1] if "llava" in case else marks)
    backend.save(str(folder / "tokenizer.json"))
    return theirs.eval()


@pytest.mark.parametrize("case", ["llava", "paligemma"])
@torch.no_grad()
def test_answers_are_those_of_transformers(case, tmp_path):
    theirs = saved(case, tmp_path)
    if case == "paligemma":  # <bos> lies beyond this small vocabulary
        text = json.loads((tmp_path / "tokenizer.json").read_text())
        text["added_tokens"] = [t for t in text["added_tokens"] if t["content"] != "<bos>"]
        text["model"]["vocab"]["<bos>"] = text["model"]["vocab"].pop("<s>")
        (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    ours = PublishedVLM(tmp_path, longest=6)
    picture = images.read(_file(tmp_path))
    prompt = ours.prompt("what colour is it?", 2)
    assert prompt.count(theirs.config.image_token_index) == 2 * ours.config.tokens_per_image
    ids, pixels = torch.tensor([prompt]), ours.pixels([picture, picture.flip(-1)])
    made = theirs.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        max_new_tokens=6,
        **({"token_type_ids": torch.zeros_like(ids)} if ours.config.prefix else {}),
    )
    expected = ours.tokenizer.decode(made[0, -6:].tolist(), skip_special_tokens=True)
    assert ours.answer([picture, picture.flip(-1)], "what colour is it?") == expected.strip()


def _file(folder: Path) -> Path:
    pixels = torch.randint(256, (3, 10, 12), generator=torch.Generator().manual_seed(0))
    images.save_png(pixels.byte(), folder / "a.png")
    return folder / "a.png"


def test_chat_with_a_published_model_and_what_is_bad(tmp_path, capsys):
    saved("llava", tmp_path)
    run = ["chat", "--published", str(tmp_path), "--chat", str(_file(tmp_path)), "--device", "cpu"]
    errors.run(caption.main, lambda: caption.command_line([*run, "--ask", "what is it?"]))
    assert len(capsys.readouterr().out.splitlines()) == 1
    model = PublishedVLM(tmp_path)
    with pytest.raises(ValueError, match="at least one image"):
        model.answer([], "what is it?")
    with pytest.raises(ValueError, match="leave out"):
        model.prompt("what is <image>?")
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<image>", "<picture>"))
    with pytest.raises(ValueError, match="do not belong together"):
        PublishedVLM(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        PublishedVLM(tmp_path)
