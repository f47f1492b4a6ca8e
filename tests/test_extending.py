"""A user's own judge, template and criterion, in a module that nobody registered, work by name everywhere."""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pandas as pd
import pytest
from conftest import random_probe, written
from test_cli import Shell, shell  # noqa: F401 - a fixture

import cliffscope as cs
from cliffscope import registry
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.selection.choice import select_from_cliffs, select_from_pool
from cliffscope.store import open_run
from cliffscope.study.saved_readouts import save_probe
from cliffscope.transcripts.datasets import read_transcripts, write_transcripts
from cliffscope.transcripts.records import Outcome, Transcripts
from cliffscope.transcripts.transcript import Span, tokenize

JUDGE, TEMPLATE, CRITERION = "toy_extensions:WordJudge", "toy_extensions:BRACKETS", "toy_extensions:SHORTEST"
MODULE = '''
"""Everything that a user brings, in one file."""

from cliffscope.judging.protocols import Verdict
from cliffscope.selection.criteria import Criterion
from cliffscope.transcripts.families import Template
from cliffscope.transcripts.records import Outcome


class WordJudge:
    name = "one word"

    def __call__(self, prompt: str, answer: str) -> Verdict:
        refused = "sorry" in answer.lower()
        outcome = Outcome.REFUSED if refused else Outcome.COMPLIED
        return Verdict(outcome=outcome, score=float(refused), reason="one word decides")


BRACKETS = Template(
    name="brackets", think_open="<think>", think_close="</think>", opening="", closing="</think> so "
)
SHORTEST = Criterion(
    name="shortest",
    summary="the shortest thinking",
    columns=("n_thinking",),
    values=lambda table: -table["n_thinking"],
)
'''


