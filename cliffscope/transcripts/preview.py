"""How will a model's transcripts be cut into tokens and spans?

One small transcript is shown before a long run, since a wrong template measures the wrong tokens, and the result looks
like a finding.
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
    """One transcript as the model sees it."""

    template: Template
    """The template that was used."""
    tokens: tuple[tuple[str, Span], ...]
    """Each token's text and span, in order."""
    warnings: tuple[str, ...]
    """What to check before a run."""

    def __repr__(self) -> str:
        """One line: the template, its closing, and the models that use it."""
        t = self.template
        closing = f"closing {t.closing!r}" if t.thinks else "no thinking, so the closing is the tail of the prompt"
        return f"Preview(template {t.name!r}, {closing}; {t.models or 'a custom template'})"


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
        template: a choice as in `find_template`; None detects it.
        prompt: the user's message.
        system: a system message before it.

    Returns:
        The tokens with their spans, and warnings.

    Raises:
        TemplateError: the chat template is missing or unknown, or cannot render these messages.

    Example:
        >>> import cliffscope as cs
        >>> preview(cs.load_model("planted-llama").tokenizer).tokens[-1][0]
        ' water.'
    """
    resolved = resolve_template(template, tokenizer)
    messages = [Message(role="user", content=prompt)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    transcript = Transcript(
        id="preview", messages=tuple(messages), thinking=THINKING if resolved.thinks else None, answer=ANSWER
    )
    row = tokenize(transcript, tokenizer, resolved, with_answer=True)
    texts = [str(tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)) for i in row.token_ids]
    tokens = tuple(zip(texts, row.labels(), strict=True))
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in row.token_ids
    return Preview(template=resolved, tokens=tokens, warnings=_warnings(resolved, tokenizer, unknown=unknown))


def _warnings(template: Template, tokenizer: PreTrainedTokenizerBase, *, unknown: bool) -> tuple[str, ...]:
    warnings: list[str] = []
    if template.thinks and not template.closing_seen and template.models:
        warnings.append(
            "the chat template never writes this closing; it comes from the model cards and servers of these models. "
            "Compare it with an answer that the model generated."
        )
    if template.thinks and len(tokenizer.encode(template.think_close, add_special_tokens=False)) > 1:
        warnings.append(
            f"{template.think_close!r} is not a single token of this vocabulary, so the closing has several tokens for "
            "it."
        )
    if not template.thinks:
        warnings.append("a model that thinks nevertheless needs --template chatml-think or a custom template.")
    if unknown:
        warnings.append(
            f"words of this sample that the vocabulary lacks are shown as {tokenizer.unk_token!r}; the spans are "
            "correct."
        )
    return tuple(warnings)
