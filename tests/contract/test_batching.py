"""How TRL orders, shuffles and splits: section by section what query-preserved mini-batching builds on."""

import pytest
import torch
import trl
from peft import LoraConfig

from tests.runs import build
from trl_cancel.upstream.trl import split_tensor_dict


def seen_micro_batches(monkeypatch, model, trainer=trl.GRPOTrainer, tag=True, **settings):
    """The micro-batches that reach the loss, in order, with a row-aligned tensor of group and rollout numbers added."""
    seen = []
    generate, loss = trl.GRPOTrainer._generate_and_score_completions, trl.GRPOTrainer.compute_loss

    def generate_tagged(self, inputs):
        batch = generate(self, inputs)
        rows = batch["advantages"].size(0)
        batch["tag"] = torch.arange(rows)
        batch["tag_rows"] = torch.arange(rows).unsqueeze(1).expand_as(batch["completion_ids"]).clone()
        batch["names"] = [f"rollout {i}" for i in range(rows)]
        return batch

    def watched_loss(self, model, inputs, *args, **kwargs):
        seen.append({name: inputs[name] for name in ("tag", "tag_rows", "names", "advantages")})
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", generate_tagged)
    monkeypatch.setattr(trl.GRPOTrainer, "compute_loss", watched_loss)
    build(model, trainer, **settings).train()
    return seen


def test_sampler_repeats_each_prompt_in_a_row(tiny_model):
    trainer = build(tiny_model, trl.GRPOTrainer, steps_per_generation=2, num_iterations=2)
    order = list(trainer._get_train_sampler())
    first, again = order[:8], order[8:16]
    assert first == [first[0]] * 4 + [first[4]] * 4
    assert first[0] != first[4]
    assert [order[i : i + 8] for i in range(0, 32, 8)] == [first] * 4, "once for each micro-step that uses it"
    assert again == first


def test_single_rollouts_are_shuffled_and_split(monkeypatch, tiny_model):
    seen = seen_micro_batches(monkeypatch, tiny_model, steps_per_generation=4, num_iterations=2, max_steps=8)
    tags = [batch["tag"].tolist() for batch in seen]
    order = [tag for batch in tags[:4] for tag in batch]
    assert sorted(order) == list(range(16))
    assert order != list(range(16))
    assert tags[:4] == tags[4:], "the second iteration uses the same micro-batches"
    assert any(len({tag // 4 for tag in batch}) > 1 for batch in tags), "groups are torn"


def test_extra_rows_survive_shuffle_and_split(monkeypatch, tiny_model):
    for batch in seen_micro_batches(monkeypatch, tiny_model, steps_per_generation=4, max_steps=4):
        assert (batch["tag_rows"] == batch["tag"].unsqueeze(1)).all()
        assert batch["names"] == [f"rollout {i}" for i in batch["tag"].tolist()]


def test_split_keeps_scalars_and_none():
    parts = split_tensor_dict({"rows": torch.arange(4), "scalar": torch.tensor(7), "none": None, "list": [*"abcd"]}, 2)
    assert [part["rows"].tolist() for part in parts] == [[0, 1], [2, 3]]
    assert [part["scalar"].item() for part in parts] == [7, 7]
    assert [part["none"] for part in parts] == [None, None]
    assert [part["list"] for part in parts] == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize(
    ("accumulation", "steps_per_generation", "num_iterations", "computed"),
    [
        (1, 1, 1, False),
        (2, 2, 1, False),
        (4, 2, 1, False),
        (4, 2, 2, False),
        (2, 2, 2, True),
        (2, 4, 1, True),
        (2, 3, 1, True),
    ],
)
def test_when_old_log_probs_are_computed(
    monkeypatch, tiny_model, accumulation, steps_per_generation, num_iterations, computed
):
    seen = []
    loss = trl.GRPOTrainer.compute_loss

    def watched_loss(self, model, inputs, *args, **kwargs):
        seen.append("old_per_token_logps" in inputs)
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trl.GRPOTrainer, "compute_loss", watched_loss)
    trainer = build(
        tiny_model,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=steps_per_generation,
        num_iterations=num_iterations,
        query_preserved=False,
        max_steps=1,
    )
    trainer.train()
    assert set(seen) == {computed}
    assert trainer.args.layout.is_on_policy is not computed


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_old_log_probs_are_the_first_forward_pass(monkeypatch, tiny_model, beta):
    """The batch holds the very tensor that the first call returns, the reference's come after it."""
    calls, batches = [], []
    forward, generate = (
        getattr(trl.GRPOTrainer, name)
        for name in ("_get_per_token_logps_and_entropies", "_generate_and_score_completions")
    )

    def watched_forward(self, model, input_ids, *args, **kwargs):
        calls.append((len(input_ids), forward(self, model, input_ids, *args, **kwargs)))
        return calls[-1][1]

    def watched_generate(self, inputs):
        calls.clear()
        batches.append((generate(self, inputs), list(calls)))
        return batches[-1][0]

    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", watched_forward)
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", watched_generate)
    build(tiny_model, trl.GRPOTrainer, steps_per_generation=4, max_steps=5, beta=beta).train()
    assert len(batches) == 2
    for batch, made in batches:
        assert len(made) == (2 if beta else 1)
        assert made[0][0] == 16, "the whole generation batch in one call"
        assert batch["old_per_token_logps"] is made[0][1][0]


@pytest.mark.parametrize("peft", [False, True])
def test_forward_pass_runs_the_backbone_in_pieces(monkeypatch, tiny_model, peft):
    """In row order, with the states that predict the completion at the end: what the hook of the states builds on."""
    arguments = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if peft else {}
    trainer = build(tiny_model, trl.GRPOTrainer, arguments=arguments)
    model = trainer.model.get_base_model() if peft else trainer.model
    ids, seen = torch.randint(3, 30, (6, 9)), []
    handle = model.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), 4, batch_size=4
        )
        handle.remove()
        full = model(input_ids=ids, output_hidden_states=True)
    assert [len(states) for states in seen] == [4, 2]
    torch.testing.assert_close(torch.cat(seen)[:, -5:-1], full.hidden_states[-1][:, -5:-1])
    expected = full.logits[:, -5:-1].log_softmax(-1).gather(-1, ids[:, -4:].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-5)


def test_num_items_spans_the_generation_batch(monkeypatch, tiny_model):
    seen, masks = [], []
    loss = trl.GRPOTrainer.compute_loss

    def watched_loss(self, model, inputs, *args, **kwargs):
        seen.append(inputs["num_items_in_batch"].item())
        masks.append(inputs["completion_mask"].sum().item())
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trl.GRPOTrainer, "compute_loss", watched_loss)
    build(tiny_model, trl.GRPOTrainer, steps_per_generation=4, max_steps=4).train()
    assert seen == [sum(masks)] * 4


def test_evaluation_is_not_buffered(tiny_model):
    trainer = build(tiny_model, trl.GRPOTrainer, per_device_eval_batch_size=4, num_generations_eval=2)
    trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert trainer._buffered_inputs is None
