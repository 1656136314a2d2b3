"""How TRL orders, scores, shuffles and splits rollouts, and in which order it calls its hooks."""

import asyncio
from typing import Any

import torch
import trl
from peft import LoraConfig
from trl import GRPOTrainer

from ..evaluation import rewards_of
from ..upstream.names import ATTRIBUTES
from ..upstream.trl import split_tensor_dict
from .check import Checks, Patches, holds
from .runs import OFF, build


CHECKS = Checks()
FORWARD = "_get_per_token_logps_and_entropies"


@CHECKS.assume("a trainer has the private attributes that are read or written")
def has_attributes(model: str) -> None:
    async def awaited(completions: Any, **_: Any) -> list[float | None]:
        return [0.0] * len(completions)

    # With an event loop, which other trainers lack.
    trainer = build(model, GRPOTrainer, arguments={"reward_funcs": awaited})
    lacking = [name for name in ATTRIBUTES if not hasattr(trainer, name)]
    holds(not lacking, f"it has no {', '.join(lacking)}")


@CHECKS.assume("the hooks are called one after the other: batches, generation, rewards, old log-probs, loss, its pass")
def order_of_hooks(model: str) -> None:
    called: list[str] = []
    of_batches = ("_prepare_inputs", "_generate_and_score_completions", "_calculate_rewards")
    hooks = (*of_batches, FORWARD, "compute_loss", "_compute_loss")
    with Patches() as patches:
        for hook in hooks:
            patches.setattr(GRPOTrainer, hook, _noting(getattr(GRPOTrainer, hook), hook, called))
        build(model, GRPOTrainer, steps_per_generation=2, max_steps=1).train()
    generation = ["_prepare_inputs", "_generate_and_score_completions", FORWARD, "_calculate_rewards"]
    loss = ["compute_loss", "_compute_loss", FORWARD]
    scored_first = [generation[0], generation[1], generation[3], generation[2]]
    holds(called in (generation + loss, scored_first + loss), f"they were called as {', '.join(called)}")


def _noting(method: Any, name: str, called: list[str]) -> Any:
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return method(self, *args, **kwargs)

    return noted


@CHECKS.assume("reward functions get what evaluation gives them, async ones in the same event loop")
def what_rewards_are_called_with(model: str) -> None:
    seen: dict[str, Any] = {}

    async def watch(completions: Any, **columns: Any) -> list[float | None]:
        seen.update(columns, loop=asyncio.get_running_loop())
        return [0.0] * len(completions)

    trainer = build(model, GRPOTrainer, arguments={"reward_funcs": watch}, max_steps=1)
    trainer.train()
    trained = dict(seen)
    seen.clear()
    rewards_of(watch, trainer.processing_class, [trainer.train_dataset[0]], [[1]], trainer)
    holds(seen.keys() == trained.keys(), f"{', '.join(sorted(seen.keys() ^ trained.keys()))} in one of them only")
    holds(seen["trainer_state"] is trained["trainer_state"] is trainer.state, "trainer_state is another")
    holds(seen["loop"] is trained["loop"] is trainer.async_loop, "async_loop is another")


@CHECKS.assume("the sampler repeats each prompt G times in a row, once for each micro-step that uses it")
def sampler(model: str) -> None:
    order = list(build(model, GRPOTrainer, steps_per_generation=2, num_iterations=2)._get_train_sampler())
    first, again = order[:8], order[8:16]
    holds(first == [first[0]] * 4 + [first[4]] * 4 and first[0] != first[4], f"its order begins with {first}")
    holds(
        [order[i : i + 8] for i in range(0, 32, 8)] == [first] * 4 and again == first, f"it goes on with {order[8:32]}"
    )


