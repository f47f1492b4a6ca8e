"""What does a tokenizer's chat template write, and what does its source hold?

1. `render_chat` renders turns as text with the tokenizer's own chat template, on a date that does not change.
2. `read_source` parses the source: its texts, the runs of text around what is filled in, the variables that it takes,
   and the fields of a message that it reads. Comments are no part of it.

Knows no conventions: conventions.py compares what this file returns.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date as calendar_date
from datetime import datetime

from jinja2 import Environment, meta, nodes
from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from cliffscope.errors import TemplateError

CLOCK = "strftime_now"
"""Name under which a chat template reads the clock."""
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_FAILURES = (JinjaError, ValueError, TypeError, KeyError, AttributeError, IndexError)

Turn = Mapping[str, object]


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """What the source of a chat template holds."""

    texts: tuple[str, ...]
    """Every text in it, written or compared with."""
    runs: tuple[tuple[str | None, ...], ...]
    """What is written at once: texts, and None for what is filled in."""
    variables: frozenset[str]
    """Variables that it takes from outside."""
    fields: tuple[str, ...]
    """Names of attributes and keys that it reads, in order."""

    @property
    def dated(self) -> bool:
        """Whether it reads the clock."""
        return CLOCK in self.variables


def chat_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of a tokenizer's chat template.

    Args:
        tokenizer: the model's own.

    Returns:
        Its Jinja text.

    Raises:
        TemplateError: there is none.
    """
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str) or not source.strip():
        raise TemplateError(
            "The tokenizer has no chat template, so no prompt can be rendered. Set tokenizer.chat_template to the "
            "model's own Jinja text, or use the chat model instead of its base model."
        )
    return source


def read_source(source: str) -> Source:
    """Parses the source of a chat template.

    Args:
        source: Jinja text.

    Returns:
        What it holds; nothing where it is no valid Jinja, which rendering will say.
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # parsed only, never rendered
    try:
        tree = environment.parse(_GENERATION.sub("", source))
    except JinjaError:
        return Source(texts=(), runs=(), variables=frozenset(), fields=())
    texts = [str(node.value) for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    texts += [node.data for node in tree.find_all(nodes.TemplateData)]
    return Source(
        texts=tuple(dict.fromkeys(texts)),
        runs=tuple(_run(node) for node in tree.find_all((nodes.Output, nodes.Add, nodes.Concat))),
        variables=frozenset(meta.find_undeclared_variables(tree)),
        fields=tuple(dict.fromkeys(_fields(tree))),
    )


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    switches: Mapping[str, bool],
    *,
    generation: bool,
    date: str = "",
) -> str:
    """Renders turns as text, exactly as the tokenizer's chat template writes them.

    Args:
        tokenizer: with a chat template.
        turns: with `role` and `content`, and whatever else the chat template reads.
        switches: variables of the chat template.
        generation: whether to write the generation prompt.
        date: the day, as 2026-01-31, that the chat template takes for today; "" leaves it to the clock.

    Returns:
        The text.

    Raises:
        TemplateError: there is no chat template, or it rejects these turns.
    """
    source = chat_source(tokenizer)
    variables: dict[str, object] = dict(switches)
    if date:
        variables["chat_template"] = _on_day(source, date)
    # The typed signature lacks the chat template's own keyword arguments.
    render: Callable[..., object] = tokenizer.apply_chat_template
    try:
        return str(render([dict(t) for t in turns], tokenize=False, add_generation_prompt=generation, **variables))
    except _FAILURES as error:
        roles = ", ".join(str(turn.get("role", "?")) for turn in turns)
        raise TemplateError(
            f"The chat template cannot render messages with the roles {roles}: {error}. Expected roles that the model "
            "supports (some have no system role). Change the messages or the template."
        ) from error


def try_render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], switches: Mapping[str, bool], *, generation: bool
) -> str | None:
    """As `render_chat`; None where the chat template rejects the turns."""
    with suppress(TemplateError):
        return render_chat(tokenizer, turns, switches, generation=generation)
    return None


def today() -> str:
    """The current day, as 2026-01-31."""
    return calendar_date.today().isoformat()


def _on_day(source: str, date: str) -> str:
    """The source with a clock that stands still; functions cannot be passed to a chat template, text can."""
    day = datetime.fromisoformat(date)
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))
    forms = [
        arg.value
        for call in tree.find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and call.node.name == CLOCK
        for arg in call.args
        if isinstance(arg, nodes.Const) and isinstance(arg.value, str)
    ]
    days = json.dumps({form: day.strftime(form) for form in forms}, ensure_ascii=False)
    # The empty expression keeps a newline at the start of the source, which Jinja drops behind a block.
    return f"{{% macro {CLOCK}(form) %}}{{{{ {days}[form] }}}}{{% endmacro %}}{{{{ '' }}}}{source}"


def _run(node: nodes.Node) -> tuple[str | None, ...]:
    """Texts of a concatenation, neighbours joined, with None for each thing that is filled in."""
    run: list[str | None] = []
    for part in _flatten(node):
        if part is not None and run and run[-1] is not None:
            run[-1] += part
        else:
            run.append(part)
    return tuple(run)


def _flatten(node: nodes.Node) -> Iterator[str | None]:
    if isinstance(node, nodes.TemplateData):
        yield node.data
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, nodes.Output | nodes.Concat):
        for child in node.nodes:
            yield from _flatten(child)
    elif isinstance(node, nodes.Add):
        yield from _flatten(node.left)
        yield from _flatten(node.right)
    else:
        yield None


def _fields(tree: nodes.Template) -> Iterator[str]:
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Call, nodes.Compare)):
        if isinstance(node, nodes.Getattr):
            yield node.attr
        for child in node.iter_child_nodes():
            if isinstance(child, nodes.Const) and isinstance(child.value, str):
                yield child.value
