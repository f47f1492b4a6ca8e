"""The report: one offline page that argues from stored tables, whatever the tables and the texts hold."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs
from synthetic import NASTY, write_run

from cliffscope.errors import DataError, StoreError
from cliffscope.figures.circuits import circuits_script
from cliffscope.report import write_report
from cliffscope.report.page import VERDICTS, sections_of, write_comparison
from cliffscope.report.stored import read_run
from cliffscope.store import SCHEMA, RunStore
from cliffscope.study.artefacts import TABLES as ARTEFACTS
from cliffscope.study.verdicts import TOPICS

SECTIONS = [
    "run",
    "suppression",
    "intervention",
    "heads",
    "closings",
    "answer",
    "cliff",
    "tokens",
    "probe",
    "witnesses",
    "selection",
    "repair",
    "omitted",
    "method",
    "reproduce",
]
TABLES = [*ARTEFACTS]
BARE = json.dumps({"schema": SCHEMA})


class Page(HTMLParser):
    """What a browser would see: elements with attributes, text, and the text of each script."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.styles, self.text, self.open = [], [], "", "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self.open = self.open.removesuffix(tag)

    def handle_data(self, data):
        if self.open == "script":
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)
        elif self.open == "style":
            self.styles += data
        else:
            self.text += data

    def data(self):
        return [text for attrs, text in self.scripts if attrs.get("type") == "application/json"]

    def code(self):
        return [text for attrs, text in self.scripts if "type" not in attrs]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


@pytest.fixture
def small_run(tmp_path):
    return write_run(tmp_path / "run", n=6, n_layers=2, n_heads=2, length=12)


def written(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def change_manifest(run_dir, **changes):
    path = run_dir / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")


def test_sections_stand_in_the_order_of_the_argument(page):
    assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == SECTIONS


def test_every_link_inside_the_page_has_its_target(page):
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"].removeprefix("#") for tag, attrs in page.elements if tag == "a"}
    assert links <= set(ids)


def test_page_opens_with_the_verdict(page):
    assert page.text.index("a cliff of 0.69 [0.65, 0.73] (n=41)") < page.text.index("The run")


def test_nothing_is_loaded_from_anywhere(page):
    assert not [tag for tag, _ in page.elements if tag in {"link", "img", "iframe", "object", "embed", "base", "form"}]
    assert not [attrs for _, attrs in page.elements if {"src", "srcset", "action", "data"} & set(attrs)]
    assert all(attrs["href"].startswith("#") for _, attrs in page.elements if "href" in attrs)
    assert "url(" not in page.styles
    assert "@import" not in page.styles


def test_plotly_and_circuitsvis_are_inlined_once(page):
    assert [script == get_plotlyjs() for script in page.code()] == [False, True, False]
    assert page.code()[2] == circuits_script()


def test_policy_allows_only_the_scripts_of_the_page(page):
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in page.code()]
    assert policy.startswith("default-src 'none'; script-src " + " ".join(f"'sha256-{code}'" for code in hashes))


