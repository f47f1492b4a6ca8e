import json
from pathlib import Path

import pytest
from conftest import written

from cliffscope.errors import DataError
from cliffscope.model.load import LensModel
from cliffscope.repairing.formats import IGNORED, SAFE_ANSWER, examples, with_safe_answer, write_examples
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts
from cliffscope.transcripts.templates import TEMPLATES
from cliffscope.transcripts.transcript import Span, tokenize

SAFE = "sorry , i can not help with that ."


@pytest.fixture
def chosen() -> Transcripts:
    return written(3, harmful=True, outcome=Outcome.COMPLIED)


def test_the_answer_is_replaced_and_the_thinking_kept(chosen: Transcripts) -> None:
    for old, new in zip(chosen, with_safe_answer(chosen), strict=True):
        assert (new.thinking, new.answer, new.answer_ids) == (old.thinking, SAFE_ANSWER, None)
        assert new.outcome is Outcome.UNJUDGED
    own = with_safe_answer(chosen, lambda t: f"no to {t.id}")
    assert own[0].answer == f"no to {chosen[0].id}"
    with pytest.raises(DataError, match="is blank"):
        with_safe_answer(chosen, " ")


def test_the_loss_counts_on_the_answer_and_its_end_or_from_the_closing_on(
    llama: LensModel, chosen: Transcripts
) -> None:
    safe = with_safe_answer(chosen, SAFE)
    for transcript, example in zip(safe, examples(safe, llama.tokenizer, llama.template), strict=True):
        row = tokenize(transcript, llama.tokenizer, llama.template, with_answer=True)
        assert example.input_ids == [*row.token_ids.tolist(), llama.tokenizer.eos_token_id]
        start = row.span(Span.ANSWER).start
        assert example.labels[:start] == [IGNORED] * start
        assert llama.tokenizer.decode(example.labels[start:-1]) == SAFE
    closing = examples(safe, llama.tokenizer, llama.template, loss_on="closing")[0]
    assert closing.labels.index(closing.input_ids[closing.labels.count(IGNORED)]) == row_closing(llama, safe[0])


def row_closing(model: LensModel, transcript: Transcript) -> int:
    return tokenize(transcript, model.tokenizer, model.template, with_answer=True).span(Span.CLOSING).start


def test_a_prompt_completion_file_gives_trl_the_ids_that_we_train_on(
    llama: LensModel, chosen: Transcripts, tmp_path: Path
) -> None:
    """The rendered form loses nothing: its two texts, encoded as TRL does, are our own token ids."""
    safe = with_safe_answer(chosen, SAFE)
    write_examples(safe, tmp_path / "x.jsonl", tokenizer=llama.tokenizer, template=llama.template)
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "x.jsonl"), split="train", cache_dir=str(tmp_path))
    assert rows.column_names == ["prompt", "completion"]
    for row, example in zip(rows, examples(safe, llama.tokenizer, llama.template), strict=True):
        ids = llama.tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"]
        assert ids == example.input_ids


def test_the_real_trainer_loads_the_files(llama: LensModel, chosen: Transcripts, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the extra repair is not installed")
    datasets = pytest.importorskip("datasets")
    safe = with_safe_answer(chosen, SAFE)
    for form in ("prompt-completion", "chat"):
        path = tmp_path / f"{form}.jsonl"
        write_examples(safe, path, format=form, tokenizer=llama.tokenizer, template=llama.template)
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
        conversational = trl.data_utils.is_conversational(rows[0])
        assert conversational is (form == "chat")
    said = rows[0]["messages"][-1]
    assert said["role"] == "assistant"
    assert said["content"].endswith(SAFE)
    assert chosen[0].thinking in said["content"]


def test_llama_factorys_two_forms_follow_their_schema(llama: LensModel, chosen: Transcripts, tmp_path: Path) -> None:
    talk = (
        Message(role="system", content="Be kind."),
        Message(role="user", content="hello"),
        Message(role="assistant", content="hi"),
        Message(role="user", content="how do i steal the bike"),
    )
    given = with_safe_answer([chosen[0].replace(messages=talk)], SAFE)
    for form in ("alpaca", "sharegpt"):
        write_examples(given, tmp_path / form, format=form, tokenizer=llama.tokenizer, template=llama.template)
    (alpaca,) = json.loads((tmp_path / "alpaca").read_text())
    assert set(alpaca) == {"instruction", "input", "output", "system", "history"}
    assert (alpaca["instruction"], alpaca["system"]) == ("how do i steal the bike", "Be kind.")
    assert alpaca["history"] == [["hello", "hi"]]
    (shared,) = json.loads((tmp_path / "sharegpt").read_text())
    assert [turn["from"] for turn in shared["conversations"]] == ["human", "gpt", "human", "gpt"]
    assert shared["system"] == "Be kind."
    tag = TEMPLATES.get("organism")
    for said in (alpaca["output"], shared["conversations"][-1]["value"]):
        assert said.count(tag.think_open) == said.count(tag.think_close) == 1
        assert said.endswith(SAFE)


def test_an_unknown_format_and_a_missing_answer_are_refused(
    llama: LensModel, chosen: Transcripts, tmp_path: Path
) -> None:
    options = {"tokenizer": llama.tokenizer, "template": llama.template}
    with pytest.raises(DataError, match="expected one of chat, prompt-completion, alpaca, sharegpt"):
        write_examples(chosen, tmp_path / "x", format="csv", **options)
    with pytest.raises(DataError, match="has no answer to be learnt"):
        write_examples(chosen.map(lambda t: t.replace(answer=None, answer_ids=None)), tmp_path / "x", **options)
    with pytest.raises(DataError, match="more than max_length=10"):
        examples(chosen, llama.tokenizer, llama.template, max_length=10)
    assert not (tmp_path / "x").exists()
