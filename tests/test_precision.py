"""bfloat16, float16 or float32, and what follows for the weights."""

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_cancel import Precision, best_precision
from trl_cancel.cli import main
from trl_cancel.cli.settings import Parser
from trl_cancel.running.precision import emulates_bfloat16, hold_trained_weights_in_float32

from .runs import build, load


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends that there is a GPU, of the generation that has bfloat16 or of one before."""

    def pretend(native):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
        # Like PyTorch, which emulates it where it must.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
        )

    return pretend


def test_bfloat16_where_it_is_native(gpu):
    gpu(native=True)
    precision = best_precision()
    assert (precision.bf16, precision.fp16, precision.dtype, precision.name) == (
        True,
        False,
        torch.bfloat16,
        "bfloat16",
    )
    assert "Tesla T4" in precision.reason


def test_float16_where_bfloat16_is_emulated(gpu):
    gpu(native=False)
    precision = best_precision()
    assert (precision.bf16, precision.fp16, precision.dtype, precision.name) == (False, True, torch.float16, "float16")
    assert precision.reason == "float16: Tesla T4 only emulates bfloat16, which is slow."


def test_float32_without_a_gpu(gpu):
    gpu(native=True)
    precision = best_precision(use_cpu=True)
    assert (precision.bf16, precision.fp16, precision.dtype) == (False, False, torch.float32)


PLAYGROUND = ["--model_name_or_path", "playground", "--dataset_name", "playground"]


@pytest.fixture
def _native(monkeypatch):
    """The parser takes the device for one with bfloat16, unless it is to use the CPU."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    found = Precision(torch.bfloat16, "bfloat16: it is native.")
    monkeypatch.setattr(
        "trl_cancel.cli.settings.best_precision", lambda use_cpu: best_precision(use_cpu) if use_cpu else found
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (True, False, "float32")),  # weights that are trained stay in float32
        (["--use_peft"], (True, False, "bfloat16")),
        (["--use_peft", "--dtype", "float32"], (True, False, "float32")),
        (["--use_cpu"], (False, False, "float32")),
        (["--fp16"], (False, True, "float32")),
        (["--bf16", "false", "--use_peft"], (False, False, "float32")),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_native")
def test_the_command_line_chooses_unless_told(arguments, expected):
    settings = Parser("test", "").read([*PLAYGROUND, *arguments])
    assert (settings.training.bf16, settings.training.fp16, settings.model.dtype) == expected


@pytest.mark.usefixtures("_native")
def test_a_file_is_obeyed(tmp_path):
    (tmp_path / "cpu.yaml").write_text("use_cpu: true\nuse_peft: true\n")
    settings = Parser("test", "").read([*PLAYGROUND, "--config", str(tmp_path / "cpu.yaml")])
    assert (settings.training.bf16, settings.training.fp16, settings.model.dtype) == (False, False, "float32")
    (tmp_path / "old.yaml").write_text("fp16: true\n")
    settings = Parser("test", "").read([*PLAYGROUND, "--config", str(tmp_path / "old.yaml")])
    assert (settings.training.bf16, settings.training.fp16, settings.precision) == (False, True, None)


def test_the_reason_is_printed(tmp_path, capsys):
    sizes = ["--max_steps", "1", "--max_completion_length", "8", "--report_to", "none", "--save_strategy", "no"]
    assert main(["train", *PLAYGROUND, *sizes, "--use_cpu", "--output_dir", str(tmp_path)]) == 0
    assert "Precision: float32: there is no GPU in use." in capsys.readouterr().out


def trained_types(trainer):
    return {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}


def test_adapters_of_4_bit_models_can_be_trained_in_fp16(tiny_model):
    """TRL makes them bfloat16, whose gradients the scaler of fp16 training refuses on a GPU."""
    pytest.importorskip("bitsandbytes")
    arguments = {
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"]),
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }
    assert trained_types(build(tiny_model, arguments=arguments)) == {torch.bfloat16}
    trainer = build(tiny_model, arguments=arguments, fp16=True)
    assert trained_types(trainer) == {torch.float32}
    trainer.train()


def test_trained_weights_in_float16_are_refused(tiny_model):
    settings = {"fp16": True, "model_init_kwargs": {"dtype": "float16"}}
    with pytest.raises(
        ValueError, match=r"fp16=True cannot train model\.embed_tokens\.weight, which is held in float16"
    ):
        build(tiny_model, **settings)
    adapter = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    trainer = build(tiny_model, **settings, arguments=adapter)
    assert trained_types(trainer) == {torch.float32}
    assert torch.float16 in {parameter.dtype for parameter in trainer.model.parameters()}


def test_weights_keep_their_values(tiny_model):
    model = load(tiny_model).bfloat16()
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    hold_trained_weights_in_float32(model.named_parameters())
    for name, value in model.named_parameters():
        assert value.dtype == (torch.float32 if value.requires_grad else torch.bfloat16)
        assert torch.equal(value, before[name].to(value.dtype))


def test_emulated_bfloat16_is_remarked(monkeypatch, tiny_model, caplog):
    assert not emulates_bfloat16(torch.device("cpu"))
    monkeypatch.setattr("trl_cancel.trainer.emulates_bfloat16", lambda device: True)
    with caplog.at_level(logging.WARNING, logger="trl_cancel.trainer"):
        build(tiny_model, bf16=True)
    assert "bf16=True, TRL's default, is emulated by this GPU" in caplog.text
