"""Which numbers a device computes with: bfloat16 where it has it, float16 where not, float32 without a GPU."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """
    A choice of precision.

    Args:
        dtype (`torch.dtype`):
            What to compute in, and to hold weights in that are not trained: `bnb_4bit_compute_dtype` for 4-bit models,
            `dtype` for those that carry an adapter. Trained weights stay in float32.
        reason (`str`):
            Why, in a sentence.
    """

    dtype: torch.dtype
    reason: str

    @property
    def bf16(self) -> bool:
        """The setting `bf16` of the configuration."""
        return self.dtype == torch.bfloat16

    @property
    def fp16(self) -> bool:
        """The setting `fp16` of the configuration."""
        return self.dtype == torch.float16

    @property
    def name(self) -> str:
        """The type's name: `"bfloat16"`, `"float16"` or `"float32"`."""
        return str(self.dtype).removeprefix("torch.")


def best_precision(use_cpu: bool = False) -> Precision:
    """
    The precision that the current device computes fastest without emulating it.

    TRL's default is bfloat16 wherever PyTorch can represent it, which it does on older GPUs too (T4, V100, RTX 20) by
    emulation, many times slower than float16.

    Args:
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether the GPU, if there is one, is left alone.

    Example:

    ```python
    >>> from trl_cancel import GRPOConfig, best_precision

    >>> precision = best_precision()
    >>> print(precision.reason)
    >>> args = GRPOConfig(bf16=precision.bf16, fp16=precision.fp16)
    ```
    """
    if not use_cpu:
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return Precision(torch.bfloat16, f"bfloat16: {name} computes it natively.")
            return Precision(torch.float16, f"float16: {name} only emulates bfloat16, which is slow.")
        if torch.xpu.is_available() and torch.xpu.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, f"bfloat16: {torch.xpu.get_device_name()} computes it natively.")
    return Precision(torch.float32, "float32: there is no GPU in use.")


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 works on a GPU only by emulation."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return not torch.cuda.is_bf16_supported(including_emulation=False)


def hold_trained_weights_in_float32(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """
    Makes trained weights fit for `fp16=True`, whose scaled gradients PyTorch can scale back in float32 only. TRL turns
    the adapters of quantized models into bfloat16.

    Args:
        parameters (`Iterable[tuple[str, torch.nn.Parameter]]`):
            Names and weights; those that are not trained are left alone.

    Raises:
        `ValueError`: If a trained weight has been loaded in float16, in which small updates would be lost.
    """
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.dtype == torch.float16:
            raise ValueError(
                f"fp16=True cannot train {name}, which is held in float16. Load the model in float32 "
                "(model_init_kwargs={'dtype': 'float32'}, or --dtype float32); with an adapter (peft_config) only "
                "what it trains must be, so leave modules_to_save out."
            )
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
