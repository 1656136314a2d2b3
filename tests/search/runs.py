"""Runs of the search, watched from outside: what was sampled, where it was trained on, and what multiplied it there."""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any
from unittest import mock

import torch
import trl
import trl.trainer.grpo_trainer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig

from trl_cancel import CancelGRPOTrainer
from trl_cancel.methods import METHODS
from trl_cancel.playground.data import load_prompts

from ..runs import build, repeatable, weights_of
from .settings import ARGUMENTS, default_of
from .standins import CREDITS, REWARDS, Engine, environment, model_folder


PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
TAG = "search_tag"
# An advantage that would be 0 is at most so large by rounding; one that is larger but below the second bound owes its
# sign to what TRL adds to standard deviations.
ROUNDING, UNCLEAR = 2e-6, 2e-3


@dataclass
class Rollout:
    """
    A sampled rollout.

    Args:
        group (`int`):
            Rollouts of one group share it.
        prompt (`tuple[int, ...]`):
            Tokens of the prompt.
        advantage (`float`):
            TRL's advantage.
        generation (`int`):
            Micro-step at which it was generated; all rounds of a generation share it.
        step (`int`):
            Optimizer steps done when it was generated.
        rewards (`tuple[float | None, ...]`):
            What the reward functions say of it.
    """

    group: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    advantage: float
    generation: int
    step: int
    rewards: tuple[float | None, ...]


@dataclass
class MicroBatch:
    """
    A micro-batch, as the loss took it. Tensors are of shape `(B, T)` unless said.

    Args:
        step (`int`):
            Optimizer steps done before.
        process (`int`):
            Index of the process.
        tags (`list[int]`):
            Its rollouts.
        mask (`torch.Tensor`):
            1 for the tokens that the loss counts.
        pushes (`torch.Tensor`):
            What really multiplies the score of each token, without the KL term and the loss's normalisation.
        logps, old_logps, sampling_logps, correction (`torch.Tensor`):
            What the loss was given, before a method changed it.
        kept_tokens (`torch.Tensor`):
            1 for the tokens of high entropy.
        coefficients (`torch.Tensor`):
            Product of what all credits said of each token, the last time that they were asked.
        spread (`bool`):
            Whether each token has an advantage of its own.
    """

    step: int
    process: int
    tags: list[int]
    mask: torch.Tensor
    pushes: torch.Tensor
    logps: torch.Tensor
    old_logps: torch.Tensor
    sampling_logps: torch.Tensor
    correction: torch.Tensor
    kept_tokens: torch.Tensor
    coefficients: torch.Tensor
    spread: bool


@dataclass
class CreditCall:
    """What a credit said: its name, and for each rollout its tag and the coefficients of its tokens."""

    name: str
    rows: list[tuple[int, list[float]]]


@dataclass
class Watched:
    """A run as seen from outside, gathered over processes."""

    rollouts: dict[int, Rollout] = field(default_factory=dict)
    micro_batches: list[MicroBatch] = field(default_factory=list)
    credits: list[CreditCall] = field(default_factory=list)

    @cached_property
    def unclear(self) -> set[int]:
        """Groups with an advantage that is neither 0 nor worth a sign."""
        return {
            rollout.group
            for rollout in self.rollouts.values()
            if ROUNDING < abs(rollout.advantage) < UNCLEAR and rollout.group not in self.idle
        }

    @cached_property
    def idle(self) -> set[int]:
        """Groups whose rewards are all equal, so that their advantages are but rounding."""
        rewards = defaultdict(set)
        for rollout in self.rollouts.values():
            rewards[rollout.group].add(rollout.rewards)
        return {group for group, found in rewards.items() if len(found) == 1}


