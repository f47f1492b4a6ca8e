from pathlib import Path

import pytest
from failing_server import SLOW_SECONDS, Failing, serving

import cliffscope as cs
from cliffscope.errors import GenerationError, ServerError, TemplateError
from cliffscope.generation.engines import Engine, LocalEngine, ServerEngine
from cliffscope.generation.speaking import Budget
from cliffscope.judging.judges import judge
from cliffscope.transcripts.records import Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.templates import TEMPLATES

openai = pytest.importorskip("openai", reason="the extra serve is not installed")

OPEN, CLOSE = TEMPLATES.get("qwq").think_open, TEMPLATES.get("qwq").think_close


def prompts(*texts: str) -> Transcripts:
    return Transcripts(
        Transcript(id=f"p{i}", messages=(Message(role="user", content=text),), harmful=False)
        for i, text in enumerate(texts)
    )


def one(message: dict[str, object], template: str = "qwq") -> Transcript:
    with serving(Failing(say=lambda _: message)) as server:
        return ServerEngine(endpoint=server.endpoint(), template=template).roll_out(prompts("How do I bake bread?"))[0]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_that_the_server_separates_is_taken(name: str) -> None:
    t = one({name: "\nBread is harmless.\n", "content": "\n\nMix flour and water."})
    assert (t.thinking, t.answer, t.closed) == ("Bread is harmless.", "Mix flour and water.", True)
    assert t.extra["finish"] == "stop"


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_separated_thinking_without_an_answer_is_unfinished(content: str | None) -> None:
    t = one({"reasoning_content": "Bread is", "content": content, "finish": "length"})
    assert (t.thinking, t.answer, t.closed) == ("Bread is", None, False)
    assert judge(Transcripts([t]))[0].outcome is Outcome.UNFINISHED


@pytest.mark.parametrize(
    ("template", "content", "thinking", "answer"),
    [
        ("qwq", f"Harmless.\n{CLOSE}\n\nMix.", "Harmless.", "Mix."),
        ("qwq", f"{OPEN}\nHarmless.\n{CLOSE}\n\nMix.", "Harmless.", "Mix."),
        ("qwq", f"Harmless.{CLOSE}Mix {CLOSE} it.", "Harmless.", f"Mix {CLOSE} it."),
        ("qwq", "Harmless, so", "Harmless, so", None),
        ("qwen3", f"{OPEN}\nHarmless.\n{CLOSE}\n\nMix.", "Harmless.", "Mix."),
        ("qwen3", f"{OPEN}\n\n{CLOSE}\n\nMix.", "", "Mix."),
        ("qwen3", f"{OPEN}\nHarmless, so", "Harmless, so", None),
        ("qwen3", "Mix.", None, "Mix."),
        ("olmo-3", f"Harmless.{CLOSE}Mix.", "Harmless.", "Mix."),
        ("magistral", "[THINK]Harmless.[/THINK]Mix.", "Harmless.", "Mix."),
        ("chatml", "Mix.", None, "Mix."),
    ],
)
def test_thinking_is_split_off_by_the_templates_tags(
    template: str, content: str, thinking: str | None, answer: str | None
) -> None:
    t = one({"content": content}, template)
    assert (t.thinking, t.answer, t.closed) == (thinking, answer, answer is not None)


def test_harmony_is_split_off_where_its_tokens_are_kept() -> None:
    harmony = TEMPLATES.get("harmony")
    t = one({"content": f"{harmony.think_open}Harmless.{harmony.closing}Mix."}, "harmony")
    assert (t.thinking, t.answer) == ("Harmless.", "Mix.")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_that_a_server_gives_in_both_fields_is_taken_once(name: str) -> None:
    for content in (f"{OPEN}\nHarmless.\n{CLOSE}\n\nMix.", f"Harmless.\n{CLOSE}\n\nMix."):
        t = one({name: "Harmless.", "content": content})
        assert (t.thinking, t.answer) == ("Harmless.", "Mix.")


def test_channels_whose_marks_a_server_stripped_are_split() -> None:
    t = one({"content": "analysisHarmless.assistantfinalMix."}, "harmony")
    assert (t.thinking, t.answer) == ("Harmless.", "Mix.")


