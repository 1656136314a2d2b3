"""
GRPO on conversations with several rewards: a system prompt, a format, the right answer and right work on the way,
with columns of the data set that the rewards read, and an evaluation during the training.

    python examples/conversational.py

trains Qwen3-0.6B in full on GSM8K, on one GPU with 24 GB.
"""

import argparse
import re

import torch
from datasets import Dataset, load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward


SYSTEM_PROMPT = "Work out the answer one line a step, then write it as \\boxed{number}."


def boxed_format_reward(completions, **kwargs):
    """1 for a response that puts a number into its only box, else 0."""
    boxes = (re.findall(r"\\boxed\{([^{}]*)\}", completion[0]["content"]) for completion in completions)
    return [float(len(box) == 1 and box[0].strip().lstrip("-").isdigit()) for box in boxes]


def work_reward(completions, results, log_metric, **kwargs):
    """The share of the right intermediate results that the response comes by; `None` where there are none."""
    rewards = []
    for completion, right in zip(completions, results, strict=True):
        found = set(_results(completion[0]["content"]))
        rewards.append(sum(result in found for result in right) / len(right) if right else None)
    log_metric("problems_without_work", rewards.count(None) / len(rewards))
    return rewards


def _results(work):
    return re.findall(r"=\s*\$?(-?\d+(?:\.\d+)?)", work)


def as_conversations(problems: Dataset, system_prompt: str) -> Dataset:
    """GSM8K's questions as conversations, with the columns that the rewards read."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def prepare(row):
        work, answer = row["answer"].split("####")
        return {
            "prompt": [*system, {"role": "user", "content": row["question"]}],
            "solution": f"\\boxed{{{answer.strip().replace(',', '')}}}",  # for accuracy_reward
            "results": _results(work),  # for work_reward
        }

    return problems.map(prepare, remove_columns=problems.column_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--dataset", default="openai/gsm8k", help="with the columns `question` and `answer`")
    parser.add_argument("--dataset_config", default="main", help="'' for none")
    parser.add_argument("--system_prompt", default=SYSTEM_PROMPT, help="none if empty")
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--eval_steps", type=int, default=50)
    parser.add_argument("--eval_problems", type=int, default=128)
    parser.add_argument("--max_completion_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--output_dir", default="runs/conversational")
    arguments = parser.parse_args()

    splits = load_dataset(arguments.dataset, arguments.dataset_config or None)
    test = splits["test"].select(range(min(arguments.eval_problems, len(splits["test"]))))
    trainer = GRPOTrainer(
        model=arguments.model,
        reward_funcs=[accuracy_reward, boxed_format_reward, work_reward],
        args=GRPOConfig(
            output_dir=arguments.output_dir,
            # The answer counts most. The small rewards tell rollouts apart while none is right yet.
            reward_weights=[1.0, 0.2, 0.3],
            # 4 prompts x 8 rollouts a generation, all in one optimizer step, so groups are whole; each generation is
            # used twice, so the second update is off-policy.
            num_generations=8,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            num_iterations=2,
            # Evaluation batches must hold whole groups too: 32 is a multiple of 2.
            eval_strategy="steps",
            eval_steps=arguments.eval_steps,
            per_device_eval_batch_size=32,
            num_generations_eval=2,
            # Qwen3 would think for thousands of tokens first, which GSM8K does not need.
            chat_template_kwargs={"enable_thinking": False},
            max_completion_length=arguments.max_completion_length,
            learning_rate=arguments.learning_rate,
            max_steps=arguments.max_steps,
            save_steps=100,  # a multiple of num_iterations, so that no checkpoint splits a generation
            logging_steps=1,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
            report_to="none",
        ),
        train_dataset=as_conversations(splits["train"], arguments.system_prompt),
        eval_dataset=as_conversations(test, arguments.system_prompt),
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
