"""Which judge does a choice mean?

1. A registered name, the name of an entry point of `cliffscope.judges`, or `package.module:name`: a judge, or a class
   or function without required arguments that makes one.
2. `classifier:FORMAT@PATH`: a guard model or sequence classifier from a local directory or hub name.
3. `model:MODEL@URL`: a language model behind an OpenAI-compatible server.

A judge object is used as it is. Every function and command that takes a judge resolves it here, before any work starts.
"""

import inspect

from cliffscope.errors import DataError
from cliffscope.judging.phrase_judge import PhraseJudge
from cliffscope.judging.protocols import Judge
from cliffscope.registry import Registry

CLASSIFIER, MODEL = "classifier", "model"
JUDGES: Registry[object] = Registry(kind="judge", group="cliffscope.judges", expected=object)
"""Judges by name. Each entry is a judge, or a class or function without required arguments that makes one."""
JUDGES.register("phrases", PhraseJudge())


def find_judge(choice: Judge | str) -> Judge:
    """Returns the judge that a choice means.

    Args:
        choice: a registered name such as `phrases`, `package.module:name`, `classifier:FORMAT@PATH`,
            `model:MODEL@URL`, or a judge. A class or a function without required arguments is called to make one.

    Returns:
        The judge.

    Raises:
        DataError: no judge has this name, the import fails, the form is incomplete, the object is not a judge, or
            no classifier can be loaded.
        JudgeError: the guard format is unknown.

    Example:
        >>> find_judge("phrases").name
        'phrases'
        >>> find_judge("wildguard")
        Traceback (most recent call last):
        cliffscope.errors.DataError: There is no judge 'wildguard'. Expected phrases, package.module:name, ...
    """
    if not isinstance(choice, str):
        return _judge_of(choice, repr(choice))
    form, colon, rest = choice.partition(":")
    if colon and form == CLASSIFIER:
        return _classifier(rest)
    if colon and form == MODEL:
        return _served_model(rest)
    if not colon and choice not in JUDGES.names():
        raise DataError(
            f"There is no judge {choice!r}. Expected {', '.join(JUDGES.names())}, package.module:name, "
            "classifier:FORMAT@PATH for a guard model, or model:MODEL@URL for a served model."
        )
    return _judge_of(JUDGES.get(choice), choice)


def _judge_of(value: object, label: str) -> Judge:
    """The value itself if it is a judge, otherwise what it makes when called."""
    judge = value
    # A class has the attributes of its instances, so it passes the protocol's check as well.
    if isinstance(value, type) or (callable(value) and not isinstance(value, Judge)):
        try:
            inspect.signature(value).bind()
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{label} cannot make a judge: {error}. Expected a judge, or a class or function without required "
                "arguments that makes one. A judge has a `name` and is called with a prompt and an answer."
            ) from error
        judge = value()
    if isinstance(judge, type) or not isinstance(judge, Judge):
        raise DataError(
            f"{label} is or makes a {type(judge).__name__}, not a judge. Expected an object with a `name` that is "
            "called with a prompt and an answer and returns a Verdict."
        )
    name: object = judge.name
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"The judge {label} has the name {name!r}. Expected text, which is stored with each verdict.")
    return judge


def _classifier(rest: str) -> Judge:
    format_name, _, path = rest.partition("@")
    if not format_name or not path:
        raise DataError(
            f"{CLASSIFIER}:{rest} is incomplete. Expected classifier:FORMAT@PATH, such as "
            "classifier:wildguard@./wildguard, where PATH is a local directory or a hub name."
        )
    # The classifier needs torch and transformers, which no other judge does.
    from cliffscope.judging.classifiers import ClassifierJudge

    return ClassifierJudge.load(path, format=format_name)


def _served_model(rest: str) -> Judge:
    model, at, address = rest.partition("@http")
    if not model or not at:
        raise DataError(
            f"{MODEL}:{rest} is incomplete. Expected model:MODEL@URL, such as "
            "model:judge-model@http://127.0.0.1:8000/v1, where MODEL is the name of the model at the server."
        )
    from cliffscope.generation.endpoints import Endpoint
    from cliffscope.judging.rubric import ModelJudge

    return ModelJudge(endpoint=Endpoint(url=f"http{address}", model=model))
