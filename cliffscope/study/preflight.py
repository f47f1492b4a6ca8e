"""How long will a study take, does it fit into memory, and what would make it do so?

1. The model is loaded, and two speeds are measured in seconds: tokens a second of a forward pass, and of generating
   with a full batch.
2. Each stage is counted in tokens from the configuration, as if every answer took its whole budget, and divided by the
   speed.
3. Memory is the weights, the cache of a batch of answers and the activations of a batch, compared with what is free.

An estimate from above, not a promise: answers mostly end before their budget.
"""

import time
from dataclasses import dataclass

import pandas as pd
import torch

from cliffscope.errors import DataError
from cliffscope.generation.batches import find_batch_size, row_bytes
from cliffscope.generation.rollout import roll_out
from cliffscope.memory import few_threads, free_bytes, held_bytes
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts.activations import BATCH_TOKENS
from cliffscope.readouts.contrast import check_contrast
from cliffscope.study.config import StudyConfig, read_inputs
from cliffscope.transcripts.records import Transcripts
from cliffscope.transcripts.transcript import Span, tokenize_all

TEST, FIT = 0.3, 0.7
"""Shares of the prompts on which safety is evaluated, and on which the probe is fitted and chosen."""
_TRIED = 16
"""Tokens that each row of a batch generates to measure the speed."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Preflight:
    """What a study will take."""

    stages: pd.DataFrame
    """stage, tokens, seconds: at most, if every answer takes its whole budget."""
    held_bytes: int
    """Held now: the weights, and on a CPU the libraries."""
    peak_bytes: int
    """That, the cache of a batch of answers, and the activations of a batch."""
    free_bytes: int
    """Free, now that the weights are loaded."""
    advice: tuple[str, ...]
    """What to change, most useful first; none where it fits."""

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return float(self.stages["seconds"].sum())

    def __repr__(self) -> str:
        """One line: time and memory."""
        return (
            f"Preflight(at most {_duration(self.seconds)}, {self.peak_bytes / 2**30:.1f} GiB of memory, of which "
            f"{self.held_bytes / 2**30:.1f} are held now; {self.free_bytes / 2**30:.1f} GiB are free)"
        )


def estimate_study(config: StudyConfig) -> Preflight:
    """Estimates what a study will take, without running it.

    Args:
        config: of the study; its run directory is not touched.

    Returns:
        Seconds a stage, memory, and advice.

    Raises:
        DataError: prompts cannot be read.
        UnsupportedModelError: the model fails a check.

    Source:
        Stages as in `cliffscope.study.runner`.
    """
    config.check()
    prompts = read_inputs(config).transcripts
    model = load_model(config.model, template=config.template, device=config.device)
    if config.transcripts is None:
        check_contrast(prompts, config.contrast, thinks=model.template.thinks)
    budget = (config.max_thinking if model.template.thinks else 0) + config.max_answer
    some = prompts[:: max(1, len(prompts) // 32)]
    bare = some.map(lambda t: t.replace(thinking="" if model.template.thinks else None, answer=None))
    tokens, omitted = tokenize_all(bare, model.tokenizer, model.template)
    if not tokens:
        raise DataError(f"None of the prompts can be used: {omitted[0].kind}")
    length = sum(t.n_pos for t in tokens) / len(tokens)
    window = max(t.span(Span.CLOSING).stop - t.span(Span.CLOSING).start for t in tokens)
    rows = min(config.batch_size, find_batch_size(model, int(length) + budget), len(prompts))
    with few_threads(small=model.small):
        forward, generated = _forward_speed(model), _generation_speed(model, prompts, rows, config)
    n, whole = len(prompts), length + budget
    heads = len(model.shape.places)
    # Tokens that are read, and tokens that are generated.
    counted = {
        "transcripts": (0, n * budget if config.transcripts is None else 0),
        "probe": (2 * FIT * n * whole, 0),
        "traces": (n * whole, 0),
        # Half of a pack's tokens are saved, since each branch starts at its own layer.
        "heads": (n * (whole + heads * window / 2), 0),
        # Each transcript is read once, and answered by every arm.
        "safety": (TEST * n * whole, TEST * n * (2 + config.controls) * config.max_answer),
    }
    stages = pd.DataFrame(
        [(stage, round(read + new), read / forward + new / generated) for stage, (read, new) in counted.items()],
        columns=["stage", "tokens", "seconds"],
    )
    held = held_bytes(model.device)
    peak = held + max(rows * row_bytes(model, int(whole)), _batch_bytes(model))
    free = free_bytes(model.device)
    seconds = float(stages["seconds"].sum())
    return Preflight(
        stages=stages,
        held_bytes=held,
        peak_bytes=peak,
        free_bytes=free,
        advice=_advice(config, model, seconds=seconds, needed=peak - held, free=free, n=n),
    )


def _forward_speed(model: LensModel) -> float:
    """Tokens a second of a forward pass of the blocks."""
    ids = torch.randint(0, len(model.tokenizer), (4, 128), generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.inference_mode():
        model.decoder(input_ids=ids, use_cache=False)
        started = time.perf_counter()
        for _ in range(3):
            float(model.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, 0, 0])
    return 3 * ids.numel() / (time.perf_counter() - started)


def _generation_speed(model: LensModel, prompts: Transcripts, rows: int, config: StudyConfig) -> float:
    """Tokens a second that a batch generates, its prompts' pass included."""
    batch = prompts[:rows]
    thinking, answer = (_TRIED, 1) if model.template.thinks else (1, _TRIED)
    started = time.perf_counter()
    roll_out(
        model, batch, max_thinking=thinking, max_answer=answer, system=config.system, batch_size=rows, temperature=1.0
    )
    return rows * _TRIED / (time.perf_counter() - started)


def _batch_bytes(model: LensModel) -> int:
    """A batch's activations: the widest is the MLP's, three of it at a time."""
    each = torch.empty(0, dtype=model.dtype).element_size()
    wide = getattr(model.hf.config.get_text_config(), "intermediate_size", None) or 4 * model.shape.d_model
    return 3 * BATCH_TOKENS * (int(wide) + model.shape.d_model) * each


def _advice(
    config: StudyConfig, model: LensModel, *, seconds: float, needed: int, free: int, n: int
) -> tuple[str, ...]:
    advice = []
    if needed > free:
        advice.append(
            f"Memory: {needed / 2**30:.1f} GiB are needed beside the weights and {free / 2**30:.1f} are free. Give a "
            "smaller batch_size or max_thinking, or load the model in bf16 or spread over devices."
        )
    if seconds > 3600:
        limit = max(1, int(n * 3600 / seconds / (1 if config.harmless is None else 2)))
        advice.append(
            f"Time: up to {_duration(seconds)}. limit={limit} brings it to about an hour, with wider intervals; "
            f"max_thinking={config.max_thinking} is what answers take at most."
        )
        if model.device.type == "cpu":
            advice.append("The model runs on the CPU; give device='cuda' where there is a GPU.")
    return tuple(advice)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
