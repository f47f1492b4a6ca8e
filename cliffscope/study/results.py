"""Which rows do a study's results become?

Each function turns one result into the table or JSON that the run directory holds; the columns are those the report
reads. No model, no files.
"""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pandas as pd
from scipy.special import expit

from cliffscope.heads.controls import SetControl
from cliffscope.heads.ranking import HeadRanking
from cliffscope.heads.sources import HeadSources
from cliffscope.readouts.trace import RefusalTraces
from cliffscope.transcripts.records import Outcome, Transcripts


def layer_frame(traces: RefusalTraces) -> pd.DataFrame:
    """id, position, layer and score of the transcripts whose layers were traced."""
    parts = [
        pd.DataFrame(
            {
                "id": name,
                "position": np.tile(np.arange(logits.shape[1]), logits.shape[0]),
                "layer": np.repeat(np.arange(logits.shape[0]), logits.shape[1]),
                "score": expit(logits).ravel(),
            }
        )
        for name, logits in traces.layer_logits.items()
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["id", "position", "layer", "score"])


def source_frame(sources: Sequence[HeadSources]) -> pd.DataFrame:
    """What heads read in one transcript: id, head, kv_group, query, position, token, span, attention, share."""
    parts = [s.to_frame().assign(id=s.tokens.id, head=str(s.head), kv_group=s.kv_group) for s in sources]
    order = ["id", "head", "kv_group", "query", "position", "token", "span", "attention", "share"]
    return pd.concat(parts, ignore_index=True)[order]


def held_out_first(cliffs: pd.DataFrame, first: Sequence[str]) -> list[str]:
    """Ids as they are worth showing: those given, then held-out ones, then what the probe was fitted on."""
    order = cliffs["id"][(cliffs["split"] != "test").argsort(kind="stable")].tolist()
    return [*first, *(i for i in order if i not in first)]


def heads_json(ranking: HeadRanking, control: SetControl, fraction: float) -> dict[str, object]:
    """The ranking's headline: the selected set against its random sets."""
    low, high = control.interval
    return {
        "method": ranking.method,
        "scope": ranking.scope,
        "n": len(ranking.clean),
        "top_fraction": fraction,
        "n_selected": len(control.heads),
        "selected": [str(h) for h in control.heads],
        "significant": [str(h) for h in ranking.significant()],
        "gap": ranking.gap,
        "set_n": len(control.effects),
        "set_effect": control.effect,
        "set_effect_low": low,
        "set_effect_high": high,
        "random_sets": control.random_effects.tolist(),
        "random_p": control.p,
        "beats_random": bool(control.effect > control.random_effects.max() and ranking.significant()),
        "path": ranking.path,
    }


def counts(transcripts: Transcripts) -> dict[str, object]:
    """Transcripts by outcome, and by harmfulness and outcome."""
    outcomes = pd.Series([str(t.outcome) for t in transcripts])
    words = {True: "harmful", False: "harmless", None: "unlabelled"}
    cells = pd.DataFrame({"group": [words[t.harmful] for t in transcripts], "outcome": outcomes})
    return {
        "transcripts": len(transcripts),
        **{str(o): int((outcomes == str(o)).sum()) for o in Outcome},
        "by": [{"group": g, "outcome": o, "n": len(part)} for (g, o), part in cells.groupby(["group", "outcome"])],
    }


def transcript_frame(transcripts: Transcripts, splits: Mapping[str, str]) -> pd.DataFrame:
    """One row a transcript with its split; n_pos counts generated tokens."""
    frame = transcripts.to_frame()
    lengths = [len(t.thinking_ids or ()) + len(t.answer_ids or ()) for t in transcripts]
    columns = ["id", "split", "harmful", "outcome", "source", "prompt", "thinking", "answer"]
    split = [splits[i] for i in frame["id"]]
    return frame.assign(split=split, n_pos=lengths, outcome=frame["outcome"].astype(str))[columns + ["n_pos"]]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "transformer-lens", "numpy", "scikit-learn"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