def test_hostile_text_makes_no_element_and_no_handler(page):
    known = {"html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "nav", "ol", "ul"}
    known |= {"li", "a", "p", "h1", "h2", "div", "dl", "dt", "dd"}
    known |= {"details", "summary", "label", "input", "output", "table", "thead", "tbody", "tr", "th", "td", "button"}
    known |= {"figure", "figcaption", "script", "noscript", "span", "i", "b", "bdi", "pre", "code"}
    assert {tag for tag, _ in page.elements} <= known
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_hostile_text_shows_as_text(page):
    for name in ("script", "closing", "template", "handler", "link"):
        assert NASTY[name] in page.text
    assert "\\u202eevil\\u2066x" in page.text


def test_hidden_characters_are_nowhere(run_dir):
    text = write_report(run_dir).read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert not set("\u202e\u2066\u2069\u200b\x00\x1b") & set(text)


def test_long_words_are_cut_and_say_so(page):
    assert "A" * 2000 not in page.text
    assert "(303 characters)" in page.text


def test_data_cannot_leave_its_script(page):
    assert len(page.data()) > 10
    for text in page.data():
        json.loads(text)
        assert not set("<>&") & set(text)


def test_figures_have_a_title_with_n_and_a_description(page):
    figures = [attrs for _, attrs in page.elements if attrs.get("class") == "plot"]
    ids = {attrs.get("id") for _, attrs in page.elements}
    assert len(figures) == 18
    assert all({attrs["aria-labelledby"], attrs["aria-describedby"]} <= ids for attrs in figures)


def test_same_run_gives_the_same_page(run_dir, tmp_path):
    first, second = (write_report(run_dir, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_or_empty_table_is_no_error(small_run, name):
    (small_run / f"{name}.parquet").unlink(missing_ok=True)
    absent = written(small_run).text
    pd.DataFrame(columns=ARTEFACTS[name].column_names).to_parquet(small_run / f"{name}.parquet")
    assert absent == written(small_run).text


def test_a_missing_stage_says_why(small_run):
    for path in [*small_run.glob("*.parquet"), *small_run.glob("*.json")]:
        if path.name != "manifest.json":
            path.unlink()
    why = "No transcript was refused, so no head could be ranked."
    change_manifest(small_run, notes=[{"stage": "heads", "text": why}, {"stage": "safety", "text": "x"}], verdict={})
    page = written(small_run)
    assert why in page.text
    assert "reached no verdict" in page.text
    assert "This run fitted no probe." in page.text


def test_a_bare_manifest_is_enough(tmp_path):
    (tmp_path / "manifest.json").write_text(BARE)
    assert "this model" in written(tmp_path).text


@pytest.mark.parametrize("content", ["{}", '{"schema": 1, "config": {}}', "[]"])
def test_a_directory_of_another_version_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises((StoreError, DataError), match=r"another version of CliffScope|not an object"):
        write_report(tmp_path)


def test_undefined_intervals_are_named_with_their_n(small_run):
    heads = pd.read_parquet(small_run / "heads.parquet")
    heads[["ci_low", "ci_high", "q"]] = np.nan
    heads.assign(n=1).to_parquet(small_run / "heads.parquet")
    cliffs = pd.read_parquet(small_run / "cliffs.parquet").iloc[[1]]
    cliffs.to_parquet(small_run / "cliffs.parquet")
    text = written(small_run).text
    assert "n/a (n=1)" in text
    assert "nan" not in text.lower().split()


@pytest.mark.parametrize("name", TABLES)
def test_missing_numbers_are_no_error(small_run, name):
    if not (small_run / f"{name}.parquet").is_file():
        ARTEFACTS[name].write(RunStore(path=small_run), ARTEFACTS[name].read(small_run))
    frame = pd.read_parquet(small_run / f"{name}.parquet")
    frame[frame.select_dtypes("float").columns] = np.nan
    frame.to_parquet(small_run / f"{name}.parquet")
    assert "Reproduce" in written(small_run).text


def test_one_layer_and_one_transcript_are_enough(tmp_path):
    page = written(write_run(tmp_path / "run", n=2, n_layers=1, n_heads=1, length=4))
    assert "Effect of each of 1 heads" in page.text


def test_200_transcripts_by_30_layers_stay_under_8_megabytes(tmp_path):
    run = write_run(tmp_path / "run", n=200, n_layers=30, n_heads=24, length=120, n_layered=60)
    assert write_report(run).stat().st_size < 8_000_000


def test_long_transcripts_of_a_wide_model_stay_under_8_megabytes(tmp_path):
    run = write_run(tmp_path / "run", n=9, n_layers=128, n_heads=128, length=3000, n_layered=5)
    page = written(run)
    assert (run / "report.html").stat().st_size < 8_000_000
    assert "tokens not shown" in page.text


def test_a_directory_without_manifest_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"holds no manifest\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "probe.json", "traces.parquet"])
def test_a_broken_file_is_named(small_run, name):
    (small_run / name).write_text("{broken")
    with pytest.raises(DataError, match=name):
        write_report(small_run)


def test_side_effects_and_answers_stand_in_the_intervention_with_random_arms_as_one(run_dir):
    page = write_report(run_dir).read_text()
    section = page[page.index('id="intervention"') :]
    assert "KL divergence (nats per token)" in section
    assert "0.002" in section
    assert "random, mean of 2" in section
    assert "0.150" in section, "the mean over random arms"


def compared(first, second, tmp_path):
    return write_comparison([first, second], tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_a_comparison_pairs_cliffs_and_shows_what_differs(tmp_path):
    run_dir, other = (write_run(tmp_path / name, n=60) for name in ("base", "other"))
    change_manifest(other, settings={"seed": 1, "model": "planted-llama"}, command="cliffscope study --seed 1")
    cliffs = pd.read_parquet(other / "cliffs.parquet")
    shift = np.where(cliffs["group"] == "harmful, complied", 0.25, 0.0)
    cliffs.assign(cliff=cliffs["cliff"] + shift).to_parquet(other / "cliffs.parquet")
    page = Page(compared(run_dir, other, tmp_path))
    both = cliffs[(cliffs["group"] == "harmful, complied") & cliffs["valid"]]
    assert f"On the {len(both)} harmful prompts that both runs complied with" in page.text
    assert re.search(r"the cliff of B: other minus that of A: base is 0\.25 \[0\.25, 0\.25\] \(paired\)", page.text)
    assert "2 heads are selected in both runs, of 2 and 2" in page.text
    assert "different weights" not in page.text
    assert "cliffscope study --seed 1" in page.text
    settings = page.text[: page.text.index("Held-out transcripts")]
    assert "max_thinking" in settings
    titles = [attrs["id"] for tag, attrs in page.elements if attrs.get("class") == "plot"]
    assert titles == ["figure-cliff", "figure-pairs", "figure-arms"]
    assert "The runs have different seeds" in page.text
    assert "n/a%" not in page.text
    few = compared(write_run(tmp_path / "few", n=9), other, tmp_path)
    assert "too few for a paired difference" in few
    renamed = pd.read_parquet(other / "transcripts.parquet")
    renamed.assign(prompt=[f"another {i}" for i in range(len(renamed))]).to_parquet(other / "transcripts.parquet")
    assert "(paired)" not in compared(run_dir, other, tmp_path), "the ids are those of other prompts"


def test_runs_of_different_models_are_compared_without_pairing_heads(run_dir, tmp_path):
    other = write_run(tmp_path / "other", n=6, n_layers=4, n_heads=2, length=12)
    frame = pd.read_parquet(other / "aligned.parquet")
    frame[frame["bin"] < frame["bin"].max()].to_parquet(other / "aligned.parquet")
    change_manifest(other, model={"name": "other", "fingerprint": "sha256:0"})
    text = Page(compared(run_dir, other, tmp_path)).text
    assert "The models have different heads" in text
    assert "each run has its own axis" in text


def test_a_run_without_results_can_be_compared(run_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.json").write_text(BARE)
    for pair in ((run_dir, tmp_path / "empty"), (tmp_path / "empty", tmp_path / "empty")):
        text = compared(*pair, tmp_path)
        assert "Reproduce" in text
        assert "<script>window.bad" not in text


def test_cliffs_from_different_plateaus_are_not_paired(tmp_path):
    first, second = (write_run(tmp_path / name, n=60) for name in ("mean", "max"))
    cliffs = pd.read_parquet(second / "cliffs.parquet")
    cliffs.assign(cliff=cliffs["plateau_max"] - cliffs["final"]).to_parquet(second / "cliffs.parquet")
    change_manifest(second, settings={"plateau": "max"})
    assert "different plateaus (mean and max), so they are not paired" in compared(first, second, tmp_path)


def test_runs_that_differ_in_method_or_probe_share_no_scale(run_dir, tmp_path):
    other = write_run(tmp_path / "a|b", n=24)
    for name, change in (("heads.json", {"method": "patch", "scope": "thinking"}), ("probe.json", {"layer": 2})):
        (other / name).write_text(json.dumps({**json.loads((other / name).read_text()), **change}))
    page = Page(compared(run_dir, other, tmp_path))
    assert "the two axes share no scale" in page.text
    settings = page.text[: page.text.index("Held-out transcripts")]
    assert "patch" in settings
    heads = [attrs.get("class") for tag, attrs in page.elements if tag == "th"]
    assert set(heads) <= {"text", "number", "long", "code"}


def test_long_names_of_runs_do_not_hide_what_the_curves_are(run_dir, tmp_path):
    other = write_run(tmp_path / "deepseek-r1-distill-qwen-7b-repaired-on-chosen", n=24)
    page = Page(compared(run_dir, other, tmp_path))
    names = [t["name"] for t in json.loads(page.data()[0])["data"] if t.get("name")]
    assert [name.partition(" (n=")[0] for name in names[:2]] == ["A: harmful, complied", "A: harmful, refused"]


def test_many_selected_heads_and_a_missing_random_arm_are_told_as_they_are(small_run):
    path = small_run / "suppression.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "selected": [f"L0H{i}" for i in range(35)]}))
    frame = pd.read_parquet(small_run / "edited_aligned.parquet")
    assert "L0H5 and 29 more), and with one size-matched random head set" in written(small_run).text
    frame[~frame["group"].str.contains("random")].to_parquet(small_run / "edited_aligned.parquet")
    assert "L0H5 and 29 more) zeroed at every token" in written(small_run).text


def test_what_was_not_read_for_what_heads_read_is_told(small_run):
    change_manifest(
        small_run,
        notes=[{"stage": "reading", "text": "What heads read: 2 of 5 transcripts have 2,048 tokens or fewer."}],
    )
    section = written(small_run).text
    assert section.count("2 of 5 transcripts have 2,048 tokens or fewer") == 2, "once where it belongs, once at the end"


def test_one_run_cannot_be_compared(run_dir, tmp_path):
    with pytest.raises(DataError, match="1 run directories were passed; a comparison takes exactly two"):
        write_comparison([run_dir], tmp_path / "x.html")


def test_a_comparison_holds_no_markup_of_its_data(run_dir, tmp_path):
    page = Page(compared(run_dir, run_dir, tmp_path))
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not any(tag == "img" for tag, _ in page.elements)


def test_the_edited_arms_stand_beside_the_unedited_curve_and_count_nobody_twice(page):
    cliff = next(json.loads(text) for text in page.data() if "top heads zeroed" in text)
    names = [trace["name"] for trace in cliff["data"] if trace.get("name")]
    assert [name for name in names if "zeroed" in name] == [
        "harmful, complied; top heads zeroed (n=41)",
        "harmful, complied; random heads zeroed (n=41)",
    ]
    assert "aligned on spans (n=200 transcripts)" in page.text


def test_what_heads_read_is_shown_as_bars_and_as_text(page):
    circuits = [json.loads(t) for a, t in page.scripts if "data-circuits" in a]
    assert len(circuits) == 2
    assert not any("<" in token or "&" in token for found in circuits for token in found["tokens"])
    assert "What L4H3 reads at the final token (n=1 transcript, 33 tokens)" in page.text


def test_runs_of_other_weights_say_what_that_means_for_their_heads(run_dir, tmp_path):
    other = write_run(tmp_path / "other", n=24)
    change_manifest(other, model={"name": "repaired", "fingerprint": "sha256:0"})
    assert "The runs use different weights" in Page(compared(run_dir, other, tmp_path)).text


def test_figures_are_numbered_in_the_page_itself(run_dir):
    text = write_report(run_dir).read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r'class="figure-name">Figure (\d+)\.<', text)]
    assert numbers == list(range(1, text.count("<figcaption") + 1))


def test_the_selected_set_is_told_with_the_transcripts_that_it_was_tested_on(small_run):
    path = small_run / "suppression.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), "n": 17, "random_sets": [0.0] * 4, "sets_by_kind": {"all layers": 4}}
        )
    )
    text = written(small_run).text
    assert "against size-matched random head sets (n=17 transcripts)" in text
    assert "4 sets of all layers: p = 0.048, at least 0.200" in text


def test_a_p_that_could_not_be_smaller_says_so(small_run):
    path = small_run / "suppression.json"
    facts = json.loads(path.read_text())
    for p, told in ((0.2, True), (0.4, False)):
        path.write_text(json.dumps({**facts, "random_sets": [0.0] * 4, "sets_by_kind": {"all layers": 4}, "p": p}))
        assert ("(the smallest possible)" in written(small_run).text) is told


def test_the_steepest_drop_is_that_of_the_transcripts_that_have_a_cliff(page):
    assert "Token of the steepest drop, harmful, complied (n=" in page.text


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"none does not exist\. Pass the directory that a study wrote"):
        write_report(tmp_path / "none")


