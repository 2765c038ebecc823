"""Data: reading, splitting before fitting, caching, batches that resume and shard exactly."""

import gzip
import json
import os
import time
import zipfile
from pathlib import Path

import datasets
import datasets.config
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msfs_functional import corpora
from msfs_functional.data import Prefetch, Ragged, Splits, TokenBatches, encode_pairs, load_pairs
from msfs_functional.synthetic.english_italian import english_italian
from msfs_functional.tokenizer import BOS, EOS, PAD, Tokenizer, train_bpe

PAIRS = [(f"the cat number {i}", f"il gatto numero {i}") for i in range(60)]


@pytest.fixture(autouse=True)
def no_network_and_no_home(tmp_path, monkeypatch):
    """Nothing reaches the Hub or a cache outside of tmp_path."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture
def shared_data() -> Path:
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("MSFS_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: MSFS_DATA names the one with multi30k and tatoeba_en_it")
    return folder


def rows(part: datasets.Dataset) -> list[tuple[str, str]]:
    return list(zip(part["source"], part["target"], strict=True))


def everything(splits: Splits) -> list[tuple[str, str]]:
    return sorted(rows(splits.train) + rows(splits.valid) + rows(splits.test))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def tsv(pairs=PAIRS) -> str:
    return "".join(f"{source}\t{target}\n" for source, target in pairs)


# ---------------------------------------------------------------- reading


def test_every_form_of_file_gives_the_same_pairs(tmp_path):
    plain = write(tmp_path / "pairs.tsv", tsv())
    with gzip.open(tmp_path / "pairs.tsv.gz", "wb") as file:
        file.write(plain.read_bytes())
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        archive.writestr("__MACOSX/._formatted.txt", "junk")
        archive.writestr("formatted.txt", tsv().replace("\n", "\r\n"))
    header = write(tmp_path / "header.tsv", "id\tit\ten\n" + "".join(
        f"{i}\t{target}\t{source}\n" for i, (source, target) in enumerate(PAIRS)))  # fmt: skip
    flat = write(
        tmp_path / "flat.jsonl",
        "".join(json.dumps({"id": 1, "en": a, "it": b}) + "\n" for a, b in PAIRS),
    )
    nested = write(
        tmp_path / "nested.jsonl",
        "".join(json.dumps({"id": 1, "translation": {"en": a, "it": b}}) + "\n" for a, b in PAIRS),
    )
    table = datasets.Dataset.from_dict(
        {"translation": [{"en": a, "it": b} for a, b in PAIRS], "id": list(range(60))}
    )
    table.to_parquet(tmp_path / "nested.parquet")
    english = write(tmp_path / "train.en", "".join(a + "\n" for a, _ in PAIRS))
    italian = write(tmp_path / "train.it", "\ufeff" + "\n".join(b for _, b in PAIRS))

    expected = everything(load_pairs(plain))
    assert expected == sorted(PAIRS)
    for location in (tmp_path / "pairs.tsv.gz", str(tmp_path / "pairs.zip"), nested,
                     [tmp_path / "nested.parquet"], [english, italian]):  # fmt: skip
        assert everything(load_pairs(location)) == expected
    for location in (header, flat, nested):
        assert everything(load_pairs(location, source="en", target="it")) == expected
    assert everything(load_pairs(plain, source="1", target="0")) == sorted((b, a) for a, b in PAIRS)


def test_only_newlines_end_a_line(tmp_path):
    strange = "one\u2028two\x0bthree\u0085four"
    english = write(tmp_path / "a.en", f"{strange}\n" + "".join(f"x{i}\n" for i in range(20)))
    italian = write(tmp_path / "a.it", "uno\n" + "y\n" * 20)
    assert (strange, "uno") in everything(load_pairs([english, italian]))


def test_the_embedded_corpus_is_the_default_in_both_directions(monkeypatch):
    def few(seed, valid=20, test=30):
        return english_italian(seed, train=300, valid=valid, test=test)

    monkeypatch.setattr(corpora, "english_italian", few)
    splits = load_pairs(seed=4)
    assert [rows(part) for part in (splits.train, splits.valid, splits.test)] == list(few(4))
    backwards = load_pairs(seed=4, source="it", target="en")
    assert rows(backwards.test) == [(b, a) for a, b in rows(splits.test)]
    assert len(load_pairs(seed=4, test_size=10).test) == 10
    with pytest.raises(ValueError, match="no column 'de', it has en, it"):
        load_pairs(target="de")
    with pytest.raises(ValueError, match="has its own splits"):
        load_pairs(test="test.tsv")
    with pytest.raises(ValueError, match=r"seed \(-1\) must be at least 0"):
        load_pairs(seed=-1)


def opus_books(folder: Path, **splits: int) -> Path:
    """A folder laid out as opus_books is on the Hub: one Parquet file a split in a folder for each
    pair of languages, ids and one column of {language: text}, the configurations in README.md."""
    translation = datasets.Translation(languages=["en", "it"])
    features = datasets.Features({"id": datasets.Value("string"), "translation": translation})
    listed = ""
    for split, count in splits.items():
        rows = [{"en": f"{split} {i}", "it": f"{split} numero {i}"} for i in range(count)]
        table = {"id": [str(i) for i in range(count)], "translation": rows}
        path = folder / "en-it" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(table, features=features).to_parquet(path)
        listed += f"  - split: {split}\n    path: en-it/{split}-*\n"
    write(
        folder / "README.md",
        "---\ndataset_info:\n- config_name: en-it\n  features:\n  - name: id\n    dtype: string\n"
        "  - name: translation\n    dtype:\n      translation:\n        languages:\n        - en\n"
        f"        - it\nconfigs:\n- config_name: en-it\n  data_files:\n{listed}---\n",
    )
    return folder


def hub(monkeypatch, folder: Path) -> None:
    """The name "books" on the Hub is a folder here, read by the real library."""
    opus_books(folder, train=50, test=10)
    load = datasets.load_dataset

    def load_dataset(name, *args, **kwargs):
        cache = str(folder.parent / "cache")
        return load(str(folder) if name == "books" else name, *args, cache_dir=cache, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_a_downloaded_file_of_opus_books_trains_as_it_is(tmp_path):
    file = opus_books(tmp_path, train=50) / "en-it" / "train-00000-of-00001.parquet"
    splits = load_pairs(file, valid_size=5, test_size=5, source="it", target="en")
    assert ("train numero 7", "train 7") in everything(splits)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [40, 5, 5]


def test_hub_datasets_use_their_splits_and_translation_columns(tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path / "hub")
    splits = load_pairs("books", config="en-it", test="test", valid_size=5)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [45, 5, 10]
    assert rows(splits.test)[0] == ("test 0", "test numero 0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").mkdir()  # a folder of that name is no split
    assert rows(load_pairs("books", config="en-it", test="test").test) == rows(splits.test)
    swapped = load_pairs("books", config="en-it", source="it", target="en")
    assert ("train numero 7", "train 7") in everything(swapped)
    with pytest.raises(ValueError, match="no column 'de', it has en, it: name two"):
        load_pairs("books", config="en-it", target="de")


def test_wrong_names_on_the_hub_list_what_there_is(tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path / "hub")
    with pytest.raises(ValueError, match=r"does not load with config 'en-xx'.*en-it") as error:
        load_pairs("books", config="en-xx")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"split 'dev'.*train"):
        load_pairs("books", config="en-it", split="dev")


def test_no_network_says_so_and_names_the_way_out():
    with pytest.raises(ValueError, match=r"cannot fetch dataset 'opus_books'.*english_italian"):
        load_pairs("opus_books", config="en-it")


def test_an_unknown_dataset_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'bokks' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"unknown dataset 'bokks'.*no file here"):
        load_pairs("bokks")


def bad_files(folder: Path) -> dict[str, Path | list[Path]]:
    """What each bad input must say, and the location."""

    def file(name: str, content: str | bytes) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    latin = tsv(PAIRS[:2]).encode() + "caffè\tcaffè\n".encode("latin-1")
    with zipfile.ZipFile(folder / "two.zip", "w") as archive:
        archive.writestr("a.txt", "a\tb")
        archive.writestr("b.txt", "a\tb")
    (folder / "folder.tsv").mkdir()
    three, two = file("three.en", "a\nb\nc\n"), file("two.it", "a\nb\n")
    nulls = '{"a": "x", "b": "y"}\n{"a": "x"}\n'
    return {
        r"no file .*none.tsv: check the path": folder / "none.tsv",
        r"empty.tsv is empty: it must hold": file("empty.tsv", " \n"),
        r"three.en has 3 lines, .*two.it has 2: aligned": [three, two],
        r"latin.tsv, line 3: byte 0xe8 is not UTF-8: convert": file("latin.tsv", latin),
        r"ragged.tsv, line 2: 1 tab-separated fields.*mend": file("ragged.tsv", "a\tb\nc\n"),
        r"cut.tsv.gz is damaged": file("cut.tsv.gz", gzip.compress(tsv().encode())[:-20]),
        r"two.zip holds 2 files \(a.txt, b.txt\)": folder / "two.zip",
        r"no.zip is damaged": file("no.zip", "no zip"),
        r"no.parquet is no Parquet file": file("no.parquet", "no parquet"),
        r"folder.tsv is a directory": folder / "folder.tsv",
        r"cut.jsonl, line 2: .*each line is one object": file("cut.jsonl", '{"a": "x"}\n{"a'),
        r"list.jsonl, line 1: \[1\] is no object": file("list.jsonl", "[1]\n"),
        r"one.jsonl has only \['a'\]: pairs need two": file("one.jsonl", '{"a": "x"}\n'),
        r"null.jsonl, row 2: column 'b' is None": file("null.jsonl", nulls),
        r"a.csv.gz ends in '.csv': one file": file("a.csv.gz", gzip.compress(b"a,b")),
        r"3 files": [folder / "a", folder / "b", folder / "c"],
        r"the train data holds no pair": file("blank.tsv", "a\t\n\tb\n"),
    }


def test_each_bad_file_gives_one_line_of_value_rule_and_remedy(tmp_path):
    for message, location in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=message) as error:
            load_pairs(location)
        assert "\n" not in str(error.value)


def test_missing_columns_say_which_exist(tmp_path):
    pairs = write(tmp_path / "p.jsonl", '{"en": "a", "it": "b"}\n' * 30)
    with pytest.raises(ValueError, match="no column 'fr', it has en, it: name two of these"):
        load_pairs(pairs, source="fr")
    plain = write(tmp_path / "p.tsv", tsv())
    with pytest.raises(ValueError, match=r"has no header with 'en' and 'it'.*count columns from 0"):
        load_pairs(plain, source="en", target="it")


# ---------------------------------------------------------------- splitting


def many_translations(tmp_path) -> Path:
    """40 sources with five targets each; some differ in case and spaces alone."""
    sources = [f"Sentence {i}." for i in range(40)]
    lines = [(s.upper() if k % 2 else s + " ", f"{s} {k}") for s in sources for k in range(5)]
    return write(tmp_path / "many.tsv", tsv(lines))


def test_no_source_sentence_is_in_two_splits(tmp_path):
    splits = load_pairs(many_translations(tmp_path), valid_size=6, test_size=0.2)
    parts = [
        {" ".join(s.casefold().split()) for s in part["source"]}
        for part in (splits.train, splits.valid, splits.test)
    ]
    assert [len(part) for part in parts] == [26, 6, 8]
    assert len(set.union(*parts)) == 40
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (26 * 5, 6, 8)
    assert splits.dropped == {"empty": 0, "other translations of held-out sentences": 14 * 4}


def test_the_seed_alone_decides_the_split(tmp_path):
    path = many_translations(tmp_path)
    first, again, other = load_pairs(path), load_pairs(path), load_pairs(path, seed=1)
    assert rows(first.test) == rows(again.test) and first.train._fingerprint
    assert first.train._fingerprint == again.train._fingerprint
    assert rows(first.test) != rows(other.test)


def test_given_splits_stay_as_they_are_and_missing_ones_are_cut_off(tmp_path):
    train, test = write(tmp_path / "a.tsv", tsv()), write(tmp_path / "b.tsv", "x\ty\nx\tz\n")
    splits = load_pairs(train, test=test, valid_size=10)
    assert rows(splits.test) == [("x", "y"), ("x", "z")]
    assert (len(splits.train), len(splits.valid)) == (50, 10)
    whole = load_pairs(train, valid=test, test=test)
    assert rows(whole.train) == PAIRS and rows(whole.valid) == rows(whole.test)


def test_empty_sides_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.tsv", tsv() + " \tb\na\t\n")
    splits = load_pairs(path)
    assert splits.dropped["empty"] == 2 and everything(splits) == sorted(PAIRS)


@pytest.mark.parametrize("size", [0, -3, 1.5])
def test_sizes_that_make_no_sense_are_refused(tmp_path, size):
    path = write(tmp_path / "a.tsv", tsv())
    with pytest.raises(ValueError, match=r"test_size \(.*\) must be a count or a fraction"):
        load_pairs(path, test_size=size)
    with pytest.raises(ValueError, match="take 61 of 60 distinct source sentences"):
        load_pairs(path, test_size=58)


def test_tatoeba_splits_by_english_sentence(shared_data):
    archive = shared_data / "tatoeba_en_it" / "ita-eng.formatted.zip"
    splits = load_pairs(archive)
    train, valid, test = (set(p["source"]) for p in (splits.train, splits.valid, splits.test))
    assert not train & valid and not train & test and not valid & test
    assert (len(splits.valid), len(splits.test)) == (1000, 1000)
    total = len(splits.train) + 2000 + splits.dropped["other translations of held-out sentences"]
    assert total == 352_040


# ---------------------------------------------------------------- encoding


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([text for pair in PAIRS for text in pair], 300)


def small(pairs=PAIRS) -> datasets.Dataset:
    source, target = zip(*pairs, strict=True)
    return datasets.Dataset.from_dict({"source": source, "target": target})


def test_encoding_is_the_tokenizers_with_bos_and_eos(tokenizer, tmp_path):
    source, target = encode_pairs(small(), tokenizer, cache_dir=tmp_path)
    for i, (text, translation) in enumerate(PAIRS):
        ids = source.values[source.offsets[i] : source.offsets[i + 1]].tolist()
        assert ids == tokenizer.encode([text], eos=True)[0]
        ids = target.values[target.offsets[i] : target.offsets[i + 1]].tolist()
        assert ids == tokenizer.encode([translation], bos=True, eos=True)[0]
        assert ids[0] == BOS and ids[-1] == EOS


def test_encoding_happens_once_for_the_same_content(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.tsv", tsv())
    first = encode_pairs(load_pairs(path).train, tokenizer, cache_dir=tmp_path / "cache")
    files = set((tmp_path / "cache").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda *a, **k: pytest.fail("encoded again"))
        again = encode_pairs(load_pairs(path).train, tokenizer, cache_dir=tmp_path / "cache")
    for side in (0, 1):
        assert np.array_equal(first[side].values, again[side].values)
    other = train_bpe(["another text, another tokenizer " * 3], 300)
    encode_pairs(load_pairs(path).train, other, cache_dir=tmp_path / "cache")
    encode_pairs(load_pairs(path, seed=1).train, tokenizer, cache_dir=tmp_path / "cache")
    encode_pairs(load_pairs(path).train, tokenizer, other, cache_dir=tmp_path / "cache")
    assert len(set((tmp_path / "cache").iterdir()) - files) == 3


# ---------------------------------------------------------------- batches


def ragged(lengths: list[int], start: int = 10) -> Ragged:
    offsets = np.cumsum([0, *lengths])
    return Ragged(np.arange(start, start + offsets[-1], dtype=np.int32), offsets)


def corpus(seed: int, count: int, longest: int = 30) -> tuple[Ragged, Ragged]:
    rng = np.random.default_rng(seed)
    source = rng.integers(1, longest + 1, count)
    target = np.clip(source + rng.integers(-3, 4, count), 0, longest) + 2
    return ragged(source.tolist()), ragged(target.tolist())


def contents(batches) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every pair of lists in some batches, in order, filling rows left out."""
    found = []
    for batch in batches:
        for source, s, target, t in zip(*(batch[name].tolist() for name in (
                "source", "source_lengths", "target", "target_lengths")), strict=True):  # fmt: skip
            assert source[s:] == [PAD] * (len(source) - s)
            assert target[t + 1 if t else 0 :] == [PAD] * (len(target) - (t + 1 if t else 0))
            if s:
                found.append((tuple(source[:s]), tuple(target[: t + 1])))
            else:
                assert t == 0
    return found


