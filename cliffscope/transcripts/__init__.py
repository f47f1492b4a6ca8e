"""Transcripts: what they are, how they are read, and which token belongs to which span."""

from cliffscope.transcripts.datasets import read_transcripts, write_transcripts
from cliffscope.transcripts.prompts import read_prompts
from cliffscope.transcripts.records import JsonValue, Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.templates import TEMPLATES, Template, detect_template, resolve_template
from cliffscope.transcripts.transcript import Span, TokenizedTranscript, tokenize, tokenize_all

__all__ = [
    "TEMPLATES",
    "JsonValue",
    "Message",
    "Omission",
    "Outcome",
    "Span",
    "Template",
    "TokenizedTranscript",
    "Transcript",
    "Transcripts",
    "detect_template",
    "read_prompts",
    "read_transcripts",
    "resolve_template",
    "tokenize",
    "tokenize_all",
    "write_transcripts",
]