def micro_batches(model: str, trainer: type = GRPOTrainer, **settings: Any) -> list[dict[str, Any]]:
    """The micro-batches that reach TRL's loss, in order, with the numbers of their rollouts in three forms."""
    seen: list[dict[str, Any]] = []
    generate, loss = GRPOTrainer._generate_and_score_completions, GRPOTrainer.compute_loss

    def generate_tagged(self: Any, inputs: Any) -> Any:
        batch: dict[str, Any] = generate(self, inputs)
        rows = batch["advantages"].size(0)
        batch["tag"] = torch.arange(rows)
        batch["tag_rows"] = torch.arange(rows).unsqueeze(1).expand_as(batch["completion_ids"]).clone()
        batch["names"] = [f"rollout {i}" for i in range(rows)]
        return batch

    def watched_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({name: inputs[name] for name in ("tag", "tag_rows", "names", "advantages")})
        return loss(self, model, inputs, *args, **kwargs)

    with Patches() as patches:
        patches.setattr(GRPOTrainer, "_generate_and_score_completions", generate_tagged)
        patches.setattr(GRPOTrainer, "compute_loss", watched_loss)
        build(model, trainer, **settings).train()
    return seen


@CHECKS.assume("single rollouts are shuffled and split, and a further iteration uses the same micro-batches")
def shuffled_and_split(model: str) -> None:
    seen = micro_batches(model, steps_per_generation=4, num_iterations=2, max_steps=8)
    tags = [batch["tag"].tolist() for batch in seen]
    order = [tag for batch in tags[:4] for tag in batch]
    holds(sorted(order) == list(range(16)), f"the rollouts that are trained on are {order}")
    holds(order != list(range(16)), "they are not shuffled")
    holds(tags[:4] == tags[4:], f"the second iteration uses {tags[4:]} after {tags[:4]}")
    holds(any(len({tag // 4 for tag in batch}) > 1 for batch in tags), "groups are not torn")


@CHECKS.assume("whatever is added to a batch by rows, tensors and lists, is shuffled and split with it")
def extra_rows(model: str) -> None:
    for batch in micro_batches(model, steps_per_generation=4, max_steps=4):
        holds((batch["tag_rows"] == batch["tag"].unsqueeze(1)).all(), "rows of a tensor are in another order")
        holds(batch["names"] == [f"rollout {i}" for i in batch["tag"].tolist()], "a list is in another order")


@CHECKS.assume("splitting keeps scalars and None, and cuts tensors and lists")
def splitting(model: str) -> None:
    batch: Any = {"rows": torch.arange(4), "scalar": torch.tensor(7), "none": None, "list": [*"abcd"]}
    parts: Any = split_tensor_dict(batch, 2)
    holds([part["rows"].tolist() for part in parts] == [[0, 1], [2, 3]], "rows are cut otherwise")
    holds([part["scalar"].item() for part in parts] == [7, 7], "a scalar is not kept")
    holds([part["none"] for part in parts] == [None, None], "None is not kept")
    holds([part["list"] for part in parts] == [["a", "b"], ["c", "d"]], "lists are cut otherwise")


@CHECKS.assume(
    "old log-probs are computed exactly where a generation batch is not used up in one optimizer step",
    # gradient_accumulation_steps, steps_per_generation, num_iterations, whether they are
    over=[
        *((1, 1, 1, False), (2, 2, 1, False), (4, 2, 1, False), (4, 2, 2, False)),
        *((2, 2, 2, True), (2, 4, 1, True), (2, 3, 1, True)),
    ],
)
def when_old_logps_are_computed(model: str, sizes: tuple[int, int, int, bool]) -> None:
    accumulation, steps, iterations, computed = sizes
    seen, loss = [], GRPOTrainer.compute_loss

    def watched_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append("old_per_token_logps" in inputs)
        return loss(self, model, inputs, *args, **kwargs)

    with Patches() as patches:
        patches.setattr(GRPOTrainer, "compute_loss", watched_loss)
        trainer = build(
            model,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=steps,
            num_iterations=iterations,
            **OFF,
            max_steps=1,
        )
        trainer.train()
    holds(set(seen) == {computed}, f"the loss gets them: {seen}")
    holds(trainer.args.layout.is_on_policy is not computed, "the layout says otherwise")


@CHECKS.assume(
    "old log-probs are the very tensor of the first forward pass over the whole generation batch", over=[0.0, 0.1]
)
def old_logps_are_the_first_pass(model: str, beta: float) -> None:
    calls: list[Any] = []
    batches: list[Any] = []
    forward, generate = getattr(GRPOTrainer, FORWARD), GRPOTrainer._generate_and_score_completions

    def watched_forward(self: Any, model: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((len(input_ids), forward(self, model, input_ids, *args, **kwargs)))
        return calls[-1][1]

    def watched_generate(self: Any, inputs: Any) -> Any:
        calls.clear()
        batches.append((generate(self, inputs), list(calls)))
        return batches[-1][0]

    with Patches() as patches:
        patches.setattr(GRPOTrainer, FORWARD, watched_forward)
        patches.setattr(GRPOTrainer, "_generate_and_score_completions", watched_generate)
        build(model, GRPOTrainer, steps_per_generation=4, max_steps=5, beta=beta).train()
    holds(len(batches) == 2, f"{len(batches)} generation batches in 5 steps")
    for batch, made in batches:
        holds(len(made) == (2 if beta else 1), f"{len(made)} passes with beta={beta}")
        holds(made[0][0] == 16, f"the first pass has {made[0][0]} of 16 rollouts")
        holds(len(made[0][1]) == 3, f"it returns {len(made[0][1])} values, not 3")
        holds(batch["old_per_token_logps"] is made[0][1][0], "the batch holds another tensor")


@CHECKS.assume(
    "a forward pass runs the backbone in pieces, in the order of the rows, with the states of the completion at the end",
    over=["", "LoRA"],
)
def backbone_in_pieces(model: str, adapter: str) -> None:
    arguments = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if adapter else {}
    trainer = build(model, GRPOTrainer, arguments=arguments)
    base = trainer.model.get_base_model() if adapter else trainer.model
    ids, seen = torch.randint(3, 30, (6, 9)), []
    handle = base.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    with torch.no_grad():
        made = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 4, batch_size=4)
        handle.remove()
        full = base(input_ids=ids, output_hidden_states=True)
    holds(len(made) == 3, f"it returns {len(made)} values, not 3")
    holds([len(states) for states in seen] == [4, 2], f"pieces of {[len(states) for states in seen]} rows")
    _close(torch.cat(seen)[:, -5:-1], full.hidden_states[-1][:, -5:-1], "other hidden states")
    expected = full.logits[:, -5:-1].log_softmax(-1).gather(-1, ids[:, -4:].unsqueeze(-1)).squeeze(-1)
    _close(made[0], expected, "other log-probs")


def _close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    holds(torch.allclose(found, expected, rtol=1e-4, atol=1e-5), f"{what}, up to {(found - expected).abs().max():.2g}")


@CHECKS.assume("num_items_in_batch counts the tokens of the generation batch")
def num_items(model: str) -> None:
    seen, masks, loss = [], [], GRPOTrainer.compute_loss

    def watched_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["num_items_in_batch"].item())
        masks.append(inputs["completion_mask"].sum().item())
        return loss(self, model, inputs, *args, **kwargs)

    with Patches() as patches:
        patches.setattr(GRPOTrainer, "compute_loss", watched_loss)
        build(model, GRPOTrainer, steps_per_generation=4, max_steps=4).train()
    holds(seen == [sum(masks)] * 4, f"it is {seen}, tokens are {masks}")


@CHECKS.assume("evaluation is not buffered")
def evaluation(model: str) -> None:
    trainer = build(model, GRPOTrainer, per_device_eval_batch_size=4, num_generations_eval=2)
    trainer.evaluate(trainer.train_dataset.select(range(4)))
    holds(trainer._buffered_inputs is None, "its batch is kept")


@CHECKS.assume("TRL's package is where its trainer is")
def of_trl(model: str) -> None:
    holds(
        trl.GRPOTrainer is GRPOTrainer, f"trl.GRPOTrainer is {trl.GRPOTrainer.__module__}.{trl.GRPOTrainer.__name__}"
    )