@dataclass
class Run:
    """
    A run's end.

    Args:
        weights (`dict`):
            Weights after training.
        logs (`list[dict]`):
            Logs, without what no two runs share.
        error (`Exception`, *optional*):
            What ended it.
        began (`bool`):
            Whether training had begun when it ended.
        watched ([`Watched`], *optional*):
            What was seen of it.
        explanation (`str`):
            What `explain()` said.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)
    error: Exception | None = None
    began: bool = False
    watched: Watched | None = None
    explanation: str = ""


def train(settings: dict[str, Any], trainer: type = CancelGRPOTrainer, watch: bool = False) -> Run:
    """
    Trains with drawn settings.

    Args:
        settings (`dict`):
            Settings, as `draw` returns them.
        trainer (`type`, *optional*, defaults to [`CancelGRPOTrainer`]):
            Class of the trainer.
        watch (`bool`, *optional*, defaults to `False`):
            Whether to watch what reaches the loss.
    """
    run, folder, watcher = Run(), tempfile.mkdtemp(), Watcher(value_of(settings, "rewards"))
    AcceleratorState._reset_state(reset_partial_state=PROCESSES == 1)
    GradientState._reset_state()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(mock.patch.object(trl.trainer.grpo_trainer, "VLLMGeneration", Engine))
            if watch:
                stack.enter_context(watcher)
            built = _build(settings, trainer, folder)
            run.explanation = built.explain() if hasattr(built, "explain") else ""
            run.began = True
            built.train()
        run.weights = weights_of(built.model)
        run.logs = [repeatable(entry) for entry in built.state.log_history]
        run.watched = watcher.gathered() if watch else None
    except Exception as error:
        if PROCESSES > 1 and run.began:  # the others wait for this process in vain
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        run.error = error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return run


def _build(settings: dict[str, Any], trainer: type, folder: str) -> Any:
    chosen = {name: settings.get(name, default) for name, default in ARGUMENTS.items()}
    arguments = {
        "reward_funcs": [REWARDS[name] for name in chosen["rewards"]],
        "train_dataset": _prompts(chosen["prompts"], chosen["conversational"]),
    }
    if chosen["streamed"]:
        arguments["train_dataset"] = arguments["train_dataset"].to_iterable_dataset()
    if settings.get("eval_strategy", "no") != "no":
        arguments["eval_dataset"] = _prompts(64, chosen["conversational"]).select(range(4))
    if chosen["lora"]:
        arguments["peft_config"] = LoraConfig(r=2, target_modules="all-linear")
    if chosen["environment"]:
        arguments["rollout_func"] = environment
    if trainer is not trl.GRPOTrainer:
        arguments["credits"] = [CREDITS[name]() for name in chosen["credits"]]
    config = {name: value for name, value in settings.items() if name not in ARGUMENTS}
    if PROCESSES > 1:
        config["ddp_timeout"] = 60
    return build(model_folder(chosen["model"]), trainer, arguments=arguments, output_dir=folder, **config)


@cache
def _prompts(count: int, conversational: bool) -> Dataset:
    rows = {str(row["prompt"]): row for row in load_prompts("train", 2 * count)}  # no prompt twice
    prompts = [row["prompt"] for row in rows.values()][:count]
    assert len(prompts) == count
    return Dataset.from_dict({"prompt": prompts if conversational else [prompt[0]["content"] for prompt in prompts]})


class Watcher(contextlib.ExitStack):
    """While it is entered, follows the rollouts of TRL's trainers and of their subclasses."""

    def __init__(self, rewards: list[str]) -> None:
        super().__init__()
        self.seen = Watched()
        self._rewards = [REWARDS[name] for name in rewards]
        self._next_tag = 0
        self._logps: torch.Tensor | None = None
        self._kept_tokens: torch.Tensor | None = None
        self._own_tags: dict[Any, list[int]] = defaultdict(list)
        self._said: dict[int, dict[str, list[float]]] = defaultdict(dict)  # by rollout and credit

    def __enter__(self) -> "Watcher":
        for name in ("_generate_and_score_completions", "_compute_loss", "_get_per_token_logps_and_entropies"):
            self._wrap(trl.GRPOTrainer, name)
        self._wrap(trl.GRPOTrainer, "get_high_entropy_mask")
        for credit in (*_of_methods(), *CREDITS.values()):
            self._wrap(credit, "coefficients")
        return super().__enter__()

    def _wrap(self, owner: type, name: str) -> None:
        original, watch = getattr(owner, name), getattr(self, name.removeprefix("_"))
        replacement = lambda watched, *args, **kwargs: watch(original, watched, *args, **kwargs)  # noqa: E731
        self.enter_context(mock.patch.object(owner, name, replacement))

    def generate_and_score_completions(self, original, trainer, inputs):
        batch = original(trainer, inputs)
        if not trainer.model.training:
            return batch
        processes, process = trainer.accelerator.num_processes, trainer.accelerator.process_index
        rows, first = len(inputs), self._next_tag + process * len(inputs)
        self._next_tag += rows * processes
        batch[TAG] = torch.arange(first, first + rows)
        keys = zip(_tokens(batch, "prompt"), _completions(batch, trainer), batch["advantages"].tolist(), strict=True)
        for tag, (prompt, completion, advantage) in enumerate(keys, start=first):
            group, step = tag // trainer.num_generations, trainer.state.global_step
            rewards = tuple(reward([completion])[0] for reward in self._rewards)
            self.seen.rollouts[tag] = Rollout(group, prompt, completion, advantage, trainer._step, step, rewards)
            self._own_tags[prompt, completion].append(tag)
        return batch

    def get_per_token_logps_and_entropies(self, original, trainer, *args, **kwargs):
        found = original(trainer, *args, **kwargs)
        if torch.is_grad_enabled():
            self._logps = found[0]
        return found

    def get_high_entropy_mask(self, original, trainer, *args, **kwargs):
        self._kept_tokens = original(trainer, *args, **kwargs)
        return self._kept_tokens

    def compute_loss(self, original, trainer, model, inputs):
        if not trainer.model.training:
            return original(trainer, model, inputs)
        before = dict(inputs)
        self._logps = self._kept_tokens = None
        loss = original(trainer, model, inputs)
        logps = self._logps
        assert logps is not None
        (gradient,) = torch.autograd.grad(loss, logps, retain_graph=True)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        share = _share_of_loss(trainer, inputs, mask.float())
        pushes = (_kl_gradient(trainer, inputs, logps.detach(), mask, share) - gradient) / share.clamp(min=1e-30)
        old = before.get("old_per_token_logps")
        old = logps.detach() if old is None else old
        correction = before.get("importance_sampling_ratio")
        self.seen.micro_batches.append(
            MicroBatch(
                step=trainer.state.global_step,
                process=trainer.accelerator.process_index,
                tags=inputs[TAG].tolist(),
                mask=mask.bool(),
                pushes=torch.where(mask.bool(), pushes, 0.0),
                logps=logps.detach(),
                old_logps=old,
                sampling_logps=before.get("sampling_per_token_logps", old),
                correction=(torch.ones_like(old[:, :1]) if correction is None else correction).expand_as(old).clone(),
                kept_tokens=torch.ones_like(old) if self._kept_tokens is None else self._kept_tokens.float(),
                coefficients=self._coefficients_of(inputs[TAG].tolist(), old.size(1)),
                spread=inputs["advantages"].dim() == 2 and inputs["advantages"].size(1) > 1,
            )
        )
        return loss

    def coefficients(self, original, credit, rollouts):
        found = original(credit, rollouts)
        coefficients = found.detach().expand_as(rollouts.mask)
        batch = {"prompt_ids": rollouts.prompt_ids, "prompt_mask": rollouts.prompt_mask}
        completions = [tuple(ids) for ids in rollouts.completion_ids.tolist()]
        keys = list(zip(_tokens(batch, "prompt"), completions, rollouts.advantages.tolist(), strict=True))
        counts, rows = defaultdict(int), []
        for key, row in zip(keys, coefficients.tolist(), strict=True):
            # Equal rollouts stand in the order in which they were sampled; the latest are meant, unless a round of the
            # same generation has sampled the same and has been kept in their place.
            matching = self._matching(*key)
            meant, others = matching[-keys.count(key) :], matching[: -keys.count(key)]
            rows.append((meant[counts[key]], row))
            counts[key] += 1
            for tag in others:
                if self.seen.rollouts[tag].generation == self.seen.rollouts[meant[-1]].generation:
                    self._said[tag].setdefault(type(credit).__name__, row)
        self.seen.credits.append(CreditCall(type(credit).__name__, rows))
        for tag, row in rows:
            self._said[tag][type(credit).__name__] = row
        return found

    def _coefficients_of(self, tags: list[int], length: int) -> torch.Tensor:
        product = torch.ones(len(tags), length)
        for place, tag in enumerate(tags):
            for row in self._said[tag].values():
                product[place] *= torch.tensor(row[:length])
        return product

    def _matching(self, prompt: tuple[int, ...], completion: tuple[int, ...], advantage: float) -> list[int]:
        """Tags of such rollouts; the completion may be padded further than it was."""
        for end in range(len(completion), 0, -1):
            if tags := self._own_tags.get((prompt, completion[:end])):
                exact = [tag for tag in tags if abs(self.seen.rollouts[tag].advantage - advantage) < UNCLEAR]
                return exact or tags  # advantages that are rounding are set to 0
        raise AssertionError("a credit was given a rollout that was not sampled")

    def gathered(self) -> Watched:
        if PROCESSES == 1:
            return self.seen
        parts = gather_object([self.seen])
        return Watched(
            {tag: rollout for part in parts for tag, rollout in part.rollouts.items()},
            [micro_batch for part in parts for micro_batch in part.micro_batches],
            [call for part in parts for call in part.credits],
        )


