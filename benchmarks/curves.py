"""What does a sweep cost, against length, heads and transcripts, and how far is the physical limit?

Three series on SmolLM2-135M, each with its floor: a forward pass of the prefix and one of half of branches x window
tokens, for each transcript. Prints JSON; with `--svg` it writes the figure of docs/performance.md (needs kaleido).
"""

import argparse
import json
import statistics

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from sweep import every_head, forward_seconds, long_transcript, random_probe, timed

from cliffscope.figures import theme
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

LENGTHS, HEADS, TRANSCRIPTS = (64, 128, 256, 512, 1024, 2048), (27, 90, 180, 270), (1, 5, 20)
Point = dict[str, float]


def main() -> None:
    """Measures, prints, draws."""
    options = parse()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    probe = random_probe(model)
    middle = long_transcript(model, 512)
    every = len(every_head(model))
    # The first sweep of a model also compares its path with the plain one.
    sweep_branches(model, probe, [middle], every_head(model))
    series = {
        "tokens": [point(model, probe, [row], every, row.n_pos) for row in map_lengths(model)],
        "heads": [point(model, probe, [middle], n, n) for n in HEADS],
        "transcripts": [point(model, probe, [long_transcript(model, 48)] * n, every, n) for n in TRANSCRIPTS],
    }
    print(json.dumps({"model": model.name, "threads": options.threads, **series}, indent=1))
    if options.svg:
        draw(series, options.threads).write_image(options.svg)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--svg", default="")
    return parser.parse_args()


def map_lengths(model: LensModel) -> list[TokenizedTranscript]:
    """A transcript of each length."""
    return [long_transcript(model, n) for n in LENGTHS]


def point(model: LensModel, probe: RefusalProbe, rows: list[TokenizedTranscript], heads: int, x: int) -> Point:
    """Median seconds of three sweeps, and the floor."""
    branches = every_head(model)
    # Heads of all layers alike: a branch costs what lies above its layer.
    spread = [branches[i * len(branches) // heads] for i in range(heads)]
    window = rows[0].final + 1 - rows[0].span(Span.CLOSING).start
    pairs = []
    # Both sides in turn, so that a slow minute of the machine falls on both.
    for _ in range(3):
        took = timed(lambda: sweep_branches(model, probe, rows, spread))[0]
        floor = sum(forward_seconds(model, max(1, n), 2) for n in (rows[0].n_pos, heads * window // 2))
        pairs.append((took, floor * len(rows)))
    took, floor = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"x": float(x), "seconds": round(took, 3), "floor": round(floor, 3)}


def draw(series: dict[str, list[Point]], threads: int) -> go.Figure:
    """A panel a series."""
    fig = make_subplots(cols=len(series), horizontal_spacing=0.09)
    for column, (name, points) in enumerate(series.items(), start=1):
        for what, color, dash in (("seconds", theme.BLUE, "solid"), ("floor", theme.GREY, "dot")):
            fig.add_scatter(
                x=[p["x"] for p in points],
                y=[p[what] for p in points],
                name="sweep" if what == "seconds" else "physical limit",
                mode="lines+markers",
                line={"color": color, "dash": dash},
                showlegend=column == 1,
                row=1,
                col=column,
            )
        fig.update_xaxes(title_text=name, type="log" if name != "heads" else "linear", row=1, col=column)
        fig.update_yaxes(rangemode="tozero", row=1, col=column)
    theme.themed(fig, title=f"Cost of a sweep of the closing, SmolLM2-135M, threads: {threads}", x="", y="", height=340)
    for column, name in enumerate(series, start=1):
        fig.update_xaxes(title_text=name, row=1, col=column)
    fig.update_yaxes(title_text="seconds", row=1, col=1)
    fig.update_layout(width=900)
    return fig


if __name__ == "__main__":
    main()