def test_a_finding_leads_to_the_section_that_states_it(page, run_dir):
    run = read_run(run_dir)
    claims = {section.id: section.claim for section in sections_of(run)}
    verdicts = run.section("verdict")
    assert {"answer", "probe", "cliff", "heads"} <= set(verdicts)
    for topic, finding in verdicts.items():
        assert finding in claims[VERDICTS[topic]], topic
    links = {attrs["href"] for tag, attrs in page.elements if tag == "a"}
    assert {f"#{VERDICTS[topic]}" for topic in verdicts} <= links


def test_findings_of_every_topic_have_their_section_and_stand_in_the_order_in_which_they_are_told(page):
    assert tuple(VERDICTS) == TOPICS
    assert set(VERDICTS.values()) <= set(SECTIONS)


def test_the_first_screen_names_the_confirmed_heads_and_what_they_do_to_the_answer(page):
    head = page.text[page.text.index("Confirmed heads") : page.text.index("The run")]
    assert head.index("Confirmed heads") < head.index("Suppression (logits)") < head.index("ASR")
    assert head.index("ASR") < head.index("Mean cliff") < head.index("Probe AUROC")
    assert "L4H3, L5H0" in head
    assert "selective; of 64 heads, on test transcripts, n=41" in head


def test_forced_closings_are_told_first_and_behaviour_stands_beside_them(small_run):
    told = "The thinking of 30 of 40 transcripts (75%) was not ended by the model."
    change_manifest(small_run, verdict={"cliff": "There is one.", "suppression": "It is.", "forced": told})
    leading = re.findall(r'<p class="verdict">(.*?)</p>', write_report(small_run).read_text(encoding="utf-8"))
    assert leading == [told, "It is."]


