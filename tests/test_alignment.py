"""Rows, rollouts and scores of the alignment recipes: nothing is lost, shifted or leaked."""

import gzip
import json

import pytest
import torch

from msfs_functional import logps as logps_module
from msfs_functional import optim, random
from msfs_functional.generation import Sampling, Settings
from msfs_functional.models.decoder import decoder, tiny
from msfs_functional.pairs import Pair, Shuffled, encode_pairs
from msfs_functional.params import stack
from msfs_functional.preference_data import (
    number_of,
    read_pairs,
    read_problems,
    solved,
    solved_or_close,
    split_by,
)
from msfs_functional.reward_models import HEAD, aggregate, bradley_terry, last_rewards, with_head
from msfs_functional.rollouts import Roller, SampleTable
from msfs_functional.scoring import answer_logps, answer_statistics, in_parts
from msfs_functional.sft import AnswerBatches, pack_answers
from msfs_functional.tokenizer import BOS, EOS, PAD
from msfs_functional.train import init_state, make_step

PROMPTS = [[BOS, 5, 6], [BOS, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def model():
    return decoder(tiny(20, width=16, depth=2, heads=2, kv_heads=1, hidden=24, max_length=48))


@pytest.fixture(scope="module")
def params(model):
    return {name: 5 * value for name, value in model.init(0).items()}


def roller(model, params, **options):
    settings = Settings(6, Sampling(1.0), samples=2, stop_tokens=(EOS,), pad=PAD)
    return Roller(model, params, settings, multiple=4, compile=False, **options)


# rollouts


def test_a_rollout_says_what_the_model_thinks_of_its_own_tokens(model, params):
    rollout = roller(model, params)(PROMPTS, random.key(0))
    assert rollout.tokens.shape == (4, 8 + 6)
    for row, completion in enumerate(rollout.completions()):
        prompt = PROMPTS[row // 2]
        ids = [*prompt, *completion]
        assert rollout.tokens[row, : len(ids)].tolist() == ids
        assert not rollout.tokens[row, len(ids) :].any()
        assert rollout.ended[row] == (completion[-1] == EOS)
        logits = model.apply(params, torch.tensor([ids]))[0].log_softmax(-1)
        for at in range(len(prompt), len(ids)):
            expected = logits[at - 1, ids[at]]
            torch.testing.assert_close(rollout.logps[row, at], expected, atol=1e-4, rtol=1e-4)
    assert not rollout.logps[~rollout.mask].any()
    own = answer_logps(model, params, rollout.tokens, rollout.mask)
    torch.testing.assert_close(own, rollout.logps, atol=1e-4, rtol=1e-4)


def test_a_row_depends_on_its_own_prompt_and_key_only(model, params):
    roll, keys = roller(model, params, longest=5), random.split(random.key(1), 2)
    both, one = roll(PROMPTS, keys), roll(PROMPTS[1:], keys[1:])
    assert both.tokens[2:].tolist() == one.tokens.tolist()
    assert roll.width == both.tokens.shape[1] == one.tokens.shape[1]


def test_generation_reads_the_parameters_that_training_writes(model, params):
    own = {name: value.clone() for name, value in params.items()}
    roll = roller(model, own)
    assert all(roll.read[name] is own[name] for name in own)
    before = roll(PROMPTS, random.key(0))
    for value in own.values():
        value.mul_(0.5)
    after = roll(PROMPTS, random.key(0))
    assert before.tokens.tolist() != after.tokens.tolist()
    fresh = roller(model, own)(PROMPTS, random.key(0))
    assert after.tokens.tolist() == fresh.tokens.tolist()
    half = roller(model, own, dtype=torch.bfloat16)
    kept = {name: value.data_ptr() for name, value in half.read.items()}
    half(PROMPTS, random.key(0), {name: 2 * value for name, value in own.items()})
    assert kept == {name: value.data_ptr() for name, value in half.read.items()}
    torch.testing.assert_close(half.read["norm.weight"].float(), 2 * own["norm.weight"])


def test_rollouts_refuse_what_cannot_end_and_prompts_that_do_not_fit(model, params):
    with pytest.raises(ValueError, match="holds no end token"):
        Roller(model, params, Settings(4))
    with pytest.raises(ValueError, match="prompt of 45 tokens and max_new_tokens"):
        roller(model, params)([[5] * 45], random.key(0))
    with pytest.raises(ValueError, match="at least one token"):
        roller(model, params)([[5], []], random.key(0))


def test_the_table_of_samples_forgets_what_a_killed_run_wrote_too_far(tmp_path):
    path = tmp_path / "samples.jsonl"
    table = SampleTable(path, every=1)
    for iteration in (1, 2, 3):
        table.add(iteration, [{"answer": f"è {iteration}"}])
    SampleTable(path, 2, every=1).add(3, [{"answer": "again"}])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in rows] == ["è 1", "è 2", "again"]


# scores


def test_scores_of_answers_equal_the_plain_formula(model, params, monkeypatch):
    monkeypatch.setitem(logps_module.CHUNK, "cpu", 60)
    tokens = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 4:7], mask[1, 2:], mask[2, 8] = True, True, True
    plain = model.apply(params, tokens).log_softmax(-1)
    expected = plain[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    expected = torch.where(mask[:, 1:], expected, 0.0)
    for most in (None, int(mask.sum()), 20):
        found = answer_logps(model, params, tokens, mask, most=most)
        assert not found[:, 0].any()
        torch.testing.assert_close(found[:, 1:], expected)
    entropy = torch.distributions.Categorical(logits=plain[:, :-1]).entropy()
    head = torch.linspace(-1, 1, 16)
    values = model.apply(params, tokens, method="hidden")[:, :-1] @ head
    for most in (None, int(mask.sum()), 20):
        logps, entropies, judged = answer_statistics(
            model, params, tokens, mask, most=most, head=head
        )
        torch.testing.assert_close(logps[:, 1:], expected)
        torch.testing.assert_close(entropies[:, 1:], torch.where(mask[:, 1:], entropy, 0.0))
        torch.testing.assert_close(judged[:, 1:], torch.where(mask[:, 1:], values, 0.0))
    assert not answer_statistics(model, params, tokens, mask)[2].any()


def test_gradients_of_scores_do_not_depend_on_how_many_tokens_are_computed(model, params):
    tokens = torch.randint(4, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6).expand(2, 6) > 3
    total = lambda p, most: answer_logps(model, p, tokens, mask, most=most).sum()  # noqa: E731
    plain, few = (torch.func.grad(total)(params, most) for most in (None, 4))
    for name in plain:
        torch.testing.assert_close(few[name], plain[name])


def test_parts_of_one_shape_give_all_rows_once():
    x, shapes = torch.arange(7), []

    def double(x):
        shapes.append(len(x))
        return 2 * x

    assert in_parts(double, {"x": x}, 3).tolist() == (2 * x).tolist()
    assert shapes == [3, 3, 3]


# rows


def test_only_answers_are_learned_in_packed_rows():
    documents = [[BOS, 5, 6, 7, EOS], [BOS, 8, 9, EOS]]
    rows = pack_answers(documents, [3, 2], 8)
    assert rows.tokens.tolist() == [[BOS, 5, 6, 7, BOS, 8, 9, PAD]]
    assert rows.labels.tolist() == [[PAD, PAD, 7, EOS, PAD, 9, EOS, PAD]]
    assert rows.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]


def test_batches_of_answers_shuffle_prompts_with_their_documents():
    documents = [[BOS, n, n, n, EOS] for n in range(5, 15)]
    batches = AnswerBatches(documents, 8, 2, prompts=[2 + n % 2 for n in range(10)])
    seen = 0
    for _ in range(6):
        batch = next(batches)
        kept = batch["labels"] != PAD
        for row in range(2):
            for segment in (1, 2):
                here = kept[row] & (batch["segments"][row] == segment)
                n = int(batch["tokens"][row][batch["segments"][row] == segment][1])
                assert int(here.sum()) == 3 - (n - 5) % 2
                seen += 1
    assert seen == 24


def test_pairs_are_padded_masked_and_counted():
    pairs = [
        Pair([1, 5], [6, 7, 2], [8, 2]),
        Pair([1, 5], [6, 2], [6, 2]),
        Pair([1, 5], [], [6, 2]),
        Pair([1] * 9, [6, 2], [7, 2]),
    ]
    found = encode_pairs(pairs, longest=10, multiple=4)
    assert found.tokens.tolist() == [[[1, 5, 6, 7, 2, 0, 0, 0], [1, 5, 8, 2, 0, 0, 0, 0]]]
    assert found.mask.sum(-1).tolist() == [[3, 2]]
    assert found.dropped == {"equal sides": 1, "an empty side": 1, "beyond 10 tokens": 1}
    with pytest.raises(
        ValueError, match=r"of 2 pairs none is left .1 with equal sides, 1 with an e"
    ):
        encode_pairs(pairs[1:3], longest=10)


def test_shuffled_batches_hold_each_row_once_an_epoch_and_shares_make_the_whole():
    data = {"x": torch.arange(12)}
    whole = Shuffled(data, 4, seed=1)
    batches = [next(whole)["x"] for _ in range(6)]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(12))
    assert torch.cat(batches[:3]).tolist() != torch.cat(batches[3:]).tolist()
    again = Shuffled(data, 4, seed=1)
    again.restore({"done": 4})
    assert next(again)["x"].tolist() == batches[4].tolist()
    parts = [Shuffled(data, 4, seed=1, share=(rank, 2)) for rank in range(2)]
    assert torch.cat([next(part)["x"] for part in parts]).tolist() == batches[0].tolist()
    with pytest.raises(ValueError, match=r"12 rows are fewer than one batch \(13\)"):
        Shuffled(data, 13)
    with pytest.raises(ValueError, match="3 data ranks must divide the batch"):
        Shuffled(data, 4, share=(0, 3))


