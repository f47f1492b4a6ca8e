"""What determines a study, and what does it start from?

`StudyConfig` is everything that a study's results depend on; it is checked before anything is run. `read_inputs` reads
the prompts or transcripts that it names. Knows no stage.
"""

from dataclasses import dataclass

from cliffscope.errors import DataError
from cliffscope.heads.ranking import top_count
from cliffscope.judging.lookup import MODEL, find_judge
from cliffscope.judging.protocols import GroupJudges, Judge
from cliffscope.organisms import is_organism, study_prompts
from cliffscope.readouts.cliff import Plateau
from cliffscope.readouts.contrast import Contrast
from cliffscope.readouts.probe import Positions
from cliffscope.selection.criteria import CRITERIA, check_fraction
from cliffscope.transcripts.datasets import read_transcripts
from cliffscope.transcripts.prompts import check_labels, read_prompts, sample_prompts
from cliffscope.transcripts.records import Split, Transcripts

ORGANISM_PROMPTS = 480
"""Prompts that a study of an organism takes."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Everything that determines a study."""

    model: str
    """What `load_model` takes."""
    out: str
    """Run directory."""
    harmful: str | None = None
    """File of harmful prompts; None with an organism takes its own."""
    harmless: str | None = None
    """File of harmless prompts."""
    transcripts: str | None = None
    """JSONL of transcripts with thinking and answer, instead of prompts."""
    template: str | None = None
    """How the model thinks; None detects it."""
    system: str | None = None
    """System message before each prompt."""
    column: str | None = None
    """Column of the prompts; None looks for the usual names."""
    harmless_column: str | None = None
    """Column of the harmless prompts, if it has another name than that of the harmful ones."""
    escape_control_tokens: bool = False
    """Whether words such as `<|im_end|>` in prompts stay text; otherwise they become control tokens, as in
    transformers."""
    limit: int | None = None
    """Prompts of each file at most, drawn with the seed."""
    max_thinking: int = 1024
    """Tokens of thinking at most."""
    max_answer: int = 128
    """Tokens of answer at most. Shorter ones hide refusals that come late: `benchmarks/judges.py --budgets`."""
    temperature: float = 0.0
    """0 is greedy."""
    judge: str = "phrases"
    """What reads the answers, as in `find_judge`: `phrases`, `classifier:FORMAT@PATH`, `model:MODEL@URL` or
    `package.module:name`. Transcripts that have outcomes keep them."""
    harmless_judge: str | None = None
    """What reads answers to harmless prompts, such as `phrases` beside a guard that classifies harm; None takes
    `judge` for all."""
    positions: Positions = "balanced"
    """Positions that the probe is fitted on."""
    contrast: Contrast = "auto"
    """Complied class of the probe: harmless transcripts (the paper's) or harmful ones; "auto" takes harmless ones where
    the model thinks, since its thinking is what the cliff is about, and harmful ones where it does not."""
    plateau: Plateau = "mean"
    """Plateau of the cliff."""
    readout: str = "answer"
    """What heads are measured by: `answer` (what the model does), `probe`, or `package.module:name`."""
    method: str = "zero"
    """How heads are measured: a name of `cliffscope.heads.methods`, or `package.module:name`."""
    top_fraction: float = 0.03
    """Share of heads that is edited."""
    controls: int = 20
    """Random sets of heads."""
    criterion: str = "cliff"
    """What examples are ranked by: a name of `cliffscope.selection.criteria`, or `package.module:name`."""
    select_fraction: float = 0.017
    """Share of the pool that is selected."""
    repair: bool = False
    """Whether the model is repaired on the selection and measured again."""
    batch_size: int = 64
    """Rows generated together at most."""
    seed: int = 0
    """Of everything drawn."""
    device: str | None = None
    """Torch device; None takes CUDA where there is one."""

    def check(self) -> None:
        """Raises an error where inputs contradict each other, a fraction is none or a criterion cannot be had."""
        for choice in (self.judge, self.harmless_judge):
            # A wrong address must be known before the settings are recorded: it may hold a password.
            if choice is not None and choice.startswith(f"{MODEL}:"):
                find_judge(choice)
        check_fraction(self.select_fraction)
        top_count(self.top_fraction, 1)
        if "suppression" in CRITERIA.get(self.criterion).columns:
            raise DataError(
                f"criterion={self.criterion!r} reads the suppression of each candidate, "
                "which a study does not measure. Choose another one, or call select_from_suppression(...)."
            )
        if self.limit is not None and self.limit < 1:
            raise DataError(f"limit={self.limit} must be at least 1; leave it out to take every prompt.")
        if self.transcripts is not None and (self.harmful or self.harmless):
            raise DataError(
                "Both transcripts and prompt files were given. Pass transcripts=..., or harmful=... and harmless=..."
            )
        if self.harmless is not None and self.harmful is None:
            raise DataError(f"harmless={self.harmless!r} was given without harmful prompts. Give harmful=... too.")
        if self.transcripts is None and self.harmful is None and not is_organism(self.model):
            raise DataError(
                f"No prompts were given for {self.model!r}. Give harmful=... (and harmless=...) files, or "
                "transcripts=...; only organisms bring their own."
            )

    def find_judge(self) -> Judge:
        """The judge of all answers of the study; raises DataError or JudgeError where there is none such."""
        judge = find_judge(self.judge)
        if self.harmless_judge is None:
            return judge
        return GroupJudges(harmful=judge, harmless=find_judge(self.harmless_judge))


@dataclass(frozen=True, eq=False, kw_only=True)
class StudyInputs:
    """What a study starts from."""

    transcripts: Transcripts
    """Prompts, or transcripts with thinking and answers."""
    splits: dict[str, Split]
    """Id to split, for those whose split is fixed."""


def read_inputs(config: StudyConfig) -> StudyInputs:
    """Reads the prompts or transcripts of a study.

    Args:
        config: which files, how many of each, and the seed that draws them.

    Returns:
        The inputs; harmless prompts get other ids where both files have the same name.

    Raises:
        DataError: a file cannot be read or holds nothing, or a prompt is both harmful and harmless.
    """
    escape = config.escape_control_tokens
    if config.transcripts is not None:
        transcripts = read_transcripts(config.transcripts, escape_control_tokens=escape)
        check_labels(transcripts, config.transcripts)
        return StudyInputs(transcripts=_sample(transcripts, config), splits={})
    if config.harmful is None:
        prompts, splits = study_prompts(config.model, n=config.limit or ORGANISM_PROMPTS, seed=config.seed)
        return StudyInputs(transcripts=prompts, splits={name: Split(side) for name, side in splits.items()})
    harmful = read_prompts(config.harmful, harmful=True, column=config.column, escape_control_tokens=escape)
    if config.harmless is None:
        return StudyInputs(transcripts=_sample(harmful, config), splits={})
    column = config.harmless_column or config.column
    harmless = read_prompts(config.harmless, harmful=False, column=column, escape_control_tokens=escape)
    # Whole files are compared, so that the error does not depend on which prompts are drawn.
    check_labels([*harmful, *harmless], f"{config.harmful} and {config.harmless}")
    harmful, harmless = _sample(harmful, config), _sample(harmless, config)
    if {t.id for t in harmless} & {t.id for t in harmful}:
        harmless = harmless.map(lambda t: t.replace(id=f"harmless-{t.id}"))
    return StudyInputs(transcripts=harmful + harmless, splits={})


def _sample(transcripts: Transcripts, config: StudyConfig) -> Transcripts:
    return Transcripts(sample_prompts(transcripts, config.limit, config.seed), omitted=transcripts.omitted)
