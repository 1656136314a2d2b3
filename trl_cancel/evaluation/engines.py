"""What generates the answers: transformers in batches, its continuous batching, or vLLM."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..arguments import whole
from .scoring import end_tokens, generate_batch, sampling
from .settings import EvaluationSettings


@dataclass(frozen=True)
class Request:
    """
    An answer to be generated.

    Args:
        prompt_ids (`list[int]`):
            Token ids of the prompt.
        seed (`int`, *optional*):
            Seed of the sampling; `None` for a greedy answer.
    """

    prompt_ids: list[int]
    seed: int | None


@dataclass(frozen=True)
class Answer:
    """
    A generated answer.

    Args:
        ids (`list[int]`):
            Its token ids, the ending one included.
        finish_reason (`str`):
            `"stop"`, or `"length"` if it was cut off.
    """

    ids: list[int]
    finish_reason: str


class Engine(Protocol):
    """
    Something that answers.

    Attributes:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        batch_size (`int`):
            Requests at a time.
    """

    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    def generate(self, requests: Sequence[Request], settings: EvaluationSettings) -> list[Answer]:
        """Answers requests, which are either all greedy or all sampled."""
        ...


def seed_of(seed: int, problem: int, sample: int) -> int:
    """A seed for one answer: the same wherever, whenever and with whichever others it is generated."""
    digest = hashlib.sha256(f"{seed}/{problem}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


class SeededChoice(LogitsProcessor):
    """
    Chooses each row's next token by a generator of its own, so that an answer does not depend on its neighbours in the
    batch, on how many processes share the work, or on the global random state: the token at which the cumulative
    probability exceeds a uniform number. Greedy decoding then takes the chosen token.

    Args:
        seeds (`list[int]`):
            Seed of each row.
        prompt_length (`int`):
            Columns of the prompts, padding included.
        max_new_tokens (`int`):
            Longest answer.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, max_new_tokens: int):
        self.prompt_length = prompt_length
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.uniform = torch.stack([torch.rand(max_new_tokens, generator=generator) for generator in generators])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.uniform = self.uniform.to(scores.device)
        cumulative = scores.float().softmax(-1).cumsum(-1)  # (B, V)
        total = cumulative[:, -1:]
        target = self.uniform[:, input_ids.size(1) - self.prompt_length].unsqueeze(1) * total
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # it may round up to the total
        chosen = torch.searchsorted(cumulative, target, right=True)  # never a token of probability 0
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class TransformersEngine:
    """
    Plain batches with `model.generate`. Each answer has a seed of its own ([`SeededChoice`]), and the caller's random
    state is left alone.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        batch_size (`int`, *optional*, defaults to `32`):
            Answers at a time; fewer where memory does not suffice, unless the model is sharded.
        sharded (`bool`, *optional*, defaults to `False`):
            Whether the processes share one model, so that all must make equally many passes.
        unwrap (`Callable`, *optional*):
            Gives a context in which the model can generate, for models that an accelerator has wrapped.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        sharded: bool = False,
        unwrap: Callable[[], AbstractContextManager[Any]] | None = None,
    ):
        self.tokenizer, self.batch_size, self.sharded = tokenizer, whole("batch_size", batch_size, 1), sharded
        self.unwrap = unwrap or (lambda: nullcontext(model))

    def generate(self, requests: Sequence[Request], settings: EvaluationSettings) -> list[Answer]:
        with self.unwrap() as model, sampling(model, seed=0):
            return self._in_memory(model, requests, settings)

    def _in_memory(self, model: Any, requests: Sequence[Request], settings: EvaluationSettings) -> list[Answer]:
        """Half of them at a time where memory does not suffice, which changes no answer."""
        try:
            return self._answers(model, requests, settings)
        except RuntimeError as error:
            # Of a sharded model, all processes would have to.
            if self.sharded or len(requests) == 1 or not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        middle = len(requests) // 2
        halves = (requests[:middle], requests[middle:])
        return [answer for half in halves for answer in self._in_memory(model, half, settings)]

    def _answers(self, model: Any, requests: Sequence[Request], settings: EvaluationSettings) -> list[Answer]:
        prompts = [request.prompt_ids for request in requests]
        seeds = [request.seed for request in requests if request.seed is not None]
        length = settings.max_completion_length
        choice = LogitsProcessorList()
        if seeds:
            choice += warpers(settings)
            choice.append(SeededChoice(seeds, max(map(len, prompts)), length))
        ids = generate_batch(model, self.tokenizer, prompts, length, logits_processor=choice, synced_gpus=self.sharded)
        end = end_tokens(model, self.tokenizer)
        return [Answer(row, "stop" if row and row[-1] in end else "length") for row in ids]


def warpers(settings: EvaluationSettings) -> LogitsProcessorList:
    """What temperature, top-k and top-p do to logits."""
    found = LogitsProcessorList()
    if settings.temperature != 1:
        found.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        found.append(TopPLogitsWarper(settings.top_p))
    return found


class ContinuousEngine:
    """
    The continuous batching of transformers, where a finished answer gives its place to the next. It pays on a GPU, and
    where lengths differ much. It draws all answers of a batch from one seed, that of the first of them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        batch_size (`int`, *optional*, defaults to `1024`):
            Answers that are asked for at once; how many run at a time depends on the memory.
        **memory:
            Arguments of [`~transformers.ContinuousBatchingConfig`], how much memory to take for example.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1024, **memory: Any):
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        self.batch_size = whole("batch_size", batch_size, 1)

    def generate(self, requests: Sequence[Request], settings: EvaluationSettings) -> list[Answer]:
        end, seed = end_tokens(self.model, self.tokenizer), requests[0].seed
        how: dict[str, Any] = {"do_sample": False}
        if seed is not None:
            how = {"do_sample": True, "temperature": settings.temperature}
            how |= {"top_k": settings.top_k, "top_p": settings.top_p}
        config = GenerationConfig(
            **how,
            max_new_tokens=settings.max_completion_length,
            eos_token_id=end,
            pad_token_id=self.tokenizer.pad_token_id,
            repetition_penalty=1.0,
        )
        with sampling(self.model, seed or 0):
            found = self.model.generate_batch(
                [request.prompt_ids for request in requests],
                generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(seed=seed or 0, **self.memory),
            )
        outputs = list(found.values())  # in the order of the requests
        failed = next((output.error for output in outputs if output.error), None)
        if failed or len(outputs) != len(requests):
            raise RuntimeError(
                f"The continuous batching of transformers answered {len(outputs)} of {len(requests)} requests"
                f"{f' and reported {failed!r}' if failed else ''}. Use the engine 'transformers', or smaller batches."
            )
        ids = [list(output.generated_tokens) for output in outputs]
        return [Answer(row, "stop" if row and row[-1] in end else "length") for row in ids]


