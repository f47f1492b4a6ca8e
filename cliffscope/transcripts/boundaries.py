"""Which transcripts that came as text end their thinking where no generation would?

Where the generated ids are not there, thinking and closing are encoded apart. The tokenizer itself may write both with
a token that spans the boundary, so that what is measured there was never generated.
"""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from cliffscope.transcripts.records import Transcript
from cliffscope.transcripts.templates import Template, closing_ids, encode
from cliffscope.transcripts.transcript import decodes_to, strip_newlines


def foreign_boundaries(
    transcripts: Iterable[Transcript], tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[str, ...]:
    """Transcripts that came as text and end their thinking at a boundary that the tokenizer would not make.

    A token such as `.</` may hold the end of the thinking and the beginning of its closing. Where the generated ids are
    not there, thinking and closing are encoded apart, as no generation by this tokenizer has them.

    Args:
        transcripts: with thinking.
        tokenizer: the model's own.
        template: from `resolve_template`.

    Returns:
        Their ids, in order; none for a template without thinking.
    """
    if not template.thinks:
        return ()
    foreign = []
    for transcript in transcripts:
        text, ids = transcript.thinking, transcript.thinking_ids
        if not text or (ids is not None and decodes_to(ids, text, tokenizer)):
            continue
        thinking = strip_newlines(text, template)
        apart = [*encode(tokenizer, thinking), *closing_ids(tokenizer, template)]
        if encode(tokenizer, thinking + template.closing) != apart:
            foreign.append(transcript.id)
    return tuple(foreign)
