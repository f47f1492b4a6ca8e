"""Which methods find the planted heads, and call nothing else a suppression head?

On each organism a probe is fitted and heads are ranked by every method on the prompts of the fit half; precision at k
is the share of planted heads among the first k = number planted. Prints JSON: organism by method.
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
from cliffscope.readouts.probe import RefusalProbe, fit_probe
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
    """Every method on one organism."""
    model = cs.load_model(name)
    classes, probe = prepare(model, name, options.prompts, options.seed, mixed=options.mixed)
    # Where nothing is complied with there is nothing to rank on but what was refused.
    ranked = classes.challenge if len(classes.challenge or ()) >= 8 else classes.refused
    planted = set(read_truth(name).planted)
    rows, rankings = {}, {}
    for method, _ in METHODS:
        start = time.perf_counter()
        ranking = rank(model, probe, classes, ranked, method, options.seed)
        rankings[method] = ranking
        rows[method] = {**describe(ranking, planted), "seconds": round(time.perf_counter() - start, 2)}
        rows[method]["spearman_with_zero"] = agreement(rankings["zero"], ranking)
    return {"n": len(ranked), "planted": sorted(map(str, planted)), "probe": repr(probe), "methods": rows}


def prepare(model: LensModel, name: str, n: int, seed: int, *, mixed: bool = False) -> tuple[Classes, RefusalProbe]:
    """Transcripts of the fit half by class, and the probe."""
    prompts, splits = study_prompts(name, n=n, seed=seed)
    truth = read_truth(name)
    partly = set() if mixed else set(truth.wrappers) - set(truth.full_wrappers)
    unanswered = Transcripts(t for t in prompts if t.id not in splits and not partly & set(t.prompt.split()))
    answered = cs.judge(cs.roll_out(model, unanswered, max_thinking=128, max_answer=32, temperature=1.0, seed=seed))
    classes = contrast_classes(answered, "auto", thinks=True)
    return classes, fit_probe(model, classes.refused, classes.complied, challenge=classes.challenge, seed=seed)


def rank(
    model: LensModel, probe: RefusalProbe, classes: Classes, ranked: Transcripts, method: str, seed: int
) -> HeadRanking:
    """One ranking, with both controls; they are the donors too."""
    options = {"harmless": classes.complied, "refused": classes.refused, "seed": seed}
    return cs.rank_heads(model, probe, ranked, method=method, **options)


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
        "least_effect": round(ranking.least_effect, 2),
        "path": ranking.path,
    }


def agreement(one: HeadRanking, other: HeadRanking) -> float:
    """Spearman correlation of mean effects over the heads that the probe sees."""
    seen = [i for i, head in enumerate(one.heads) if head.layer <= one.readout_layer]
    return round(float(spearmanr(one.effects.mean(0)[seen], other.effects.mean(0)[seen]).statistic), 3)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
