import pytest
from conftest import written

from cliffscope.readouts.contrast import Contrast, contrast_classes
from cliffscope.transcripts.records import Outcome, Transcripts

CELLS = {
    (harmful, outcome): 2 + i for i, (harmful, outcome) in enumerate((h, o) for h in (True, False) for o in Outcome)
}


@pytest.fixture(scope="module")
def judged() -> Transcripts:
    """Two or more of each cell, and two that nobody labelled."""
    groups = [written(n, harmful=harmful, outcome=outcome) for (harmful, outcome), n in CELLS.items()]
    nameless = [t.replace(id=f"nameless-{t.outcome}", harmful=None) for t in (groups[0][0], groups[1][0])]
    return Transcripts([t for group in groups for t in group] + nameless)


@pytest.mark.parametrize(
    ("contrast", "thinks", "name"),
    [
        ("auto", True, "harmless"),
        ("auto", False, "harmful"),
        ("harmless", False, "harmless"),
        ("harmless", True, "harmless"),
        ("harmful", True, "harmful"),
        ("harmful", False, "harmful"),
    ],
)
def test_auto_follows_the_thinking_and_a_named_contrast_does_not(
    judged: Transcripts, contrast: Contrast, thinks: bool, name: str
) -> None:
    assert contrast_classes(judged, contrast, thinks=thinks).name == name


def test_harmless_sets_refused_harmful_against_complied_harmless_and_challenges_with_the_rest(
    judged: Transcripts,
) -> None:
    found = contrast_classes(judged, "harmless", thinks=True)
    assert found.challenge is not None
    assert {(t.harmful, t.outcome) for t in found.refused} == {(True, Outcome.REFUSED)}
    assert {(t.harmful, t.outcome) for t in found.complied} == {(False, Outcome.COMPLIED)}
    assert {(t.harmful, t.outcome) for t in found.challenge} == {(True, Outcome.COMPLIED)}
    sizes = (len(found.refused), len(found.complied), len(found.challenge))
    assert sizes == (
        CELLS[True, Outcome.REFUSED],
        CELLS[False, Outcome.COMPLIED],
        CELLS[True, Outcome.COMPLIED],
    )


def test_harmful_sets_harmful_ones_against_each_other_and_has_no_challenge(judged: Transcripts) -> None:
    found = contrast_classes(judged, "harmful", thinks=True)
    assert found.challenge is None
    assert {(t.harmful, t.outcome) for t in found.refused} == {(True, Outcome.REFUSED)}
    assert {(t.harmful, t.outcome) for t in found.complied} == {(True, Outcome.COMPLIED)}


def test_no_transcript_is_in_two_classes_and_unjudged_and_unlabelled_ones_are_in_none(judged: Transcripts) -> None:
    found = contrast_classes(judged, "harmless", thinks=True)
    ids = [t.id for group in (found.refused, found.complied, found.challenge or ()) for t in group]
    assert len(ids) == len(set(ids))
    assert not any(i.startswith(("nameless", "unjudged", "unfinished")) for i in ids)


def test_without_transcripts_the_classes_are_empty() -> None:
    found = contrast_classes(Transcripts(), "auto", thinks=True)
    assert (len(found.refused), len(found.complied), len(found.challenge or ())) == (0, 0, 0)
