"""
GRPO as short as it gets: a model by its name, a data set, one reward function.

    python examples/plain.py

trains Qwen3-0.6B in full on one GPU with 24 GB.
"""

import argparse

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
parser.add_argument("--dataset", default="trl-lib/DeepMath-103K", help="with the columns `prompt` and `solution`")
parser.add_argument("--max_steps", type=int, default=500)
parser.add_argument("--max_completion_length", type=int, default=2048)
parser.add_argument("--learning_rate", type=float, default=1e-6)
parser.add_argument("--output_dir", default="runs/plain")
arguments = parser.parse_args()

trainer = GRPOTrainer(
    model=arguments.model,
    reward_funcs=accuracy_reward,  # reads the column `solution`
    args=GRPOConfig(
        output_dir=arguments.output_dir,
        # One group of 8 rollouts a micro-batch, 4 groups an optimizer step. Nothing else is set, so a generation
        # batch is one optimizer step: the updates are on-policy, and no group can be torn.
        num_generations=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        # Answers that are cut off earn nothing. Watch completions/clipped_ratio; TRL's default of 512 is too short for
        # a model that thinks.
        max_completion_length=arguments.max_completion_length,
        learning_rate=arguments.learning_rate,
        max_steps=arguments.max_steps,
        save_steps=100,
        logging_steps=1,
        # bf16 is TRL's default. A T4 has none in hardware, and neither has this example without a GPU.
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        report_to="none",
    ),
    train_dataset=load_dataset(arguments.dataset, split="train"),
)
trainer.train()
trainer.save_model()
trainer.save_state()  # trainer_state.json: everything that was logged
