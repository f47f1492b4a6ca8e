from pathlib import Path

import pytest
from conftest import written

from cliffscope.errors import StoreError
from cliffscope.generation.answers import OMISSIONS_FILE, open_answers
from cliffscope.store import open_run
from cliffscope.transcripts.records import Omission, Outcome, Transcripts

ANSWERS = written(6, harmful=True, outcome=Outcome.COMPLIED)


def files_of(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if not p.name.startswith(".")}


def test_batches_are_found_again_and_go_with_the_finished_arm(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_run(run, {"a": 1}) as store, open_answers(store) as kept:
        kept.keep_batch("top heads", ANSWERS[:2])
        kept.keep_batch("top heads", ANSWERS[2:3])
    with open_run(run, {"a": 1}) as store, open_answers(store) as kept:
        assert kept.begun_arms(["top heads", "random 1"]) == {"top heads": ANSWERS[:3], "random 1": Transcripts()}
        assert kept.finished("top heads") is None
        kept.keep_batch("top heads", ANSWERS[3:])
        kept.keep("top heads", Transcripts(ANSWERS, omitted=[Omission(stage="roll_out", reason="long", id="x")]))
    assert files_of(run) == {"manifest.json", "arm-top-heads.jsonl", OMISSIONS_FILE}, (
        "an empty or finished log was left"
    )
    with open_run(run, {"a": 1}) as store, open_answers(store) as kept:
        found = kept.finished_arms(["top heads", "random 1"])
        assert list(found) == ["top heads"]
        assert found["top heads"] == Transcripts(ANSWERS, omitted=[Omission(stage="roll_out", reason="long", id="x")])


def test_a_half_written_transcript_is_cut_off(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_run(run, {}) as store, open_answers(store) as kept:
        kept.keep_batch("unedited", ANSWERS[:3])
    log = run / "arm-unedited.log"
    log.write_bytes(log.read_bytes()[:-7])
    with open_run(run, {}) as store, open_answers(store) as kept:
        assert kept.begun("unedited") == ANSWERS[:2]


def test_what_was_kept_holds_the_directory_for_its_configuration(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_run(run, {"seed": 0}) as store, open_answers(store) as kept:
        kept.begun("unedited")
    with open_run(run, {"seed": 1}) as store, open_answers(store) as kept:
        kept.keep_batch("unedited", ANSWERS[:3])
    with pytest.raises(StoreError, match="seed was 1, now 2"), open_run(run, {"seed": 2}):
        pass
