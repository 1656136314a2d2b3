"""The estimates of memory: what they add up, and that the documentation quotes them."""

import json
import runpy
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def memory():
    return runpy.run_path(str(ROOT / "benchmarks/memory.py"))


def test_weights_are_counted_as_they_are_held(memory):
    """Two blocks whose linear layers, 4-bit ones with a scale every 64, are counted by hand."""
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).requires_grad_(False)
    linear = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    rest = 2 * 100 * 64 + 64 + 2 * (2 * 64 + 2 * 32)
    assert memory["frozen_bytes"](model, four_bit=False, nested=False) == 2 * (linear + rest)
    assert memory["frozen_bytes"](model, four_bit=True, nested=False) == linear / 2 + linear / 64 * 4 + 2 * rest
    nested = linear / 2 + linear / 64 * (1 + 4 / 256) + 2 * rest
    assert memory["frozen_bytes"](model, four_bit=True, nested=True) == pytest.approx(nested)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers about itself, on the meta device
def test_figures_are_those_of_the_recipes(memory):
    results = json.loads((ROOT / "benchmarks/results/memory.json").read_text())
    page = (ROOT / "docs/lora.md").read_text()
    for name, gpu in memory["GPUS"].items():
        found = memory["estimate"](name)
        assert found == pytest.approx(results[name], abs=1e-3)
        assert all(f"{size:.2f}" in page for size in found.values())
        assert max(found["generating"], found["training"]) + found["more with NTHR or DelTA"] < gpu * 1e9 / 2**30
