"""What does a run directory hold?

Every file of a run directory is named here, once, with its columns, their types and units, and what it is for. Stages
hand their results to these objects, which check them when they are written; the report and `open_study` read through
them; the table in docs/guide/study.md is made from them. Knows no stage, no model and no figure.
"""

from collections.abc import Mapping
from typing import Final

from cliffscope.study.artefact_kinds import (
    Arrays,
    Artefact,
    Document,
    Page,
    Place,
    Row,
    Table,
    TranscriptFile,
    columns_of,
)

_ID: Final[Row] = ("id", "text", "transcript")
_GROUP: Final[Row] = ("group", "text", "request and outcome, such as `harmful, complied`")
_SPLIT: Final[Row] = ("split", "text", "fit, validate or test")
_HARMFUL: Final[Row] = ("harmful", "bool", "whether the request is harmful; missing where nobody said")
_OUTCOME: Final[Row] = ("outcome", "text", "refused, complied, unfinished or unjudged")
_INTERVAL: tuple[Row, ...] = (
    ("ci_low", "float", "lower end of the 95% interval"),
    ("ci_high", "float", "upper end of the 95% interval"),
)
_MEAN_TRACE = columns_of(
    _GROUP,
    ("bin", "int", "place on the common axis, from 0"),
    ("label", "text", "what the place is called"),
    ("span", "text", "prompt, thinking or closing"),
    ("mean", "float", "mean refusal score over transcripts, 0 to 1"),
    *_INTERVAL,
    ("n", "int", "transcripts"),
)
_CLIFF: tuple[Row, ...] = (
    _ID,
    _GROUP,
    _HARMFUL,
    _OUTCOME,
    ("plateau_max", "float", "largest refusal score in the thinking, 0 to 1"),
    ("plateau_mean", "float", "mean refusal score in the thinking, 0 to 1"),
    ("plateau_late", "float", "mean refusal score in the last two fifths of the thinking, 0 to 1"),
    ("final", "float", "refusal score at the final token, 0 to 1"),
    ("cliff", "float", "plateau minus final"),
    ("drop", "float", "largest fall of the score from one token to the next"),
    ("drop_position", "int", "position of that fall"),
    ("drop_token", "text", "its token"),
    ("valid", "bool", "whether the probe can tell there"),
    ("reason", "text", "why not"),
)
_HEAD: tuple[Row, ...] = (("layer", "int", "layer index from 0"), ("head", "int", "query head index from 0"))
_ARM: tuple[Row, ...] = (
    ("arm", "text", "name of the arm, such as `random 3`"),
    ("kind", "text", "unedited, top or random"),
)

