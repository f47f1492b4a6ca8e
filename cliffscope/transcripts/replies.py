"""Which part of a text is thinking, and which is answer?

Knows text and templates, no tokens.
"""

from cliffscope.transcripts.families import Template


def split_reply(text: str, template: Template) -> tuple[str | None, str | None]:
    r"""Splits generated text into thinking and answer, both without tags.

    If the prompt opens thinking, text without the closing tag is all thinking. If the model opens it, text that does
    not start with the opening tag is all answer.

    Args:
        text: the text that the model wrote after the generation prompt.
        template: the template of the model.

    Returns:
        (thinking, answer). Thinking is None if there was none; answer is None if the thinking never closed.

    Example:
        >>> split_reply("Bread is harmless.\n</think>\n\nMix flour and water.", TEMPLATES.get("qwq"))
        ('Bread is harmless.', 'Mix flour and water.')
        >>> split_reply("Bread is", TEMPLATES.get("qwq"))
        ('Bread is', None)
    """
    if not template.thinks:
        return None, text
    tag, stripped = template.think_open, text.lstrip()
    if stripped.startswith(tag):
        text = stripped.removeprefix(tag).removeprefix(template.opening.partition(tag)[2] or "\n")
    elif template.opening and template.think_close not in text:
        return None, text
    thinking, closed, answer = text.partition(template.think_close)
    before, _, after = template.closing.partition(template.think_close)
    if not closed:
        return thinking, None
    return thinking.removesuffix(before), answer.removeprefix(after).lstrip("\n")
