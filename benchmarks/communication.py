"""
What this package sends between processes: `python -m benchmarks.communication`.

Two processes train on the CPU, on canned rollouts, with a copy of the model each (DDP) or with one that is sharded
(FSDP2, DeepSpeed ZeRO-3). Counted are the bytes that one process puts into collectives which a function of this package starts; not those
that TRL starts (rewards, texts, its metrics), nor gradients, nor the weights that are gathered for a forward pass. Each
is set beside the formula of `docs/scaling.md` at the sizes of the run.

Writes `benchmarks/results/communication.json` and prints the table of `docs/scaling.md`. Three minutes on two cores.
"""

import argparse
import io
import json
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.engines import DEEPSPEED, FSDP, ROOT, allow_engines_without_gpu, canned_rollouts, leave, start
from tests.runs import DEFAULTS, build
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model


RESULTS = Path(__file__).parent / "results" / "communication.json"
PACKAGE = f"{ROOT / 'trl_cancel'}/"
ENGINES = {"DDP": "two", "FSDP2": "fsdp2", "ZeRO-3": "zero3"}
STEPS = 4
WIDTH = 64  # d
LENGTH = 9  # T of the canned rollouts
METRIC = 8  # bytes: a sum and a weight

Formula = Callable[["Sizes"], float]


@dataclass(frozen=True)
class Sizes:
    """
    What the formulas speak of.

    Args:
        B (`int`):
            Rollouts of one process in a generation batch.
        b (`int`):
            Rollouts of one process in an optimizer step.
        V (`int`):
            Words.
        T, d, K, P, s (`int`):
            Tokens of the longest completion, hidden size, refinements, processes, bytes of a weight.
    """

    B: int
    b: int
    V: int
    T: int = LENGTH
    d: int = WIDTH
    K: int = 1
    P: int = 2
    s: int = 4


@dataclass(frozen=True)
class Case:
    """
    A method that is measured.

    Args:
        settings (`dict`):
            Its settings.
        text (`str`):
            Its formula as the documentation has it.
        generation, step (`Callable`):
            Bytes for each generation batch and for each optimizer step, but for metrics.
        metrics (`tuple[int, int]`):
            Metrics for each generation batch and for each optimizer step.
        engines (`tuple[str, ...]`):
            Where it is measured.
    """

    settings: dict[str, Any]
    text: str
    generation: Formula = lambda sizes: 0
    step: Formula = lambda sizes: 0
    metrics: tuple[int, int] = (0, 0)
    engines: tuple[str, ...] = ("DDP",)

    def expected(self, sizes: Sizes) -> float:
        """Bytes an optimizer step, where a generation batch makes two."""
        each = self.generation(sizes) + METRIC * self.metrics[0]
        return each / 2 + self.step(sizes) + METRIC * self.metrics[1]


ALL = {
    **DEFAULTS,
    "optim": "sgd",
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "max_steps": STEPS,
    "cancellation_metrics": False,
}
# Half of each group of eight on either process.
STRADDLING = {"num_generations": 8, "per_device_train_batch_size": 4, "steps_per_generation": 1, "num_iterations": 2}
GROUP_WEIGHTS = {"group_weights": "min", "importance_sampling_level": "sequence", "loss_type": "grpo"}
SPREAD = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
AGREE = 8  # bytes: how much memory the states may take, agreed by all processes
OF_LAMBDA = 20 + 16  # bytes: counts and sums of the credits; in how many pieces the tokens are looked at
CASES = {
    "query-preserved mini-batches": Case({}, "0"),
    "sign controls": Case({"advantage_sign": "positive"}, "0"),
    "symmetric clipping": Case({"symmetric_clip": True}, "metrics", metrics=(0, 3)),
    "cancellation metrics": Case({"cancellation_metrics": True}, "metrics", metrics=(0, 4)),
    "cancellation metrics, straddling groups": Case(
        {"cancellation_metrics": True, **STRADDLING},
        "B (16 T + 12) a generation, b (16 T + 12) a step",
        generation=lambda n: n.B * (16 * n.T + 12) + 80,  # 80 and 40: the shapes of what is gathered
        step=lambda n: n.b * (16 * n.T + 12) + 40,
        metrics=(0, 4),
    ),
    "token shifts of each step": Case({"token_shift_steps": 1}, "metrics", metrics=(0, 10)),
    "group weights": Case(GROUP_WEIGHTS, "metrics", metrics=(0, 5), engines=("DDP", "FSDP2")),
    "group weights, spread groups": Case(
        {**GROUP_WEIGHTS, **SPREAD}, "metrics, and one more pass", metrics=(0, 5), engines=("DDP", "FSDP2")
    ),
    "group weights, straddling groups": Case(
        {**GROUP_WEIGHTS, **STRADDLING}, "24 b a step", step=lambda n: 24 * n.b + 40, metrics=(0, 5)
    ),
    "NTHR": Case({"nthr": True}, "metrics", generation=lambda n: AGREE, metrics=(3, 0), engines=("DDP", "FSDP2")),
    "NTHR, sharded output layer": Case(
        {"nthr": True},
        "V d s / P a generation",
        generation=lambda n: n.V * n.d * n.s / n.P + AGREE,
        metrics=(3, 0),
        engines=("ZeRO-3",),
    ),
    "DelTA": Case(
        {"delta_credit": True},
        "8 (K + 1)(d + 4) a generation",
        generation=lambda n: 8 * (n.K + 1) * (n.d + 4) + OF_LAMBDA + AGREE,
        metrics=(4, 0),
        engines=("DDP", "FSDP2", "ZeRO-3"),
    ),
    "DelTA, top fraction": Case(
        {"delta_credit": True, "delta_top_fraction": 0.5},
        "8 (K + 1)(d + 4) + 260 a generation",
        generation=lambda n: 8 * (n.K + 1) * (n.d + 4) + 260 + OF_LAMBDA + AGREE,  # bisection: 32 counts
        metrics=(4, 0),
    ),
    "DelTA, hidden gradient, sharded output layer": Case(
        {"delta_credit": True, "delta_proxy": "hidden_gradient"},
        "8 (K + 1)(d + 4) + V d s / P a generation",
        generation=lambda n: 8 * (n.K + 1) * (n.d + 4) + n.V * n.d * n.s / n.P + OF_LAMBDA + AGREE,
        metrics=(4, 0),
        engines=("ZeRO-3",),
    ),
    "rounds of generation": Case(
        {"filter_zero_variance": True},
        "about B + 40 a round, and what TRL sends for it",
        generation=lambda n: 4 + 8 + 8 + kept_flags(n.B),
        metrics=(6, 0),
    ),
}


