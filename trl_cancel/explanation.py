"""What a configuration does, in words: sizes, how far off policy, what is kept together, what is added and why."""

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from trl import GRPOConfig

from .batch.clipping import CLIPPED_LOSSES
from .batch.layout import BatchLayout
from .batch.protocol import Credit
from .config import CancelGRPOConfig
from .methods import METHODS
from .pipeline.token_credits import TokenCredits, makes_old_logps


WIDTH, INDENT = 100, 16


def explain(config: GRPOConfig, credits: Sequence[Credit] = (), may_wait: bool = True) -> str:
    """
    Describes a configuration.

    Args:
        config ([`CancelGRPOConfig`] or [`~trl.GRPOConfig`]):
            The configuration.
        credits (`Sequence` of [`~trl_cancel.credit.Credit`], *optional*):
            Token credits that are passed to the trainer rather than configured.
        may_wait (`bool`, *optional*, defaults to `True`):
            Whether credits may wait for the forward pass of the loss, which a subclass that overrides the way there rules
            out.

    Returns:
        `str`: A few lines, each led by its topic.
    """
    config = CancelGRPOConfig.adopt(config)
    token_credits = TokenCredits(config, credits, may_wait)
    said: dict[str, list[str]] = defaultdict(list)
    for method in METHODS:
        for topic, line in method.explain(config):
            said[topic].append(line)
    topics = {
        "Generation": list(_generation(config)),
        "Sampling": list(_sampling(config)),
        "Completions": [_completions(config)],
        "Optimizer step": [_optimizer_step(config)],
        "Off-policy": [_off_policy(config)],
        "Groups": said["Groups"],
        "Clipping": said["Clipping"] or [_clipping(config)],
        "Group weights": said["Group weights"],
        "Credit": [*said["Credit"], *_own_credit(token_credits)],
        "Loss": list(_loss(config, token_credits)),
        "Precision": list(_precision(config)),
        "Forward passes": [_passes(config, token_credits)],
        "Evaluation": list(_evaluation(config)),
        "Checkpoints": list(_checkpoints(config)),
        "Leaks": list(_leaks(config)) or ["Nothing in these settings breaks cancellation."],
    }
    return "\n".join(
        _wrap(topic if first else "", line) for topic, lines in topics.items() for first, line in _mark(lines)
    )


def _mark(lines: list[str]) -> Iterator[tuple[bool, str]]:
    return ((index == 0, line) for index, line in enumerate(lines))


def _wrap(topic: str, line: str) -> str:
    return textwrap.fill(line, WIDTH, initial_indent=topic.ljust(INDENT), subsequent_indent=" " * INDENT)


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


def _generation(config: CancelGRPOConfig) -> Iterator[str]:
    layout = config.layout
    where = "" if layout.num_processes == 1 else f", {layout.generation_batch_per_process} on each of "
    where += "" if layout.num_processes == 1 else f"{layout.num_processes} processes"
    total = layout.prompts_per_generation * layout.num_generations
    yield f"{_count(layout.prompts_per_generation, 'prompt')} x {layout.num_generations} rollouts = {total} rollouts{where}."
    wanted = [selector.wants for selector in reversed(config.selectors)]
    if not wanted:
        return
    yield (
        f"Up to {config.max_generation_rounds} rounds of as many, from fresh prompts, until there are "
        f"{' and '.join(wanted)}; then the groups that came first are kept, as far as that will do. Each round costs a "
        "generation and TRL's passes for it. See balance/*."
    )


def _sampling(config: CancelGRPOConfig) -> Iterator[str]:
    if not config.use_vllm:
        return
    if not config.vllm_importance_sampling_correction:
        yield (
            "By vLLM, whose log-probs differ from the model's, and nothing corrects for that "
            "(vllm_importance_sampling_correction=False)."
        )
        return
    yield (
        f"By vLLM, whose log-probs differ from the model's; vllm_importance_sampling_mode="
        f"{config.vllm_importance_sampling_mode!r} corrects for that. See sampling/*."
    )
    truncations = {"top_p": config.top_p < 1, "top_k": config.top_k > 0, "min_p": bool(config.min_p)}
    chosen = [f"{name}={getattr(config, name)}" for name, is_on in truncations.items() if is_on]
    if chosen:
        yield (
            f"vLLM's log-probs are those of {' and '.join(chosen)}, the model's are not, so the correction takes the "
            "truncation for a change of the policy."
        )


def _completions(config: CancelGRPOConfig) -> str:
    length = config.max_completion_length
    limit = "Of any length" if length is None else f"Cut off after {length} tokens"
    if config.mask_truncated_completions:
        fate = "one that is cut off has a reward and counts in its group, but pushes nothing"
    else:
        fate = "one that is cut off is rewarded for what is there and trained on like any other"
    return f"{limit} (max_completion_length={length}); {fate}. See completions/clipped_ratio."


