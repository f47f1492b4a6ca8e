"""The section that shows single transcripts, token by token.

1. Take the transcripts whose layers were traced, then those with the largest cliff in each group.
2. Write each as plain text whose tokens are shaded by the refusal score at the probe's layer.
3. Where the layers were traced, add a control for the layer and a heat map of layer by token.

Long transcripts keep the beginning and the end of each span, and say how many tokens stand between.
"""

import base64
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pandas as pd

from cliffscope.figures import embed, layer_heat, printable
from cliffscope.report.content import Part, Plot, Remark, Section, TokenRun, TokenView, number, plot
from cliffscope.report.stored import StoredRun, as_int

VIEWS = 8
"""Transcripts shown."""
HEATS = 4
"""Transcripts with a heat map."""
SPAN_TOKENS = 400
"""Most tokens shown of one span."""
HEAT_TOKENS = 600
"""Most tokens of a heat map: the last ones, where the cliff is."""
HEAT_CELLS = 18_000
"""Most cells of a heat map, which bounds the page at any number of layers."""
TOKEN = 80
"""Most characters shown of one token."""


def tokens_section(run: StoredRun) -> Section:
    """A few transcripts with their tokens shaded by score."""
    traces, layered = run.tables["traces"], run.tables["layer_traces"]
    ids = _shown_ids(run)
    views = [_view(run, name, place) for place, name in enumerate(ids)]
    total = traces["id"].nunique()
    parts: list[Part] = list(views)
    if total > len(ids):
        parts.append(
            Remark(text=f"{len(ids)} of {total:,} traced transcripts are shown; traces.parquet holds all of them.")
        )
    missing: tuple[str, ...] = ()
    if not ids:
        missing = ("This run stored no token-level traces.", *run.notes("traces", "readouts"))
    has_layers = bool(len(layered)) and bool(ids)
    return Section(
        id="tokens",
        title="Single transcripts",
        claim="",
        lead=(
            "A deeper shade means a higher refusal score at that token; no shade means a score near zero. Hover over "
            "a token to see its values."
            + (" Where all layers were traced, the slider above the text selects the layer." if has_layers else "")
        ),
        parts=parts,
        missing=missing,
    )


def _shown_ids(run: StoredRun) -> list[str]:
    traced = run.tables["traces"]["id"].unique().tolist()
    layered = set(run.tables["layer_traces"]["id"].unique())
    cliffs = run.tables["cliffs"]
    cliffs = cliffs[cliffs["id"].isin(traced)].sort_values("cliff", ascending=False, kind="stable")
    ranked = [*cliffs["id"], *traced]
    first = list(dict.fromkeys(name for name in ranked if name in layered))[:HEATS]
    by_group = [rows["id"].to_list()[:2] for _, rows in cliffs.groupby("group", sort=True)]
    rest = [name for names in by_group for name in names]
    return list(dict.fromkeys([*first, *rest, *traced]))[:VIEWS]


def _view(run: StoredRun, name: str, place: int) -> TokenView:
    traces = run.tables["traces"]
    rows = traces[traces["id"] == name].sort_values("position").reset_index(drop=True)
    grid = _layer_grid(run, name, rows)
    places = _shown_places(rows["span"].astype(str).to_list())
    probe_layer = as_int(run.probe.get("layer"))
    element = f"transcript-{place + 1}"
    return TokenView(
        id=element,
        name=printable(name, limit=60),
        facts=_facts(run, name),
        runs=_runs(rows, places),
        layers="" if grid is None else embed([_packed(scores) for scores in grid[:, places]]),
        n_layers=0 if grid is None else len(grid),
        probe_layer=probe_layer if grid is not None and probe_layer < len(grid) else 0,
        heat=None if grid is None else _heat(rows, grid, element, probe_layer),
    )


def _facts(run: StoredRun, name: str) -> str:
    cliffs = run.tables["cliffs"]
    rows = cliffs[cliffs["id"] == name].to_dict("records")
    if not rows:
        return ""
    plateau = run.plateau
    names = {f"plateau_{plateau}": f"plateau ({plateau})", "final": "final", "cliff": "cliff"}
    scores = pd.to_numeric(pd.Series({key: rows[0][key] for key in names}), errors="coerce").astype(float)
    shown = ", ".join(f"{name} {number(scores[key])}" for key, name in names.items())
    return f"{printable(str(rows[0]['group']), limit=60)}: {shown}"


def _layer_grid(run: StoredRun, name: str, rows: pd.DataFrame) -> np.ndarray | None:
    frame = run.tables["layer_traces"]
    frame = frame[frame["id"] == name].dropna(subset=["layer", "position"])
    if frame.empty:
        return None
    wide = frame.drop_duplicates(["layer", "position"]).pivot(index="layer", columns="position", values="score")
    wide = wide.reindex(index=range(int(wide.index.max()) + 1), columns=rows["position"].to_list())
    grid: np.ndarray = wide.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    return grid


def _shown_places(spans: Sequence[str]) -> list[int]:
    shown: list[int] = []
    start = 0
    for _, run in groupby(spans):
        size = len(list(run))
        skipped = max(0, size - SPAN_TOKENS)
        shown += [place for place in range(start, start + size) if not 0 <= place - start - SPAN_TOKENS // 4 < skipped]
        start += size
    return shown


def _runs(rows: pd.DataFrame, shown: list[int]) -> list[TokenRun]:
    sizes = rows["span"].astype(str).value_counts()
    score = pd.to_numeric(rows["score"], errors="coerce").to_numpy(float)
    logit = pd.to_numeric(rows["logit"], errors="coerce").to_numpy(float)
    texts, spans = rows["token"].fillna("").astype(str).to_list(), rows["span"].astype(str).to_list()
    spaced = any(text[:1].isspace() for text in texts if text.strip())
    runs = []
    for span, group in groupby(shown, key=lambda place: spans[place]):
        places = list(group)
        tokens = [
            (
                _written(texts[place], spaced=spaced, broken=span != "closing"),
                int(_percent(score[place : place + 1])[0]),
                f"{place} · {printable(texts[place], limit=TOKEN, keep_spaces=False)} · "
                f"score {number(score[place], 3)} · logit {number(logit[place])}",
            )
            for place in places
        ]
        runs.append(TokenRun(span=span, tokens=tokens, skipped=max(0, int(sizes[span]) - len(places))))
    return runs


def _written(text: str, *, spaced: bool, broken: bool) -> str:
    # A token that is only white space would be invisible, so it shows its symbol; a word keeps its own space.
    shown = printable(text, limit=TOKEN, keep_spaces=bool(text.strip()))
    line = f"{shown}\n" if broken and "\n" in text else shown
    return line if spaced else f"{line} "


def _percent(score: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(score), np.round(100 * np.nan_to_num(score)), -1).astype(int)


def _packed(score: np.ndarray) -> str:
    return base64.b64encode(_percent(score).astype(np.uint8).tobytes()).decode("ascii")


def _heat(rows: pd.DataFrame, grid: np.ndarray, element: str, probe_layer: int) -> Plot:
    most = max(1, min(HEAT_TOKENS, HEAT_CELLS // len(grid)))
    last = slice(max(0, len(rows) - most), None)
    fig = layer_heat(
        rows["token"].fillna("").astype(str).to_list()[last],
        rows["span"].astype(str).to_list()[last],
        grid[:, last],
        probe_layer=probe_layer,
    )
    cut = f" Only the last {most} of {len(rows):,} tokens are shown." if len(rows) > most else ""
    return plot(
        element, fig, f"Each layer is scored by its own probe. Outlined: the layer of the probe in this report.{cut}"
    )