def test_forced_transcripts_are_counted_beside_the_total_and_not_in_it(page):
    assert "5 forced." in page.text
    # refused 68, complied 41, unfinished 3, unjudged 0; one forced in each of the three rows.
    assert "harmful6841303112" in page.text, "cells stand side by side in the text of the page"


def test_every_section_of_the_argument_says_how_it_is_read(page):
    argued = ("suppression", "intervention", "heads", "closings", "answer", "cliff", "probe", "witnesses")
    assert page.text.count("How to read it:") == len(argued)


def test_confirmed_heads_are_listed_with_kind_n_effect_interval_and_p(page):
    start = page.text.index("2 of 2 significant heads confirmed on test transcripts")
    assert "L4H3yesselective3.70[3.40, 4.00]3.70300.00141" in page.text[start:]
    assert "L5H0yesselective" in page.text[start:]


def test_a_q_that_was_not_tested_says_why(page):
    assert "n/a: could turn no answer" in page.text


def test_early_closings_draw_the_answer_unedited_and_edited_and_the_probe_in_one_figure(page):
    closings = next(json.loads(text) for text in page.data() if "share of the thinking" in text)
    names = [trace["name"] for trace in closings["data"] if trace.get("name")]
    assert names == ["the answer, unedited", "the answer, selected heads zeroed", "the probe's score at the token"]


def test_the_words_alone_stand_beside_the_probe_and_witnesses_say_what_was_not_tested(page):
    assert "N-grams of prompt and thinking, harmful only" in page.text
    assert "could not be tested" in page.text
    assert "which on average have 91% of the probability" in page.text
