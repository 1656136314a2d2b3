"""
GRPO with TRL's parser and LoRA: every setting of the data, the trainer and the model in a YAML file or as a flag.

    python examples/lora.py --config examples/lora.yaml

trains an adapter of a 4-bit Qwen3-0.6B on one GPU with 16 GB.
"""

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward


def main(script: ScriptArguments, training: GRPOConfig, model: ModelConfig) -> None:
    training.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    splits = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = GRPOTrainer(
        model.model_name_or_path,
        accuracy_reward,
        args=training,
        train_dataset=splits[script.dataset_train_split],
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()  # the adapter alone
    trainer.save_state()
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config())