class VllmEngine:
    """
    vLLM, with a seed for each answer.

    Args:
        path (`str`):
            Hub id or folder of the model, or of a LoRA adapter if `base` is given.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        base (`str`, *optional*):
            Hub id or folder of the adapter's base model.
        lora_rank (`int`, *optional*, defaults to `16`):
            Rank of the adapter.
        batch_size (`int`, *optional*, defaults to `1024`):
            Answers that are asked for at once.
        revision (`str`, *optional*):
            Branch, tag or commit of what `path` names on the Hub.
        base_revision (`str`, *optional*):
            The same of the adapter's base model.
        **arguments:
            Further arguments of `vllm.LLM`: `dtype`, `tensor_parallel_size`, `gpu_memory_utilization`, ...

    Raises:
        `ImportError`: If vLLM is not installed.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        base: str | None = None,
        lora_rank: int = 16,
        batch_size: int = 1024,
        revision: str | None = None,
        base_revision: str | None = None,
        **arguments: Any,
    ):
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ImportError(f"The engine vllm needs vLLM ({error}). Run: pip install 'trl-cancel[vllm]'") from error
        self.tokenizer, self.batch_size = tokenizer, whole("batch_size", batch_size, 1)
        self.adapter = None
        arguments["revision"] = revision if base is None else base_revision
        if base is not None:
            rank = 1 << max(3, (lora_rank - 1).bit_length())  # it takes powers of two
            arguments |= {"enable_lora": True, "max_lora_rank": rank}
            self.adapter = LoRARequest("adapter", 1, _downloaded(path, revision))
        self.llm = LLM(model=base or path, **arguments)

    def generate(self, requests: Sequence[Request], settings: EvaluationSettings) -> list[Answer]:
        from vllm import SamplingParams

        def params(request: Request) -> Any:
            how = {"temperature": 0.0}
            if request.seed is not None:
                how = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
            end = [token for token in [self.tokenizer.eos_token_id] if token is not None]
            return SamplingParams(
                **how, seed=request.seed, max_tokens=settings.max_completion_length, stop_token_ids=end
            )

        outputs = self.llm.generate(
            [{"prompt_token_ids": request.prompt_ids} for request in requests],
            [params(request) for request in requests],
            lora_request=self.adapter,
            use_tqdm=False,
        )
        answers = [output.outputs[0] for output in outputs]
        return [
            Answer(list(answer.token_ids), "length" if answer.finish_reason == "length" else "stop")
            for answer in answers
        ]


def _downloaded(path: str, revision: str | None) -> str:
    """vLLM takes adapters from a folder."""
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    return snapshot_download(path, revision=revision)
