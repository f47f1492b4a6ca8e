"""What do early closings at every thinking token cost, over the forward pass of as many tokens?

All sides run in one process on SmolLM2-135M, fp32, one transcript a length; medians of `--repeats`.

- `packed`: `trace_early_closings` at every thinking token, the answer readout of one-token openings, whole: tokenizing,
  the comparison with plain passes on a short piece, masks, controls, tables.
- `floor`: a plain forward pass of the blocks over (positions x closing tokens + prefix) tokens, as rows of the prefix's
  length: what no method can go below that computes every closing token once. `one_row` is the same in one row, whose
  attention grows as the square.
- `plain`: a plain pass of the cut transcript, median over `--some` positions, times the positions.

The bar is `packed` over `floor` of at most 1.3. Prints JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pandas as pd
import psutil
import torch

from cliffscope.heads.early_closings import EarlyClosings, trace_early_closings
from cliffscope.heads.edits import HeadRef, zero
from cliffscope.heads.packed_closings import early_closings
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts.answer import AnswerReadout
from cliffscope.readouts.openings import describe, read_openings
from cliffscope.readouts.readout import read_final
from cliffscope.readouts.regions import FINAL
from cliffscope.readouts.reports import AnswerReport, region_report
from cliffscope.transcripts.records import Message, Transcript, Transcripts
from cliffscope.transcripts.transcript import ClosingRule, Span, tokenize

SENTENCE = "The user asks how bread is made, so I list what it needs and how long each of the steps takes. "
BAR = 1.3
Result = TypeVar("Result")


def main() -> None:
    """Measures and prints."""
    options = parse()
    torch.set_num_threads(options.threads)
    model = load_model(options.model, template=options.template)
    answer = readout(model)
    rows = [measure(model, answer, n, options) for n in options.tokens]
    head = {"model": model.name, "threads": torch.get_num_threads(), "bar": BAR}
    print(json.dumps({**head, "lengths": rows, "load_average": psutil.getloadavg()[0]}, indent=1))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--template", default="chatml-think")
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 512], help="thinking tokens")
    parser.add_argument("--some", type=int, default=3, help="positions that are read plainly")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def measure(model: LensModel, answer: AnswerReadout, n: int, options: argparse.Namespace) -> dict[str, object]:
    """One length."""
    transcript = thought(model, n)
    tokens = tokenize(transcript, model.tokenizer, model.template)
    places = early_closings(tokens, ClosingRule.of(model.tokenizer, model.template))
    prefix = tokens.span(Span.CLOSING).start
    total = prefix + sum(len(place.closing) for place in places)
    some = [places[int(i)] for i in np.linspace(0, len(places) - 1, options.some)]
    head = zero([HeadRef(layer=3, head=1)], scope="closing")
    passes: dict[str, list[float]] = {"packed": [], "edited": [], "floor": [], "one_row": []}
    results: list[EarlyClosings] = []
    for _ in range(options.repeats + 1):
        # Sides take turns, so that a machine that slows down slows all of them.
        seconds, traced = timed(lambda: trace_early_closings(model, answer, Transcripts([transcript])))
        results.append(traced)
        passes["packed"].append(seconds)
        passes["edited"].append(
            timed(lambda: trace_early_closings(model, answer, Transcripts([transcript]), edit=head))[0]
        )
        passes["floor"].append(timed(lambda: forward(model, total, prefix))[0])
        passes["one_row"].append(timed(lambda: forward(model, total, total))[0])
    plain = [timed(lambda place=place: read_final(model, answer, [place.cut(tokens)])) for place in some]
    differences = [
        abs(float(logit[0]) - float(results[0].logits[0][place.position - tokens.bounds[0]]))
        for place, (_, logit) in zip(some, plain, strict=True)
    ]
    medians = {name: statistics.median(seconds[1:]) for name, seconds in passes.items()}
    loop = statistics.median(seconds for seconds, _ in plain) * len(places)
    return {
        "thinking": n,
        "positions": len(places),
        "closing_tokens": len(places[-1].closing),
        "tokens": total,
        "path": results[0].path,
        **{f"{name}_seconds": round(seconds, 3) for name, seconds in medians.items()},
        "plain_seconds": round(loop, 2),
        "packed_over_floor": round(medians["packed"] / medians["floor"], 3),
        "edited_over_floor": round(medians["edited"] / medians["floor"], 3),
        "packed_over_one_row": round(medians["packed"] / medians["one_row"], 3),
        "times_faster_than_plain": round(loop / medians["packed"], 1),
        "largest_difference": max(differences),
    }


def forward(model: LensModel, tokens: int, width: int) -> None:
    """A plain pass of the blocks over so many tokens, in rows of a width and one shorter row."""
    with torch.inference_mode():
        for size, rows in ((width, tokens // width), (tokens % width, 1)):
            if size and rows:
                ids = torch.randint(100, 1000, (rows, size), generator=torch.Generator().manual_seed(0))
                model.decoder(input_ids=ids.to(model.device), use_cache=False)


def thought(model: LensModel, n: int) -> Transcript:
    """A transcript with so many thinking tokens."""
    ids = model.tokenizer.encode(SENTENCE * (1 + n // 10), add_special_tokens=False)[:n]
    return Transcript(
        id=f"bread-{n}",
        messages=(Message(role="user", content="How do I bake bread?"),),
        thinking=model.tokenizer.decode(ids),
        thinking_ids=tuple(ids),
    )


def readout(model: LensModel) -> AnswerReadout:
    """The answer readout of two openings of one token; what it can tell is not measured here."""
    nothing = region_report(FINAL, np.zeros(0), np.zeros(0))
    report = AnswerReport(
        final=nothing,
        within_harmful=nothing,
        openings=pd.DataFrame(),
        separation=1.0,
        covered=1.0,
        mass=1.0,
        warnings=(),
    )
    vocabulary = model.hf.get_output_embeddings().weight.shape[0]
    by_class = read_openings({"refused": ["Sorry"], "complied": ["Sure"]}, model.tokenizer, vocabulary)
    return AnswerReadout(
        openings=describe(by_class, model.tokenizer),
        layer=model.shape.n_layers - 1,
        vocabulary=vocabulary,
        refused_logit=0.0,
        fingerprint="",
        template=model.template.name,
        report=report,
    )


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds, and what came back."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
