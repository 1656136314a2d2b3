"""Answers of vLLM and of transformers to the same problems: `python evaluation.py FOLDER`."""

import json
import os
import sys
import warnings
from pathlib import Path

from tests.vllm.scenarios import ENVIRONMENT


def main(folder):
    os.environ.update(ENVIRONMENT, VLLM_CPU_KVCACHE_SPACE="1")  # GiB
    warnings.simplefilter("ignore")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import ModelConfig

    from trl_cancel.evaluation import EvaluationSettings, answer_problems, math_verify_reward
    from trl_cancel.evaluation.models import EngineSettings, load_engine, load_tokenizer
    from trl_cancel.playground.data import load_prompts
    from trl_cancel.playground.tokenizer import build_tokenizer
    from trl_cancel.playground.warm_start import build_model

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    build_model(tokenizer, **sizes, initializer_range=0.2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    lora = LoraConfig(r=12, lora_alpha=48, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")

    problems = load_prompts("test", 12)
    settings = EvaluationSettings(num_samples=2, max_completion_length=10, score_truncated=True)
    found = {}
    for engine in ("transformers", "vllm"):
        how = EngineSettings(engine, gpu_memory_utilization=0.1, max_model_length=128)
        for name in ("model", "adapter"):
            path = str(folder / name)
            loaded = load_engine(path, load_tokenizer(path), ModelConfig(dtype="float32"), how, torch.device("cpu"))
            if engine == "vllm":  # again, to see that seeds decide
                found[f"{engine} {name} again"] = answer_problems(loaded, problems, math_verify_reward, settings)
            found[f"{engine} {name}"] = answer_problems(loaded, problems, math_verify_reward, settings)
    (folder / "answers.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
