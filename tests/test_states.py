"""Logits of single tokens against the model's own, for heads of many kinds."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from trl_cancel.states import LMHead


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {
    "qwen3": SMALL,
    "qwen3, tied": {**SMALL, "tie_word_embeddings": True},
    "llama": SMALL,
    "gemma2, soft cap": {**SMALL, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "cohere, scaled": {**SMALL, "logit_scale": 0.0625},
    "granite, divided": {**SMALL, "logits_scaling": 8.0},
    "phi, with a bias": {**SMALL, "num_key_value_heads": 2},
    "gpt2, tied": GPT2,
}


def build(name):
    torch.manual_seed(0)
    kind = name.split(",")[0]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ARCHITECTURES[name]))
    for parameter in model.parameters():  # also what starts at zero, such as biases
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def states_and_logits(model):
    tokens = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    handle.remove()
    return seen[0], logits


def assert_right(head, model):
    hidden, logits = states_and_logits(model)
    chosen = torch.tensor([7, 3, 49, 3])
    with torch.no_grad():
        torch.testing.assert_close(head.logits(hidden, chosen), logits[..., chosen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    model = build(name)
    assert_right(LMHead.of(model), model)


@pytest.mark.parametrize("name", ["gemma2, soft cap", "cohere, scaled", "granite, divided"])
def test_the_layer_alone_would_be_wrong(name):
    """What the model does to its logits is there to be missed."""
    model = build(name)
    hidden, logits = states_and_logits(model)
    with torch.no_grad():
        assert (model.get_output_embeddings()(hidden) - logits).abs().max() > 0.1


@pytest.mark.parametrize("name", ["qwen3", "gemma2, soft cap"])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    ],
    ids=["elsewhere", "on the head", "whole head", "dora"],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
def test_adapters(name, lora):
    model = build(name)
    if name.startswith("gemma2"):
        model.config.tie_word_embeddings = False
    model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **lora)).eval()
    head = LMHead.of(model)
    for parameter in model.parameters():  # as if trained since
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    assert_right(head, model)
    with model.disable_adapter():
        assert_right(head, model)


def test_follows_the_training():
    model = build("llama")
    head = LMHead.of(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    assert_right(head, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3", "gemma2, soft cap", "granite, divided"])
def test_half_precision(name, dtype):
    model = build(name).to(dtype)
    head, (hidden, logits) = LMHead.of(model), states_and_logits(model)
    with torch.no_grad():
        found = head.logits(hidden, torch.arange(50))
    torch.testing.assert_close(found.float(), logits.float(), rtol=0.05, atol=0.05)


def test_training_mode_is_left_alone():
    model = build("qwen3").train()
    LMHead.of(model)
    assert model.training


def test_other_functions_of_the_states_are_refused():
    model = build("qwen3")
    forward = type(model).forward

    def odd(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits**2
        return output

    model.forward = odd.__get__(model)
    with pytest.raises(ValueError, match="logits of Qwen3ForCausalLM are not a scaled and capped linear function"):
        LMHead.of(model)
