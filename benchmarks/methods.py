"""Which methods find the planted heads, and call nothing else a suppression head?

On each organism an answer readout and a probe are fitted and heads are ranked by every method on the prompts of the fit
half, by each readout that the method can use; precision at k is the share of planted heads among the first k = number
planted. Where nothing harmful is complied with there is no answer readout. Prints JSON: organism by readout and method.
"""

import argparse
import json
import time

import numpy as np
from scipy.stats import spearmanr

import cliffscope as cs
from cliffscope.heads.catalogue import METHODS
from cliffscope.heads.ranking import HeadRanking
from cliffscope.model.load import LensModel
from cliffscope.organisms import names, read_truth, study_prompts
from cliffscope.readouts.contrast import Classes, contrast_classes
from cliffscope.readouts.probe import FEWEST, RefusalProbe, fit_probe
from cliffscope.readouts.readout import Readout
from cliffscope.transcripts.records import Transcripts


def main() -> None:
    """Measures and prints."""
    options = parse()
    print(json.dumps({name: study(name, options) for name in options.organisms}, indent=1))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organisms", nargs="+", default=list(names()))
    parser.add_argument("--prompts", type=int, default=480)
    parser.add_argument("--mixed", action="store_true", help="with partly wrapped prompts too")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def study(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Every method on one organism, by each readout."""
    model = cs.load_model(name)
    classes = sort_answers(model, name, options)
    complied = classes.challenge or Transcripts()
    # Where nothing is complied with there is nothing to rank on but what was refused.
    ranked = complied if len(complied) >= FEWEST else classes.refused
    readouts: dict[str, Readout] = {}
    if len(complied) >= FEWEST:
        readouts["answer"] = cs.fit_answer_readout(model, classes.refused, complied, seed=options.seed)
    readouts["probe"] = fit_probe(model, classes.refused, classes.complied, challenge=complied, seed=options.seed)
    planted = set(read_truth(name).planted)
    tables = {kind: rank_all(model, readout, classes, ranked, planted, options) for kind, readout in readouts.items()}
    shown = {kind: repr(readout) for kind, readout in readouts.items()}
    return {"n": len(ranked), "planted": sorted(map(str, planted)), "readouts": shown, **tables}


def sort_answers(model: LensModel, name: str, options: argparse.Namespace) -> Classes:
    """Transcripts of the fit half by class."""
    prompts, splits = study_prompts(name, n=options.prompts, seed=options.seed)
    truth = read_truth(name)
    partly = set() if options.mixed else set(truth.wrappers) - set(truth.full_wrappers)
    unanswered = Transcripts(t for t in prompts if t.id not in splits and not partly & set(t.prompt.split()))
    budget = {"max_thinking": 128, "max_answer": 32, "temperature": 1.0}
    answered = cs.judge(cs.roll_out(model, unanswered, seed=options.seed, **budget))
    return contrast_classes(answered, "auto", thinks=True)


def rank_all(
    model: LensModel,
    readout: Readout,
    classes: Classes,
    ranked: Transcripts,
    planted: set[cs.HeadRef],
    options: argparse.Namespace,
) -> dict[str, dict[str, object]]:
    """Every method that can use the readout, with both controls; they are the donors too."""
    rows: dict[str, dict[str, object]] = {}
    rankings: dict[str, HeadRanking] = {}
    for name, method in METHODS:
        if method.linear and not isinstance(readout, RefusalProbe):
            continue
        start = time.perf_counter()
        controls = {"harmless": classes.complied, "refused": classes.refused}
        rankings[name] = cs.rank_heads(model, readout, ranked, method=name, seed=options.seed, **controls)
        rows[name] = {
            **describe(rankings[name], planted),
            "spearman_with_zero": agreement(rankings["zero"], rankings[name]),
            "seconds": round(time.perf_counter() - start, 2),
        }
    return rows


def describe(ranking: HeadRanking, planted: set[cs.HeadRef]) -> dict[str, object]:
    """What was found, beside the truth."""
    frame, significant = ranking.to_frame(), set(ranking.significant())
    first = [cs.HeadRef(layer=int(a), head=int(b)) for a, b in zip(frame["layer"], frame["head"], strict=True)]
    return {
        "precision_at_k": len(planted & set(first[: len(planted)])) / len(planted) if planted else None,
        "significant_planted": len(significant & planted),
        "significant_others": len(significant - planted),
        "first": [f"{head} {effect:+.2f}" for head, effect in zip(first[:5], frame["effect"], strict=False)],
        "gap": round(ranking.gap, 2),
        "path": ranking.path,
    }


def agreement(one: HeadRanking, other: HeadRanking) -> float:
    """Spearman correlation of mean effects over the heads that the readout sees."""
    seen = [i for i, head in enumerate(one.heads) if head.layer <= one.readout_layer]
    return round(float(spearmanr(one.effects.mean(0)[seen], other.effects.mean(0)[seen]).statistic), 3)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