def lists(pair: tuple[Ragged, Ragged]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    both = []
    for i in range(len(pair[0].lengths)):
        both.append(tuple(
            tuple(side.values[side.offsets[i] : side.offsets[i + 1]].tolist()) for side in pair
        ))  # fmt: skip
    return both


def epoch(batches: TokenBatches) -> list[dict[str, torch.Tensor]]:
    return [next(batches) for _ in range(batches.steps_per_epoch)]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    count=st.integers(1, 200),
    tokens=st.integers(70, 900),
    buckets=st.integers(1, 9),
    world=st.integers(1, 3),
    length_multiple=st.sampled_from([1, 4, 8]),
)
def test_an_epoch_gives_every_pair_once_in_few_shapes_within_the_budget(
    seed, count, tokens, buckets, world, length_multiple
):
    pairs = corpus(seed, count)
    ranks = [
        TokenBatches(*pairs, tokens=tokens, buckets=buckets, length_multiple=length_multiple,
                     rank=rank, world=world, seed=seed)
        for rank in range(world)
    ]  # fmt: skip
    made = [epoch(rank) for rank in ranks]
    assert sorted(pair for rank in made for pair in contents(rank)) == sorted(lists(pairs))
    shapes = [[(*b["source"].shape, b["target"].shape[1] - 1) for b in rank] for rank in made]
    assert all(rank == shapes[0] for rank in shapes)
    assert set(shapes[0]) == set(ranks[0].shapes) and len(ranks[0].shapes) <= buckets
    for b, s, t in ranks[0].shapes:
        assert b * (s + t) <= tokens and not s % length_multiple and not t % length_multiple
    padded = sum(b * (s + t) for b, s, t in shapes[0]) * world
    real = sum(
        int(b[n].sum()) for r in made for b in r for n in ("source_lengths", "target_lengths")
    )
    assert ranks[0].padding == pytest.approx(1 - real / padded)


