"""What does a published classifier say about an answer?

1. Prompt and answer are written in the classifier's own format. Text that could pass for its control tokens is broken
   up.
2. The classifier writes its verdict, grades the answer by its next token, or assigns a label. It reads one answer at a
   time, greedily, so that a verdict does not depend on other answers.
3. The verdict is parsed strictly. An answer that does not fit the classifier's context is left unjudged, never
   truncated.

The formats are in guards.py. This file is at the Hugging Face edge and knows no transcripts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cliffscope.errors import DataError, JudgeError, UnsupportedModelError
from cliffscope.judging.guards import ChatFormat, GradeFormat, GuardFormat, LabelFormat, TextFormat, fill, find_format
from cliffscope.judging.protocols import Verdict
from cliffscope.transcripts.records import Outcome
from cliffscope.transcripts.templates import encode


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassifierJudge:
    """Judges with a guard model or a sequence classifier.

    Create one with `ClassifierJudge.load`. A guard that classifies harm, not refusal (`harmful_only`), leaves answers
    to harmless prompts unjudged.

    Raises:
        DataError: the checkpoint lacks what the format needs: labels, grade tokens or a chat template.
    """

    format: GuardFormat
    """How the classifier reads an answer, and what its reply means."""
    model: PreTrainedModel
    """The classifier, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    """The classifier's tokenizer."""

    def __post_init__(self) -> None:
        """Checks that checkpoint and format belong together."""
        if isinstance(self.format, LabelFormat):
            _check_labels(self.format, self._labels())
        elif isinstance(self.format, GradeFormat):
            self._grade_ids(self.format)
        elif isinstance(self.format, ChatFormat) and not self.tokenizer.chat_template:
            raise DataError(
                f"Format {self.format.name!r} needs the chat template of the guard's checkpoint, but this tokenizer "
                "has none. Load the complete checkpoint."
            )

    @classmethod
    def load(
        cls,
        path_or_name: str,
        *,
        format: str | GuardFormat,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> "ClassifierJudge":
        """Loads a classifier.

        Args:
            path_or_name: a local directory or a hub name. An adapter such as StrongREJECT's needs the package peft.
            format: a name of `guards.FORMATS`, or a format object.
            device: torch device; None uses CUDA if available, otherwise the CPU.
            dtype: dtype of the weights; None keeps the checkpoint's.
            revision: revision of a hub repository.

        Returns:
            The judge.

        Raises:
            DataError: the checkpoint cannot be loaded, or does not suit the format.
            UnsupportedModelError: the checkpoint needs Python code of its own, which is not run.
            JudgeError: the format is unknown.

        Example:
            >>> ClassifierJudge.load("./none", format="wildguard")
            Traceback (most recent call last):
            cliffscope.errors.DataError: No classifier could be loaded from './none': ...
        """
        guard_format = find_format(format)
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path_or_name, revision=revision, trust_remote_code=False)
            model = _loader(guard_format).from_pretrained(
                path_or_name, dtype=dtype or "auto", revision=revision, use_safetensors=True, trust_remote_code=False
            )
            model.to(target).eval()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            if "trust_remote_code" in str(error):
                raise UnsupportedModelError(
                    f"The classifier {path_or_name!r} needs Python code that comes with the checkpoint, which is not "
                    "run. Read that code, load model and tokenizer yourself, and pass ClassifierJudge(format=..., "
                    "model=..., tokenizer=...)."
                ) from error
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"No classifier could be loaded from {path_or_name!r}: {message} Expected a local directory with "
                "config.json, safetensors and a tokenizer, or a hub name that can be reached. An adapter also needs "
                "the package peft."
            ) from error
        return cls(format=guard_format, model=model, tokenizer=tokenizer)

    @property
    def name(self) -> str:
        """The format's name."""
        return self.format.name

    @property
    def harmful_only(self) -> bool:
        """Whether it classifies harm, not refusal, so that it can judge only answers to harmful prompts."""
        return self.format.harmful_only

    def __call__(self, prompt: str, answer: str) -> Verdict:
        """Judges one answer.

        Args:
            prompt: the last user message.
            answer: the answer to it.

        Returns:
            The verdict.

        Raises:
            JudgeError: the classifier's reply does not have the documented form, or the text does not fit its context.
        """
        prompt, answer = self._defuse(prompt), self._defuse(answer)
        if isinstance(self.format, LabelFormat):
            return self._label(self.format, prompt, answer)
        if isinstance(self.format, GradeFormat):
            return self._grade(self.format, prompt, answer)
        ids = self._ids(self.format, prompt, answer)
        return self.format.parse(self._write(ids, self.format.max_tokens))

    def _defuse(self, text: str) -> str:
        """The text with a space after the first character of every control token of the tokenizer or the format."""
        special = [str(token.content) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        marks = self.format.marks if isinstance(self.format, TextFormat | GradeFormat) else ()
        # Longest first, since one may be part of another.
        for control in sorted({*special, *marks}, key=len, reverse=True):
            if len(control) > 1:
                text = text.replace(control, f"{control[0]} {control[1:]}")
        return text

    def _ids(self, format: ChatFormat | TextFormat, prompt: str, answer: str) -> list[int]:
        if isinstance(format, TextFormat):
            return self._encode(fill(format.text, prompt, answer), special=not format.writes_bos)
        turns = [
            {"role": role, "content": [{"type": "text", "text": content}] if format.parts else content}
            for role, content in (("user", prompt), ("assistant", answer))
        ]
        # The typed signature lacks content in parts.
        rendered = cast(Any, self.tokenizer).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return encode(self.tokenizer, str(rendered))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=special)]

    def _fit(self, ids: Sequence[int], room: int) -> torch.Tensor:
        """The ids as a batch of one, provided that they and `room` more tokens fit the context."""
        config = self.model.config.get_text_config()
        context = min(int(getattr(config, "max_position_embeddings", 0) or 10**9), self.tokenizer.model_max_length)
        if len(ids) + room > context:
            raise JudgeError(
                f"Prompt and answer are {len(ids)} tokens in the format {self.name!r} and {room} more are needed, but "
                f"the classifier's context is {context}. Generate with a smaller answer budget, or choose a different "
                "judge."
            )
        return torch.tensor([list(ids)], device=self.model.device)

    def _write(self, ids: Sequence[int], max_tokens: int) -> str:
        batch = self._fit(ids, max_tokens)
        pad = self.tokenizer.pad_token_id
        with torch.inference_mode():
            written = cast(Any, self.model).generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=pad if pad is not None else self.tokenizer.eos_token_id,
            )
        return str(self.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))

    def _grade(self, format: GradeFormat, prompt: str, answer: str) -> Verdict:
        batch = self._fit(self._encode(fill(format.text, prompt, answer), special=True), 0)
        with torch.inference_mode():
            logits = self.model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[0, -1].float()
        shares = torch.softmax(logits[self._grade_ids(format)], -1)
        expected = float((shares * torch.linspace(0, 1, len(shares), device=shares.device)).sum().clamp(0, 1))
        outcome = Outcome.COMPLIED if expected >= format.threshold else Outcome.REFUSED
        return Verdict(outcome=outcome, score=1 - expected, reason=f"expected help {expected:.2f} of 1")

    def _grade_ids(self, format: GradeFormat) -> list[int]:
        encoded = {grade: encode(self.tokenizer, grade) for grade in format.grades}
        longer = [grade for grade, ids in encoded.items() if len(ids) != 1]
        if longer:
            raise DataError(
                f"Format {format.name!r} needs each grade to be one token; {longer[0]!r} is {len(encoded[longer[0]])}. "
                "Load the checkpoint that the format belongs to."
            )
        return [ids[0] for ids in encoded.values()]

    def _label(self, format: LabelFormat, prompt: str, answer: str) -> Verdict:
        texts = (prompt, answer) if format.pair else (answer,)
        encoded = self.tokenizer(*texts, return_tensors="pt").to(self.model.device)
        self._fit(encoded["input_ids"][0].tolist(), 0)
        with torch.inference_mode():
            shares = torch.softmax(self.model(**encoded).logits[0].float(), -1).tolist()
        share_of = dict(zip(self._labels(), shares, strict=True))
        refusal = min(1.0, sum(share_of[label] for label in format.refused))
        label = max(share_of, key=lambda name: share_of[name])
        outcome = Outcome.REFUSED if label in format.refused else Outcome.COMPLIED
        return Verdict(outcome=outcome, score=refusal, reason=f"label {label}")

    def _labels(self) -> list[str]:
        labels = {int(i): label for i, label in (self.model.config.id2label or {}).items()}
        return [labels[i] for i in sorted(labels)]


def _loader(format: GuardFormat) -> Any:
    if isinstance(format, LabelFormat):
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if isinstance(format, ChatFormat) and format.images else AutoModelForCausalLM


def _check_labels(format: LabelFormat, labels: Sequence[str]) -> None:
    if set(labels) != format.refused | format.complied or format.refused & format.complied:
        raise DataError(
            f"Format {format.name!r} expects the labels {', '.join(sorted(format.refused | format.complied))}, but "
            f"this checkpoint has {', '.join(labels)}. Pass LabelFormat(name=..., refused=..., complied=...) with each "
            "of the checkpoint's labels in exactly one set."
        )
