"""A model's transcripts are tokenized once, whoever asks for them and however often."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import written

from cliffscope.errors import DataError, SpanError, TemplateError
from cliffscope.model.load import LensModel
from cliffscope.study.config import StudyConfig
from cliffscope.study.runner import run_study
from cliffscope.transcripts import templates, tokenization
from cliffscope.transcripts.records import Outcome, Transcript
from cliffscope.transcripts.tokenization import Tokenization
from cliffscope.transcripts.transcript import TokenizedTranscript, tokenize, tokenize_all, tokenize_before_answer


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[Transcript]:
    """Transcripts that were tokenized, in order."""
    transcripts: list[Transcript] = []

    def count(transcript: Transcript, *others: object, **options: bool) -> TokenizedTranscript:
        transcripts.append(transcript)
        return tokenize_before_answer(transcript, *others, **options)

    monkeypatch.setattr(tokenization, "tokenize_before_answer", count)
    return transcripts


def new(model: LensModel, **changes: int) -> Tokenization:
    sizes = {"max_length": model.shape.context, **changes}
    return Tokenization(tokenizer=model.tokenizer, template=model.template, **sizes)


def same(a: TokenizedTranscript, b: TokenizedTranscript) -> bool:
    return a.id == b.id and a.bounds == b.bounds and np.array_equal(a.token_ids, b.token_ids)


@pytest.mark.parametrize("with_answer", [False, True])
def test_tokens_are_those_of_tokenize(model: LensModel, with_answer: bool) -> None:
    transcripts = written(4, harmful=True, outcome=Outcome.REFUSED)
    expected, _ = tokenize_all(transcripts, model.tokenizer, model.template, with_answer=with_answer)
    for _ in range(2):
        rows, omitted = model.tokenize_all(transcripts, with_answer=with_answer)
        assert not omitted
        assert all(same(a, b) for a, b in zip(rows, expected, strict=True))


def test_a_transcript_is_tokenized_once_with_and_without_its_answer_and_whatever_its_labels(
    llama: LensModel, tokenized: list[Transcript]
) -> None:
    transcripts, kept = written(3, harmful=True, outcome=Outcome.REFUSED), new(llama)
    kept.all_tokens(transcripts)
    kept.all_tokens(transcripts, with_answer=True)
    kept.all_tokens(t.replace(outcome=Outcome.UNJUDGED, harmful=None, extra={"verdict": 1}) for t in transcripts)
    assert [t.id for t in tokenized] == [t.id for t in transcripts]


@pytest.mark.parametrize(
    "change", [{"id": "other"}, {"thinking": "this is fine ."}, {"extra": {"closing_ids": "no list"}}]
)
def test_another_content_is_tokenized_again(
    llama: LensModel, tokenized: list[Transcript], change: dict[str, object]
) -> None:
    transcript, kept = written(1, harmful=True, outcome=Outcome.REFUSED)[0], new(llama)
    kept.all_tokens([transcript, transcript.replace(**change)])
    assert len(tokenized) == 2


def test_another_chat_template_is_another_tokenization(
    llama: LensModel, monkeypatch: pytest.MonkeyPatch, tokenized: list[Transcript]
) -> None:
    transcript, kept = written(1, harmful=True, outcome=Outcome.REFUSED)[0], new(llama)
    kept.tokens(transcript)
    monkeypatch.setattr(llama.tokenizer, "chat_template", "{{ raise_exception('broken') }}")
    with pytest.raises(TemplateError):
        kept.tokens(transcript)
    assert len(tokenized) == 2


def test_errors_are_those_of_tokenize_each_time(llama: LensModel, tokenized: list[Transcript]) -> None:
    transcript = written(1, harmful=True, outcome=Outcome.REFUSED)[0]
    silent, kept = transcript.replace(thinking=None, thinking_ids=None), new(llama)
    with pytest.raises(SpanError) as plain:
        tokenize(silent, llama.tokenizer, llama.template)
    for _ in range(2):
        with pytest.raises(SpanError) as error:
            kept.tokens(silent)
        assert str(error.value) == str(plain.value)
    assert len(tokenized) == 1
    rows, omitted = kept.all_tokens([silent, transcript])
    assert [row.id for row in rows] == [transcript.id]
    assert [o.reason for o in omitted] == [str(plain.value)]


def test_the_limit_is_on_the_whole_transcript_and_only_where_it_is_asked_for(llama: LensModel) -> None:
    transcript = written(1, harmful=True, outcome=Outcome.REFUSED)[0]
    n_pos = tokenize(transcript, llama.tokenizer, llama.template).n_pos
    kept = new(llama, max_length=n_pos)
    assert kept.tokens(transcript).n_pos == n_pos
    with pytest.raises(DataError, match=f"more than max_length={n_pos}"):
        kept.tokens(transcript, with_answer=True)
    assert kept.tokens(transcript, with_answer=True, limited=False).n_pos > n_pos


def test_stored_tokens_are_bounded_and_the_latest_stay(llama: LensModel, tokenized: list[Transcript]) -> None:
    a, b, c = written(3, harmful=True, outcome=Outcome.REFUSED)
    sizes = [tokenize(t, llama.tokenizer, llama.template).n_pos for t in (a, b, c)]
    kept = new(llama, most_tokens=sum(sizes) - 1)
    kept.all_tokens([a, b, a, c, a, c, b])
    assert [t.id for t in tokenized] == [a.id, b.id, c.id, b.id]


def study_of(path: Path, **changes: object) -> StudyConfig:
    return StudyConfig(
        **{
            **{"model": "planted-llama", "out": str(path), "limit": 60, "max_thinking": 96, "max_answer": 16},
            **{"temperature": 1.0, "controls": 1, "device": "cpu", **changes},
        }
    )


@pytest.mark.slow
def test_a_study_tokenizes_every_transcript_once(
    tmp_path: Path, tokenized: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: Counter[str] = Counter()
    render = templates.generation_prompt

    def count(*arguments: object) -> str:
        rendered[str(arguments[1])] += 1
        return render(*arguments)

    monkeypatch.setattr("cliffscope.transcripts.transcript.generation_prompt", count)
    run_study(study_of(tmp_path / "run"), until="readouts")
    contents = Counter((t.id, t.thinking is not None and bool(t.thinking)) for t in tokenized)
    assert set(contents.values()) == {1}
    # Once as a prompt to be answered, once with its thinking.
    assert {name for name, thinks in contents if thinks} <= {name for name, thinks in contents if not thinks}
    assert max(rendered.values()) == 2
    # The same transcripts, read from a file, through the stages that measure them: each once.
    tokenized.clear()
    rendered.clear()
    file = str(tmp_path / "run" / "transcripts.jsonl")
    study = run_study(study_of(tmp_path / "again", transcripts=file, limit=None), until="side effects")
    assert "side effects" in study.verdict, "every stage that reads tokens has run"
    names = {name for name, thinks in contents if thinks}
    assert len(names) > 50
    assert Counter(t.id for t in tokenized) == Counter(dict.fromkeys(names, 1))
