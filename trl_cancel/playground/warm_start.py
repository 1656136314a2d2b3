"""
Trains a playground's model from scratch to imitate the noisy teacher: `python -m trl_cancel.playground.warm_start`.

The package ships the results, so nobody needs to run this; it is here so that anybody can.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from . import CHECKPOINTS, NAME
from .data import load_demonstrations
from .tasks import task_named
from .tokenizer import build_tokenizer


BATCH_SIZE = 32
# What `from_pretrained` reads; the rest of what the trainer saves is left behind.
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


# 400 thousand parameters.
ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


def build_model(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Qwen3ForCausalLM:
    """
    A randomly initialised Qwen3.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer it is for.
        **changes:
            Entries of its configuration that differ from the playground's.
    """
    return Qwen3ForCausalLM(
        Qwen3Config(
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **{"vocab_size": len(tokenizer), **ARCHITECTURE, **changes},
        )
    )


def warm_start(output: Path, seed: int = 0, steps: int | None = None, task: str = NAME, use_cpu: bool = True) -> None:
    """
    Trains and saves the model and its tokenizer.

    Args:
        output (`Path`):
            Folder to save to.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights, the problems and the slips.
        steps (`int`, *optional*):
            Optimizer steps of 32 responses each; as many as the task says if not given.
        task (`str`, *optional*, defaults to `"playground"`):
            Name of the task.
        use_cpu (`bool`, *optional*, defaults to `True`):
            Whether a GPU is left alone.

    Raises:
        `ValueError`: If the task is unknown.
    """
    chosen = task_named(task)
    steps = steps or chosen.warm_start_steps
    set_seed(seed)
    tokenizer = build_tokenizer(chosen.words)
    model = build_model(tokenizer, **chosen.architecture)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=BATCH_SIZE,
                max_steps=steps,
                learning_rate=chosen.warm_start_learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=30,
                weight_decay=0.01,
                adam_beta2=0.95,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=use_cpu,
                completion_only_loss=True,
                save_strategy="no",
                report_to=[],
                logging_steps=100,
                seed=seed,
            ),
            train_dataset=load_demonstrations(steps * BATCH_SIZE, seed, task),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model(folder)
        tokenizer.save_pretrained(folder)
        output.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(Path(folder) / name, output / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=NAME, choices=CHECKPOINTS, help="task (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder to save to (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: those of the task)")
    arguments = parser.parse_args()
    output = arguments.output or CHECKPOINTS[arguments.task]
    warm_start(output, arguments.seed, arguments.steps, arguments.task)
    print(f"Saved to {output}.")


if __name__ == "__main__":
    main()
