"""Who generates the answers: this process, or a server?

1. `LocalEngine` generates with a loaded model, edited or not.
2. `ServerEngine` uses an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`) with an unedited
   model or an exported checkpoint.
3. Both return transcripts with thinking and answer separated, and report what they left out.

A server counts thinking and answer in one budget and cannot be made to close thinking, so all arms of a comparison must
use the same engine. This file knows no tags: transcripts/templates.py splits text that a server does not.
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
from cliffscope.transcripts.records import CUT, Omission, Transcript, Transcripts
from cliffscope.transcripts.replies import SERVER_REFUSAL, part_turn, split_reply
from cliffscope.transcripts.templates import Template, find_template


@runtime_checkable
class Engine(Protocol):
    """Answers prompts."""

    def roll_out(self, prompts: Transcripts, *, progress: Callable[[int], None] | None = None) -> Transcripts:
        """Generates thinking and answer for each prompt, in order; failures are in `omitted`."""


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
    """Lengths, sampling and seed."""
    system: str | None = None
    """System message for each prompt that has none."""
    batch_size: int | None = None
    """Maximum rows in a batch; None derives it from the free memory."""

    def roll_out(self, prompts: Transcripts, *, progress: Callable[[int], None] | None = None) -> Transcripts:
        """Generates thinking and answer for each prompt.

        Args:
            prompts: any thinking and answer that they have are replaced.
            progress: called with the number of transcripts done.

        Returns:
            Transcripts in the order of the prompts. Prompts that do not fit the context are omitted, with the reason.
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

    The thinking is the server's `reasoning_content` or `reasoning`. If the server sends neither, the text is split by
    the template's tags. Thinking that never closed leaves the transcript unfinished.

    Raises:
        TemplateError: there is no such template.
        GenerationError: the budget is below 1 token, or the temperature is negative.
    """

    endpoint: Endpoint
    """The server."""
    template: str | Template
    """How the model thinks: a name such as `qwen3-thinking`, or `chatml` for a model without thinking. There is no
    default, since a reply that was cut off during thinking would look like an answer."""
    max_tokens: int = 1152
    """Maximum tokens of thinking and answer together; the default is the sum of the local engine's two budgets."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Seed of the sampling, if the server supports it."""
    system: str | None = None
    """System message for each prompt that has none."""
    resume: str | os.PathLike[str] | None = None
    """File in which each reply is stored as it arrives, so that an interrupted run can resume; one file a model."""

    def __post_init__(self) -> None:
        """Rejects settings under which nothing can be generated."""
        find_template(self.template)
        if self.max_tokens < 1 or not self.temperature >= 0:
            raise GenerationError(
                f"max_tokens={self.max_tokens}, temperature={self.temperature}: expected at least 1 token and a "
                "temperature of 0 or more."
            )

    def roll_out(self, prompts: Transcripts, *, progress: Callable[[int], None] | None = None) -> Transcripts:
        """Requests thinking and answer for each prompt from the server.

        Args:
            prompts: any thinking and answer that they have are replaced.
            progress: called with the number of transcripts done.

        Returns:
            Transcripts in the order of the prompts, without token ids; `extra["finish"]` is the server's finish reason.
            Blank prompts, and prompts that the server did not answer, are omitted, with the reason.

        Raises:
            MissingExtraError: the package openai is missing.
            ServerError: the server cannot be reached, or rejects the key or the model, and nothing was answered.
            StoreError: the `resume` file belongs to a different model, or to different prompts or options.
        """
        questions = [bare_prompt(transcript, self.system) for transcript in prompts]
        reasons = {t.id: "the prompt is blank" for t in questions if not t.prompt.strip()}
        requests = {
            t.id: Request(messages=t.messages, max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed)
            for t in questions
            if t.id not in reasons
        }
        replies = ask_all(self.endpoint, requests, resume=self.resume, progress=progress)
        reasons |= replies.failed
        template = find_template(self.template)
        answered = [_answered(t, replies.replies[t.id], template) for t in questions if t.id in replies.replies]
        omitted = [Omission(stage=STAGE, reason=reasons[t.id], id=t.id) for t in questions if t.id in reasons]
        return Transcripts(answered, omitted=(*prompts.omitted, *omitted))


def _answered(transcript: Transcript, reply: Reply, template: Template) -> Transcript:
    if reply.reasoning is None:
        thinking, answer = split_reply(reply.content, template)
    else:
        # If there is nothing but thinking, it is unknown whether the thinking closed.
        thinking, answer = reply.reasoning.strip("\n"), reply.content.lstrip("\n") or None
    cut = answer is not None and reply.finish == "length"
    extra: dict[str, object] = {**transcript.extra, "finish": reply.finish, CUT: cut}
    if reply.refusal.strip() and not (answer or "").strip():
        answer, extra[SERVER_REFUSAL] = reply.refusal, reply.refusal
    answered = transcript.replace(thinking=thinking, answer=answer, closed=answer is not None, extra=extra)
    # A server may leave the thinking in the content, too, or strip the tags by which a template tells it apart.
    return part_turn(answered, template)