def _checkpoints(config: CancelGRPOConfig) -> Iterator[str]:
    remark = within_generation(config)
    if remark is not None:
        yield remark
    intervals = {"save_steps": config.save_steps, "logging_steps": config.logging_steps}
    in_steps = config.save_strategy == config.logging_strategy == "steps" and min(intervals.values()) >= 1
    if in_steps and config.save_steps % config.logging_steps:
        chosen = " and ".join(f"{name}={every:g}" for name, every in intervals.items())
        yield (
            f"{chosen} save between two logs: the first log of a run that resumes there averages only the steps since. "
            "The weights are not affected."
        )


def within_generation(config: CancelGRPOConfig) -> str | None:
    """
    Says so if checkpoints fall within generation batches, which they do not hold.

    Args:
        config ([`CancelGRPOConfig`]):
            The configuration.
    """
    every = config.save_steps
    if config.save_strategy != "steps" or every < 1 or config.layout.ends_generation(every):
        return None
    period = config.layout.steps_until_repeat
    return (
        f"save_steps={every:g} saves within generation batches ({_updates(config.layout)} each): a run that resumes there "
        f"generates another instead of the rest, so it differs from one without interruption. Multiples of {period}, "
        f"such as save_steps={max(1, round(every / period)) * period}, avoid that."
    )


