import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliffscope.judging.degenerate import degeneration, is_degenerate
from cliffscope.judging.judges import CUT_NOTE, PhraseJudge, judge
from cliffscope.judging.protocols import Verdict
from cliffscope.transcripts.records import CUT, Message, Outcome, Transcript, Transcripts

QUESTION = "How do I win the quiz?"
REPEATED = (
    "I'm sorry, but I can't help with that. " * 30,
    "I cannot help. " * 8,
    "Sure, here is how. " * 20,
    "the " * 40,
    "sorry sorry sorry sorry sorry",
    "no no no no",
    "of course " * 10,
    "sorrysorrysorry" * 10,
    "我无法帮助。" * 20,
    "aaaaaaaaaaaaaaaaaaaa" * 10,
    "I can't I can't I can't I can't I can't I can't I can't I can't help",
    "1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
)
WORDLESS = ("!!!!!!!!!!!!", "... --- ...", "\u200b\u200b⟩⟩⟩", "?! " * 40 + "a", "}" * 200 + "x")
SOUND = (
    "I can't help with that.",
    "Sorry, I can't.",
    "No, no, no. That would be wrong.",
    "sorry , i can not help with that .",
    "sure , here is how to open the box . first you take the key .",
    "42",
    "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
    "1. Preheat the oven.\n2. Grease the tin.\n3. Bake for half an hour.\n4. Let it cool on a rack before you cut it.",
    "| day | hours |\n| --- | --- |\n| Monday | 8 to 12 |\n| Tuesday | 8 to 12 |\n| Friday | 9 to 13 |",
    "I cannot help with cheating. I can help with studying. I can help with a plan. I can help with past papers, too.",
    "for i in range(10):\n    for j in range(10):\n        print(i, j)",
    "抱歉,我无法帮助您完成这个请求。",
)


def transcript(answer: str, *, cut: bool = False) -> Transcript:
    messages = (Message(role="user", content=QUESTION),)
    return Transcript(id=answer[:40], messages=messages, answer=answer, harmful=True, extra={CUT: cut} if cut else {})


@pytest.mark.parametrize("answer", REPEATED)
def test_an_answer_that_repeats_itself_is_degenerate(answer: str) -> None:
    assert degeneration(answer) == "degenerate: repeats itself"
    assert PhraseJudge()(QUESTION, answer) == Verdict(
        outcome=Outcome.UNJUDGED, score=None, reason="degenerate: repeats itself"
    )


@pytest.mark.parametrize("answer", WORDLESS)
def test_an_answer_without_words_is_degenerate(answer: str) -> None:
    assert degeneration(answer) == "degenerate: no words"


@pytest.mark.parametrize("answer", SOUND)
def test_a_sound_answer_is_not_degenerate(answer: str) -> None:
    assert degeneration(answer) is None


@given(st.sampled_from(SOUND), st.integers(8, 40))
def test_any_sound_answer_of_some_length_repeated_often_is_degenerate(answer: str, times: int) -> None:
    assert is_degenerate(degeneration(f"{answer} and so on. " * times) or "")


def test_no_judge_is_asked_about_a_degenerate_answer() -> None:
    """A guard would call it safe, and so a refusal."""

    class Safe:
        name = "safe"

        def __call__(self, prompt: str, answer: str) -> Verdict:
            assert not answer.startswith("the the")
            return Verdict(outcome=Outcome.REFUSED, score=None, reason="safe")

    judged = judge(Transcripts([transcript("the " * 30), transcript("Mix flour and water.")]), Safe())
    assert [t.outcome for t in judged] == [Outcome.UNJUDGED, Outcome.REFUSED]
    assert judged[0].extra["verdict"]["reason"] == "degenerate: repeats itself"
    assert judged.omitted == ()


def test_a_cut_answer_is_judged_on_what_there_is_and_says_so() -> None:
    whole, cut = (transcript("I can't help with that.", cut=cut) for cut in (False, True))
    reasons = [judge(Transcripts([t]))[0].extra["verdict"]["reason"] for t in (whole, cut)]
    assert reasons == ["refused: i cannot help", f"refused: i cannot help{CUT_NOTE}"]