# reward models


def test_a_reward_is_read_off_the_last_token(model, params):
    params = with_head(params, 16, 0)
    tokens = torch.randint(4, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 4])
    found = last_rewards(model, params, tokens, lengths)
    body = {name: value for name, value in params.items() if name != HEAD}
    for row, length in enumerate(lengths.tolist()):
        alone = model.apply(body, tokens[row : row + 1, :length], method="hidden")[0, -1]
        torch.testing.assert_close(found[row], alone @ params[HEAD])
    changed = tokens.clone()
    changed[1, 4:] = 5
    assert last_rewards(model, params, changed, lengths).tolist() == found.tolist()


def test_aggregates_of_hand_worked_rewards():
    rewards = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    assert aggregate(rewards).tolist() == [2.0, 2.0]
    assert aggregate(rewards, "min").tolist() == [1.0, 2.0]
    assert aggregate(rewards, "uncertainty", penalty=0.5).tolist() == [1.5, 2.0]
    with pytest.raises(ValueError, match=r"how .'median'. must be"):
        aggregate(rewards, "median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="penalty"):
        aggregate(rewards, "uncertainty", penalty=-1.0)


def test_reward_models_trained_in_one_step_equal_those_trained_alone(model, params):
    tokens = torch.randint(4, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((8,), 6)

    def loss_fn(params, batch, key):
        rewards = last_rewards(model, params, batch["tokens"], batch["lengths"])
        return bradley_terry(*rewards.chunk(2), centring=0.01).mean(), {}

    starts = [with_head(params, 16, seed) for seed in range(2)]
    optimizer, batch = optim.adamw(1e-2), {"tokens": tokens, "lengths": lengths}
    keys = torch.stack([random.key(seed) for seed in range(2)])
    together = init_state(stack(starts), optimizer, keys)
    step = make_step(loss_fn, optimizer, members=2, compile=False)
    alone = [init_state(dict(s), optimizer, random.key(i)) for i, s in enumerate(starts)]
    single = make_step(loss_fn, optimizer, compile=False, donate=False)
    for _ in range(3):
        together, _ = step(together, batch)
        alone = [single(state, batch)[0] for state in alone]
    for i, state in enumerate(alone):
        for name, value in state.params.items():
            torch.testing.assert_close(together.params[name][i], value, atol=1e-4, rtol=1e-3)


# files


def test_pairs_come_from_columns_or_from_two_transcripts(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: more\n\nAssistant:"
    rows = [{"chosen": f"{start} good", "rejected": f"{start} bad"}]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    plain = tmp_path / "b.jsonl"
    plain.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    found = read_pairs([path, plain])
    assert found.kept == [(start, " good", " bad"), ("p", "c", "r")]
    assert not any(found.left_out.values())


def test_pairs_without_a_preference_are_left_out_and_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    sides = [("c", "r"), ("c", " c"), ("", "r"), ("c", " "), ("c", "c")]
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in sides]
    rows.append({"chosen": "x\n\nAssistant: a", "rejected": "y\n\nAssistant: b"})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = read_pairs([path])
    assert found.kept == [("p", "c", "r")]
    assert found.left_out == {"an empty side": 2, "equal sides": 2, "two prompts": 1}
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(ValueError, match=r"of 1 pairs none is left \(1 with equal sides\)"):
        read_pairs([path])


def test_files_that_are_something_else_say_what_was_found(tmp_path):
    path = tmp_path / "a.jsonl"
    for text, message in {
        '{"question": "q", "reply": "r"}': r"line 1 holds \['question', 'reply'\], expected",
        "[1]": r"holds \['list'\]",
        "{": "line 1 is no JSON",
        '{"question": "q", "answer": 3}': "'answer' is a int, expected text",
        "": "holds no line",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_problems([path])
    with pytest.raises(ValueError, match="does not exist"):
        read_problems([tmp_path / "none.jsonl"])


def test_equal_prompts_stay_on_one_side_of_the_split():
    items = [(f"p{n % 40}", n) for n in range(200)]
    train, held_out = split_by(items, lambda item: item[0], 0.3)
    assert len(train) + len(held_out) == 200
    assert not {p for p, _ in train} & {p for p, _ in held_out}
    with pytest.raises(ValueError, match="1 items leave"):
        split_by(items[:1], lambda item: item[0], 0.3)
    with pytest.raises(ValueError, match="share"):
        split_by(items, lambda item: item[0], 1.0)


def test_answers_are_checked_by_their_last_number():
    assert number_of("so 3 + 4 = 7\n#### 1,234.5") == 1234.5
    assert number_of("#### -3 then #### 4") == 4
    assert number_of("7") is None
    truth = ["#### 7", "#### 7", "#### 7"]
    texts = ["#### 7.0", "#### 8", "7"]
    assert solved([""] * 3, texts, truth) == [1.0, 0.0, 0.0]
    assert solved_or_close([""] * 3, texts, truth) == [1.0, 0.1, 0.0]
