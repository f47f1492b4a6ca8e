"""The main path: from a model and prompts to a report.

1. Load the model.
2. Read prompts, generate thinking and answers (or read transcripts), judge the answers, split by prompt.
3. Fit the refusal probe, with its held-out report.
4. Trace every transcript, measure the cliffs.
5. Rank the heads on fit prompts, test the first 3% on test prompts against random sets.
6. Measure safety on test prompts: unedited, top heads zeroed, random sets zeroed.
7. Select the training examples with the largest cliff.
8. Write the report.

Each stage writes its files into the run directory and is never repeated; what could not be done is noted there.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from cliffscope import verdicts
from cliffscope.alignment.selection import select_from_cliffs
from cliffscope.errors import DataError, ProbeError
from cliffscope.heads.edits import zero
from cliffscope.heads.ranking import control_sets, rank_heads
from cliffscope.models import LensModel, load_model
from cliffscope.organisms import is_organism, study_prompts
from cliffscope.probing.cliff import Plateau
from cliffscope.probing.contrast import Contrast, contrast_classes
from cliffscope.probing.files import load_probe, save_probe
from cliffscope.probing.probe import FEWEST, Positions, RefusalProbe, fit_probe
from cliffscope.probing.trace import Cliffs, trace_refusal
from cliffscope.report.page import write_report
from cliffscope.results import counts, heads_json, layer_frame, transcript_frame, versions
from cliffscope.safety.evaluation import UNEDITED, evaluate_safety
from cliffscope.safety.generation import roll_out
from cliffscope.safety.judges import judge
from cliffscope.store import RunStore, open_run
from cliffscope.transcripts.datasets import read_prompts, read_transcripts, write_transcripts
from cliffscope.transcripts.records import Omission, Outcome, Transcripts

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
"""Called with stage, items done, items in all."""
REPORT, TRANSCRIPTS, OMITTED = "report.html", "transcripts.jsonl", "omitted.parquet"
HEAT_MAPS = 4
"""Transcripts of which every layer is traced for the report."""
TOKEN_TRACES = 200
"""Transcripts of which every token is stored."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Everything that determines a study."""

    model: str
    """What `load_model` takes."""
    out: str
    """Run directory."""
    harmful: str | None = None
    """File of harmful prompts; None with an organism takes its own."""
    harmless: str | None = None
    """File of harmless prompts."""
    transcripts: str | None = None
    """JSONL of transcripts with thinking and answer, instead of prompts."""
    template: str | None = None
    """How the model thinks; None detects it."""
    system: str | None = None
    """System message before each prompt."""
    limit: int | None = None
    """Prompts of each file at most, drawn with the seed."""
    max_thinking: int = 1024
    """Tokens of thinking at most."""
    max_answer: int = 64
    """Tokens of answer at most."""
    temperature: float = 0.0
    """0 is greedy."""
    positions: Positions = "balanced"
    """Positions that the probe is fitted on."""
    contrast: Contrast = "auto"
    """Complied class of the probe: harmless transcripts (the paper's) or harmful ones; "auto" takes harmless ones where
    the model thinks, since its thinking is what the cliff is about, and harmful ones where it does not."""
    plateau: Plateau = "mean"
    """Plateau of the cliff."""
    top_fraction: float = 0.03
    """Share of heads that is edited."""
    controls: int = 20
    """Random sets of heads."""
    select_fraction: float = 0.017
    """Share of the pool that is selected."""
    batch_size: int = 64
    """Rows generated together at most."""
    seed: int = 0
    """Of everything drawn."""
    device: str | None = None
    """Torch device; None takes CUDA where there is one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """A finished study: its directory and what it found."""

    path: Path
    """Run directory."""
    verdict: dict[str, str]
    """The findings in sentences, by topic."""

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / REPORT

    def __repr__(self) -> str:
        """One line: directory and the finding about the cliff."""
        return f"Study({str(self.path)!r}: {self.verdict.get('cliff', 'no verdict')})"


def run_study(config: StudyConfig, *, command: str | None = None, progress: Progress | None = None) -> Study:
    """Runs a study, or finishes one that was interrupted.

    Args:
        config: what to do; the same one continues a run in the same directory.
        command: how to run it again, for the report; None writes the Python call.
        progress: called with stage, items done and items in all.

    Returns:
        The study; its report is written.

    Raises:
        StoreError: the directory is in use, or belongs to another configuration.
        DataError: prompts cannot be read.
        UnsupportedModelError: the model fails a check.
    """
    _check_inputs(config)
    options = {k: v for k, v in asdict(config).items() if k != "out"}
    with open_run(config.out, options) as store:
        run = _Run(config=config, store=store, progress=progress or _silent)
        if not store.finished("report"):
            store.update(
                command=command or f"cliffscope.run_study({config!r})",
                versions=versions(),
                cliffscope=version("cliffscope"),
            )
            for name, stage in _STAGES.items():
                if not store.finished(name):
                    started = time.perf_counter()
                    log.info("stage %s", name)
                    stage(run)
                    store.finish(name, time.perf_counter() - started)
        return open_study(store.path)


def open_study(path: str | Path) -> Study:
    """Opens a finished study for reading.

    Args:
        path: its run directory.

    Returns:
        The study.

    Raises:
        StoreError: there is no run.
    """
    verdict = RunStore(path=Path(path)).manifest.get("verdict")
    return Study(
        path=Path(path), verdict={str(k): str(v) for k, v in verdict.items()} if isinstance(verdict, dict) else {}
    )


@dataclass(eq=False, kw_only=True)
class _Run:
    """A study in progress; what earlier stages left on disk is read when it is needed."""

    config: StudyConfig
    store: RunStore
    progress: Progress
    notes: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> LensModel:
        """Loaded once."""
        return load_model(self.config.model, template=self.config.template, device=self.config.device)

    @cached_property
    def transcripts(self) -> Transcripts:
        """All judged transcripts."""
        return read_transcripts(self.store.path / TRANSCRIPTS)

    @cached_property
    def splits(self) -> dict[str, str]:
        """Transcript id to split."""
        frame = self.store.read_frame("transcripts.parquet")
        return {str(i): str(s) for i, s in zip(frame["id"], frame["split"], strict=True)}

    @cached_property
    def probe(self) -> RefusalProbe | None:
        """None if none could be fitted."""
        return load_probe(self.store) if self.store.has("probe.json") else None

    def part(self, *splits: str, harmful: bool | None = None, outcome: Outcome | None = None) -> Transcripts:
        """Transcripts of some splits."""
        return Transcripts(
            t
            for t in self.transcripts
            if self.splits[t.id] in splits
            and (harmful is None or t.harmful is harmful)
            and (outcome is None or t.outcome == outcome)
        )

    def note(self, text: str) -> None:
        """Adds a remark to the manifest."""
        notes = self.store.manifest.get("notes")
        known = notes if isinstance(notes, list) else []
        self.store.update(notes=known if text in known else [*known, text])

    def leave_out(self, omitted: tuple[Omission, ...]) -> None:
        """Adds omissions to the run's table and to the counts in the manifest."""
        # A reason that names its transcript would be counted apart from the same reason for another one.
        rows = [{**asdict(o), "reason": o.reason.replace(repr(o.id), "this transcript")} for o in omitted]
        before = (
            self.store.read_frame(OMITTED)
            if self.store.has(OMITTED)
            else pd.DataFrame(columns=["stage", "reason", "id"])
        )
        table = pd.concat([before, pd.DataFrame(rows, columns=["stage", "reason", "id"])], ignore_index=True)
        table = table.drop_duplicates(ignore_index=True)
        self.store.write_frame(OMITTED, table)
        counts = [
            {"stage": stage, "reason": reason, "count": len(part), "ids": part["id"].head(5).tolist()}
            for (stage, reason), part in table.groupby(["stage", "reason"], sort=False)
        ]
        self.store.update(omitted=counts)

    def counter(self, stage: str, total: int) -> Callable[[int], None]:
        """A progress callback of one stage."""
        return lambda done: self.progress(stage, done, total)


