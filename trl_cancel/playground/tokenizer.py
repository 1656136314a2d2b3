"""The playground's tokenizer: one token a digit, symbol or word, and a chat template in the style of Qwen."""

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast


PAD, UNKNOWN, TURN_START, TURN_END = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
WORDS = ("Compute", "The", "answer", "is", "\\boxed{", "}", ".", " ", "\n", "+", "-", "=", *"0123456789")
# `{% generation %}` marks the assistant's tokens, so that a completion-only loss knows them.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(more_words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """
    Builds the tokenizer from its word list; text outside the list becomes the unknown token.

    Args:
        more_words (`tuple[str, ...]`, *optional*):
            Words of a task beside those of the plain one.
    """
    words = (*WORDS, *more_words)
    vocabulary = [PAD, UNKNOWN, TURN_START, TURN_END, *ROLES, *words]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    pattern = "|".join(_escape(word) for word in sorted([*ROLES, *words], key=len, reverse=True)) + r"|."
    backend.pre_tokenizer = Split(Regex(pattern), behavior="isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _escape(word: str) -> str:
    return "".join("\\" + char if char in r"\{}.+-=*?|()[]^$" else char for char in word)
