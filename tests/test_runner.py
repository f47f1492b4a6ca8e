"""A study of an organism, in one go and killed in the middle; the budgets are small, the truth is planted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import MakeCheckpoint

from cliffscope.errors import CliffScopeError, DataError, EditError, StoreError
from cliffscope.model.checkpoints import ASSETS
from cliffscope.store import open_run
from cliffscope.study.config import StudyConfig
from cliffscope.study.manifest import Manifest, library_versions
from cliffscope.study.runner import Study, _version_notes, open_study, plan_study, run_study
from cliffscope.study.stages.selection import SelectionStage
from cliffscope.transcripts.datasets import read_transcripts, write_transcripts

pytestmark = pytest.mark.skipif(
    not all((ASSETS / name / "truth.json").is_file() for name in ("planted-llama", "null-llama")),
    reason="the organisms' assets are not in the package yet",
)
STAGES = (
    *("transcripts", "readouts", "transfer", "traces", "heads", "suppression", "early closings", "reading"),
    *("safety", "side effects", "witnesses", "selection", "report"),
)
TOPICS = [
    *("suppression", "intervention", "heads", "side effects", "answer", "cliff", "probe", "witnesses", "selection"),
]
FILES = {
    *("manifest.json", "transcripts.jsonl", "transcripts.parquet", "omitted.parquet", "report.html"),
    *("answer.json", "probe.json", "probe.safetensors", "probe_layers.parquet", "text_baseline.json"),
    *("traces.parquet", "layer_traces.parquet", "aligned.parquet", "cliffs.parquet"),
    *("edited_aligned.parquet", "edited_cliffs.parquet", "head_sources.parquet"),
    *(
        "heads.parquet",
        "heads.json",
        "selected_heads.parquet",
        "suppression.json",
        "suppression.parquet",
        "early_curves.parquet",
        "settled.parquet",
        "witnesses.json",
        "safety.parquet",
        "safety_pairs.parquet",
        "safety_quality.parquet",
    ),
    *("side_effects.parquet", "arms.json", "confirmed_heads.parquet", "arm-unedited.jsonl"),
    *("arm-top-heads.jsonl", "arm-random-1.jsonl", "arm-random-2.jsonl", "arm-random-3.jsonl"),
    *("selection.parquet", "selection.jsonl"),
}
RUN = """
import json, sys
from cliffscope.study.config import StudyConfig
from cliffscope.study.runner import run_study
run_study(StudyConfig(**json.loads(sys.argv[1])))
"""


def config_of(out: Path, **changes: object) -> StudyConfig:
    config = StudyConfig(
        model="planted-llama",
        out=str(out),
        limit=120,
        max_thinking=96,
        max_answer=16,
        temperature=1.0,
        controls=3,
        device="cpu",
    )
    return replace(config, **changes)


def manifest_of(path: Path) -> dict[str, object]:
    """The manifest; empty as long as there is none."""
    return json.loads((path / "manifest.json").read_text()) if (path / "manifest.json").is_file() else {}


def stages_of(path: Path) -> Mapping[str, Mapping[str, float]]:
    found = manifest_of(path).get("stages", {})
    assert isinstance(found, dict)
    return found


def files_of(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if not p.name.startswith(".")}


def same_results(a: Path, b: Path) -> None:
    """The same files with the same contents, and the same manifest but for times."""
    assert files_of(a) == files_of(b)
    for name in files_of(a):
        if name.endswith(".parquet"):
            pd.testing.assert_frame_equal(pd.read_parquet(a / name), pd.read_parquet(b / name), obj=name)
        elif name not in ("manifest.json", "report.html"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for field in ("verdict", "notes", "counts", "omitted", "model"):
        assert manifest_of(a).get(field) == manifest_of(b).get(field), field


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that nobody interrupted."""
    return run_study(config_of(tmp_path_factory.mktemp("whole") / "run"))