def test_a_refusal_in_a_field_of_its_own_is_a_refusal() -> None:
    t = one({"content": None, "refusal": "Not this."}, "chatml")
    assert t.answer == "Not this."
    assert judge(Transcripts([t]))[0].outcome is Outcome.REFUSED


def test_labels_and_ids_are_kept_and_old_answers_replaced() -> None:
    old = Transcript(
        id="a",
        messages=(Message(role="user", content="Hi"),),
        thinking="old",
        answer="old",
        thinking_ids=(1,),
        answer_ids=(2,),
        harmful=True,
        outcome=Outcome.REFUSED,
        source="file",
        extra={"kept": 1},
    )
    with serving(Failing()) as server:
        new = ServerEngine(endpoint=server.endpoint(), template="chatml", system="Be brief.").roll_out(
            Transcripts([old])
        )[0]
    assert (new.id, new.harmful, new.source, new.extra["kept"]) == ("a", True, "file", 1)
    assert (new.thinking, new.answer, new.thinking_ids, new.answer_ids) == (None, "reply to Hi", None, None)
    assert new.outcome is Outcome.UNJUDGED
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_budget_sampling_and_further_fields_are_sent() -> None:
    with serving(Failing()) as server:
        endpoint = server.endpoint(extra_body={"chat_template_kwargs": {"enable_thinking": True}})
        ServerEngine(endpoint=endpoint, template="chatml", max_tokens=7, temperature=0.5, seed=3).roll_out(
            prompts("Hi")
        )
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("toy", 7, 0.5, 3)
    assert body["chat_template_kwargs"] == {"enable_thinking": True}


def test_a_bad_server_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    failures = ["500", "429", "cut", "malformed", "slow", "html"]
    texts = [f"question {i}" for i in range(30)]
    script = {text: failures[i % 6 : i % 6 + 2] for i, text in enumerate(texts)} | {"question 29": ["500"] * 99}
    given = Transcripts(
        prompts(*texts, "  \n"), omitted=[Omission(stage="read_prompts", reason="duplicate", id="elsewhere")]
    )
    with serving(Failing(script=script)) as server:
        engine = ServerEngine(
            # A good reply that a loaded machine delays beyond the timeout would be requested again.
            endpoint=server.endpoint(timeout_seconds=SLOW_SECONDS * 0.8, concurrency=8),
            template="chatml",
            resume=tmp_path / "answers.jsonl",
        )
        first = engine.roll_out(given)
        again = engine.roll_out(given)
    assert [t.answer for t in first] == [f"reply to question {i}" for i in range(29)]
    assert first == again
    assert {o.id for o in first.omitted} == {"elsewhere", "p29", "p30"}
    assert {o.id: o.reason for o in first.omitted}["p30"] == "the prompt is blank"
    assert "status 500" in {o.id: o.reason for o in first.omitted}["p29"]
    # Each prompt was answered once, the second run asked only what had failed.
    assert all(server.answered[text] == 1 for text in texts[:29])


def test_a_server_that_is_not_there_is_a_server_error() -> None:
    with serving(Failing()) as server:
        endpoint = server.endpoint(attempts=1)
    with pytest.raises(ServerError, match="ConnectError"):
        ServerEngine(endpoint=endpoint, template="chatml").roll_out(prompts("Hi"))


def test_blank_prompts_alone_ask_no_server() -> None:
    with serving(Failing()) as server:
        found = ServerEngine(endpoint=server.endpoint(), template="chatml").roll_out(prompts("", "\n"))
    assert not len(found)
    assert len(found.omitted) == 2
    assert not server.asked


def test_impossible_settings_are_refused() -> None:
    with serving(Failing()) as server:
        endpoint = server.endpoint()
    with pytest.raises(TemplateError, match="There is no template 'qwen'"):
        ServerEngine(endpoint=endpoint, template="qwen")
    with pytest.raises(GenerationError, match="max_tokens=0"):
        ServerEngine(endpoint=endpoint, template="chatml", max_tokens=0)


def test_the_local_engine_is_roll_out() -> None:
    model = cs.load_model("planted-llama")
    asked = cs.organisms.prompts("test", 2, harmful=True)
    engine = LocalEngine(model=model, budget=Budget(max_thinking=64, max_answer=16))
    assert isinstance(engine, Engine)
    assert engine.roll_out(asked) == cs.roll_out(model, asked, max_thinking=64, max_answer=16)