@pytest.fixture(autouse=True)
def module(tmp_path: Path) -> Iterator[Path]:
    """The module's folder, which is not on the path yet."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "toy_extensions.py").write_text(MODULE, encoding="utf-8")
    before = list(sys.path)
    yield folder
    sys.path[:] = before
    sys.modules.pop("toy_extensions", None)


@pytest.fixture
def importable(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(module)


@pytest.fixture(scope="module")
def pool() -> Transcripts:
    return written(12, harmful=True, outcome=Outcome.COMPLIED)


@pytest.fixture(scope="module")
def probe(llama: LensModel) -> RefusalProbe:
    return random_probe(llama, 4)


def shortest(model: LensModel, pool: Transcripts, number: int) -> list[str]:
    """Ids of the shortest thinking in tokens, counted here."""
    lengths = {}
    for t in pool:
        span = tokenize(t, model.tokenizer, model.template).span(Span.THINKING)
        lengths[t.id] = span.stop - span.start
    return sorted(lengths, key=lambda name: (lengths[name], name))[:number]


@pytest.mark.usefixtures("importable")
def test_a_judge_of_ones_own_judges_compares_and_evaluates(llama: LensModel, pool: Transcripts) -> None:
    refused = pool.map(lambda t: t.replace(answer="Sorry, I can't help with that."))
    judged = cs.judge(refused, JUDGE)
    assert {t.outcome for t in judged} == {Outcome.REFUSED}
    assert {t.extra["verdict"]["judge"] for t in judged} == {"one word"}
    helped = pool.map(lambda t: t.replace(answer="here it is ."))
    report = cs.compare_answers({"plain": helped, "edited": refused}, judge=JUDGE)
    assert (report.rate("unedited"), report.rate("edited")) == (1.0, 0.0)
    assert cs.judge_agreement(refused, JUDGE, "phrases").observed == 1.0
    measured = cs.evaluate_safety(llama, pool[:2], judge=JUDGE, max_thinking=2, max_answer=2)
    assert len(measured.outcomes) == 2


@pytest.mark.usefixtures("importable")
def test_a_template_of_ones_own_closes_the_thinking(llama: LensModel, pool: Transcripts, checkpoints) -> None:
    model = cs.load_model(checkpoints["llama"], template=TEMPLATE, device="cpu")
    assert model.template.name == "brackets"
    ids = tokenize(pool[0], model.tokenizer, model.template)
    closing = model.tokenizer.decode(ids.token_ids[ids.span(Span.CLOSING)])
    assert closing == model.tokenizer.decode(model.tokenizer.encode("</think> so ", add_special_tokens=False))
    assert closing != llama.template.closing


@pytest.mark.usefixtures("importable")
def test_a_criterion_of_ones_own_selects_from_transcripts_cliffs_and_scores(
    llama: LensModel, probe: RefusalProbe, pool: Transcripts
) -> None:
    expected = shortest(llama, pool, 3)
    direct = cs.select_by_cliff(llama, probe, pool, number=3, criterion=CRITERION)
    assert [t.id for t in direct.selected] == expected
    assert repr(direct) == "Selection(3 of 12 by shortest, left out 0)"
    cliffs = cs.trace_refusal(llama, probe, pool).cliffs()
    characters = sorted(pool, key=lambda t: (len(t.thinking or ""), t.id))[:3]
    assert list(select_from_cliffs(cliffs, pool, number=3, criterion=CRITERION).selected) == characters
    scored = select_from_pool(cs.score_pool(llama, probe, pool), pool, number=3, criterion=CRITERION)
    assert [t.id for t in scored.selected] == expected


def test_extensions_are_found_in_the_working_directory_of_the_command_line(
    shell: Shell,  # noqa: F811
    module: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: dict[str, Path],
    probe: RefusalProbe,
    pool: Transcripts,
    llama: LensModel,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(module)
    given, judged = tmp_path / "pool.jsonl", tmp_path / "judged.jsonl"
    write_transcripts(pool.map(lambda t: t.replace(answer="Sorry, I can't help with that.")), given)
    found = shell("judge", "--judge", JUDGE, "--transcripts", given, "--out", judged, "--json")
    assert found.code == 0, found.err
    assert found.json["refused"] == 12
    assert read_transcripts(judged)[0].extra["verdict"]["judge"] == "one word"

    shown = shell("template", "--model", checkpoints["llama"], f"--template={TEMPLATE}", "--json")
    assert shown.code == 0, shown.err
    assert shown.json["template"] == "brackets"

    with open_run(tmp_path / "probe", {}) as store:
        save_probe(store, probe)
    write_transcripts(pool, given)
    words = ("--model", checkpoints["llama"], "--probe", tmp_path / "probe", "--transcripts", given)
    selected = shell("select", *words, "--out", tmp_path / "x.jsonl", "--number", 3, "--criterion", CRITERION, "--json")
    assert selected.code == 0, selected.err
    assert selected.json["chosen"] == shortest(llama, pool, 3)

    small = ("--max-thinking", 2, "--max-answer", 2, "--judge", JUDGE, "--limit", 4, "--harmful")
    evaluated = shell(
        *("evaluate", "--model", checkpoints["llama"], "--prompts", given, "--out", tmp_path / "safety"), *small
    )
    assert evaluated.code == 0, evaluated.err
    assert len(pd.read_parquet(tmp_path / "safety" / "safety.parquet")) == 1
    assert json.loads((tmp_path / "safety" / "manifest.json").read_text())["config"]["judge"] == JUDGE


def test_the_working_directory_is_searched_only_where_a_module_is_named(
    shell: Shell,  # noqa: F811
    module: Path,
    monkeypatch: pytest.MonkeyPatch,
    pool: Transcripts,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(module)
    write_transcripts(pool, tmp_path / "pool.jsonl")
    words = ("judge", "--transcripts", tmp_path / "pool.jsonl", "--out", tmp_path / "judged.jsonl")
    assert shell(*words).code == 0
    assert str(module) not in sys.path
    assert "cannot be imported" in shell.fails(3, *words, "--judge", "toy_extension:WordJudge")
    assert sys.path[-1] == str(module)


@pytest.mark.usefixtures("importable")
def test_extensions_of_an_installed_package_have_short_names(
    pool: Transcripts, llama: LensModel, probe: RefusalProbe, monkeypatch: pytest.MonkeyPatch, checkpoints
) -> None:
    offered = {"cliffscope.judges": JUDGE, "cliffscope.templates": TEMPLATE, "cliffscope.criteria": CRITERION}
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("toy", offered[group], group)])
    assert cs.judge(pool, "toy")[0].extra["verdict"]["judge"] == "one word"
    assert cs.load_model(checkpoints["llama"], template="toy", device="cpu").template.name == "brackets"
    chosen = cs.select_by_cliff(llama, probe, pool, number=2, criterion="toy").selected
    assert [t.id for t in chosen] == shortest(llama, pool, 2)
