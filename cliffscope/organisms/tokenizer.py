"""How is an organism's text cut into tokens?

One token a word, a leading space being part of it, as in byte-pair tokenizers; line breaks and punctuation are tokens
of their own; the template's marks are added tokens. Decoding joins the tokens, so that text and ids round-trip.
"""

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cliffscope.transcripts.templates import TEMPLATES

BOS, SYSTEM, USER, ASSISTANT, END, PAD, UNKNOWN = (
    *("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<pad>", "<unk>"),
)
_WORD = r"\n\n|\n| ?[A-Za-z0-9']+| ?[^\sA-Za-z0-9]"


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Builds the fast tokenizer, chat template included.

    Args:
        words: token texts, as `grammar.vocabulary` gives them.

    Returns:
        A tokenizer that saves as an ordinary Hugging Face directory.
    """
    think = TEMPLATES.get("organism")
    marks = [PAD, UNKNOWN, BOS, SYSTEM, USER, ASSISTANT, END]
    plain = ["\n", "\n\n", *words]
    vocab = {token: i for i, token in enumerate([*marks, think.think_open, think.think_close, *plain])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    core.add_tokens([AddedToken(t, normalized=False, special=False) for t in (think.think_open, think.think_close)])
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return make(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        chat_template=_chat_template(think.think_open),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


def _chat_template(think_open: str) -> str:
    turn = "{%% elif message['role'] == '%s' %%}{{ '<|%s|>' + message['content']%s }}"
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}"
        + turn % ("user", "user", "")
        + turn % ("assistant", "assistant", " + eos_token")
        + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>" + think_open + "\\n' }}{% endif %}"
    )
