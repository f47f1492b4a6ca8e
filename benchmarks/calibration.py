"""How often is a claim about heads wrong where there is nothing to claim?

Simulates effects of 64 heads on complied, refused and harmless transcripts, in which no head suppresses refusal, or
one acts everywhere alike, and counts simulations with at least one false claim: a head with q of at most 0.05 where
none has an effect, or a broad head that is called selective. Prints one row a scenario; no model is needed.

    python benchmarks/calibration.py --simulations 1000
"""

import argparse
from dataclasses import dataclass

import numpy as np

from cliffscope.heads.statistics import HeadKind, decisive_p, decisive_q, kinds_of
from cliffscope.stats import wilson

HEADS = 64


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is simulated."""

    name: str
    broad: float = 0.0
    """Effect of head 0 on every transcript, harmless ones too."""
    complied: int = 40
    refused: int = 40
    harmless: int = 40
    wide: float = 1.0
    """Standard deviation of effects on refused transcripts, relative to that on complied ones."""


SCENARIOS = (
    Scenario(name="no effect"),
    Scenario(name="no effect, logits near zero", complied=200),
    Scenario(name="broad effect", broad=2.0),
    Scenario(name="broad effect, one refused transcript", broad=2.0, refused=1),
    Scenario(name="broad effect, 6 refused transcripts", broad=2.0, refused=6),
    Scenario(name="broad effect, 40 refused transcripts, unequal variances", broad=2.0, wide=4.0),
    Scenario(name="broad effect, 6 refused transcripts, unequal variances", broad=2.0, refused=6, wide=4.0),
)


def simulate(scenario: Scenario, rng: np.random.Generator) -> bool:
    """Whether a false claim is made."""
    spread = rng.gamma(1.0, 0.3, HEADS)  # heads differ in how much they do, a few do much
    near = 0.5 if "near zero" in scenario.name else 4.0
    clean = -np.abs(rng.normal(near, near / 2, scenario.complied))
    groups = [
        rng.normal(0.0, 1.0, (n, HEADS)) * spread * scale
        for n, scale in ((scenario.complied, 1.0), (scenario.refused, scenario.wide), (scenario.harmless, 1.0))
    ]
    for group in groups:
        group[:, 0] += scenario.broad
    if not scenario.broad:
        return bool((decisive_q(decisive_p(clean, groups[0])) <= 0.05).any())
    return kinds_of(groups[0][:, :1], groups[1][:, :1], groups[2][:, :1])[0] is HeadKind.SELECTIVE


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| scenario | false claims | 95% interval |\n|---|---|---|")
    for scenario in SCENARIOS:
        rng = np.random.default_rng(options.seed)
        false = sum(simulate(scenario, rng) for _ in range(options.simulations))
        interval = wilson(false, options.simulations)
        share = false / options.simulations
        print(f"| {scenario.name} | {share:.3f} | [{interval.low:.3f}, {interval.high:.3f}] |")


if __name__ == "__main__":
    main()
