"""Hidden states as they were computed, and logits of single tokens against the model's own, for heads of many kinds."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from trl_cancel.batch import states
from trl_cancel.batch.states import GIB, LMHead, StateStore, last_hidden_states

from .runs import TINY


SMALL = {
    **TINY,
    "vocab_size": 50,
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


def test_restricted_head_is_the_same_head():
    model = build("gemma2, soft cap")
    head, (hidden, _) = LMHead.of(model), states_and_logits(model)
    tokens = torch.tensor([[7, 3], [49, 3]])
    few = head.restricted_to(tokens)
    chosen = torch.tensor([49, 3, 49, 7])
    with torch.no_grad():
        assert torch.equal(few.logits(hidden, chosen), head.logits(hidden, chosen))
        expected = head.logits(hidden, chosen)
        model.lm_head.weight.mul_(2)
        assert torch.equal(few.logits(hidden, chosen), expected), "it has weights of its own"


def test_quantized_head(monkeypatch):
    """A layer that does not show its weight is measured, in several pieces."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(states, "UNIT_VECTORS", 24)
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.float32, quant_type="nf4")
    torch.nn.init.normal_(layer.weight)
    layer = layer.to("cpu")  # quantizes
    hidden, chosen = torch.randn(3, 64), torch.tensor([7, 3, 49])
    with torch.no_grad():
        full = layer(hidden)
        assert not layer.weight.is_floating_point()
        torch.testing.assert_close(
            LMHead(layer).logits(hidden, chosen), full[:, chosen], rtol=0.02, atol=0.1
        )  # bfloat16 inside


@pytest.mark.parametrize("name", ["qwen3", "gpt2, tied"])
@pytest.mark.parametrize("adapter", [False, True])
def test_last_hidden_states_are_those_that_predict_the_completion(name, adapter):
    model = build(name)
    if adapter:
        is_gpt2 = name.startswith("gpt2")
        lora = LoraConfig(target_modules=["c_attn" if is_gpt2 else "q_proj"], fan_in_fan_out=is_gpt2)
        model = get_peft_model(model, lora).eval()
    tokens, caught = torch.randint(3, 50, (4, 7)), []
    with last_hidden_states(model, 3, caught.append):
        full = [model(input_ids=part, output_hidden_states=True).hidden_states[-1] for part in tokens.split(2)]
    model(input_ids=tokens)
    assert len(caught) == 2, "not after the block"
    for found, expected in zip(caught, full, strict=True):
        assert torch.equal(found, expected[:, 3:6])
        assert not found.requires_grad


def random_batch():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 0, 5, 1])
    mask = (torch.arange(5) < lengths.unsqueeze(1)).long()
    return torch.randn(4, 5, 8, dtype=torch.bfloat16), mask


@pytest.mark.parametrize("budget", [10.0, 0.5], ids=["on the device", "offloaded"])
def test_store_gives_back_what_was_put_in(budget):
    hidden, mask = random_batch()
    size = hidden.numel() * 2
    store = StateStore(budget * size / GIB)
    store.reserve(size)
    assert (store.keeps, store.offloads) == (True, budget < 1)
    store.add(hidden[:3], mask[:3])
    store.add(hidden[3:], mask[3:])
    assert len(store) == 4
    expected = hidden * mask.unsqueeze(-1)
    for rows in (slice(0, 4), slice(1, 3), slice(3, 4)):
        assert torch.equal(store[rows], expected[rows])
    assert store[:].dtype == torch.bfloat16
    assert sum(part.numel() for part in store._states) == mask.sum() * 8, "padding takes no memory"


def test_store_recomputes_what_it_has_no_room_for():
    hidden, mask = random_batch()
    store = StateStore(0.2 * hidden.numel() * 2 / GIB)
    store.reserve(hidden.numel() * 2)
    model = build("qwen3")
    with store.filled_by(model, mask):
        model(input_ids=torch.randint(3, 50, (4, 9)))
    assert len(store) == 0
    store.recompute = lambda rows: hidden[rows]
    assert torch.equal(store[1:3], hidden[1:3])


def test_store_takes_the_passes_in_turn():
    model, (_, mask) = build("qwen3"), random_batch()
    tokens = torch.randint(3, 50, (4, 9))
    store = StateStore()
    store.add(torch.ones(1, 5, 16), torch.ones(1, 5))  # of a pass before
    with store.filled_by(model, mask), torch.no_grad():
        for part in tokens.split([3, 1]):
            model(input_ids=part)
    with torch.no_grad():
        expected = model.base_model(input_ids=tokens).last_hidden_state[:, -6:-1] * mask.unsqueeze(-1)
    torch.testing.assert_close(store[1:5], expected, rtol=1e-5, atol=1e-6)


def test_dropout_does_not_disturb_the_measurement():
    model = build("gpt2, tied").train()
    assert model.config.embd_pdrop > 0
    assert LMHead.of(model).scale == pytest.approx(1.0, abs=1e-6)
