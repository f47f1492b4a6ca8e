"""How are readouts stored in a run directory?"""

from collections.abc import Mapping

from cliffscope.readouts.answer import AnswerReadout
from cliffscope.readouts.files import (
    answer_readout_from_saved,
    probe_from_saved,
    saved_answer_readout,
    saved_probe,
)
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.store import RunStore
from cliffscope.study.artefact_kinds import Artefact
from cliffscope.study.artefacts import ANSWER, PROBE, PROBE_ARRAYS, PROBE_LAYERS


def probe_files(
    probe: RefusalProbe, contrast: str, *, forced: Mapping[str, int] | None = None
) -> dict[Artefact, object]:
    """A probe as the artefacts that hold it.

    Args:
        probe: the probe.
        contrast: its complied class, `harmless` or `harmful`.
        forced: transcripts that were left out since their thinking was closed at its budget, by split.
    """
    saved = saved_probe(probe)
    return {
        PROBE: {**saved.document, "contrast": contrast, "forced": dict(forced or {})},
        PROBE_ARRAYS: saved.arrays,
        PROBE_LAYERS: saved.layers,
    }


def save_probe(store: RunStore, probe: RefusalProbe, contrast: str = "") -> None:
    """Writes a probe into a run directory."""
    for artefact, value in probe_files(probe, contrast).items():
        artefact.write(store, value)


def load_probe(store: RunStore) -> RefusalProbe:
    """Reads a probe from a run directory.

    Raises:
        ProbeError: a field is missing or wrong.
        StoreError: a file is not there or cannot be read.
    """
    return probe_from_saved(
        store.read_json(PROBE.file),
        store.read_arrays(PROBE_ARRAYS.file),
        store.read_frame(PROBE_LAYERS.file),
        place=store.path / PROBE.file,
    )


def save_answer_readout(store: RunStore, readout: AnswerReadout) -> None:
    """Writes an answer readout into a run directory."""
    ANSWER.write(store, saved_answer_readout(readout))


def load_answer_readout(store: RunStore) -> AnswerReadout:
    """Reads an answer readout from a run directory.

    Raises:
        ProbeError: a field is missing or wrong.
        StoreError: the file is not there or cannot be read.
    """
    return answer_readout_from_saved(store.read_json(ANSWER.file), place=store.path / ANSWER.file)
