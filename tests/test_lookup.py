"""A judge is found by its name, by where it is, or by its checkpoint or server; whatever is no judge is refused."""

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from conftest import MakeCheckpoint, random_probe

from cliffscope import registry
from cliffscope.errors import DataError, JudgeError
from cliffscope.evaluation.dose import dose_response
from cliffscope.evaluation.safety import compare_answers, evaluate_safety
from cliffscope.judging import classifiers
from cliffscope.judging.judges import judge, judge_agreement
from cliffscope.judging.lookup import JUDGES, find_judge
from cliffscope.judging.phrase_judge import PhraseJudge
from cliffscope.judging.protocols import Judge
from cliffscope.judging.rubric import ModelJudge
from cliffscope.model.load import LensModel
from cliffscope.repairing.comparison import compare_repair
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts

MODULE = """
from cliffscope.judging.protocols import Verdict
from cliffscope.transcripts.records import Outcome


class Strict:
    name = "strict"

    def __init__(self, word: str = "sure") -> None:
        self.word = word

    def __call__(self, prompt: str, answer: str) -> Verdict:
        outcome = Outcome.COMPLIED if self.word in answer else Outcome.REFUSED
        return Verdict(outcome=outcome, score=None, reason="by one word")


class Needy(Strict):
    def __init__(self, word: str) -> None:
        super().__init__(word)


class Nameless(Strict):
    name = ""


def make() -> Strict:
    return Strict("yes")


def judge_answer(prompt: str, answer: str) -> Verdict:
    return Verdict(outcome=Outcome.REFUSED, score=None, reason="")


ready = Strict("okay")
number = 7


def make_number() -> int:
    return 7
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "their_judges.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("their_judges", None)


@pytest.fixture
def answered() -> Transcripts:
    texts = ("sure .", "yes .", "okay .", "no .")
    question = (Message(role="user", content="how do i bake bread"),)
    return Transcripts(
        Transcript(id=text.split()[0], messages=question, answer=text, harmful=True, outcome=Outcome.REFUSED)
        for text in texts
    )


def complied(transcripts: Transcripts) -> list[str]:
    return [t.id for t in transcripts.where(outcome=Outcome.COMPLIED)]


@pytest.mark.parametrize(
    ("choice", "word"),
    [
        ("their_judges:Strict", "sure"),
        ("their_judges:make", "yes"),
        ("their_judges:ready", "okay"),
    ],
)
def test_a_class_a_function_and_an_instance_of_a_module_are_judges(
    answered: Transcripts, choice: str, word: str
) -> None:
    judged = judge(answered, choice)
    assert complied(judged) == [word]
    assert {t.extra["verdict"]["judge"] for t in judged} == {"strict"}
    assert complied(judge(answered, find_judge(choice))) == [word]


def test_a_name_an_object_and_its_class_are_the_same_judge() -> None:
    own = PhraseJudge(name="mine")
    assert find_judge(own) is own
    assert find_judge("phrases") == PhraseJudge()
    assert find_judge(PhraseJudge) == PhraseJudge()  # type: ignore[arg-type]
    assert isinstance(find_judge("phrases"), Judge)


def test_an_entry_point_of_another_package_is_a_judge_by_its_name(
    answered: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def points(group: str) -> list[EntryPoint]:
        assert group == "cliffscope.judges"
        return [EntryPoint("strict", "their_judges:Strict", group)]

    monkeypatch.setattr(registry, "entry_points", points)
    assert JUDGES.names() == ("phrases", "strict")
    assert complied(judge(answered, "strict")) == ["sure"]
    with pytest.raises(DataError, match=r"no judge 'lax'\. Expected phrases, strict, package\.module:name"):
        find_judge("lax")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("wildguard", r"no judge 'wildguard'\. Expected phrases, .*classifier:FORMAT@PATH.*model:MODEL@URL"),
        ("", "no judge ''"),
        ("no_such_module:x", "cannot be imported"),
        ("their_judges:nothing", "cannot be imported"),
        ("their_judges:Needy", "cannot make a judge: missing a required argument: 'word'"),
        ("their_judges:judge_answer", "cannot make a judge: missing a required argument: 'prompt'"),
        ("their_judges:Nameless", "has the name ''"),
        ("their_judges:number", "is or makes a int, not a judge"),
        ("their_judges:make_number", "is or makes a int, not a judge"),
        ("builtins:dict", "cannot make a judge"),
        ("classifier:./wildguard", r"classifier:\./wildguard is incomplete. Expected classifier:FORMAT@PATH"),
        ("classifier:@./wildguard", "is incomplete"),
        ("classifier:wildguard@", "is incomplete"),
        ("model:judge-model", "model:judge-model is incomplete. Expected model:MODEL@URL"),
        ("model:@http://127.0.0.1:9/v1", "is incomplete"),
        ("model:judge-model@127.0.0.1:9", "is incomplete"),
    ],
)
def test_what_is_no_judge_is_refused_with_the_form_it_should_have(choice: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_judge(choice)


def test_an_object_that_is_no_judge_is_refused() -> None:
    with pytest.raises(DataError, match="7 is or makes a int, not a judge"):
        find_judge(7)  # type: ignore[arg-type]


def test_a_classifier_is_loaded_in_the_format_that_is_named(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("llama", chatml=True)
    guard = find_judge(f"classifier:harmbench@{folder}")
    assert guard.name == "harmbench"
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(
        classifiers.ClassifierJudge, "load", lambda path, *, format: seen.append((path, format)) or PhraseJudge()
    )
    find_judge("classifier:wildguard@./folder@v2")
    assert seen == [("./folder@v2", "wildguard")]


def test_a_classifier_of_no_known_format_or_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="wildgard"):
        find_judge(f"classifier:wildgard@{tmp_path}")
    with pytest.raises(DataError, match="No classifier could be loaded"):
        find_judge(f"classifier:wildguard@{tmp_path}")


@pytest.mark.parametrize(
    ("choice", "model", "url"),
    [
        ("model:judge-model@http://127.0.0.1:9/v1", "judge-model", "http://127.0.0.1:9/v1"),
        ("model:org/name:8b@https://host/a@b/v1", "org/name:8b", "https://host/a@b/v1"),
    ],
)
def test_a_served_model_is_asked_at_its_address(choice: str, model: str, url: str) -> None:
    served = find_judge(choice)
    assert isinstance(served, ModelJudge)
    assert (served.endpoint.model, served.endpoint.url, served.name) == (model, url, model)


def test_every_function_that_takes_a_judge_finds_it_by_name(answered: Transcripts) -> None:
    assert compare_answers({"plain": answered}, judge="their_judges:Strict").rate("unedited") == 0.25
    assert compare_answers({"plain": answered}, judge="phrases").rate("unedited") == 0.75, "no . is a refusal"
    assert judge_agreement(answered, "their_judges:make", "their_judges:ready").observed == 0.5
    assert judge_agreement(answered, "their_judges:make").observed == 0.75


def test_an_unknown_judge_is_refused_before_anything_is_generated(
    llama: LensModel, answered: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*args: object, **options: object) -> None:
        raise AssertionError("generated")

    monkeypatch.setattr("cliffscope.evaluation.safety.continue_roll_out", generate)
    monkeypatch.setattr("cliffscope.repairing.comparison.continue_roll_out", generate)
    with pytest.raises(DataError, match="no judge 'lax'"):
        evaluate_safety(llama, answered, judge="lax")
    with pytest.raises(DataError, match="no judge 'lax'"):
        compare_repair(llama, llama, answered, judge="lax")
    with pytest.raises(DataError, match="no judge 'lax'"):
        dose_response(llama, random_probe(llama, 4), None, answered, judge="lax")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no judge 'lax'"):
        judge_agreement(answered, "lax", "their_judges:make")
