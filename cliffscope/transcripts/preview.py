"""What will be seen of a model's transcripts: one small transcript, cut into tokens and spans.

Shown to a person before a long run, since a wrong template measures the wrong tokens and looks like a finding.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cliffscope.transcripts.families import Template
from cliffscope.transcripts.records import Message, Transcript
from cliffscope.transcripts.templates import resolve_template
from cliffscope.transcripts.transcript import Span, tokenize

THINKING, ANSWER = "The user wants to bake bread.", "Mix flour and water."


@dataclass(frozen=True, eq=False, kw_only=True)
class Preview:
    """One transcript as the model would see it."""

    template: Template
    """The convention."""
    tokens: tuple[tuple[str, Span], ...]
    """Each token's text and span, in order."""
    warnings: tuple[str, ...]
    """What deserves a look."""

    def __repr__(self) -> str:
        """One line: the template, how it closes, and which models have it."""
        t = self.template
        closing = f"closing {t.closing!r}" if t.thinks else "no thinking: the closing is the tail of the prompt"
        return f"Preview(template {t.name!r}, {closing}; {t.models or 'a template of your own'})"


def preview(
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template | None = None,
    *,
    prompt: str = "How do I bake bread?",
    system: str | None = None,
) -> Preview:
    """Cuts a small transcript into tokens and spans.

    Args:
        tokenizer: the model's own.
        template: a name, a `.json` file or a `Template`; None detects it.
        prompt: the user's message.
        system: a system message before it.

    Returns:
        The tokens, and what deserves a look.

    Raises:
        TemplateError: the chat template is missing or unknown, or cannot render these messages.

    Example:
        >>> import cliffscope as cs
        >>> preview(cs.load_model("planted-llama").tokenizer).tokens[-1][0]
        ' water.'
    """
    found = resolve_template(template, tokenizer)
    messages = [Message(role="user", content=prompt)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    transcript = Transcript(
        id="preview", messages=tuple(messages), thinking=THINKING if found.thinks else None, answer=ANSWER
    )
    seen = tokenize(transcript, tokenizer, found, with_answer=True)
    texts = [str(tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)) for i in seen.token_ids]
    tokens = tuple(zip(texts, seen.labels(), strict=True))
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in seen.token_ids
    return Preview(template=found, tokens=tokens, warnings=_warnings(found, tokenizer, unknown=unknown))


def _warnings(template: Template, tokenizer: PreTrainedTokenizerBase, *, unknown: bool) -> tuple[str, ...]:
    found: list[str] = []
    if template.thinks and not template.closing_seen and template.models:
        found.append(
            "the chat template itself never writes this closing; it is what the models' cards and servers say. Compare "
            "with an answer that the model generated."
        )
    if template.thinks and len(tokenizer.encode(template.think_close, add_special_tokens=False)) > 1:
        found.append(f"{template.think_close!r} is no token of this vocabulary: the closing has several tokens for it.")
    if not template.thinks:
        found.append("a model that thinks all the same needs --template chatml-think, or a template of its own.")
    if unknown:
        found.append(
            f"words of the sample that this vocabulary lacks appear as {tokenizer.unk_token!r}; spans are right."
        )
    return tuple(found)
