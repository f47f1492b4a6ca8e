"""Organisms with judged transcripts and a probe, each made once a session; shared by the files that test them."""

import functools
from pathlib import Path

import cliffscope as cs
from cliffscope.organisms import grammar, read_truth
from cliffscope.readouts.contrast import contrast_classes
from cliffscope.readouts.probe import fit_probe
from cliffscope.transcripts.records import Outcome, Transcripts

PLANTED = ("planted-llama", "planted-qwen3")
ORGANISMS = (*PLANTED, "null-llama")
VISIBLE = "probe-visible-llama"
"""Not in the package: its loss pushed along the axes of a probe."""
VISIBLE_FOLDER = Path(__file__).parent / "organisms" / VISIBLE
BUDGET = {"max_thinking": 128, "max_answer": 32}


class Grown:
    """An organism with judged transcripts, a probe, an answer readout and its truth."""

    def __init__(self, name: str) -> None:
        place = str(VISIBLE_FOLDER) if name == VISIBLE else name
        self.name, self.truth = name, read_truth(place)
        self.model = cs.load_model(place)
        words = tuple(self.truth.wrappers)
        self.full = self.truth.full_wrappers
        plain = (None, *grammar.NEUTRAL_WRAPPERS)
        # To fit on, harmless prompts have the wrappers of refused ones, or the wrapper would tell the classes apart.
        self.fit = self.answer(*(("fit", 120, *kind) for kind in ((True, plain), (True, self.full), (False, plain))))
        classes = contrast_classes(self.fit, "auto", thinks=True)
        self.probe = fit_probe(self.model, classes.refused, classes.complied, challenge=classes.challenge)
        self.answers = cs.fit_answer_readout(
            self.model, classes.refused, self.complied_of(self.fit) or classes.complied
        )
        self.plain, self.wrapped, self.harmless = (
            self.answer(("test", 100, *kind)) for kind in ((True, plain), (True, self.full), (False, (*plain, *words)))
        )

    def answer(self, *kinds: tuple[str, int, bool, tuple[str | None, ...]]) -> Transcripts:
        asked = Transcripts(
            t
            for part, n, harmful, words in kinds
            for t in grammar.prompts(part, n, harmful=harmful, wrappers=words, seed=5)
        )
        return cs.judge(cs.roll_out(self.model, asked, temperature=1.0, **BUDGET))

    @staticmethod
    def complied_of(transcripts: Transcripts) -> Transcripts:
        return transcripts.where(harmful=True, outcome=Outcome.COMPLIED)

    def refused(self, transcripts: Transcripts) -> float:
        judged = [t for t in transcripts if t.outcome in (Outcome.REFUSED, Outcome.COMPLIED)]
        return sum(t.outcome is Outcome.REFUSED for t in judged) / len(judged)

    def greedy(self, harmful: bool, words: tuple[str | None, ...], n: int = 150) -> float:
        asked = grammar.prompts("test", n, harmful=harmful, wrappers=words, seed=11)
        return self.refused(cs.judge(cs.roll_out(self.model, asked, **BUDGET)))

    def cliffs(self, transcripts: Transcripts):
        return cs.trace_refusal(self.model, self.probe, transcripts).cliffs().to_frame()


@functools.cache
def grown(name: str) -> Grown:
    """The organism of that name."""
    return Grown(name)