def kept_flags(count: int) -> int:
    """Bytes in which it is sent whether each rollout of a round is kept."""
    stream = io.BytesIO()
    pickle.Pickler(stream).dump([True] * count)
    return len(stream.getvalue())


class Collectives(TorchDispatchMode):
    """Adds up the bytes that this process puts into collectives which this package starts."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace and is_ours(sys._getframe()):
            self.sent += bytes_put_in(function._schema, args)
        return function(*args, **(kwargs or {}))


def is_ours(frame: FrameType | None) -> bool:
    """Whether a function of this package is nearer on the stack than one of TRL's or transformers'."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return True
        if "/trl/" in file or "/transformers/" in file:
            return False
        frame = frame.f_back
    return False


def bytes_put_in(schema: Any, args: Any) -> int:
    """What goes in and not what comes out of an all-reduce, an all-gather or a wait for one."""
    if "wait" in schema.name:
        return 0
    given = [
        value
        for argument, value in zip(schema.arguments, args, strict=False)
        if argument.name in ("tensors", "input", "inputs", "input_tensors", "input_tensor")
    ]
    return sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))


def measure(model: str, file: Path) -> None:
    """Runs every case in the processes that this one is among."""
    found = {}
    engine = "FSDP2" if FSDP else "ZeRO-3" if DEEPSPEED else "DDP"
    for name, case in CASES.items():
        if engine not in case.engines:
            continue
        with tempfile.TemporaryDirectory() as folder:
            settings = {**ALL, **case.settings, "output_dir": folder, "use_cpu": not DEEPSPEED}
            trainer = build(model, arguments={"rollout_func": canned_rollouts}, **settings)
            with Collectives() as collectives:
                trainer.train()
        layout = trainer.args.layout
        sizes = Sizes(
            B=layout.generation_batch_per_process,
            b=layout.per_device_train_batch_size * layout.gradient_accumulation_steps,
            V=trainer.model.config.vocab_size,
        )
        found[name] = {"bytes": collectives.sent / STEPS, "formula": case.expected(sizes), "sizes": vars(sizes)}
    if trainer.accelerator.is_main_process:
        file.write_text(json.dumps(found))


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    build_model(tokenizer, hidden_size=WIDTH, **sizes, tie_word_embeddings=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def table(results: dict[str, Any]) -> str:
    """The results as the table of the documentation."""
    lines = [
        "| method | engine | bytes of one process, but for metrics | an optimizer step, measured | by the formula |",
        "|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        for engine in case.engines:
            found = results[engine][name]
            lines.append(f"| {name} | {engine} | {case.text} | {found['bytes']:.0f} | {found['formula']:.0f} |")
    return "\n".join(lines)


def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        results: dict[str, Any] = {}
        for engine, how in ENGINES.items():
            start(how, "benchmarks.communication", "--measure", Path(folder) / "model", Path(folder) / "found.json")
            results[engine] = json.loads((Path(folder) / "found.json").read_text())
    versions = {name: version(name) for name in ("trl", "transformers", "accelerate", "torch", "deepspeed")}
    output.write_text(json.dumps({"environment": versions, **results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=Path, nargs=2, metavar=("MODEL", "FILE"), help="used by the processes")
    arguments = parser.parse_args()
    if arguments.measure:
        warnings.simplefilter("ignore")
        allow_engines_without_gpu()
        measure(str(arguments.measure[0]), arguments.measure[1])
        leave()
    else:
        main(arguments.output)
