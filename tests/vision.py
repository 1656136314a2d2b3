"""Vision-language models of a few thousand random parameters, one for each way in which images reach a model."""

import random
from typing import Any

import torch
import transformers as hf
from datasets import Dataset
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trl_cancel.playground.tokenizer import build_tokenizer


TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # peaked enough that rollouts share prefixes
    "bos_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.4,  # and the pictures matter
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(family: str) -> tuple[Any, Any]:
    """
    A model of a family and its processor; equal at each call.

    Args:
        family (`str`):
            One of `FAMILIES`.
    """
    torch.manual_seed(0)
    return FAMILIES[family]()


def _tokenizer(image: str, **special: str) -> Any:
    """The playground's, with more tokens, which are its attributes too."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special.values()]})
    for name, token in special.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", image)
    return tokenizer


def _text(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {**TEXT, "vocab_size": len(tokenizer), **special, **changes}


class _WithoutVideos(hf.Qwen2_5_VLProcessor):
    """The processor of videos would need torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def _qwen() -> tuple[Any, Any]:
    """Patches of all images in one row, cut by `image_grid_thw`; positions of three axes."""
    tokenizer = _tokenizer(
        "<|vision_start|><|image_pad|><|vision_end|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )
    config = hf.Qwen2_5_VLConfig(
        text_config=_text(tokenizer, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1]}),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.4,
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
    )
    images = Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=512, patch_size=4)
    processor = _WithoutVideos(images, tokenizer, None, chat_template=tokenizer.chat_template)
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def _gemma() -> tuple[Any, Any]:
    """One row an image, and `token_type_ids`: the tokens of an image see each other."""
    tokenizer = _tokenizer("<start>", image_token="<image>", boi_token="<start>", eoi_token="<end>")
    config = hf.Gemma3Config(
        text_config=_text(tokenizer, head_dim=8, query_pre_attn_scalar=8),
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    processor = hf.Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4)
    model = hf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # 0 in a new model
    return model, processor


def _llava_next() -> tuple[Any, Any]:
    """Tiles of each image, as many as its size asks for, padded to the most in the batch; `image_sizes`."""
    tokenizer = _tokenizer("<image>", image_token="<image>")
    pinpoints = [[8, 16], [16, 8], [16, 16]]
    config = hf.LlavaNextConfig(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_grid_pinpoints=pinpoints
    )
    processor = hf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def _idefics() -> tuple[Any, Any]:
    """One row a prompt, padded to the most and the largest images in the batch, and `pixel_attention_mask`."""
    tokenizer = _tokenizer("<image>", image_token="<image>", image_boundary_token="<fake_token_around_image>")
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 4, "longest_edge": 16})
    processor = hf.Idefics2Processor(images, tokenizer, image_seq_len=2, chat_template=tokenizer.chat_template)
    config = hf.Idefics2Config(
        text_config={"model_type": "mistral", **_text(tokenizer), "sliding_window": None},
        vision_config={**VISION, "image_size": 16},
        perceiver_config={
            "hidden_size": 16,
            "resampler_n_latents": 2,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
            "initializer_range": 0.4,
        },
        image_token_id=tokenizer.image_token_id,
    )
    return hf.Idefics2ForConditionalGeneration(config), processor


FAMILIES = {"qwen": _qwen, "gemma": _gemma, "llava-next": _llava_next, "idefics": _idefics}


def load_pictures(counts: tuple[int, ...] = (1,), sizes: tuple[int, ...] = (8, 16), rows: int = 64) -> Dataset:
    """
    Prompts of several lengths with pictures of several sizes.

    Args:
        counts (`tuple[int, ...]`, *optional*, defaults to `(1,)`):
            Numbers of pictures, in turns.
        sizes (`tuple[int, ...]`, *optional*, defaults to `(8, 16)`):
            Widths and heights of the pictures.
        rows (`int`, *optional*, defaults to `64`):
            Number of prompts.
    """
    rng = random.Random(0)

    def picture() -> Image.Image:
        width, height = rng.choice(sizes), rng.choice(sizes)
        return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "Compute " + "1+" * rng.randrange(4) + str(row % 10)}],
                "images": [picture() for _ in range(counts[row % len(counts)])],
            }
            for row in range(rows)
        ]
    )