def _stage_transcripts(run: _Run) -> None:
    config, forced = run.config, dict[str, str]()
    if config.transcripts is not None:
        read = read_transcripts(config.transcripts)
        unjudged = all(t.outcome is Outcome.UNJUDGED for t in read)
        transcripts = judge(read) if unjudged else read
    else:
        prompts, forced = _prompts(config)
        transcripts = judge(
            roll_out(
                run.model,
                prompts,
                max_thinking=config.max_thinking,
                max_answer=config.max_answer,
                temperature=config.temperature,
                system=config.system,
                seed=config.seed,
                batch_size=config.batch_size,
                progress=run.counter("transcripts", len(prompts)),
            )
        )
    if not len(transcripts):
        raise DataError("No transcript is left: every prompt was omitted. Lower the budgets or give other prompts.")
    write_transcripts(transcripts, run.store.path / TRANSCRIPTS)
    parts = transcripts.split(seed=config.seed)
    # Where a test half is given, what is left is for fitting and validating.
    moved = {"test": "fit"} if forced else {}
    splits = {t.id: forced.get(t.id, moved.get(name, name)) for name, part in parts.items() for t in part}
    run.store.write_frame("transcripts.parquet", transcript_frame(transcripts, splits))
    run.leave_out(transcripts.omitted)
    model = run.model
    run.store.update(
        model={
            "name": model.name,
            "fingerprint": model.fingerprint,
            "template": model.template.name,
            **{k: v for k, v in asdict(model.shape).items() if k != "context"},
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        counts=counts(transcripts),
        verdict={},
        notes=[],
    )


def _stage_probe(run: _Run) -> None:
    classes = contrast_classes(run.transcripts, run.config.contrast, thinks=run.model.template.thinks)
    try:
        probe = fit_probe(
            run.model,
            classes.refused,
            classes.complied,
            positions=run.config.positions,
            seed=run.config.seed,
            challenge=classes.challenge,
            splits=run.splits,
            progress=run.counter("probe", len(run.transcripts)),
        )
    except ProbeError as error:
        run.note(f"No probe: {error}")
        run.store.update(verdict={"probe": verdicts.no_probe(str(error))})
        return
    save_probe(run.store, probe)
    stored = run.store.read_json("probe.json")
    run.store.write_json("probe.json", {**stored, "contrast": classes.name})
    run.leave_out(probe.omitted)
    run.store.update(verdict={"probe": verdicts.of_probe(probe.report, classes.name)})


def _stage_traces(run: _Run) -> None:
    if run.probe is None:
        return
    deep = _examples(run)
    traces = trace_refusal(
        run.model,
        run.probe,
        run.transcripts,
        layers_of=deep,
        progress=run.counter("traces", len(run.transcripts)),
    )
    cliffs = traces.cliffs(plateau=run.config.plateau)
    frame = cliffs.to_frame()
    frame["split"] = [run.splits[i] for i in frame["id"]]
    run.store.write_frame("cliffs.parquet", frame)
    shown = [*deep, *[i for i in frame["id"] if i not in deep]][:TOKEN_TRACES]
    tokens = traces.to_frame()
    run.store.write_frame("traces.parquet", tokens[tokens["id"].isin(shown)])
    run.store.write_frame("layer_traces.parquet", layer_frame(traces))
    test = frame[frame["split"] == "test"]
    groups = {str(name): part["id"].tolist() for name, part in test.groupby("group")}
    run.store.write_frame("aligned.parquet", traces.aligned(groups, seed=run.config.seed))
    run.leave_out(traces.omitted)
    _add_verdict(run, "cliff", verdicts.of_cliff(test, run.config.plateau))


def _stage_heads(run: _Run) -> None:
    if run.probe is None:
        return
    suppressed = run.part("fit", "validate", harmful=True, outcome=Outcome.COMPLIED)
    held_out = run.part("test", harmful=True, outcome=Outcome.COMPLIED)
    if len(suppressed) < FEWEST or len(held_out) < FEWEST:
        run.note(
            f"Heads were not ranked: {len(suppressed)} harmful transcripts of the fit and {len(held_out)} of the test "
            f"split were complied with; {FEWEST} of each are needed. There is nothing to restore."
        )
        _add_verdict(run, "heads", verdicts.no_heads(len(suppressed) + len(held_out)))
        return
    harmless = run.part("fit", "validate", harmful=False)
    ranking = rank_heads(
        run.model,
        run.probe,
        suppressed,
        harmless=harmless,
        seed=run.config.seed,
        progress=run.counter("heads", len(suppressed)),
    )
    top = ranking.top(run.config.top_fraction)
    control = control_sets(run.model, run.probe, held_out, top, draws=run.config.controls, seed=run.config.seed)
    frame = ranking.to_frame()
    frame["selected"] = frame["rank"] <= len(top)
    run.store.write_frame("heads.parquet", frame)
    run.store.write_json("heads.json", heads_json(ranking, control, run.config.top_fraction))
    run.leave_out(ranking.omitted)
    _add_verdict(run, "heads", verdicts.of_heads(ranking, control))


def _stage_safety(run: _Run) -> None:
    if not run.store.has("heads.json"):
        return
    ranking = run.store.read_frame("heads.parquet")
    chosen = ranking[ranking["selected"]]
    edit = zero(verdicts.head_refs(chosen))
    test = run.part("test")
    labelled = Transcripts(t for t in test if t.harmful is not None)
    done = {UNEDITED: labelled} if run.config.transcripts is None else {}
    arms = run.config.controls + 2
    finished = [len(done)]

    def keep(name: str, transcripts: Transcripts) -> None:
        write_transcripts(transcripts, run.store.path / _arm_file(name))
        finished[0] += 1
        run.progress("safety", finished[0], arms)

    for name in ["top heads", *[f"random {i + 1}" for i in range(run.config.controls)]]:
        if run.store.has(_arm_file(name)):
            done[name] = read_transcripts(run.store.path / _arm_file(name))
    finished[0] = len(done)
    report = evaluate_safety(
        run.model,
        labelled,
        edit=edit,
        controls=run.config.controls,
        max_thinking=run.config.max_thinking,
        max_answer=run.config.max_answer,
        temperature=run.config.temperature,
        system=run.config.system,
        seed=run.config.seed,
        batch_size=run.config.batch_size,
        done=done,
        on_arm=keep,
    )
    run.store.write_frame("safety.parquet", report.to_frame())
    run.store.write_frame("safety_pairs.parquet", report.pairs())
    run.leave_out(report.omitted)
    _add_verdict(run, "intervention", verdicts.of_safety(report))


def _stage_selection(run: _Run) -> None:
    if run.probe is None:
        return
    pool = run.part("fit", "validate", "test", harmful=True, outcome=Outcome.COMPLIED)
    cliffs = Cliffs(frame=run.store.read_frame("cliffs.parquet"), plateau=run.config.plateau)
    selection = select_from_cliffs(cliffs, pool, fraction=run.config.select_fraction)
    selection.to_jsonl(run.store.path / "selection.jsonl")
    run.store.write_frame("selection.parquet", selection.to_frame())
    run.leave_out(selection.omitted)
    _add_verdict(run, "selection", verdicts.of_selection(selection))


def _stage_report(run: _Run) -> None:
    write_report(run.store.path, run.store.path / REPORT)


_STAGES: dict[str, Callable[[_Run], None]] = {
    "transcripts": _stage_transcripts,
    "probe": _stage_probe,
    "traces": _stage_traces,
    "heads": _stage_heads,
    "safety": _stage_safety,
    "selection": _stage_selection,
    "report": _stage_report,
}


def _check_inputs(config: StudyConfig) -> None:
    if config.transcripts is not None and (config.harmful or config.harmless):
        raise DataError(
            "Both transcripts and prompt files were given. Give transcripts=..., or harmful=... and harmless=..."
        )
    if config.transcripts is None and config.harmful is None and not is_organism(config.model):
        raise DataError(
            f"No prompts were given for {config.model!r}. Give harmful=... (and harmless=...) files, or "
            "transcripts=...; only organisms bring their own."
        )


def _prompts(config: StudyConfig) -> tuple[Transcripts, dict[str, str]]:
    """Prompts, and the splits that are fixed for some of them."""
    if config.harmful is None:
        return study_prompts(config.model, n=config.limit or 480, seed=config.seed)
    found = read_prompts(config.harmful, harmful=True, limit=config.limit, seed=config.seed)
    if config.harmless is not None:
        found = found + read_prompts(config.harmless, harmful=False, limit=config.limit, seed=config.seed)
    return found, {}


def _examples(run: _Run) -> list[str]:
    """Test transcripts that the report shows token by token: harmful complied, harmful refused, harmless."""
    found: list[str] = []
    kinds = ((True, Outcome.COMPLIED, HEAT_MAPS - 2), (True, Outcome.REFUSED, 1), (False, Outcome.COMPLIED, 1))
    for harmful, outcome, n in kinds:
        found += [t.id for t in run.part("test", harmful=harmful, outcome=outcome)[:n]]
    return found


def _add_verdict(run: _Run, topic: str, sentence: str) -> None:
    verdict = run.store.manifest.get("verdict")
    run.store.update(verdict={**(verdict if isinstance(verdict, dict) else {}), topic: sentence})


def _arm_file(name: str) -> str:
    return f"arm-{name.replace(' ', '-')}.jsonl"


def _silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""
