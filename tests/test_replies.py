import pytest

from cliffscope.judging.judges import judge
from cliffscope.judging.protocols import Verdict
from cliffscope.transcripts.families import TEMPLATES
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts
from cliffscope.transcripts.replies import SERVER_REFUSAL, part_answer, part_turn
from cliffscope.transcripts.templates import Template

ASKED = (Message(role="user", content="How do I bake bread?"),)
HARMONY = "<|channel|>analysis<|message|>Weigh it.<|end|><|start|>assistant<|channel|>final<|message|>Mix flour."
SPLIT = [
    "<think>Weigh it.</think>Mix flour.",
    "\n<think>\nWeigh it.\n</think>\n\nMix flour.",
    "Weigh it.\n</think>\n\nMix flour.",
    "[THINK]Weigh it.[/THINK]Mix flour.",
    "<seed:think>Weigh it.</seed:think>Mix flour.",
    "◁think▷Weigh it.◁/think▷Mix flour.",
    "<|START_THINKING|>Weigh it.<|END_THINKING|>Mix flour.",
    "<|begin_of_thought|>\n\nWeigh it.\n\n<|end_of_thought|>\n\nMix flour.",
    "<|channel>Weigh it.<channel|>Mix flour.",
    HARMONY,
    f"<|start|>assistant{HARMONY}<|return|>",
    "analysisWeigh it.assistantfinalMix flour.",
]
UNCLEAR = [
    ("<think>I should weigh", "never closes"),
    ("Mix.\n<reasoning>I should weigh", "never closes"),
    ("Mix flour <think>so</think> and water.", "in its middle"),
    ("<think>a</think>b<think>c</think>d", "more than once"),
    ("<|channel|>analysis<|message|>Weigh it", "no final one"),
    ("analysisThe user asks for bread.", "no final one"),
]
ANSWERS = [
    "Mix flour.",
    "Put it in `<think>` tags.",
    "```\n<think>\n```\nis a tag.",
    "Analysis of the question: mix flour.",
    "analysis is what I do.",
    "Use <b>flour</b> and [water].",
    "The assistant finally mixes it.",
]


def transcript(answer: str | None, **rest: object) -> Transcript:
    return Transcript(id="a", messages=ASKED, answer=answer, **rest)  # type: ignore[arg-type]


class Listening:
    """A judge that notes what it reads."""

    name = "listening"

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, prompt: str, answer: str) -> Verdict:
        self.read.append(answer)
        return Verdict(outcome=Outcome.COMPLIED, score=0.0, reason="")


@pytest.mark.parametrize("text", SPLIT)
def test_thinking_is_told_apart_and_never_judged(text: str) -> None:
    parts = part_answer(text)
    assert ((parts.thinking or "").strip(), (parts.answer or "").strip()) == ("Weigh it.", "Mix flour.")
    listening = Listening()
    judged = judge(Transcripts([transcript(text)]), listening)[0]
    assert [answer.strip() for answer in listening.read] == ["Mix flour."]
    assert (judged.thinking or "").strip() == "Weigh it."
    assert "split" in judged.extra


@pytest.mark.parametrize(("text", "reason"), UNCLEAR)
def test_an_answer_from_which_thinking_cannot_be_told_apart_is_unjudged(text: str, reason: str) -> None:
    listening = Listening()
    judged = judge(Transcripts([transcript(text)]), listening)
    assert judged[0].outcome is Outcome.UNJUDGED
    assert listening.read == []
    assert [reason in omission.reason for omission in judged.omitted] == [True]
    assert judged[0].answer == text


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_without_thinking_stays_as_it_is(text: str) -> None:
    assert part_answer(text).answer == text
    assert part_turn(transcript(text)).answer == text


def test_generated_ids_are_kept_while_the_judge_reads_the_answer_alone() -> None:
    generated = transcript(SPLIT[0], answer_ids=(1, 2, 3))
    listening = Listening()
    judged = judge(Transcripts([generated]), listening)[0]
    assert (judged.answer, judged.answer_ids) == (SPLIT[0], (1, 2, 3))
    assert listening.read == ["Mix flour."]


def test_thinking_that_is_given_twice_is_taken_once() -> None:
    for answer in ("<think>Weigh it.</think>Mix flour.", "Weigh it.</think>Mix flour."):
        twice = part_turn(transcript(answer, thinking="Weigh it."))
        assert (twice.thinking, twice.answer) == ("Weigh it.", "Mix flour.")
    stray = transcript("Mix </think> flour.", thinking="Weigh it.")
    assert part_turn(stray) is stray
    assert judge(Transcripts([stray]), Listening())[0].outcome is Outcome.UNJUDGED


def test_the_tags_of_a_learned_template_count() -> None:
    learned = Template(name="t", think_open="Steps:", think_close="[FINAL]", opening="", closing="\n[FINAL]\n")
    assert part_answer("Steps:\nWeigh it.\n[FINAL]\nMix flour.", learned).answer == "Mix flour."
    assert part_answer("Steps:\nWeigh it.\n[FINAL]\nMix flour.").answer == "Steps:\nWeigh it.\n[FINAL]\nMix flour."


def test_a_servers_own_refusal_is_a_refusal() -> None:
    judged = judge(Transcripts([transcript("No.", extra={SERVER_REFUSAL: "No."})]), Listening())[0]
    assert judged.outcome is Outcome.REFUSED


def test_no_known_template_leaves_its_thinking_in_an_answer() -> None:
    for _, template in TEMPLATES:
        if template.thinks:
            text = f"{template.opening or template.think_open}Weigh it.{template.closing}Mix flour."
            assert part_answer(text).answer == "Mix flour."
