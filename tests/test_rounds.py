"""Rounds of generation: which groups reach the optimizer steps, and that nothing of them is lost or mixed up."""

import json
import weakref
from collections import Counter

import pandas
import pytest
import torch
import trl

from tests.test_token_credit import DELTA, NTHR, Watch, delta_expected, nthr_expected
from trl_cancel import CancelGRPOConfig
from trl_cancel.batch.rollouts import join_rows
from trl_cancel.batch.states import StateStore
from trl_cancel.pipeline.rounds import GroupPool, Rounds, Scored
from trl_cancel.pipeline.scoring import Scoring
from trl_cancel.playground.data import load_prompts
from trl_cancel.running.rewards import at_the_mean

from .runs import DEFAULTS, OFF_POLICY, assert_same_weights, build, noisy_reward, train


def rare_reward(completion_ids, **kwargs):
    """Right about once in seven, so that many groups are all wrong."""
    return [float(sum(ids) % 7 == 0) for ids in completion_ids]


def thirds_reward(completion_ids, **kwargs):
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def hopeless_reward(completion_ids, **kwargs):
    return [0.0] * len(completion_ids)


RARE = {"reward_funcs": rare_reward}
SPLIT = {**OFF_POLICY, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_steps": 16}
WANTED = {
    "filter": {"filter_zero_variance": True},
    "balance": {"reward_balance": 0.25},
    "both": {"filter_zero_variance": True, "reward_balance": 0.25},
}


class Steps:
    """Watches what reaches each loss, and the log-probs that the policy would give it, computed anew."""

    def __init__(self, monkeypatch):
        self.batches, self.generated = [], []
        loss, score = trl.GRPOTrainer.compute_loss, Scoring.score

        def watched_loss(trainer, model, inputs, *args, **kwargs):
            self.batches.append(dict(inputs))
            return loss(trainer, model, inputs, *args, **kwargs)

        def watched_score(scoring, generate, inputs):
            scored = score(scoring, generate, inputs)
            self.generated[-1].append(scored)
            ids = torch.cat([scored.batch["prompt_ids"], scored.batch["completion_ids"]], dim=1)
            assert len(ids) == len(scored)
            return scored

        chosen = Rounds.chosen

        def watched_chosen(rounds, score, inputs):
            self.generated.append([])
            return chosen(rounds, score, inputs)

        monkeypatch.setattr(trl.GRPOTrainer, "compute_loss", watched_loss)
        monkeypatch.setattr(Scoring, "score", watched_score)
        monkeypatch.setattr(Rounds, "chosen", watched_chosen)


class RoundsOfLengths:
    """A rollout function: random tokens, up to another length in each round."""

    def __init__(self, *lengths):
        self.lengths, self.calls = lengths, 0

    def __call__(self, prompts, trainer):
        generator = torch.Generator().manual_seed(self.calls)
        longest = self.lengths[self.calls % len(self.lengths)]
        self.calls += 1
        lengths = torch.randint(1, longest + 1, (len(prompts),), generator=generator).tolist()
        completions = [torch.randint(3, 30, (length,), generator=generator).tolist() for length in lengths]
        return {
            "prompt_ids": [trainer.processing_class(prompt[0]["content"])["input_ids"] for prompt in prompts],
            "completion_ids": completions,
            "logprobs": [[0.0] * len(completion) for completion in completions],
        }


def text_of(prompt_ids, prompt_mask, completion_ids, completion_mask):
    return tuple(prompt_ids[prompt_mask.bool()].tolist()), tuple(completion_ids[completion_mask.bool()].tolist())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wanted", WANTED)
def test_every_step_is_as_asked_for_or_logged_as_not(monkeypatch, tiny_model, wanted, seed):
    steps = Steps(monkeypatch)
    settings = {**SPLIT, **WANTED[wanted], "seed": seed, "max_steps": 40}
    run = train(tiny_model, **settings, arguments=RARE if seed else {"reward_funcs": thirds_reward})
    logs = [log for log in run.logs if "balance/rounds" in log]
    assert len(logs) == len(steps.generated) == 5
    assert max(log["balance/rounds"] for log in logs) > 1, "or there was nothing to do"
    first = 0
    for log, rounds in zip(logs, steps.generated, strict=True):
        assert log["balance/rounds"] == len(rounds) <= 4
        used = steps.batches[first : first + 4]
        first += 8  # two iterations
        fulfilled, varied = [], []
        for batch in used:
            advantages = batch["rollout_advantages"].view(-1, 4)
            assert (batch["group_ids"].view(-1, 4) == batch["group_ids"].view(-1, 4)[:, :1]).all(), "groups are whole"
            both = min((advantages > 0).sum(), (advantages < 0).sum()) >= 0.25 * advantages.numel()
            fulfilled.append(both.item() or "reward_balance" not in WANTED[wanted])
            varied.append((advantages != 0).any(1).all().item())
        enough = not WANTED[wanted].get("filter_zero_variance") or all(varied)
        assert log["balance/satisfied"] == pytest.approx(sum(fulfilled) / 4 if enough else 0)
        rewards = torch.cat([scored.rewards for scored in rounds]).flatten()
        assert log["reward"] == pytest.approx(rewards.mean().item()), "of all that was generated"
        idle = (rewards.view(-1, 4).amax(1) == rewards.view(-1, 4).amin(1)).float().mean().item()
        assert log["balance/zero_variance_fraction"] == pytest.approx(idle)
        assert log["balance/discarded_fraction"] == pytest.approx(1 - 1 / len(rounds))
        kept = torch.cat([batch["rollout_advantages"] for batch in used])
        assert log["balance/positive_fraction"] == pytest.approx((kept > 0).float().mean().item())
        assert log["balance/negative_fraction"] == pytest.approx((kept < 0).float().mean().item())


def test_rollouts_keep_what_belongs_to_them(monkeypatch, tiny_model):
    """Through rounds of different lengths: tokens, advantages, log-probs of policy and reference."""
    steps = Steps(monkeypatch)
    arguments = {**RARE, "rollout_func": RoundsOfLengths(3, 6, 5)}
    train(tiny_model, **{**SPLIT, "max_steps": 8}, **WANTED["both"], beta=0.1, arguments=arguments)
    (rounds,) = steps.generated
    assert len({scored.batch["completion_ids"].size(1) for scored in rounds}) > 1
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    origin = {}
    for scored in rounds:
        for row in range(len(scored)):
            batch = scored.batch
            group = scored.group_ids[row].item()
            origin.setdefault((group, text_of(*(batch[name][row] for name in names))), (batch, row))
    tokens = 0
    for batch in steps.batches[:4]:
        for row, group in enumerate(batch["group_ids"].tolist()):
            source, at = origin[group, text_of(*(batch[name][row] for name in names))]
            assert batch["rollout_advantages"][row] == source["advantages"][at]
            for name in ("old_per_token_logps", "ref_per_token_logps"):
                mask, other = batch["completion_mask"][row].bool(), source["completion_mask"][at].bool()
                assert torch.equal(batch[name][row][mask], source[name][at][other])
        tokens += batch["completion_mask"].sum()
    assert {batch["num_items_in_batch"].item() for batch in steps.batches} == {tokens.item()}
    assert len({group for batch in steps.batches[:4] for group in batch["group_ids"].tolist()}) == 8


@pytest.mark.parametrize(
    ("method", "expected"), [(NTHR, nthr_expected), (DELTA, delta_expected)], ids=["nthr", "delta"]
)
@pytest.mark.parametrize("gib", [2.0, 0.0])
def test_states_follow_the_rollouts(monkeypatch, tiny_model, method, expected, gib):
    watch = Watch(monkeypatch, expected)
    settings = {**SPLIT, **WANTED["both"], **method, "state_cache_gib": gib}
    watch.train(tiny_model, **settings, arguments=RARE)


def test_nothing_changes_where_the_first_round_will_do(tiny_model):
    settings = {**SPLIT, "filter_zero_variance": True, "reward_balance": 0.01}
    ours = train(tiny_model, **settings)
    theirs = train(tiny_model, **SPLIT)
    assert {log["balance/rounds"] for log in ours.logs if "balance/rounds" in log} == {1}
    assert_same_weights(ours.weights, theirs.weights)
    for log, expected in zip(ours.logs, theirs.logs, strict=True):
        assert {name: log[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("rewards", "aggregation"),
    # The mean is that of the second rollout but for rounding, by itself or of the values of two functions.
    [([(0.1, 0.2, 0.4, 0.1)], "sum_then_normalize"), ([(0.1, 0.2, 0.3, 0.2), (3, 2, 1, 2)], "normalize_then_sum")],
)
def test_a_reward_that_is_the_mean_has_no_sign(tiny_model, rewards, aggregation):
    functions = [lambda completion_ids, v=values, **kwargs: [*v] * (len(completion_ids) // 4) for values in rewards]
    weights = [1.0, 0.5][: len(rewards)]
    seen = []

    class Seen:
        scope = "rollout"

        def coefficients(self, rollouts):
            seen.append(rollouts.advantages.view(-1, 4))
            return torch.ones_like(rollouts.mask, dtype=torch.float)

    run = train(
        tiny_model,
        reward_balance=0.25,
        reward_weights=weights,
        multi_objective_aggregation=aggregation,
        max_steps=1,
        arguments={"reward_funcs": functions, "credits": [Seen()]},
    )
    assert (seen[0][:, 1] == 0).all()
    assert (seen[0][:, [0, 2]] != 0).all()
    log = run.logs[0]
    signs = torch.tensor([row.sign().tolist() for row in seen[0]])
    assert log["balance/positive_fraction"] == pytest.approx((signs > 0).float().mean().item())
    assert log["balance/negative_fraction"] == pytest.approx((signs < 0).float().mean().item())


def test_filter_where_groups_are_torn(tiny_model):
    """A step need not hold whole groups for whole groups to be exchanged."""
    torn = {"query_preserved": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    run = train(
        tiny_model, **{**OFF_POLICY, **torn}, filter_zero_variance=True, max_generation_rounds=8, arguments=RARE
    )
    chosen = [log for log in run.logs if "balance/satisfied" in log]
    assert max(log["balance/rounds"] for log in chosen) > 1
    assert all(log["frac_reward_zero_std"] == 0 or log["balance/satisfied"] == 1 for log in chosen)


def test_hopeless_prompts_end_with_the_best_there_is(tiny_model, caplog):
    run = train(
        tiny_model,
        **{**SPLIT, "max_steps": 9},
        **WANTED["both"],
        max_generation_rounds=3,
        arguments={"reward_funcs": hopeless_reward},
    )
    logs = [log for log in run.logs if "balance/rounds" in log]
    assert [(log["balance/rounds"], log["balance/satisfied"]) for log in logs] == [(3, 0), (3, 0)]
    said = [record.message for record in caplog.records if "max_generation_rounds" in record.message]
    assert len(said) == 1


def test_data_set_smaller_than_a_round_is_refused(tiny_model):
    with pytest.raises(ValueError, match="train_dataset has 7 rows, but a generation takes 8 prompts"):
        build(tiny_model, **SPLIT, arguments={"train_dataset": load_prompts("train", 7)})


def test_data_set_of_one_round(tiny_model):
    run = train(tiny_model, **SPLIT, **WANTED["both"], arguments={**RARE, "train_dataset": load_prompts("train", 8)})
    assert run.trainer._fresh_prompts.drawn > 0


@pytest.mark.parametrize("shuffled", [True, False])
def test_streamed_data(tiny_model, shuffled):
    stream = load_prompts("train", 40).to_iterable_dataset()
    run = train(
        tiny_model,
        **SPLIT,
        **WANTED["both"],
        shuffle_dataset=shuffled,
        arguments={**RARE, "train_dataset": stream},
    )
    assert run.trainer._fresh_prompts.drawn > 0


@pytest.mark.parametrize(
    ("streamed", "rows", "step"),
    [(False, 64, 8), (True, 64, 8), (False, 16, 16)],
    ids=["data set", "stream", "in a later epoch"],
)
def test_resumed_run_equals_the_uninterrupted_one(tiny_model, tmp_path, streamed, rows, step):
    dataset = load_prompts("train", rows)
    arguments = {**RARE, "train_dataset": dataset.to_iterable_dataset() if streamed else dataset}
    settings = {**SPLIT, **WANTED["both"], **DELTA, "max_steps": 24}
    settings |= {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 8}
    whole = train(tiny_model, **settings, arguments=arguments)
    saved = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["trl_cancel.FreshPrompts"]["attributes"]["drawn"] > 0
    resumed = train(tiny_model, **settings, arguments=arguments, resume=str(tmp_path / f"checkpoint-{step}"))
    assert_same_weights(resumed.weights, whole.weights)
    assert resumed.logs[step:-1] == whole.logs[step:-1]


def test_orders_of_the_epochs_are_those_of_trl(tiny_model):
    trainer = build(tiny_model, **SPLIT, **WANTED["both"], arguments={"train_dataset": load_prompts("train", 16)})
    ours, theirs = trainer._get_train_sampler(), trl.GRPOTrainer._get_train_sampler(trainer)
    assert len(ours) == len(theirs)
    orders = [list(theirs) for _ in range(3)]
    assert orders[0] != orders[1]
    for epoch in (2, 0, 1, 1):
        ours.set_epoch(epoch)
        assert list(ours) == orders[epoch]


def test_a_checkpoint_without_a_position_starts_from_the_first_prompt(tiny_model, tmp_path):
    settings = {**SPLIT, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 8}
    train(tiny_model, **{**settings, "max_steps": 8}, arguments=RARE)
    run = train(tiny_model, **settings, **WANTED["both"], arguments=RARE, resume=str(tmp_path / "checkpoint-8"))
    assert run.trainer._fresh_prompts.drawn > 0


def test_table_of_completions_tells_which_were_kept(tiny_model, tmp_path):
    settings = {**SPLIT, **WANTED["both"], "log_completions": True, "output_dir": str(tmp_path), "max_steps": 9}
    run = train(tiny_model, **settings, arguments=RARE)
    logs = [log for log in run.logs if "balance/rounds" in log]
    for step, log in zip((1, 9), logs, strict=True):
        table = pandas.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert len(table) == 32 * log["balance/rounds"]
        assert table["balance/kept"].sum() == 32
        kept = Counter(str(prompt) for prompt in table[table["balance/kept"]]["prompt"])
        assert all(count % 4 == 0 for count in kept.values())


def test_table_of_completions_with_evaluation_in_between(tiny_model, tmp_path):
    settings = {**SPLIT, **WANTED["both"], "log_completions": True, "output_dir": str(tmp_path), "max_steps": 9}
    settings |= {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 8}
    arguments = {**RARE, "eval_dataset": load_prompts("test", 4)}
    train(tiny_model, **settings, num_generations_eval=2, arguments=arguments)
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00009.parquet")
    assert table["balance/kept"].sum() == 32


def test_discarded_rollouts_are_released(monkeypatch, tiny_model):
    alive = []
    score = Scoring.score

    def watched(scoring, generate, inputs):
        scored = score(scoring, generate, inputs)
        alive.append(weakref.ref(scored.batch["completion_ids"]))
        return scored

    monkeypatch.setattr(Scoring, "score", watched)
    train(tiny_model, **SPLIT, **WANTED["both"], arguments=RARE)
    assert len(alive) > 2
    assert not any(reference() is not None for reference in alive)


def test_rewards_that_differ_little_have_a_sign():
    """Beside a large offset; only what the rounding of their mean may be has none."""
    rewards = torch.tensor([[1000.0, 1000.0005] * 2, [0.1, 0.1, 0.1, 0.1]]).unsqueeze(-1)
    assert at_the_mean(rewards, torch.ones(1)).tolist() == [[False] * 4, [True] * 4]


def test_columns_of_later_rounds_are_those_of_the_first(tiny_model):
    seen = []

    def reward(completion_ids, **kwargs):
        seen.append(sorted(kwargs))
        return rare_reward(completion_ids)

    train(tiny_model, **SPLIT, **WANTED["both"], arguments={"reward_funcs": reward})
    assert len(seen) > 2
    assert all(names == seen[0] for names in seen)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_filter_looks_at_the_rewards_themselves(monkeypatch, tiny_model, aggregation, scale):
    """However advantages are scaled, with rewards of none, and with a function that is only logged."""

    def sometimes(completion_ids, **kwargs):
        return [None if sum(ids) % 2 else float(sum(ids) % 7 == 0) for ids in completion_ids]

    steps = Steps(monkeypatch)
    run = train(
        tiny_model,
        **{**SPLIT, "max_steps": 16, "max_generation_rounds": 8},
        **WANTED["filter"],
        multi_objective_aggregation=aggregation,
        scale_rewards=scale,
        reward_weights=[1.0, 0.5, 0.0],
        arguments={"reward_funcs": [rare_reward, sometimes, noisy_reward]},
    )
    logs = [log for log in run.logs if "balance/rounds" in log]
    assert {log["balance/satisfied"] for log in logs} == {1}
    assert max(log["balance/rounds"] for log in logs) > 1
    rewards = {group: [] for rounds in steps.generated for part in rounds for group in part.group_ids.tolist()}
    for part in (part for rounds in steps.generated for part in rounds):
        for group, row in zip(part.group_ids.tolist(), part.rewards[:, :2].tolist(), strict=True):
            rewards[group].append(tuple(None if value != value else value for value in row))
    for batch in steps.batches:
        for group in set(batch["group_ids"].tolist()):
            first, second = ([row[i] for row in rewards[group]] for i in (0, 1))
            known = {value for value in second if value is not None}
            assert len(set(first)) > 1 or len(known) > 1 or (None in second and known == {1.0})


class TestJoin:
    def batch(self, rows, prompt, completion, **more):
        return {
            "prompt_ids": torch.full((rows, prompt), 5),
            "completion_ids": torch.full((rows, completion), 6),
            "num_items_in_batch": torch.tensor(rows),
            **more,
        }

    def test_prompts_are_padded_on_the_left_and_completions_on_the_right(self):
        joined = join_rows([self.batch(1, 2, 3), self.batch(1, 3, 1)], pad_token_id=0)
        assert joined["prompt_ids"].tolist() == [[0, 5, 5], [5, 5, 5]]
        assert joined["completion_ids"].tolist() == [[6, 6, 6], [6, 0, 0]]

    def test_other_entries(self):
        """Those of prompts and completions together, those of a whole rollout, and several features a token."""
        first = self.batch(1, 2, 3, token_type_ids=torch.ones(1, 5), importance_sampling_ratio=torch.ones(1, 1))
        second = self.batch(2, 1, 1, token_type_ids=torch.ones(2, 2), importance_sampling_ratio=torch.ones(2, 1))
        first["features"], second["features"] = torch.ones(1, 3, 2), torch.ones(2, 1, 2)
        joined = join_rows([first, second], pad_token_id=0)
        assert joined["token_type_ids"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0]]
        assert joined["importance_sampling_ratio"].shape == (3, 1)
        assert joined["features"].sum((1, 2)).tolist() == [6, 2, 2]

    def test_equal_widths_do_not_confuse(self):
        joined = join_rows([self.batch(1, 3, 3), self.batch(1, 5, 5)], pad_token_id=0)
        assert joined["prompt_ids"][0].tolist() == [0, 0, 5, 5, 5]
        assert joined["completion_ids"][0].tolist() == [6, 6, 6, 0, 0]

    def test_rounds_without_images(self):
        images = {
            "pixel_values": [torch.ones(2, 4)],
            "image_grid_thw": [torch.ones(1, 3)],
            "num_images": [1],
            "mm_token_type_ids": torch.ones(1, 5),
        }
        for order in (1, -1):
            batches = [self.batch(1, 2, 3, **images), self.batch(2, 2, 1)][::order]
            joined = join_rows(batches, pad_token_id=0)
            assert sorted(len(value) for value in joined["pixel_values"]) == [0, 0, 2]
            assert sorted(joined["num_images"]) == [0, 0, 1]
            assert joined["mm_token_type_ids"].sum(1).sort().values.tolist() == [0, 0, 5]
        with pytest.raises(ValueError, match="Only some rounds of generation have odd"):
            join_rows([self.batch(1, 2, 3, odd=torch.ones(1)), self.batch(1, 2, 3)], pad_token_id=0)

    def test_images_are_padded_to_the_largest_and_the_most(self):
        """A row a rollout, or a list where their numbers differ; a processor may give the one or the other."""
        one, two = torch.ones(2, 1, 3, 4), torch.ones(1, 2, 5, 2)
        batches = [self.batch(2, 2, 3, pixel_values=list(one.split(1))), self.batch(1, 2, 3, pixel_values=two)]
        for order in (1, -1):
            rollouts = join_rows(batches[::order], pad_token_id=0)["pixel_values"][::order]
            assert {rows.shape for rows in rollouts} == {(1, 2, 5, 4)}
            assert torch.equal(rollouts[0][:, :1, :3], one[:1])
            assert torch.equal(rollouts[2][..., :2], two)
            assert [rows.sum() for rows in rollouts] == [12, 12, 20]

    def test_what_cannot_be_aligned_is_refused(self):
        first, second = self.batch(1, 2, 3, odd=torch.ones(1, 7)), self.batch(1, 2, 4, odd=torch.ones(1, 9))
        with pytest.raises(ValueError, match="odd of shapes"):
            join_rows([first, second], pad_token_id=0)


def test_stores_are_joined():
    def store(lengths, width):
        found = StateStore()
        mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
        states = torch.randn(len(lengths), width, 4)
        found.add(states, mask)
        return found, states * mask.unsqueeze(-1)

    torch.manual_seed(0)
    (first, a), (second, b) = store([2, 3], 3), store([5, 1, 4], 5)
    joined = StateStore.join([first.take(torch.tensor([1])), second.take(torch.tensor([2, 0]))], 5)
    assert torch.equal(joined[0:1][:, :3], a[1:2])
    assert not joined[0:1][:, 3:].any()
    assert torch.equal(joined[1:3], b[[2, 0]])


@pytest.mark.parametrize("groups", [[0], [0, 1], [0, 1, 2]])
def test_states_of_a_round_that_were_too_many_go_for_all(groups):
    """Whichever rounds a process takes groups of: where a model is sharded, all must make the same passes."""

    def scored(keeps):
        ids = torch.ones(4, 3, dtype=torch.long)
        batch = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": ids}
        states = StateStore(1.0)
        states.reserve(0 if keeps else 1 << 40)
        if keeps:
            states.add(torch.randn(4, 3, 2), torch.ones(4, 3))
        flags = torch.zeros(4).bool()
        return Scored(batch, torch.zeros(4, 1), flags, flags, torch.arange(4) // 2, [{}] * 4, states)

    pool = GroupPool(CancelGRPOConfig(**{**DEFAULTS, "num_generations": 2}))
    for keeps in (True, False):
        pool.add(scored(keeps))
    taken = pool.take(torch.tensor(groups), pad_token_id=0)
    assert not taken.states.keeps
    assert len(taken.states) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_balance": 0.6}, r"reward_balance=0.6 must be between 0 and 0.5, e.g. 0.25"),
        ({"reward_balance": True}, r"reward_balance=True must be between"),
        ({"max_generation_rounds": 0}, r"max_generation_rounds=0 must be a whole number of at least 1"),
        ({"filter_zero_variance": 1}, r"filter_zero_variance=1 must be True or False"),
        (
            {"reward_balance": 0.5, "num_generations": 3, "per_device_train_batch_size": 3},
            r"asks for 2 rollouts of either sign among the 3 of .* 0.333 or less",
        ),
        ({"reward_balance": 0.25, "query_preserved": False}, r"needs whole groups in each optimizer step. Set query_"),
    ],
)
def test_refusals(tiny_model, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_model, **{**SPLIT, **settings})