def test_a_study_leaves_every_file_and_finds_what_was_planted(whole: Study) -> None:
    assert files_of(whole.path) == FILES
    assert list(stages_of(whole.path)) == list(STAGES)
    assert list(whole.verdict) == TOPICS
    assert not any("nan" in sentence.lower().split() for sentence in whole.verdict.values())
    safety = pd.read_parquet(whole.path / "safety.parquet")
    assert safety["arm"].unique().tolist() == ["unedited", "top heads", "random 1", "random 2", "random 3"]
    # At the closing the edit turns the opening of every answer, and the answers go on as they began.
    opened = {
        arm: [t.answer.startswith("sorry") for t in read_transcripts(whole.path / f"arm-{arm}.jsonl") if t.harmful]
        for arm in ("unedited", "top-heads")
    }
    assert sum(opened["unedited"]) <= 0.7 * len(opened["unedited"])
    assert sum(opened["top-heads"]) >= 0.95 * len(opened["top-heads"])
    asr = safety[safety["group"] == "harmful"].set_index("arm")["rate"]
    assert whole.verdict["intervention"].startswith("Attack success falls with the ")
    assert f"at the closing: {asr['unedited']:.2f} [" in whole.verdict["intervention"]
    assert f"{asr['top heads']:.2f} [" in whole.verdict["intervention"]
    assert (
        "cannot be shown with 3 random sets of a kind: the least p that they allow is 0.25"
        in (whole.verdict["suppression"])
    )
    # Three random sets leave the judged answers as the first witness, which the probe contradicts.
    assert whole.verdict["witnesses"].startswith("The witnesses disagree: attack success falls")
    assert "the probe's score at the final token follows the harm in the request" in whole.verdict["witnesses"]
    heads = pd.read_parquet(whole.path / "heads.parquet")
    edited = pd.read_parquet(whole.path / "edited_cliffs.parquet").groupby("group")["cliff"].mean()
    assert set(edited.index) == {"harmful, complied; top heads zeroed", "harmful, complied; random heads zeroed"}
    truth = json.loads((ASSETS / "planted-llama" / "truth.json").read_text())
    assert f"L{heads['layer'][0]}H{heads['head'][0]}" in truth["planted"]


def test_no_cliff_is_claimed_of_an_organism_whose_complied_prompts_score_high_at_the_final_token(whole: Study) -> None:
    cliffs = pd.read_parquet(whole.path / "cliffs.parquet").query("split == 'test' and outcome == 'complied'")
    final = cliffs["final"][cliffs["harmful"].astype(bool)]
    assert final.mean() > 0.5
    assert whole.verdict["cliff"].startswith("No refusal cliff can be claimed, since the probe reads harm there")


def test_no_prompt_is_in_two_splits_and_what_is_told_of_the_test_split_was_not_fitted_on(whole: Study) -> None:
    table = pd.read_parquet(whole.path / "transcripts.parquet")
    assert set(table["split"]) == {"fit", "validate", "test"}
    assert (table.groupby("prompt")["split"].nunique() == 1).all()
    test = set(table["id"][table["split"] == "test"])
    arm = read_transcripts(whole.path / "arm-random-1.jsonl")
    written = {t.id: t for t in read_transcripts(whole.path / "transcripts.jsonl")}
    assert {t.id for t in arm} == {name for name in test if written[name].closed}
    assert all(t.thinking_ids == written[t.id].thinking_ids for t in arm), "an arm thought for itself"


def test_a_finished_study_is_opened_and_not_run_again(whole: Study) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in whole.path.iterdir()}
    again = run_study(config_of(whole.path))
    assert again.verdict == whole.verdict == open_study(whole.path).verdict
    assert again.report.stat().st_size > 1_000_000
    assert {p.name: p.stat().st_mtime_ns for p in whole.path.iterdir()} == before
    assert repr(again) == f"Study({str(whole.path)!r}: {whole.verdict['suppression']})"