def _tokens(batch: dict[str, Any], part: str) -> list[tuple[int, ...]]:
    rows = zip(batch[f"{part}_ids"], batch[f"{part}_mask"].bool(), strict=True)
    return [tuple(ids[mask].tolist()) for ids, mask in rows]


def _completions(batch: dict[str, Any], trainer: Any) -> list[tuple[int, ...]]:
    """Tokens of the completions without padding, of those too that are masked for being truncated."""
    pad = trainer._tokenizer.pad_token_id
    rows = [list(ids) for ids in batch["completion_ids"].tolist()]
    for row, counts in zip(rows, batch["completion_mask"].tolist(), strict=True):
        while row and row[-1] == pad and not counts[len(row) - 1]:
            row.pop()
    return [tuple(row) for row in rows]


def _share_of_loss(trainer: Any, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """What the loss multiplies each token's term with, for TRL's `loss_type`."""
    rows, parts = len(mask), trainer.current_gradient_accumulation_steps
    kind = trainer.loss_type
    if kind in ("grpo", "sapo"):
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / rows / parts
    if kind == "bnpo":
        return mask / mask.sum().clamp(min=1) / parts
    if kind == "dr_grpo":
        return mask / (rows * trainer.max_completion_length * parts)
    if kind == "luspo":
        return mask / rows / parts
    tokens = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    return mask / (tokens * parts / trainer.args.steps_per_generation)


def _kl_gradient(
    trainer: Any, inputs: dict[str, Any], logps: torch.Tensor, mask: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """Gradient of the KL term by the log-probs."""
    if not trainer.beta:
        return torch.zeros_like(logps)
    leaf = logps.clone().requires_grad_()
    difference = inputs["ref_per_token_logps"] - leaf
    kl = difference.exp() - difference - 1
    if trainer.args.use_bias_correction_kl:
        old = inputs.get("old_per_token_logps")
        log_ratio = leaf - (logps if old is None else old)
        if trainer.importance_sampling_level == "sequence":
            log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        kl = kl * log_ratio.exp()
    return torch.autograd.grad((trainer.beta * share * kl).sum(), leaf)[0]


def value_of(settings: dict[str, Any], name: str) -> Any:
    """A setting, or its default."""
    return settings.get(name, default_of(name))


def _of_methods() -> list[type]:
    """The classes of credit that stand in the files of the methods."""
    files = [vars(sys.modules[type(method).__module__]).values() for method in METHODS]
    return [cls for names in files for cls in names if isinstance(cls, type) and "coefficients" in vars(cls)]
