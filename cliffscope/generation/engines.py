"""Who generates the answers: this process, or a server?

1. `LocalEngine` generates with a loaded model, edited or not.
2. `ServerEngine` asks an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`) for an unedited model
   or an exported checkpoint.
3. Both give transcripts with thinking and answer apart, and say what they left out.

A server counts thinking and answer in one budget and cannot be made to close thinking, so the arms of one comparison
must use one engine. This file knows no tags: transcripts/templates.py splits what a server does not.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from cliffscope.errors import GenerationError
from cliffscope.generation.endpoints import Endpoint, Reply, Request, ask_all
from cliffscope.generation.rollout import STAGE, bare_prompt, roll_out
from cliffscope.generation.speaking import Budget
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Omission, Transcript, Transcripts
from cliffscope.transcripts.templates import Template, find_template, split_reply


@runtime_checkable
class Engine(Protocol):
    """Anything that answers prompts."""

    def roll_out(self, prompts: Transcripts, *, progress: Callable[[int], None] | None = None) -> Transcripts:
        """Generate thinking and answer for each prompt, in order; what failed is in `omitted`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LocalEngine:
    """Answers with a model in this process.

    Example:
        >>> import cliffscope as cs
        >>> engine = LocalEngine(model=cs.load_model("planted-llama"))
        >>> engine.roll_out(cs.organisms.prompts("test", 1, harmful=True))[0].answer.split()[0]
        'sorry'
    """

    model: LensModel
    """The model; edit its weights around the call to generate under an edit."""
    budget: Budget = field(default_factory=Budget)
    """How long and how it generates."""
    system: str | None = None
    """System message put before each prompt that has none."""
    batch_size: int | None = None
    """Rows at most; None finds it from the free memory."""

    def roll_out(self, prompts: Transcripts, *, progress: Callable[[int], None] | None = None) -> Transcripts:
        """Generates thinking and answer for each prompt.

        Args:
            prompts: thinking and answer they already have are replaced.
            progress: called with the number of transcripts done.

        Returns:
            Transcripts in the prompts' order; prompts that do not fit the context are omitted, each with its reason.
        """
        return roll_out(
            self.model,
            prompts,
            max_thinking=self.budget.max_thinking,
            max_answer=self.budget.max_answer,
            temperature=self.budget.temperature,
            force_closing=self.budget.force_closing,
            system=self.system,
            seed=self.budget.seed,
            batch_size=self.batch_size,
            progress=progress,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ServerEngine:
    """Answers with a model behind an OpenAI-compatible server.

    Thinking is what the server sends as `reasoning_content` or `reasoning`; where it sends neither, the text is split
    by the template's tags. Thinking that never closed leaves the transcript unfinished, whatever came after it.
    """

    endpoint: Endpoint
    """The server."""
    template: str | Template
    """How the model thinks: a name such as `qwen3-thinking`, or `chatml` for one that does not. There is no default,
    since a reply that was cut while thinking looks like an answer to whoever does not know."""
    max_tokens: int = 1152
    """Tokens of thinking and answer together; the default is the sum of the local engine's two budgets."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Of the sampling, where the server heeds it."""
    system: str | None = None
    """System message put before each prompt that has none."""
    resume: str | os.PathLike[str] | None = None
    """File that keeps each reply as it comes, so that a killed run goes on where it stopped. One file, one model."""

    def __post_init__(self) -> None:
        """Refuses settings under which nothing can be generated."""
        find_template(self.template)
        if self.max_tokens < 1 or not self.temperature >= 0:
            raise GenerationError(
                f"max_tokens={self.max_tokens}, temperature={self.temperature}: expected at least 1 token and a "
                "temperature of 0 or more."
            )

    def roll_out(self, prompts: Transcripts, *, progress: Callable[[int], None] | None = None) -> Transcripts:
        """Asks the server for thinking and answer of each prompt.

        Args:
            prompts: thinking and answer they already have are replaced.
            progress: called with the number of transcripts done.

        Returns:
            Transcripts in the prompts' order, without token ids, `extra["finish"]` being the server's reason to stop.
            Blank prompts, and those that the server did not answer, are omitted, each with its reason.

        Raises:
            MissingExtraError: the package openai is missing.
            ServerError: the server is not there or refuses the key or the model, and nothing was answered.
            StoreError: the file of `resume` belongs to another model or to other prompts or options.
        """
        asked = [bare_prompt(transcript, self.system) for transcript in prompts]
        reasons = {t.id: "the prompt is blank" for t in asked if not t.prompt.strip()}
        requests = {
            t.id: Request(messages=t.messages, max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed)
            for t in asked
            if t.id not in reasons
        }
        replies = ask_all(self.endpoint, requests, resume=self.resume, progress=progress)
        reasons |= replies.failed
        template = find_template(self.template)
        kept = [_answered(t, replies.found[t.id], template) for t in asked if t.id in replies.found]
        omitted = [Omission(stage=STAGE, reason=reasons[t.id], id=t.id) for t in asked if t.id in reasons]
        return Transcripts(kept, omitted=(*prompts.omitted, *omitted))


def _answered(transcript: Transcript, reply: Reply, template: Template) -> Transcript:
    if reply.reasoning is None:
        thinking, answer = split_reply(reply.content, template)
    else:
        # With nothing beside the thinking, nobody can tell whether it closed.
        thinking, answer = reply.reasoning.strip("\n"), reply.content.lstrip("\n") or None
    return transcript.replace(
        thinking=thinking,
        answer=answer,
        closed=answer is not None,
        extra={**transcript.extra, "finish": reply.finish},
    )