def copy_of(study: Study, tmp_path: Path) -> Path:
    shutil.copytree(study.path, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    return tmp_path / "run"


def planned(config: StudyConfig, **options: str) -> list[str]:
    """Stages that would run."""
    plan = plan_study(config, **options)
    return plan["stage"][plan["action"] == "run"].tolist()


def test_a_plan_says_what_would_run_and_why_without_a_model(whole: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliffscope.study.stages.base.load_model", None)
    before = {p.name: p.stat().st_mtime_ns for p in whole.path.iterdir()}
    config = config_of(whole.path)
    assert planned(config) == []
    assert planned(replace(config, batch_size=8, device=None)) == []
    assert planned(replace(config, seed=1)) == list(STAGES)
    depend = ["suppression", "early closings", "reading", "safety", "side effects", "witnesses", "report"]
    assert planned(replace(config, controls=4)) == depend
    assert planned(replace(config, repair=True)) == ["repair", "report"]
    assert planned(replace(config, select_fraction=0.1)) == ["selection", "report"]
    assert planned(replace(config, plateau="max"), until="traces") == ["traces"]
    why = plan_study(replace(config, top_fraction=0.05)).set_index("stage")["why"]
    assert why["suppression"] == "top_fraction was 0.03, now 0.05"
    assert why["safety"] == "depends on suppression"
    assert {p.name: p.stat().st_mtime_ns for p in whole.path.iterdir()} == before


def test_a_new_directory_is_planned_from_the_start(tmp_path: Path) -> None:
    assert planned(config_of(tmp_path / "run")) == list(STAGES)
    assert not (tmp_path / "run").exists()


def test_another_fraction_runs_again_what_depends_on_it_and_nothing_else(whole: Study, tmp_path: Path) -> None:
    path = copy_of(whole, tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    run_study(config_of(path, select_fraction=0.2))
    changed = {p.name for p in path.iterdir() if p.stat().st_mtime_ns != before.get(p.name)} - {".lock"}
    assert changed == {"manifest.json", "omitted.parquet", "report.html", "selection.parquet", "selection.jsonl"}
    assert len(read_transcripts(path / "selection.jsonl")) > len(read_transcripts(whole.path / "selection.jsonl"))
    run_study(config_of(path))
    same_results(path, whole.path)


def test_code_that_gives_other_results_runs_again_by_its_version(
    whole: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = copy_of(whole, tmp_path)
    monkeypatch.setattr(SelectionStage, "version", 99)
    assert planned(config_of(path)) == ["selection", "report"]
    with caplog.at_level("INFO", logger="cliffscope"):
        run_study(config_of(path))
    assert "stage selection: code changed (version)" in caplog.text
    assert planned(config_of(path)) == []


def test_a_file_that_was_deleted_is_made_again(whole: Study, tmp_path: Path) -> None:
    path = copy_of(whole, tmp_path)
    (path / "selection.parquet").unlink()
    assert planned(config_of(path)) == ["selection"]
    run_study(config_of(path))
    same_results(path, whole.path)


def test_the_report_alone_is_written_again_and_other_stages_only_on_what_they_need(
    whole: Study, tmp_path: Path
) -> None:
    path = copy_of(whole, tmp_path)
    (path / "report.html").unlink()
    run_study(config_of(path), only="report")
    assert whole.verdict["heads"] in (path / "report.html").read_text(encoding="utf-8")
    assert stages_of(path)["heads"] == stages_of(whole.path)["heads"]
    with pytest.raises(DataError, match="stage suppression is not up to date with these settings"):
        run_study(config_of(path, top_fraction=0.05), only="safety")
    with pytest.raises(DataError, match="expected a stage: transcripts, readouts"):
        run_study(config_of(path), only="sefety")
    with pytest.raises(DataError, match="Pass one of them"):
        run_study(config_of(path), only="report", until="heads")


def test_until_leaves_out_what_comes_after_and_outdated_results_are_not_kept(whole: Study, tmp_path: Path) -> None:
    path = copy_of(whole, tmp_path)
    study = run_study(config_of(path, plateau="max"), until="traces")
    assert list(stages_of(path)) == [
        "transcripts",
        "readouts",
        "transfer",
        "traces",
        "heads",
        "suppression",
        "early closings",
        "safety",
        "side effects",
    ]
    assert not {"selection.parquet", "edited_cliffs.parquet", "witnesses.json", "report.html"} & files_of(path)
    assert list(study.verdict) == TOPICS[:-2]


def test_a_directory_of_an_older_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"schema": 1, "config": {}, "stages": {}}))
    with pytest.raises(StoreError, match=r"another version of CliffScope \(schema 1, expected 2\).*different --out"):
        run_study(config_of(tmp_path / "run"))


def after_stage(stage: str) -> Callable[[Path], bool]:
    return lambda path: stage in stages_of(path)


def after_the_first_random_arm(path: Path) -> bool:
    return (path / "arm-random-1.jsonl").is_file()


def inside_an_arm(path: Path) -> bool:
    """A batch of the edited arm is in its log, and the arm is not finished."""
    log = path / "arm-top-heads.log"
    return log.is_file() and log.read_bytes().count(b"\n") > 1


def inside_the_first_roll_out(path: Path) -> bool:
    log = path / "arm-unedited.log"
    return log.is_file() and log.read_bytes().count(b"\n") > 1


@pytest.mark.parametrize(
    ("reached", "finished"),
    [
        (inside_the_first_roll_out, ()),
        (after_stage("readouts"), STAGES[:2]),
        (inside_an_arm, STAGES[:8]),
        (after_the_first_random_arm, STAGES[:8]),
    ],
    ids=["inside transcripts", "after the probe", "inside an arm", "inside safety"],
)
def test_a_killed_study_goes_on_where_it_stopped_and_ends_with_the_same_results(
    whole: Study, tmp_path: Path, reached: Callable[[Path], bool], finished: tuple[str, ...]
) -> None:
    config = config_of(tmp_path / "run")
    path = Path(config.out)
    with subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(asdict(config))],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            until = time.monotonic() + 200
            while not reached(path) and process.poll() is None and time.monotonic() < until:
                time.sleep(0.002)
            with pytest.raises(StoreError, match="in use by another process"):
                run_study(config)
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = dict(stages_of(path))
    assert tuple(kept)[: len(finished)] == finished
    assert "safety" not in kept
    ours = ("transcripts", "arm-")
    written = {p.name: p.stat().st_mtime_ns for p in path.glob("*.jsonl") if p.name.startswith(ours)}
    run_study(config)
    assert list(stages_of(path)) == list(STAGES)
    assert {name: stages_of(path)[name] for name in kept} == kept
    assert {name: (path / name).stat().st_mtime_ns for name in written if not name.startswith(".")} == written
    assert {p.name for p in path.iterdir()} - files_of(path) == {".lock"}, "a partial file was left behind"
    same_results(path, whole.path)