@given(seed=st.integers(0, 99), stop=st.integers(0, 60), more=st.integers(1, 40))
def test_resuming_anywhere_gives_the_very_next_batch(seed, stop, more):
    pairs = corpus(seed, 120)
    batches = TokenBatches(*pairs, tokens=400, seed=seed)
    for _ in range(stop):
        next(batches)
    state = json.loads(json.dumps(batches.state()))
    expected = [next(batches) for _ in range(more)]
    again = TokenBatches(*pairs, tokens=400, seed=seed)
    again.restore(state)
    for a, b in zip(expected, again, strict=False):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_order_depends_on_seed_and_epoch_alone():
    pairs = corpus(0, 200)

    def two_epochs(seed):
        batches = TokenBatches(*pairs, tokens=300, seed=seed)
        return contents(epoch(batches)), contents(epoch(batches))

    first, second = two_epochs(3)
    assert first != second and sorted(first) == sorted(second)
    assert two_epochs(3) == (first, second) and two_epochs(4)[0] != first
    torch.manual_seed(1), np.random.seed(1)
    assert two_epochs(3)[0] == first


def test_ranks_together_hold_the_rows_of_one_larger_rank():
    pairs = corpus(1, 150)
    one = TokenBatches(*pairs, tokens=800, row_multiple=2, buckets=1)
    (rows_of_one, s, t), = one.shapes  # fmt: skip
    two = [
        TokenBatches(*pairs, tokens=rows_of_one // 2 * (s + t), buckets=1, rank=r, world=2)
        for r in range(2)
    ]
    assert one.steps_per_epoch == two[0].steps_per_epoch
    for whole, *halves in zip(epoch(one), *map(epoch, two), strict=True):
        assert contents([whole]) == [
            row for rows in zip(*(contents([half]) for half in halves), strict=True) for row in rows
        ]


def test_without_shuffling_rows_keep_their_order_and_iteration_starts_over():
    pairs = corpus(2, 50)
    batches = TokenBatches(*pairs, tokens=10_000, buckets=1, shuffle=False, epochs=1)
    assert contents(batches) == lists(pairs)
    assert contents(batches) == lists(pairs)
    assert contents(next(batches) for _ in ()) == []
    with pytest.raises(StopIteration):
        next(batches)


def test_long_pairs_are_dropped_and_counted():
    source, target = ragged([3, 9, 4, 2]), ragged([5, 4, 12, 6])
    batches = TokenBatches(source, target, tokens=100, max_length=5, epochs=1)
    assert batches.dropped == 2
    assert sorted(map(len, (s for s, _ in contents(batches)))) == [2, 3]


def test_rows_are_a_multiple_of_the_accumulation():
    batches = TokenBatches(*corpus(3, 100), tokens=600, row_multiple=4)
    assert all(b % 4 == 0 for b, _, _ in batches.shapes)


def test_buckets_save_padding():
    pairs = corpus(4, 3000)
    paddings = [TokenBatches(*pairs, tokens=2000, buckets=n).padding for n in (1, 2, 4, 8)]
    assert paddings == sorted(paddings, reverse=True) and paddings[-1] < 0.2 < 0.35 < paddings[0]


def test_bad_settings_say_value_rule_and_remedy():
    pairs = corpus(0, 20)
    cases = {
        r"tokens \(0\) must be at least 1": dict(tokens=0),
        r"buckets \(-1\) must be": dict(tokens=99, buckets=-1),
        r"seed \(-1\) must be at least 0": dict(tokens=99, seed=-1),
        r"rank \(2\) must lie in \[0, world = 2\)": dict(tokens=99, rank=2, world=2),
        r"exceeds tokens \(10\): raise": dict(tokens=10),
        r"none of 20 pairs has at most max_length \(1\)": dict(tokens=99, max_length=1),
    }
    for message, options in cases.items():
        source = ragged([5] * 20) if "max_length" in options else pairs[0]
        target = ragged([5] * 20) if "max_length" in options else pairs[1]
        with pytest.raises(ValueError, match=message):
            TokenBatches(source, target, **options)
    with pytest.raises(ValueError, match="20 sources and 2 targets"):
        TokenBatches(pairs[0], ragged([3, 3]), tokens=99)
    batches = TokenBatches(*pairs, tokens=200)
    for change in ({"seed": 5}, {"steps_per_epoch": 1}, {"pairs": 7}):
        with pytest.raises(ValueError, match="resume with the same data"):
            batches.restore({**batches.state(), **change})


# ---------------------------------------------------------------- prefetching


def test_prefetching_changes_neither_batches_nor_positions():
    pairs = corpus(5, 200)
    plain = TokenBatches(*pairs, tokens=300)
    ahead = Prefetch(TokenBatches(*pairs, tokens=300), "cpu", depth=3)
    for _ in range(plain.steps_per_epoch + 3):
        a, b = next(plain), next(ahead)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert ahead.state() == plain.state()
    state = ahead.state()
    expected = [next(ahead) for _ in range(5)]
    ahead.restore(state)
    for a, b in zip(expected, ahead, strict=False):
        assert all(torch.equal(a[name], b[name]) for name in a)
    ahead.close()
    ahead.close()


def test_prefetching_ends_with_the_epochs_and_starts_over():
    pairs = corpus(6, 40)
    ahead = Prefetch(TokenBatches(*pairs, tokens=300, epochs=1), "cpu")
    assert sorted(contents(ahead)) == sorted(lists(pairs))
    assert sorted(contents(ahead)) == sorted(lists(pairs))


@pytest.mark.timeout(20)
def test_closing_never_waits_for_a_full_queue():
    for taken in range(4):
        ahead = Prefetch(TokenBatches(*corpus(6, 9), tokens=120, epochs=1), "cpu", depth=1)
        for _ in range(taken):
            next(ahead)
        time.sleep(0.05)
        ahead.close()


def test_an_error_in_the_thread_reaches_the_caller(monkeypatch):
    batches = TokenBatches(*corpus(7, 40), tokens=300)
    monkeypatch.setattr(TokenBatches, "__next__", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(Prefetch(batches, "cpu"))
    with pytest.raises(ValueError, match=r"depth \(0\)"):
        Prefetch(batches, "cpu", depth=0)


@pytest.mark.gpu
def test_prefetched_batches_arrive_on_the_device():
    pairs = corpus(8, 200)
    plain = TokenBatches(*pairs, tokens=300)
    ahead = Prefetch(TokenBatches(*pairs, tokens=300), "cuda")
    for _ in range(20):
        a, b = next(plain), next(ahead)
        assert all(b[name].is_cuda and torch.equal(a[name], b[name].cpu()) for name in a)
    ahead.close()


def test_multi30k_batches_come_far_faster_than_a_gpu_eats_them(shared_data, tmp_path):
    folder = shared_data / "multi30k"
    names = {"train": "train", "valid": "val", "test": "test_2016_flickr"}
    files = {k: [folder / f"{name}.{end}.gz" for end in ("en", "de")] for k, name in names.items()}
    splits = load_pairs(files["train"], valid=files["valid"], test=files["test"])
    assert [len(p) for p in (splits.train, splits.valid, splits.test)] == [29_000, 1014, 1000]
    tokenizer = train_bpe([*splits.train["source"][:2000], *splits.train["target"][:2000]], 2000)
    ids = encode_pairs(splits.train, tokenizer, cache_dir=tmp_path)
    batches = TokenBatches(*ids, tokens=16_384, max_length=128)
    assert batches.padding < 0.25
    next(batches)
    start, tokens = time.process_time(), 0
    for batch in (next(batches) for _ in range(300)):
        tokens += batch["source"].numel() + batch["target"].numel()
    assert tokens / (time.process_time() - start) > 10e6, "an H200 takes 3M tokens/s"
