"""How is a probe kept in a run directory?"""

from cliffscope.readouts.files import probe_from_saved, saved_probe
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.store import RunStore
from cliffscope.study.artefact_kinds import Artefact
from cliffscope.study.artefacts import PROBE, PROBE_ARRAYS, PROBE_LAYERS


def probe_files(probe: RefusalProbe, contrast: str) -> dict[Artefact, object]:
    """A probe as the artefacts that hold it.

    Args:
        probe: the probe.
        contrast: its complied class, `harmless` or `harmful`.
    """
    saved = saved_probe(probe)
    return {
        PROBE: {**saved.document, "contrast": contrast},
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