def test_the_unedited_arm_is_kept_too_where_transcripts_are_given(
    whole: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transcripts of somebody else's making, the unedited arm is generated like the others."""
    from cliffscope.evaluation import safety as evaluation

    judge, ran = evaluation.judge_answers, list[int]()

    def fail_at_the_third(*args: object, **options: object) -> object:
        ran.append(1)
        if len(ran) == 3:
            raise CliffScopeError("the machine caught fire")
        return judge(*args, **options)

    config = config_of(tmp_path / "run", transcripts=str(whole.path / "transcripts.jsonl"), limit=None, controls=1)
    monkeypatch.setattr(evaluation, "judge_answers", fail_at_the_third)
    with pytest.raises(CliffScopeError, match="fire"):
        run_study(config)
    assert {"arm-unedited.jsonl", "arm-top-heads.jsonl"} <= files_of(Path(config.out))
    run_study(config)
    assert len(ran) == 3 + 1, "an arm that was finished was run again"
    assert stages_of(Path(config.out))["report"]


def test_arms_that_were_killed_within_a_block_go_on_behind_the_last_one(
    whole: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliffscope.generation import answering

    behind, blocks = answering.answer_behind, list[int]()

    def fail_at_the_second(*args: object, **options: object) -> object:
        blocks.append(1)
        if len(blocks) == 2:
            raise CliffScopeError("the machine caught fire")
        return behind(*args, **options)

    given = str(whole.path / "transcripts.jsonl")
    config = config_of(tmp_path / "run", transcripts=given, limit=None, controls=1, batch_size=40)
    monkeypatch.setattr(answering, "answer_behind", fail_at_the_second)
    with pytest.raises(CliffScopeError, match="fire"):
        run_study(config)
    path = Path(config.out)
    logs = {"arm-unedited.log", "arm-top-heads.log", "arm-random-1.log"}
    assert logs <= files_of(path)
    run_study(config)
    n_blocks = len(blocks) - 1
    assert n_blocks > 2
    assert not logs & files_of(path)
    answers = read_transcripts(path / "arm-unedited.jsonl")
    own = {t.id: t.answer_ids for t in read_transcripts(given)}
    assert [t.answer_ids for t in answers] == [own[t.id] for t in answers], "the unedited model answered otherwise"
    once = run_study(config_of(tmp_path / "once", transcripts=given, limit=None, controls=1, batch_size=40))
    assert len(blocks) == 2 * n_blocks + 1, "a block that was finished was run again"
    same_results(path, once.path)


def test_an_organism_that_complies_with_nothing_is_told_so(tmp_path: Path) -> None:
    study = run_study(config_of(tmp_path / "run", model="null-llama"))
    notes = manifest_of(study.path)["notes"]
    told = {note["stage"]: note["text"] for note in notes}
    assert list(told) == ["transfer", "heads"]
    assert told["transfer"].startswith("No probe was carried over between sources")
    assert told["heads"].startswith("Heads were not ranked: 0 harmful prompts of the fit and validate splits and 0 of")
    assert "no cliff to look for" in study.verdict["cliff"]
    assert study.verdict["heads"].startswith("Heads were not ranked")
    assert study.verdict["selection"].startswith("Nothing was selected")
    assert study.report.stat().st_size > 1_000_000
    assert list(stages_of(study.path)) == list(STAGES)
    assert not {"heads.parquet", "safety.parquet"} & files_of(study.path)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"top_fraction": 0.0}, EditError),
        ({"select_fraction": 1.5}, DataError),
        ({"limit": 0}, DataError),
        ({"harmless": "x.csv"}, DataError),
        ({"model": "some-model"}, DataError),
        ({"harmful": "x.csv", "transcripts": "t.jsonl"}, DataError),
        ({"method": "zeroo"}, DataError),
        ({"readout": "answers"}, DataError),
        ({"method": "direct"}, DataError),
        ({"method": "mean", "harmful": "x.csv"}, DataError),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_a_directory_is_made(
    tmp_path: Path, changes: Mapping[str, object], error: type[CliffScopeError]
) -> None:
    with pytest.raises(error):
        run_study(config_of(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_heads_that_leave_no_others_to_compare_with_are_refused_before_anything_is_generated(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cliffscope.study.stages.transcripts.roll_out", None)
    for fraction in (1.0, 0.995):
        with pytest.raises(EditError, match="edits 64 of 64 heads of 'planted-llama': no other set is left"):
            run_study(config_of(tmp_path / "run", top_fraction=fraction))
    (tmp_path / "prompts.txt").write_text("how do i bake bread\n")
    model = make_checkpoint("llama", num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(EditError, match="edits 1 of 1 heads"):
        run_study(config_of(tmp_path / "run", model=str(model), harmful=str(tmp_path / "prompts.txt")))
    assert not (tmp_path / "run").exists()


def test_a_stage_that_was_interrupted_says_with_which_libraries_it_had_begun(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", {}) as store:
        manifest = Manifest(store=store)
        assert manifest.begin("safety", "key", {"torch": "2.12"}, resumes=False) == ()
        assert manifest.begin("safety", "key", {"torch": "2.13"}, resumes=True) == ({"torch": "2.12"},)
        assert manifest.begin("safety", "key", {"torch": "2.13"}, resumes=True) == ({"torch": "2.12"},)
        assert manifest.begin("safety", "other", {"torch": "2.13"}, resumes=False) == ()
    (note,) = _version_notes([{"torch": "2.12"}, library_versions()])
    assert note.endswith("what it had kept was made with torch 2.12.")
    assert _version_notes([library_versions()]) == ()


def test_a_run_that_fails_before_anything_is_written_leaves_no_directory_that_it_made(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", harmful=str(tmp_path / "missing.csv"))
    with pytest.raises(DataError, match=r"missing\.csv"):
        run_study(config)
    assert not (tmp_path / "run").exists()


def test_transcripts_in_which_nothing_was_complied_with_fit_no_probe(tmp_path: Path, whole: Study) -> None:
    few = read_transcripts(whole.path / "transcripts.jsonl").where(outcome="refused")
    write_transcripts(few, tmp_path / "few.jsonl")
    study = run_study(config_of(tmp_path / "run", transcripts=str(tmp_path / "few.jsonl"), limit=10))
    assert len(read_transcripts(study.path / "transcripts.jsonl")) == 10
    assert study.verdict["probe"].startswith("No probe could be fitted")


def test_a_repair_on_request_is_made_once_measured_and_told(whole: Study, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the extra repair is not installed")
    config = config_of(copy_of(whole, tmp_path), repair=True, select_fraction=0.5)
    assert planned(config) == ["selection", "repair", "report"]
    study = run_study(config)
    table = pd.read_parquet(study.path / "repair.parquet").set_index(["measure", "model"])["value"]
    assert table[("asr", "after")] < table[("asr", "before")]
    assert table[("over_refusal", "after")] <= table[("over_refusal", "before")] + 0.2
    assert table[("kl", "after")] > 0
    assert study.verdict["repair"].startswith("Repaired on ")
    assert (study.path / "repaired" / "config.json").is_file()
    assert 'id="repair"' in study.report.read_text()
    assert 'id="repair"' not in whole.report.read_text()