def _optimizer_step(config: CancelGRPOConfig) -> str:
    """A micro-batch can come twice within a step, and the steps can differ."""
    layout = config.layout
    size = layout.per_device_train_batch_size * layout.num_processes
    steps = [layout.micro_batches_of(step) for step in range(layout.steps_until_repeat)]
    rollouts = [len(uses) * size for uses in steps]
    times = [number for uses in steps for number in uses.values()]
    used = f", each used {_range(times, 'time')}" if max(times) > 1 else ""
    if config.tears_groups:
        prompts = f"of up to {_count(max(_most_prompts(layout, uses) for uses in steps), 'prompt')}"
    else:
        prompts = _range([number // layout.num_generations for number in rollouts], "prompt")
    micro_batches = layout.gradient_accumulation_steps * layout.num_processes
    as_many = f"as {micro_batches} x {layout.per_device_train_batch_size}"
    return f"{_range(rollouts, 'rollout')} ({prompts}){used}, {as_many}."


def _most_prompts(layout: BatchLayout, uses: Counter[tuple[int, int]]) -> int:
    """Of how many prompts the rollouts of a step can be, where they are drawn one by one from the generation batches."""
    size = layout.per_device_train_batch_size * layout.num_processes
    rollouts = Counter(batch for batch, _ in uses)
    return sum(min(number * size, layout.prompts_per_generation) for number in rollouts.values())


def _range(numbers: Sequence[int], noun: str) -> str:
    """`4 rollouts`, or `4 to 6 rollouts` if they differ."""
    low, high = min(numbers), max(numbers)
    return _count(high, noun) if low == high else f"{low} to {_count(high, noun)}"


def _updates(layout: BatchLayout) -> str:
    return _range(layout.fewest_and_most_updates, "optimizer step")


def _off_policy(config: CancelGRPOConfig) -> str:
    layout = config.layout
    if layout.is_on_policy:
        return "No: each generation batch is used for one optimizer step, and all ratios are 1."
    return (
        f"{_updates(layout)} with each generation batch (steps_per_generation={layout.steps_per_generation} x "
        f"num_iterations={layout.num_iterations} / gradient_accumulation_steps={layout.gradient_accumulation_steps}), "
        "all but the first with weights that have moved."
    )


def _clipping(config: CancelGRPOConfig) -> str:
    low, high = config.clipping.low, config.clipping.high
    level = f"{config.importance_sampling_level}-level ratio"
    if config.loss_type not in CLIPPED_LOSSES:
        return f"That of loss_type={config.loss_type!r}, {level}."
    loose = config.importance_sampling_level == "sequence" and high >= 0.1
    bound, positive = config.delta, 1 + high
    above = ""
    if bound is not None:  # two-sided clipping, as TRL takes the least of its terms
        above, positive = f" and above {max(bound, positive):g}", min(bound, positive)
    return (
        f"TRL's, by the sign of the advantage: {level}, negative rollouts are cut off below {1 - low:g}{above}, positive "
        f"ones above {positive:g}.{' That is loose for whole sequences; 0.003 to 0.02 is usual.' if loose else ''}"
    )


def _own_credit(credits: TokenCredits) -> Iterator[str]:
    if credits.own:
        yield f"Times the coefficients of {', '.join(type(credit).__name__ for credit in credits.own)}."


def _loss(config: CancelGRPOConfig, credits: TokenCredits) -> Iterator[str]:
    """What its value says, which users ask first: why it is 0."""
    if config.learning_rate == 0:
        yield "Nothing can be learned: learning_rate=0 moves no weight."
    if _first_loss_is_zero(config, credits):
        when = "at every optimizer step" if config.layout.is_on_policy else "whenever a generation batch is new"
        but = "" if config.loss_type == "grpo" else ", but for the lengths of the rollouts"
        kl = f" To this comes {config.beta:g} times the KL, which starts at 0." if config.beta else ""
        yield f"0 {when}{but}: ratios are 1 there, and the advantages of a group sum to 0.{kl}"
    yield (
        "It does not tell whether the model learns; reward does. grad_norm tells whether there is an update, "
        "frac_reward_zero_std which share of the groups has no part in it."
    )


def _first_loss_is_zero(config: CancelGRPOConfig, credits: TokenCredits) -> bool:
    """Whether pushes of one size go out with the advantages of whole groups."""
    drops_some = (
        config.mask_truncated_completions
        or config.off_policy_mask_threshold is not None
        or config.top_entropy_quantile < 1
        or (config.use_vllm and config.vllm_importance_sampling_correction)
        or config.tears_groups
        # A step that begins with the rest of one generation batch and goes on with the next is new only in part.
        or not (config.layout.is_on_policy or config.layout.updates_per_generation.is_integer())
    )
    adds_some = bool(credits) or config.entropy_coef != 0 or config.use_adaptive_entropy
    zero_mean = config.multi_objective_aggregation == "sum_then_normalize" and config.loss_type in CLIPPED_LOSSES
    return zero_mean and not drops_some and not adds_some


def _precision(config: CancelGRPOConfig) -> Iterator[str]:
    if config.fp16:
        yield (
            "float16, with gradients scaled up. A step whose gradients overflow is left out and the scale halved, so "
            "grad_norm may read inf or nan now and then; at every step, it is not training. Weights that are trained "
            "must be in float32."
        )


def _evaluation(config: CancelGRPOConfig) -> Iterator[str]:
    if config.eval_strategy == "no":
        return
    rollouts = config.per_device_eval_batch_size * config.world_size
    each = config.num_generations_eval or config.num_generations
    yield (
        f"{_count(rollouts / each, 'prompt')} x {each} rollouts a batch. Methods rest, so eval_loss says as little as the "
        "loss; eval_reward counts."
    )


def _passes(config: CancelGRPOConfig, credits: TokenCredits) -> str:
    passes = []
    if config.use_vllm and config.vllm_importance_sampling_correction:
        passes.append("one for the log-probs that correct vLLM's")
    elif makes_old_logps(config):
        passes.append("one for the old log-probs, since updates are off-policy")
    if config.beta:
        passes.append("one for the reference model's log-probs, since beta > 0")
    before = f"TRL makes {' and '.join(passes)}, without gradients, for each generation batch. " if passes else ""
    own = list(_own_passes(config, credits)) or ["This package adds none."]
    return f"{before}Each micro-batch's loss makes its own. {' '.join(own)}"


def _own_passes(config: CancelGRPOConfig, credits: TokenCredits) -> Iterator[str]:
    layout = config.layout
    needed = {"hidden states": bool(credits.of_states), "entropies": credits.need_entropies}
    what = " and ".join(name for name, is_needed in needed.items() if is_needed)
    if credits.in_loss:
        yield f"Token credit takes its {what} from that pass."
    elif credits.pass_when_scored and makes_old_logps(config):
        yield f"Token credit takes its {what} from the one for the log-probs."
    elif credits.pass_when_scored:
        yield f"This package adds one without gradients for each generation batch, for the {what} of token credit."
    if config.weigher is not None and layout.spreads_groups and not layout.is_on_policy:
        yield (
            "This package adds one without gradients for each optimizer step but the first of a generation batch, "
            "since groups are spread over micro-batches; a per_device_train_batch_size that is a multiple of "
            "num_generations saves it."
        )
    elif config.weigher is not None and layout.spreads_groups and _mask_looks_at_the_policy(config):
        yield (
            "This package adds one without gradients for each generation batch: groups are spread over micro-batches, "
            "and off_policy_mask_threshold compares the policy with what vLLM says."
        )
    if config.token_shift_steps:
        steps = config.token_shift_steps
        which = "each optimizer step" if steps == 1 else f"one optimizer step in {steps}"
        yield (
            f"This package adds two without gradients over the rollouts of {which}, before it and after it, for shift/* "
            f"(token_shift_steps={steps})."
        )


def _mask_looks_at_the_policy(config: CancelGRPOConfig) -> bool:
    """Whether the off-policy mask needs the policy's log-probs beside the sampler's, and TRL has not made them."""
    corrects = config.vllm_importance_sampling_correction
    return config.off_policy_mask_threshold is not None and config.use_vllm and not corrects


def _leaks(config: CancelGRPOConfig) -> Iterator[str]:
    for method in METHODS:
        yield from method.leaks(config)
    if config.loss_type in ("grpo", "sapo"):
        yield f"loss_type={config.loss_type!r} divides by each rollout's length, so short rollouts push harder."
    if config.mask_truncated_completions:
        yield "mask_truncated_completions=True drops members of a group after its advantages are computed."
    if config.off_policy_mask_threshold is not None:
        yield "off_policy_mask_threshold drops negative members of a group."
    is_transformed = config.weigher is not None and config.weigher.takes_correction
    if config.use_vllm and config.vllm_importance_sampling_correction and not is_transformed:
        yield f"vllm_importance_sampling_mode={config.vllm_importance_sampling_mode!r} weighs rollouts or tokens apart."
