"""The main path: from a model and prompts to a report.

1. Load the model.
2. Read prompts, generate thinking and answers (or read transcripts), judge the answers, split by prompt.
3. Fit the refusal probe, with its held-out report.
4. Trace every transcript, measure the cliffs.
5. Rank the heads on fit prompts, test the first 3% on test prompts against random sets; trace with them zeroed.
6. Measure safety on test prompts: unedited, top heads zeroed, random sets zeroed.
7. Select the training examples with the largest cliff.
8. On request, repair the model on them, and measure again.
9. Write the report.

Each stage writes its files into the run directory and is never repeated; what could not be done is noted there.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from cliffscope.errors import ProbeError, UnsupportedModelError
from cliffscope.evaluation.arms import UNEDITED, arm_names, plan_arms
from cliffscope.evaluation.safety import SafetyReport, evaluate_safety
from cliffscope.evaluation.side_effects import SideEffects, measure_side_effects
from cliffscope.generation.answers import AnswerStore, open_answers
from cliffscope.generation.rollout import check_left, roll_out
from cliffscope.heads.controls import control_sets, count_sets
from cliffscope.heads.edits import HeadEdit, HeadRef, zero
from cliffscope.heads.ranking import rank_heads
from cliffscope.heads.sources import trace_all_sources
from cliffscope.judging.judges import judge
from cliffscope.model.load import load_model
from cliffscope.notebook import Shown
from cliffscope.progress import Progress
from cliffscope.readouts.contrast import check_contrast, contrast_classes
from cliffscope.readouts.files import save_probe
from cliffscope.readouts.probe import FEWEST, fit_probe
from cliffscope.readouts.trace import Cliffs, trace_refusal
from cliffscope.repairing.comparison import compare_repair
from cliffscope.repairing.finetune import repair
from cliffscope.repairing.formats import own_refusal
from cliffscope.report.page import write_report
from cliffscope.selection.choice import select_from_cliffs
from cliffscope.store import RunStore, open_run
from cliffscope.study import verdicts
from cliffscope.study.config import StudyConfig, read_inputs
from cliffscope.study.results import (
    counts,
    heads_json,
    held_out_first,
    layer_frame,
    source_frame,
    transcript_frame,
    versions,
)
from cliffscope.study.run import TRANSCRIPTS, Run, silent
from cliffscope.transcripts.datasets import read_transcripts, write_transcripts
from cliffscope.transcripts.records import Outcome, Transcripts

log = logging.getLogger(__name__)
REPORT = "report.html"
SELECTION, REPAIRED = "selection.jsonl", "repaired"
TOKEN_TRACES = 200
"""Transcripts of which every token is stored."""
SOURCE_HEADS = 3
"""Heads of which is traced what they read, in the held-out transcript of median cliff."""
SOURCE_TOKENS = 2048
"""A longer transcript is not taken for that: attention patterns of all layers grow with its square."""
EDITED = {"top": "harmful, complied; top heads zeroed", "random": "harmful, complied; random heads zeroed"}
"""Names of the edited arms' curves."""
SIDE_EFFECT_TRANSCRIPTS = 40
"""Harmless test transcripts on which side effects are measured."""
SIDE_EFFECT_CONTROLS = 5
"""Random sets that side effects are measured under: their divergence is a yardstick, not a claim."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Study(Shown):
    """A finished study: its directory and what it found."""

    path: Path
    """Run directory."""
    verdict: dict[str, str]
    """The findings in sentences, by topic."""

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / REPORT

    def small_table(self) -> pd.DataFrame:
        """What it found, topic by topic."""
        return pd.DataFrame(list(self.verdict.items()), columns=["topic", "finding"])

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
    config.check()
    options = {k: v for k, v in asdict(config).items() if k != "out"}
    with open_run(config.out, options) as store:
        run = Run(config=config, store=store, progress=progress or silent)
        if not store.finished("report"):
            store.update(
                command=command or f"cliffscope.run_study({config!r})",
                versions=versions(),
                cliffscope=version("cliffscope"),
            )
            for name, stage in _STAGES.items():
                if not store.finished(name):
                    if name != "repair" or config.repair:
                        log.info("stage %s", name)
                    with store.stage(name):
                        stage(run)
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


def _stage_transcripts(run: Run) -> None:
    inputs = read_inputs(run.config)
    transcripts = inputs.transcripts
    if run.config.transcripts is None:
        check_contrast(transcripts, run.config.contrast, thinks=run.model.template.thinks)
    with open_answers(run.store) as kept:
        if run.config.transcripts is None:
            transcripts = judge(_roll_out(run, transcripts, kept))
        elif all(t.outcome is Outcome.UNJUDGED for t in transcripts):
            transcripts = judge(transcripts)
        write_transcripts(transcripts, run.store.path / TRANSCRIPTS)
        kept.drop_log(UNEDITED)
    parts = transcripts.split(seed=run.config.seed)
    # Where a test half is given, what is left is for fitting and validating.
    moved = {"test": "fit"} if inputs.splits else {}
    splits = {t.id: inputs.splits.get(t.id, moved.get(name, name)) for name, part in parts.items() for t in part}
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


def _roll_out(run: Run, prompts: Transcripts, kept: AnswerStore) -> Transcripts:
    config = run.config
    found = roll_out(
        run.model,
        prompts,
        max_thinking=config.max_thinking,
        max_answer=config.max_answer,
        temperature=config.temperature,
        system=config.system,
        seed=config.seed,
        batch_size=config.batch_size,
        done=kept.begun(UNEDITED),
        on_batch=partial(kept.keep_batch, UNEDITED),
        progress=run.counter("transcripts", len(prompts)),
    )
    check_left(found)
    return found


def _stage_probe(run: Run) -> None:
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


def _stage_traces(run: Run) -> None:
    if run.probe is None:
        return
    deep = run.examples()
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
    shown = held_out_first(frame, deep)[:TOKEN_TRACES]
    tokens = traces.to_frame()
    run.store.write_frame("traces.parquet", tokens[tokens["id"].isin(shown)])
    run.store.write_frame("layer_traces.parquet", layer_frame(traces))
    test = frame[frame["split"] == "test"]
    groups = {str(name): part["id"].tolist() for name, part in test.groupby("group")}
    run.store.write_frame("aligned.parquet", traces.aligned(groups, seed=run.config.seed))
    run.leave_out(traces.omitted)
    run.add_verdict("cliff", verdicts.of_cliff(test, run.config.plateau))


def _stage_heads(run: Run) -> None:
    if run.probe is None:
        return
    suppressed = run.part("fit", "validate", harmful=True, outcome=Outcome.COMPLIED)
    held_out = run.part("test", harmful=True, outcome=Outcome.COMPLIED)
    if len(suppressed) < FEWEST or len(held_out) < FEWEST:
        run.note(
            f"Heads were not ranked: {len(suppressed)} harmful transcripts of the fit and {len(held_out)} of the test "
            f"split were complied with; {FEWEST} of each are needed. There is nothing to restore."
        )
        run.add_verdict("heads", verdicts.no_heads(len(suppressed) + len(held_out)))
        return
    harmless = run.part("fit", "validate", harmful=False)
    ranking = rank_heads(
        run.model,
        run.probe,
        suppressed,
        harmless=harmless,
        refused=run.part("fit", "validate", harmful=True, outcome=Outcome.REFUSED),
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
    run.add_verdict("heads", verdicts.of_heads(ranking, control, can_tell=run.probe.report.final.can_tell))


def _stage_edited(run: Run) -> None:
    """The held-out transcripts of the ranking once more: with heads edited, and what the first heads read in them."""
    if run.probe is None or not run.store.has("heads.json"):
        return
    ranking = run.store.read_frame("heads.parquet")
    chosen = verdicts.head_refs(ranking[ranking["selected"]])
    asked = run.part("test", harmful=True, outcome=Outcome.COMPLIED)
    bins = run.store.read_frame("aligned.parquet").drop_duplicates("bin")
    closing = int((bins["span"] == "closing").sum())
    controls = min(1, count_sets(run.model.shape, chosen, same_layers=True))
    curves, cliffs = [], []
    for arm in plan_arms(run.model, zero(chosen), controls=controls, seed=run.config.seed)[1:]:
        traces = trace_refusal(run.model, run.probe, asked, edit=arm.edit)
        curves.append(traces.aligned({EDITED[arm.kind]: [t.id for t in asked]}, closing=closing, seed=run.config.seed))
        cliffs.append(traces.cliffs(plateau=run.config.plateau).to_frame().assign(group=EDITED[arm.kind]))
    run.store.write_frame("edited_aligned.parquet", pd.concat(curves, ignore_index=True))
    run.store.write_frame("edited_cliffs.parquet", pd.concat(cliffs, ignore_index=True))
    _read_sources(run, chosen, {t.id: t.n_pos for t in traces.tokens})


def _read_sources(run: Run, chosen: Sequence[HeadRef], lengths: dict[str, int]) -> None:
    short = [name for name, n_pos in lengths.items() if n_pos <= SOURCE_TOKENS]
    cliffs = run.store.read_frame("cliffs.parquet").set_index("id")["cliff"].reindex(short).dropna()
    if len(short) < len(lengths):
        run.note(f"What heads read: {len(short)} of {len(lengths)} transcripts have {SOURCE_TOKENS:,} tokens or fewer.")
    if run.probe is None or cliffs.empty:
        return
    median = run.transcripts.where(ids=[str((cliffs - cliffs.median()).abs().idxmin())])[0]
    heads = [h for h in chosen if h.layer <= run.probe.layer][:SOURCE_HEADS]
    try:
        found = trace_all_sources(run.model, run.probe, median, heads) if heads else []
    except UnsupportedModelError as error:
        run.note(f"What heads read was not traced: {error}")
        return
    if found:
        run.store.write_frame("head_sources.parquet", source_frame(found))


def _stage_safety(run: Run) -> None:
    if not run.store.has("heads.json"):
        return
    ranking = run.store.read_frame("heads.parquet")
    chosen = ranking[ranking["selected"]]
    edit = zero(verdicts.head_refs(chosen))
    labelled = Transcripts(t for t in run.part("test") if t.harmful is not None)
    controls = min(run.config.controls, count_sets(run.model.shape, edit.heads, same_layers=True))
    if controls < run.config.controls:
        run.note(
            f"Safety was measured with {controls} random sets, not {run.config.controls}: the layers of the selected "
            "heads have no more different ones."
        )
    report = _compare_arms(run, labelled, edit, controls)
    run.store.write_frame("safety.parquet", report.to_frame())
    run.store.write_frame("safety_pairs.parquet", report.pairs())
    run.store.write_frame("safety_quality.parquet", report.quality())
    run.leave_out(report.omitted)
    effects = _side_effects(run, edit, controls)
    run.add_verdict("intervention", verdicts.of_safety(report, effects))


def _compare_arms(run: Run, labelled: Transcripts, edit: HeadEdit, controls: int) -> SafetyReport:
    names = arm_names(controls)
    with open_answers(run.store) as kept:
        done = kept.finished_arms(names)
        if run.config.transcripts is None:
            done[UNEDITED] = labelled
        count = len(done)

        def keep(name: str, transcripts: Transcripts) -> None:
            nonlocal count
            kept.keep(name, transcripts)
            count += 1
            run.progress("safety", count, len(names))

        return evaluate_safety(
            run.model,
            labelled,
            edit=edit,
            controls=controls,
            max_thinking=run.config.max_thinking,
            max_answer=run.config.max_answer,
            temperature=run.config.temperature,
            system=run.config.system,
            seed=run.config.seed,
            batch_size=run.config.batch_size,
            done=done,
            begun=kept.begun_arms(name for name in names if name not in done),
            on_arm=keep,
            on_batch=kept.keep_batch,
        )


def _side_effects(run: Run, edit: HeadEdit, controls: int) -> SideEffects | None:
    """On harmless test transcripts with an answer; None where there is none."""
    written = Transcripts(t for t in run.part("test", harmful=False) if t.answer is not None)[:SIDE_EFFECT_TRANSCRIPTS]
    if not written:
        return None
    found = measure_side_effects(
        run.model,
        edit,
        transcripts=Transcripts(written),
        controls=min(controls, SIDE_EFFECT_CONTROLS),
        seed=run.config.seed,
        progress=run.counter("side effects", len(written)),
    )
    run.store.write_frame("side_effects.parquet", found.to_frame())
    run.leave_out(found.omitted)
    return found


def _stage_selection(run: Run) -> None:
    if run.probe is None:
        return
    pool = run.part("fit", "validate", "test", harmful=True, outcome=Outcome.COMPLIED)
    cliffs = Cliffs(frame=run.store.read_frame("cliffs.parquet"), plateau=run.config.plateau)
    selection = select_from_cliffs(cliffs, pool, fraction=run.config.select_fraction)
    selection.to_jsonl(run.store.path / SELECTION)
    run.store.write_frame("selection.parquet", selection.to_frame())
    run.leave_out(selection.omitted)
    run.add_verdict("selection", verdicts.of_selection(selection))


def _stage_repair(run: Run) -> None:
    if not run.config.repair:
        return
    chosen = read_transcripts(run.store.path / SELECTION) if run.store.has(SELECTION) else Transcripts()
    if not len(chosen):
        run.note("The model was not repaired: nothing was selected to train on.")
        return
    folder = run.store.path / REPAIRED
    if not folder.exists():
        # What is learnt is how this model itself refuses.
        said = own_refusal(run.part("fit", "validate", harmful=True, outcome=Outcome.REFUSED))
        harmless = run.part("fit", "validate", harmful=False, outcome=Outcome.COMPLIED)
        repair(run.model, chosen, folder, harmless=harmless, answer=said, seed=run.config.seed)
    asked = Transcripts(t for t in run.part("test") if t.harmful is not None)
    report = compare_repair(
        run.model,
        load_model(str(folder), template=run.config.template, device=run.config.device),
        asked,
        max_thinking=run.config.max_thinking,
        max_answer=run.config.max_answer,
        temperature=run.config.temperature,
        system=run.config.system,
        seed=run.config.seed,
        batch_size=run.config.batch_size,
        answered=asked if run.config.transcripts is None else None,
    )
    run.store.write_frame("repair.parquet", report.to_frame())
    run.add_verdict("repair", verdicts.of_repair(report, len(chosen)))


def _stage_report(run: Run) -> None:
    write_report(run.store.path, run.store.path / REPORT)


_STAGES: dict[str, Callable[[Run], None]] = {
    "transcripts": _stage_transcripts,
    "probe": _stage_probe,
    "traces": _stage_traces,
    "heads": _stage_heads,
    "edited": _stage_edited,
    "safety": _stage_safety,
    "selection": _stage_selection,
    "repair": _stage_repair,
    "report": _stage_report,
}