TRANSCRIPTS = TranscriptFile(file="transcripts.jsonl", meaning="every transcript, judged")
TRANSCRIPT_TABLE = Table(
    file="transcripts.parquet",
    meaning="one row per transcript, with its split",
    columns=columns_of(
        _ID,
        _SPLIT,
        _HARMFUL,
        _OUTCOME,
        ("source", "text", "where the prompt comes from"),
        ("prompt", "text", "last user message"),
        ("thinking", "text", "between the tags"),
        ("answer", "text", "after the closing"),
        ("n_pos", "int", "generated tokens"),
        ("forced", "bool", "whether its thinking was closed at its budget; no claim rests on it then"),
    ),
)
PROBE = Document(
    file="probe.json",
    meaning="the probe: what it was fitted on and its held-out report",
    keys={
        "layer": "layer of the probe",
        "positions": "positions that it was fitted on",
        "fingerprint": "of the model",
        "template": "convention of thinking",
        "strength": "inverse regularisation, C",
        "refused_logit": "mean logit of held-out refused transcripts at the final token",
        "contrast": "complied class: harmless or harmful",
        "n_fit": "transcripts by class in the fit split",
        "forced": "transcripts left out since their thinking was closed at its budget, by split",
        "cells": "class, harmful, n",
        "warnings": "one-sided classes",
        "omitted": "transcripts left out",
        "report": "held-out quality by region",
    },
)
PROBE_ARRAYS = Arrays(
    file="probe.safetensors",
    meaning="directions and biases of the probes of all layers",
    arrays={"weights": "[layer, d_model]", "biases": "[layer]"},
)
PROBE_LAYERS = Table(
    file="probe_layers.parquet",
    meaning="held-out quality of the probe by layer and region",
    columns=columns_of(
        ("layer", "int", "layer index from 0"),
        ("region", "text", "positions looked at together"),
        ("auroc", "float", "refused against complied, 0 to 1"),
        ("auroc_low", "float", "lower end of its 95% interval"),
        ("auroc_high", "float", "upper end of its 95% interval"),
        ("tpr_at_1_fpr", "float", "true positive rate at 1% false positives"),
        ("brier", "float", "Brier score"),
        ("calibration_error", "float", "expected calibration error"),
        ("n_refused", "int", "refused transcripts"),
        ("n_complied", "int", "complied transcripts"),
    ),
)
TEXT_BASELINE = Document(
    file="text_baseline.json",
    meaning="what n-grams of prompt and thinking alone tell on the probe's test transcripts",
    keys={
        "overall": "held-out quality, refused against complied",
        "within_harmful": "the same among harmful transcripts",
        "strength": "inverse regularisation, C",
        "n_terms": "words and pairs of words",
        "terms": "strongest terms: term, weight; positive for refusal",
    },
)
ANSWER = Document(
    file="answer.json",
    meaning="the answer readout: its openings and its held-out report",
    keys={
        "layer": "last layer that it reads",
        "vocabulary": "tokens of the model's head",
        "fingerprint": "of the model",
        "template": "convention of thinking",
        "refused_logit": "mean log-odds of held-out refused transcripts",
        "openings": "token_ids, refuses, text",
        "omitted": "transcripts left out",
        "report": "held-out quality, and the openings with their counts",
    },
)
TRACES = Table(
    file="traces.parquet",
    meaning="refusal score of every token of up to 200 transcripts",
    columns=columns_of(
        _ID,
        ("position", "int", "token position from 0"),
        ("span", "text", "prompt, thinking, closing or answer"),
        ("token", "text", "its text"),
        ("logit", "float", "refusal logit"),
        ("score", "float", "refusal score, 0 to 1"),
    ),
)
LAYER_TRACES = Table(
    file="layer_traces.parquet",
    meaning="refusal score of a few transcripts at every layer",
    columns=columns_of(
        _ID,
        ("position", "int", "token position from 0"),
        ("layer", "int", "layer index from 0"),
        ("score", "float", "refusal score by that layer's own probe, 0 to 1"),
    ),
)
ALIGNED = Table(file="aligned.parquet", meaning="mean traces by group, held-out transcripts", columns=_MEAN_TRACE)
CLIFFS = Table(
    file="cliffs.parquet",
    meaning="one row per transcript: plateau, final score, cliff",
    columns=columns_of(*_CLIFF, _SPLIT, optional=("split",)),
)
HEADS = Table(
    file="heads.parquet",
    meaning="one row per head: its effect, interval, p and q",
    columns=columns_of(
        *_HEAD,
        ("kv_group", "int", "key-value head that it reads"),
        ("effect", "float", "readout, edited minus unedited, logit; positive suppresses refusal"),
        ("effect_score", "float", "the same in score"),
        *_INTERVAL,
        ("p", "float", "exact sign test over the decisive transcripts"),
        ("q", "float", "Benjamini-Hochberg over heads that the readout can see"),
        ("untested", "text", "why p and q are missing"),
        ("decisive", "int", "transcripts whose answer the head's effect could turn"),
        ("kind", "text", "selective, broad or unknown"),
        ("effect_harmless", "float", "effect on harmless transcripts, logit"),
        ("effect_refused", "float", "effect on refused transcripts, logit"),
        ("n", "int", "transcripts"),
        ("rank", "int", "place by effect, from 1"),
        ("readout", "text", "what was read: answer or probe"),
        ("method", "text", "how heads were measured"),
        ("scope", "text", "where they were edited"),
    ),
)
HEADS_FACTS = Document(
    file="heads.json",
    meaning="how the heads were ranked",
    keys={
        "method": "how heads were measured",
        "scope": "where they were edited",
        "path": "how the sweep was computed, and why not faster",
        "n": "transcripts",
        "readout": "what was read: answer or probe",
        "can_tell": "whether the readout can tell on held-out transcripts",
        "gap": "refused logit minus that of these transcripts",
        "measured": "heads that the readout can see, each of which counts as a test",
        "least_q": "smallest q that so few transcripts allow",
        "significant": "heads with q of at most 0.05",
    },
)
SELECTED_HEADS = Table(
    file="selected_heads.parquet",
    meaning="the heads that are edited from here on",
    columns=columns_of(*_HEAD, ("rank", "int", "place by effect, from 1")),
)
CONFIRMATION = Table(
    file="confirmed_heads.parquet",
    meaning="significant heads measured again on test transcripts, one by one",
    columns=columns_of(
        *_HEAD,
        ("effect", "float", "effect of the head alone, logit"),
        *_INTERVAL,
        ("added", "float", "what it adds to the heads confirmed before it, logit"),
        ("decisive", "int", "transcripts whose answer the added effect could turn"),
        ("p", "float", "exact sign test, adjusted for the number of candidates"),
        ("confirmed", "bool", "whether p is at most 0.05"),
        ("kind", "text", "selective, broad or unknown"),
        ("n", "int", "transcripts"),
    ),
)
SUPPRESSION = Document(
    file="suppression.json",
    meaning="the selected set against random sets, on test transcripts",
    keys={
        "readout": "what was read: answer or probe",
        "can_tell": "whether the readout can tell on held-out transcripts",
        "top_fraction": "share of heads selected",
        "selected": "heads",
        "n": "transcripts",
        "unedited": "mean readout of them, logit",
        "refused": "mean readout of held-out refused transcripts, logit",
        "restored": "share of the way from the one to the other that the edit goes",
        "effect": "mean joint effect, logit",
        "effect_low": "lower end of its 95% interval",
        "effect_high": "upper end of its 95% interval",
        "random_sets": "mean joint effect of each random set, logit",
        "p": "share of sets with at least the effect, the selected set included; the larger of the two kinds",
        "p_by_kind": "that share among sets of the same layers, and of all layers",
        "sets_by_kind": "random sets of each kind",
        "why": "why it cannot be claimed that the set suppresses refusal; empty where it can",
    },
)
SUPPRESSED = Table(
    file="suppression.parquet",
    meaning="one row per test transcript: the readout unedited, with the selected heads zeroed, and under random sets",
    columns=columns_of(
        _ID,
        _GROUP,
        ("unedited", "float", "readout of the unedited model, logit"),
        ("edited", "float", "readout with the selected heads zeroed at the closing, logit"),
        ("suppression", "float", "edited minus unedited, logit"),
        ("unedited_p", "float", "sigmoid of the unedited logit, 0 to 1"),
        ("edited_p", "float", "sigmoid of the edited logit, 0 to 1"),
        ("suppression_p", "float", "their difference"),
        ("random_mean", "float", "mean readout over random sets, logit; missing where none was run"),
        ("random_mean_p", "float", "the same of the sigmoids, 0 to 1"),
    ),
)
EDITED_ALIGNED = Table(
    file="edited_aligned.parquet",
    meaning="mean traces of complied harmful transcripts with the selected heads and with one random set zeroed",
    columns=_MEAN_TRACE,
)
EDITED_CLIFFS = Table(file="edited_cliffs.parquet", meaning="cliffs of these transcripts", columns=columns_of(*_CLIFF))
HEAD_SOURCES = Table(
    file="head_sources.parquet",
    meaning="what the first heads read in the transcript of median cliff",
    columns=columns_of(
        _ID,
        ("head", "text", "such as L4H5"),
        ("kv_group", "int", "key-value head that it reads"),
        ("query", "int", "position of the closing token"),
        ("position", "int", "position of the source token"),
        ("token", "text", "text of the source token"),
        ("span", "text", "span of the source token"),
        ("attention", "float", "attention weight, 0 to 1"),
        ("share", "float", "share of the refusal logit"),
    ),
)
EARLY_CURVES = Table(
    file="early_curves.parquet",
    meaning="mean readout had the thinking ended earlier, unedited and edited, and the probe's mean score there",
    columns=columns_of(
        ("curve", "text", "`unedited`, `edited` or `probe`"),
        ("fraction", "float", "share of the thinking that is written, 0 to 1"),
        ("mean", "float", "mean score over transcripts, 0 to 1"),
        *_INTERVAL,
        ("n", "int", "transcripts"),
    ),
)
SETTLED = Table(
    file="settled.parquet",
    meaning="the thinking token from which on each answer stays on the side where it ends",
    columns=columns_of(
        _ID,
        _GROUP,
        ("position", "int", "token position from 0"),
        ("fraction", "float", "share of the thinking that is written there, 0 to 1"),
        ("token", "text", "its text"),
        ("refuses", "bool", "whether it ends on the side of refusing"),
        ("first", "float", "readout closed after the first thinking token, logit"),
        ("final", "float", "readout at the end of the thinking, logit"),
        ("n", "int", "tokens of thinking"),
    ),
)
ARM_ANSWERS = Place(file="arm-*.jsonl", meaning="answers of each arm")
ARM_LOGS = Place(file="arm-*.log", meaning="finished batches of an arm that is still running", transient=True)
ARM_OMISSIONS = Place(file="arms.json", meaning="what each arm left out")
SAFETY = Table(
    file="safety.parquet",
    meaning="attack success and over-refusal by arm",
    columns=columns_of(
        *_ARM,
        ("group", "text", "harmful or harmless"),
        ("n", "int", "prompts"),
        ("refused", "int", "answers judged as refusals"),
        ("complied", "int", "answers judged as compliance"),
        ("partial", "int", "answers that refuse and help all the same; compliance where the refusal is taken back"),
        ("unfinished", "int", "answers that never came"),
        ("unjudged", "int", "answers that no judge could read"),
        ("rate", "float", "attack success (harmful) or over-refusal (harmless), 0 to 1"),
        *_INTERVAL,
        ("forced", "int", "answers to thinking that was closed at its budget"),
        ("cut", "int", "answers that reached their budget before they ended"),
        ("degenerate", "int", "unjudged answers that are broken text, such as one phrase over and over"),
        ("scope", "text", "where the arm's edit acts, such as closing; empty where none does"),
    ),
)
SAFETY_PAIRS = Table(
    file="safety_pairs.parquet",
    meaning="difference of each arm from the unedited one, paired by prompt",
    columns=columns_of(
        ("arm", "text", "name of the arm"),
        ("group", "text", "harmful or harmless"),
        ("n", "int", "prompts with a judged answer in both arms, to thinking that the model ended itself"),
        ("unedited", "float", "rate of the unedited arm over them, 0 to 1"),
        ("edited", "float", "rate of this arm over them, 0 to 1"),
        ("difference", "float", "rate minus that of the unedited arm"),
        *_INTERVAL,
        ("discordant", "int", "prompts whose outcome differs"),
        ("mcnemar_p", "float", "exact McNemar test; missing where no outcome differs"),
    ),
)
SAFETY_QUALITY = Table(
    file="safety_quality.parquet",
    meaning="what the answers of each arm are like",
    columns=columns_of(
        *_ARM,
        ("group", "text", "harmful or harmless"),
        ("measure", "text", "such as repetition"),
        ("n", "int", "answers"),
        ("value", "float", "mean"),
        *_INTERVAL,
    ),
)
SIDE_EFFECTS = Table(
    file="side_effects.parquet",
    meaning="divergence of the edited model on harmless transcripts",
    columns=columns_of(
        *_ARM,
        ("measure", "text", "kl or perplexity"),
        ("n", "int", "transcripts"),
        ("value", "float", "mean"),
        *_INTERVAL,
        ("unit", "text", "unit of the value"),
        ("scope", "text", "where the arm's edit acts; empty where none does"),
    ),
)
TRANSFER = Table(
    file="transfer.parquet",
    meaning="AUROC of probes fitted on one source of prompts and tested on another",
    columns=columns_of(
        ("fit_source", "text", "source that the probe was fitted on"),
        ("test_source", "text", "source that it was tested on"),
        ("auroc", "float", "refused against complied, 0 to 1"),
        *_INTERVAL,
        ("n_refused", "int", "refused test transcripts"),
        ("n_complied", "int", "complied test transcripts"),
    ),
)
WITNESSES = Document(
    file="witnesses.json",
    meaning="what each witness says, and where two disagree",
    keys={"witnesses": "name, says (missing where it could not be tested), saw", "sentence": "where they disagree"},
)
SELECTION = Table(
    file="selection.parquet",
    meaning="the ranked pool",
    columns=columns_of(
        _ID,
        ("prompt", "text", "last user message"),
        ("thinking", "text", "between the tags"),
        ("answer", "text", "after the closing"),
        ("plateau", "float", "refusal score in the thinking, 0 to 1"),
        ("final", "float", "refusal score at the final token, 0 to 1"),
        ("cliff", "float", "plateau minus final"),
        ("rank", "int", "place in the pool, from 1"),
        ("chosen", "bool", "whether it is selected"),
    ),
)
SELECTED = TranscriptFile(file="selection.jsonl", meaning="the selected transcripts; empty where none was selected")
REPAIRED = Place(file="repaired", meaning="with `--repair`: the repaired checkpoint, a folder")
REPAIR = Table(
    file="repair.parquet",
    meaning="with `--repair`: the model before and after",
    columns=columns_of(
        ("model", "text", "before or after"),
        ("measure", "text", "such as asr"),
        ("n", "int", "transcripts"),
        ("value", "float", "value of the measure"),
        *_INTERVAL,
        ("note", "text", "why a value is missing"),
    ),
)
OMITTED = Table(
    file="omitted.parquet",
    meaning="everything that was left out, with the reason",
    columns=columns_of(
        ("stage", "text", "stage of the study"),
        ("step", "text", "function that left it out"),
        ("reason", "text", "why"),
        _ID,
    ),
)
REPORT = Page(file="report.html", meaning="the report")
MANIFEST = Place(
    file="manifest.json",
    meaning="settings, model, stages with their keys, library versions and seconds, findings, notes, counts",
)

ARTEFACTS: tuple[Artefact, ...] = (
    *(MANIFEST, TRANSCRIPTS, TRANSCRIPT_TABLE, PROBE, PROBE_ARRAYS, PROBE_LAYERS, TEXT_BASELINE, ANSWER, TRANSFER),
    *(TRACES, LAYER_TRACES, ALIGNED, CLIFFS, HEADS, HEADS_FACTS, SELECTED_HEADS, CONFIRMATION, SUPPRESSION),
    *(SUPPRESSED, EARLY_CURVES, SETTLED, EDITED_ALIGNED, EDITED_CLIFFS, HEAD_SOURCES),
    *(ARM_ANSWERS, ARM_LOGS, ARM_OMISSIONS, SAFETY, SAFETY_PAIRS, SAFETY_QUALITY, SIDE_EFFECTS, WITNESSES),
    *(SELECTION, SELECTED, REPAIRED, REPAIR, OMITTED, REPORT),
)
"""Every artefact, in the order in which a study makes them."""
TABLES: Mapping[str, Table] = {artefact.name: artefact for artefact in ARTEFACTS if isinstance(artefact, Table)}
"""Every table by name."""
