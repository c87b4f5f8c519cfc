"""Headlines and numbers: exact where it matters, never flattering."""

import re
from typing import get_args

import pytest

from safegraft.contracts.methods import (
    MODELS,
    AntidoteParameters,
    GramParameters,
    Method,
    NlsrParameters,
    NoneParameters,
    SafeLoraParameters,
    SafetyLockParameters,
)
from safegraft.contracts.report import Behaviour, Digest, Evaluation, Recommendation, Share, Spread
from safegraft.report import headline, words
from safegraft.report.grid import DIFFERENCE_LEVELS, LEVELS, Scale, grid_of, level_colours, short_kinds
from safegraft.report.text import Look, story
from safegraft.report.words import change, kept, nats, number, percent, shown, size
from tests.report.samples import (
    BIASES,
    KINDS,
    METHODS,
    SIDE_CAR,
    five,
    line,
    lines,
    probe,
    report,
    sha,
    sweep,
    variant,
)


def plain(text: str) -> str:
    return text.replace("\xa0", " ")


def test_headline_of_a_repair() -> None:
    assert (
        plain(headline(report(lines(30))))
        == "84 of 210 modules were repaired; the adapter kept 93 % of its update and changed by 27 %"
    )
    assert headline(report(lines(2, share=1.0))).startswith("All 14 modules were repaired; ")
    assert headline(report(lines(1, KINDS[:1], 1.0))).startswith("The only module was repaired; ")
    assert headline(report([line("a", 0, 0.1, 0.9), line("b", 0, 0.9)])).startswith("1 of 2 modules was repaired; ")


def test_headline_counts_what_acted_more_on_safety_prompts_where_the_similarity_says_so() -> None:
    cost = "; the adapter kept 93 % of its update and changed by 27 %"
    tilted = [line("a", 0, 0.3, 0.99), line("b", 0, 0.7, 0.6), line("c", 1, 0.71, 0.99)]
    assert plain(headline(report(tilted, method="gram"))) == (
        "2 of 3 modules acted more on safety prompts than on general ones, after the repair 1 does" + cost
    )
    assert "after the repair none does; " in headline(report([tilted[0], tilted[2]], method="antidote"))
    both = [line("a", 0, 0.3, 0.4), line("b", 0, 0.5, 0.7)]
    assert "2 of 2 modules acted more on safety prompts than on general ones, after the repair 2 do; " in headline(
        report(both, method="gram")
    )
    sound = report([line("a", 0, 0.8, 0.99), line("b", 0, 0.9, 0.99)], method="gram")
    assert plain(headline(sound)) == "All 2 modules were repaired" + cost, "nothing that would have to be told"
    pushed = GramParameters(amplification=0.5)
    assert headline(report(tilted, method=pushed)).startswith("All 3 modules were repaired")
    # A cosine says nothing of general prompts.
    assert "safety prompts" not in headline(report(tilted, method="nlsr"))


def test_headline_of_an_analysis_counts_them_too() -> None:
    measured = "were measured, nothing was changed; "
    some = report([line("a", 0, 0.3), line("b", 0, 0.7), line("c", 0, 0.9)], mode="analyze", method="gram")
    assert headline(some) == f"3 modules {measured}2 act more on safety prompts than on general ones"
    one = report([line("a", 0, 0.3), line("b", 0, 0.8)], mode="analyze", method="gram")
    assert headline(one) == f"2 modules {measured}1 acts more on safety prompts than on general ones"
    none = report([line("a", 0, 0.8), line("b", 0, 0.8)], mode="analyze", method="gram")
    assert headline(none) == f"2 modules {measured}none acts more on safety prompts than on general ones"


def test_headline_where_nothing_changed() -> None:
    assert headline(report(lines(2, share=0))) == "Nothing was changed; the output is the input, byte for byte"
    other = report(lines(2, share=0), output=Digest(sha256=sha("other"), bytes=1))
    assert headline(other) == "None of 14 modules was repaired", "sameness is only claimed where the hashes agree"
    analysis = report([line("model.layers.0.q_proj", 0, -0.25)], mode="analyze")
    assert headline(analysis) == "1 module was measured, nothing was changed; median similarity −0.25, lowest −0.25"


def test_headline_of_several_strengths_spans_what_they_keep() -> None:
    assert (
        plain(headline(five()))
        == "5 strengths of general_weight, from 0.1 to 3: the adapter keeps 37 % to 81 % of its update"
    )
    pushed = sweep(variant(2, 1.0, 0.09), variant(6, 1.006, 0.28), method="safetylock")
    assert plain(headline(pushed)) == (
        "2 strengths, from 2 to 6: the adapter keeps all of its update and changes by 9 % to 28 %"
    ), "the parameter is called strength, and what is kept does not tell how much was added"
    turned = sweep(variant(0.1, -0.2, 1.4), variant(0.2, 0.354, 0.9), method="antidote")
    assert plain(headline(turned)).endswith(": the adapter keeps none to 35 % of its update")
    alike = sweep(variant(-0.5, 0.501, 0.5), variant(0.5, 0.499, 0.5), method="safelora")
    assert plain(headline(alike)) == (
        "2 strengths of threshold, from −0.5 to 0.5: the adapter keeps 50 % of its update"
    ), "a range of one figure is that figure"
    unknown = sweep(variant(0.1, float("nan"), 0.4), variant(0.2, 0.6, 0.4))
    assert plain(headline(unknown)).endswith(": the adapter keeps 60 % of its update")


def test_headline_of_a_single_strength_is_that_of_any_run() -> None:
    assert headline(sweep(variant(0.3, 0.52, 0.55))) == headline(
        report(lines(2, share=1.0), method="gram", summary=variant(0.3, 0.52, 0.55).summary)
    )


def test_headline_of_strengths_that_change_nothing() -> None:
    untouched = [variant(value, 1.0, 0.0, repaired=0) for value in (-0.5, 0.0)]
    assert plain(headline(sweep(*untouched, method="safelora"))) == (
        "2 strengths of threshold, from −0.5 to 0: nothing was changed, every output is the input, byte for byte"
    )
    other = sweep(untouched[0], variant(0, 1.0, 0.0, repaired=0, output="other"), method="safelora")
    assert headline(other).endswith(": no module was repaired"), "sameness is only claimed where all hashes agree"


def test_headline_of_an_analysis_does_not_speak_of_strengths() -> None:
    measured = five(mode="analyze", modules=lines(2, share=0), output=None)
    assert headline(measured).startswith("14 modules were measured, nothing was changed; ")


def test_headline_of_a_side_car_says_where_the_repair_is() -> None:
    method = SafetyLockParameters(output="side_car")
    alone = report(lines(2, share=0), method=method, warnings=[SIDE_CAR])
    assert headline(alone) == "The adapter is as it came, byte for byte; the repair is in a side-car file beside it"
    other = report(lines(2, share=0), method=method, warnings=[SIDE_CAR], output=Digest(sha256=sha("x"), bytes=1))
    assert headline(other) == "The adapter is without a repair; the repair is in a side-car file beside it"
    several = sweep(*(variant(value, 1.0, 0.0, repaired=0) for value in (2, 6)), method=method, warnings=[SIDE_CAR])
    assert headline(several) == (
        "2 strengths, from 2 to 6: the adapter is as it came, byte for byte; the repairs are in side-car files beside "
        "it"
    )


def test_headline_of_biases_calls_the_weights_unchanged_only_where_they_are() -> None:
    method = SafetyLockParameters(output="lora_bias")
    only = variant(6, 1.0, 0.0).summary
    two = report([line("a.o_proj", 0, 0.0, 1.0), line("b.o_proj", 1, 1.0)], method=method, warnings=[BIASES])
    biased = two.model_copy(update={"summary": only.model_copy(update={"modules": 14, "repaired": 12})})
    assert headline(biased) == "12 of 14 modules were given biases; the weights are as they came"
    single = two.model_copy(update={"summary": only.model_copy(update={"modules": 14, "repaired": 1})})
    assert headline(single) == "1 of 14 modules was given a bias; the weights are as they came"
    both = two.model_copy(update={"summary": variant(6, 0.9, 0.3).summary})
    assert plain(headline(both)) == (
        "All 14 modules were repaired, with biases; the adapter kept 90 % of its update and changed by 30 %"
    )
    unseen = report(lines(2, share=1.0), summary=variant(1000, 0.9999, 0.0004).summary)
    assert plain(headline(unseen)).endswith("changed by < 1 %"), "a small edit is no bias"


def test_a_module_that_was_given_a_bias_is_not_said_to_have_changed_by_nothing() -> None:
    given, edited = line("l.0.o_proj", 0, 0.2, 0.9, edit=0.0), line("l.1.o_proj", 1, 0.2, 0.9, edit=0.5)
    left = line("l.2.o_proj", 2, 0.9)
    biased = report([given, edited, left], method="safetylock", warnings=[BIASES])
    told = [plain(words.changed(biased, found)) for found in biased.modules]
    assert told == ["given a bias", "changed by 50 %", "changed by 0 %"]
    assert plain(words.changed(report([given]), given)) == "changed by 0 %", "no bias, no word of one"
    assert "given a bias" in story(biased, Look(80, False, True)).plain


def test_headline_of_biases_at_several_strengths_knows_a_first_one_that_is_zero() -> None:
    method = SafetyLockParameters(output="lora_bias", strength=0)
    several = sweep(variant(0, 1.0, 0.0, repaired=0), variant(6, 1.0, 0.0, repaired=12), method=method, warnings=[])
    assert headline(several) == "2 strengths, from 0 to 6: biases were added; the weights are as they came"


def test_headline_of_an_edit_larger_than_the_update() -> None:
    large = report(lines(2, share=1.0), summary=variant(0.1, -0.03, 1.8).summary)
    assert headline(large) == "All 14 modules were repaired; the adapter kept none of its update and changed by " + (
        "1.8 times its size"
    )


@pytest.mark.parametrize(
    ("edit", "text"),
    [(0.27, "27 %"), (1.0, "100 %"), (1.004, "100 %"), (1.04, "1.04 times its size"), (1.8, "1.8 times its size"),
     (12.0, "12 times its size"), (100.2, "100 times its size"), (12345.6, "12,346 times its size"),
     (1e6, "1,000,000 times its size"), (1e308, "more than a million times its size"), (-1e308, "–"),
     (float("inf"), "–"), (float("nan"), "–")],
)  # fmt: skip
def test_an_edit_is_a_share_up_to_the_whole_and_a_multiple_beyond(edit: float, text: str) -> None:
    assert plain(change(edit)) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(-0.2, "none"), (0.0, "0 %"), (0.354, "35 %"), (0.9999, "> 99 %"), (1.0, "all"), (1.3, "all"),
     (float("nan"), "–"), (float("inf"), "–")],
)  # fmt: skip
def test_what_is_kept_is_at_least_nothing_and_at_most_all(share: float, text: str) -> None:
    assert plain(kept(share)) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (0.001, "< 1 %"),
        (0.271, "27 %"),
        (0.9999, "> 99 %"),
        (1.0, "100 %"),
        (1.2, "120 %"),
        (-0.05, "−5 %"),
        (1e308, "–"),
        (float("nan"), "–"),
    ],
)
def test_percent_calls_little_not_nothing_and_much_not_all(share: float, text: str) -> None:
    assert plain(percent(share)) == text


def test_numbers() -> None:
    assert [number(value) for value in (0.734, -0.001, -0.5, float("inf"))] == ["0.73", "0.00", "−0.50", "–"]
    assert plain(percent(0.9999, 1)) == "> 99.9 %"
    assert [plain(size(count)) for count in (7, 1500, 20_277_624)] == ["7 bytes", "1.5 kB", "20.3 MB"]
    assert [plain(nats(value)) for value in (0.0, 0.0001, 0.2134, float("nan"))] == ["0.000", "< 0.001", "0.213", "–"]
    assert [words.plain(value) for value in (0.3, 1.0, -0.5, 100.0)] == ["0.3", "1", "−0.5", "100"]


def test_every_method_has_a_name_with_the_paper_of_its_parameters() -> None:
    assert set(words.METHODS) == set(MODELS) == set(METHODS)
    for name, model in MODELS.items():
        papers = re.findall(r"arXiv ([\d.]+\d)", model.__doc__ or "")
        assert re.findall(r"arXiv ([\d.]+\d)", words.METHODS[name]) == papers
        assert words.method_name(report(lines(1), method=name)) == words.METHODS[name]


def test_no_choice_of_a_parameter_lacks_its_words() -> None:
    def choices(model: type[Method], field: str) -> set[str]:
        return set(get_args(model.model_fields[field].annotation))

    assert set(words.SCORERS) == choices(NlsrParameters, "scorer")
    assert set(words.BASES) == choices(AntidoteParameters, "basis")
    assert set(words.SPARED) == choices(AntidoteParameters, "spare")


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (NlsrParameters(skip_share=0.6), "the 40 % of modules with the lowest similarity."),
        (NlsrParameters(skip_share=0.0), "every module."),
        (NlsrParameters(skip_share=1.0), "no module."),
        (NlsrParameters(selection="bernoulli", seed=7), "a seeded random draw in which less similar modules are drawn "
         "more often (seed 7)."),
        (NlsrParameters(selection="bernoulli", skip_share=1.0, seed=7), "a seeded random draw in which less similar "
         "modules are drawn more often (seed 7)."),
        (NlsrParameters(selection="highest"), "as a control: the 50 % of modules with the highest similarity."),
        (NlsrParameters(selection="random", skip_share=0.8, seed=7), "as a control: 20 % of the modules, drawn at "
         "random (seed 7)."),
        (GramParameters(), "every module, and in each of them the directions of inputs that safety prompts use more "
         "than general ones do."),
        (SafeLoraParameters(threshold=-0.25), "the modules whose update has a cosine of at most −0.25 with its "
         "projection."),
        (SafeLoraParameters(selection="lowest"), "the 10 modules with the lowest similarity."),
        (SafeLoraParameters(selection="lowest", modules=1), "the module with the lowest similarity."),
        (SafeLoraParameters(selection="lowest", modules=0), "no module."),
        (AntidoteParameters(), "every module. Of each row's entries of both factors, in a basis that does not depend "
         "on how training began, the 10 % that matter most on harmful prompts are pruned."),
        (AntidoteParameters(basis="stored", spare="general"), "every module. Of each row's entries of both factors, "
         "as they were saved, the 10 % that matter most on harmful prompts are pruned, except those that matter as "
         "much on general prompts."),
        (AntidoteParameters(basis="rows", spare="safety", density=0.25), "every module. Of its output rows the 25 % "
         "that matter most on harmful prompts are pruned, except the reference's safety-critical neurons."),
        (AntidoteParameters(density=0), "no module, because nothing is to be pruned."),
        (SafetyLockParameters(), "the output projections of the 24 attention heads whose activations tell safe from "
         "unsafe answers best."),
        (SafetyLockParameters(heads=1, output="lora_bias"), "the output projections of the attention head whose "
         "activations tell safe from unsafe answers best."),
        (SafetyLockParameters(output="side_car"), "no module of the adapter. The side-car pushes the 24 attention "
         "heads whose activations tell safe from unsafe answers best."),
        (SafetyLockParameters(strength=0), "no module, because a push of strength 0 is none."),
        (NoneParameters(), "no module. This is the control that shows what happens without a repair."),
    ],
    ids=lambda value: value.type if not isinstance(value, str) else "",
)  # fmt: skip
def test_every_selection_is_told_in_words(method: Method, text: str) -> None:
    said = plain(words.selection(report(lines(1), method=method)))
    said = re.sub(r" Safety-critical is .*", "", said)
    assert re.sub(r"^Chosen for repair(: |, )", "", said) == text


@pytest.mark.parametrize("scorer", sorted(words.SCORERS))
def test_a_scorer_is_told_and_a_control_called_one(scorer: str) -> None:
    said = words.selection(report(lines(1), method=NlsrParameters.model_validate({"scorer": scorer, "seed": 5})))
    assert f" Safety-critical is {words.SCORERS[scorer]}" in said
    assert ("control" in said) == (scorer in ("magnitude", "random"))
    assert ("(seed 5)" in said) == (scorer == "random"), "a seed only where something was drawn"


def test_every_lineage_is_told_with_what_is_not_known() -> None:
    continued = words.lineage(report(lines(1), lineage="continued", lineage_similarity=0.84))
    fresh = words.lineage(report(lines(1), lineage="fresh", lineage_similarity=-0.004))
    foreign = words.lineage(report(lines(1), lineage="foreign", lineage_similarity=-0.031))
    assert "trained further from the provider's aligned adapter" in continued
    assert "median cosine 0.84" in continued
    for text in (fresh, foreign):
        assert text.startswith("It is unrelated to the provider's aligned adapter (median cosine of the updates ")
        assert "nothing here would give that alignment back" in text
    assert "label" not in fresh
    assert "cosine of the updates 0.00;" in fresh, "never −0.00"
    assert "Its label for its base model is unknown to the reference." in foreign
    assert "taken to sit on the aligned model, which nobody has confirmed" in foreign
    assert "−0.03" in foreign


@pytest.mark.parametrize("lineage", ["fresh", "foreign"])
def test_a_lineage_of_which_nothing_was_compared_claims_no_comparison(lineage: str) -> None:
    text = words.lineage(report(lines(1), lineage=lineage, lineage_similarity=None))
    assert text.startswith("There was no aligned update to compare its own with.")
    assert "unrelated" not in text


def test_the_recommendation_is_one_sentence_whichever_method_ran() -> None:
    advice = Recommendation(method="gram", reason="gram serves a fresh adapter of any rank")
    assert words.recommendation(report(lines(1), method="gram", recommendation=advice)) == (
        "It is the one that is recommended for this adapter and reference: gram serves a fresh adapter of any rank."
    )
    assert words.recommendation(report(lines(1), method="none", recommendation=advice)) == (
        "Had no method been named, gram would have run: gram serves a fresh adapter of any rank."
    )
    without = Recommendation(method="none", reason="The reference offers no method that is recommended.")
    for method in ("safelora", "none"):
        assert words.recommendation(report(lines(1), method=method, recommendation=without)) == (
            "No method is recommended for this adapter and reference: The reference offers no method that is "
            "recommended."
        )
    silent = Recommendation(method="gram", reason="")
    assert words.recommendation(report(lines(1), recommendation=silent)) == (
        "Had no method been named, gram would have run."
    )


def test_a_probe_says_which_way_the_adapter_moved() -> None:
    assert plain(words.probe(probe(1.2345, 0.1234))) == (
        "On 32 prompts, the repair brought the adapter nearer to the model that it sits on: 1.234 nats before, 0.123 "
        "after. The likeliest first token is the model's own on 56 % of the prompts before, on 94 % after."
    )
    assert "farther from the model" in words.probe(probe(0.1, 0.2))
    assert "as far from the model that it sits on as it was" in words.probe(probe(0.10001, 0.10002))
    assert words.probe(probe(prompts=1)).startswith("On 1 prompt, ")


def test_what_became_of_the_adapter_is_no_more_than_what_was_done() -> None:
    half = lines(2, share=0.5)
    assert words.outcome(report(half)).endswith("; the other 7 are byte for byte as they came.")
    assert words.outcome(report([line("a", 0, 0.1, 0.9), line("b", 0, 0.9)])).endswith(
        "; the other one is byte for byte as it came."
    )
    assert words.outcome(report(lines(2, share=1.0))) == "Every module was repaired."
    assert words.outcome(report(lines(1, KINDS[:1], 1.0))) == "Its only module was repaired."
    for changes in ({"output_rank": "exact"}, {"warnings": [BIASES]}):
        assert words.outcome(report(half, **changes)).endswith("; the other 7 compute what they did."), "not the bytes"
    nothing = lines(2, share=0)
    assert words.outcome(report(nothing)) == "No module was repaired, so the adapter was handed back as it came."
    assert words.outcome(report(nothing, output=Digest(sha256=sha("x"), bytes=1))) == ""
    assert "side-car" in words.outcome(report(nothing, warnings=[SIDE_CAR]))
    measured = words.outcome(report(nothing, mode="analyze", warnings=[SIDE_CAR]))
    assert measured == "This was a measurement only: no adapter was written."
    assert words.outcome(five()).endswith("those of the first that was asked for, general_weight 0.3.")


def test_what_was_checked_is_what_the_layout_allows() -> None:
    half = lines(2, share=0.5)
    assert "they have the same tensors, and differ in the repaired modules and nowhere else." in words.checked(
        report(half)
    )
    assert "every tensor has the rank that was planned" in words.checked(report(half, output_rank="exact"))
    assert "but for the biases that were added" in words.checked(report(half, warnings=[BIASES]))
    cut = report(half, summary=variant(1, 0.5, 0.5).summary)
    assert "lost at most 1.2 % of a module's update." in plain(words.checked(cut))
    nothing = lines(2, share=0)
    assert "the same file" in words.checked(report(nothing))
    assert "Do not use the output" in words.checked(report(nothing, output=Digest(sha256=sha("x"), bytes=1)))


def test_what_was_done_is_only_said_to_be_done_where_it_was() -> None:
    done = words.done(report(lines(2)))
    assert done.startswith("The output rows (neurons)")
    assert words.done(report(lines(2, share=0))) == (
        f"No module was changed. Of a repaired module the report would say: “{done}”"
    )
    assert words.done(report(lines(2, share=0), mode="analyze")) == (
        f"This run measured and changed nothing. Of a repaired module the report would say: “{done}”"
    )
    assert words.done(report(lines(2, share=0), method="none")) == "Nothing was done."
    assert words.done(report(lines(2, share=0), method="none", mode="analyze")) == (
        "This run measured and changed nothing."
    )
    beside = report(lines(2, share=0), method=SafetyLockParameters(output="side_car"), warnings=[SIDE_CAR])
    assert words.done(beside).startswith("24 attention heads are pushed")


def test_shown_cuts_the_middle_and_replaces_what_cannot_be_seen() -> None:
    assert shown("a\u202eb\x00c") == "a\ufffdb\ufffdc"
    cut = shown("start" + "x" * 1000 + "end")
    assert len(cut) < 170
    assert cut.startswith("start")
    assert cut.endswith("end")


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.52, 0.98], 0.5, 1.0),
        ([-0.31, 0.2], -0.35, 0.2),
        ([0.9991, 0.9999], 0.9, 1.0),
        ([-1.0], -1.0, -0.9),
        ([1.0000002, 0.3], 0.3, 1.0),
        ([float("nan")], 0.0, 1.0),
    ],
)
def test_the_scale_spans_the_data(values: list[float], low: float, high: float) -> None:
    scale = Scale.of(values)
    assert [scale.low, scale.high] == pytest.approx([low, high])
    assert all(0 <= scale.level(value) < LEVELS for value in values if value == value)
    assert [position for position, _ in scale.ticks()][:: len(scale.ticks()) - 1] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.55, 1.0, ["0.60", "0.70", "0.80", "0.90", "1.00"]),
        (0.85, 1.0, ["0.85", "0.90", "0.95", "1.00"]),
        (0.9, 1.0, ["0.90", "0.92", "0.94", "0.96", "0.98", "1.00"]),
        (-1.0, 1.0, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
    ],
)
def test_an_axis_has_round_marks(low: float, high: float, labels: list[str]) -> None:
    marks = Scale(low, high).round_ticks()
    assert [label.replace("\u2212", "-") for _, label in marks] == labels
    assert [low + position * (high - low) for position, _ in marks] == pytest.approx([float(text) for text in labels])


def test_the_colours_rise_in_lightness_and_hold_readable_text() -> None:
    def luminance(code: str) -> float:
        parts = [int(code[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    backs = [luminance(back) for back, _ in level_colours()]
    assert backs == sorted(backs)
    for back, text in level_colours():
        light, dark = sorted((luminance(back), luminance(text)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.3


def test_the_grid_averages_what_shares_a_cell() -> None:
    grid = grid_of(
        report(
            [line("l.0.e.0.w", 0, 0.2, 0.6), line("l.0.e.1.w", 0, 0.4), line("l.10.w", 10, 0.5), line("w", None, 0.1)]
        )
    )
    assert grid.layers == (0, 10, None)
    cell = grid.cells[0, "w"]
    assert [cell.before, cell.after] == pytest.approx([0.3, 0.5])
    assert (cell.modules, cell.repaired) == (2, 1)
    assert cell.value("difference") == pytest.approx(0.2)


def test_a_mean_that_no_number_holds_is_none() -> None:
    large = [line("l.0.e.0.w", 0, 1e308, 0.5), line("l.0.e.1.w", 0, 1e308, 0.5)]
    grid = grid_of(report(lines(1)).model_copy(update={"modules": large}))
    assert [words.number(value) for value in (grid.cells[0, "w"].before, grid.cells[0, "w"].after)] == ["–", "0.50"]


def test_projections_come_in_the_order_of_a_block() -> None:
    grid = grid_of(report([line(f"l.0.{kind}", 0, 0.5) for kind in ("zeta", *reversed(KINDS))]))
    assert grid.kinds == (*KINDS, "zeta")
    assert short_kinds(grid.kinds) == ("q", "k", "v", "o", "gate", "up", "down", "zeta")
    assert short_kinds(("q", "q_proj")) == ("q", "q_proj"), "never two columns of one name"


Rates = dict[str, tuple[int, int]]


def rates(before: Rates, after: Rates) -> Evaluation:
    def side(counted: Rates) -> Behaviour:
        return Behaviour(**{name: Share(hits=hits, total=total) for name, (hits, total) in counted.items()})

    return Evaluation(judge="key phrases", before=side(before), after=side(after))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ((24, 24), (0, 24), "Harm score fell from 1.00 to 0.00."),
        ((0, 24), (24, 24), "Harm score rose from 0.00 to 1.00."),
        ((12, 24), (10, 24), "Harm score fell from 0.50 to 0.42; the intervals overlap, so this may be chance."),
        ((12, 24), (12, 24), "Harm score stayed at 0.50."),
        ((500, 1000), (501, 1000), "Harm score stayed at 0.50."),
    ],
)
def test_an_evaluation_claims_no_more_than_was_counted(
    before: tuple[int, int], after: tuple[int, int], told: str
) -> None:
    assert (
        words.evaluation(rates({"harm_score": before}, {"harm_score": after}))
        == f"{told} Whoever measured it does not say on which files."
    )
    named = rates({"harm_score": before}, {"harm_score": after}).model_copy(update={"output_sha256": "0" * 64})
    assert words.evaluation(named) == told


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"harm_score": (24, 24)}, {"harm_score": (0, 24)}, None),
        ({"harm_score": (24, 24)}, {"harm_score": (23, 24)}, "harm score is still 0.96"),
        ({"harm_score": (1, 24)}, {"harm_score": (20, 24)}, "harm score rose to 0.83"),
        ({"task_accuracy": (22, 24)}, {"task_accuracy": (21, 24)}, None),
        ({"over_refusal": (1, 24)}, {"over_refusal": (24, 24)}, "over-refusal rose to 1.00"),
        (
            {"over_refusal": (1, 24), "task_accuracy": (91, 100)},
            {"over_refusal": (24, 24), "task_accuracy": (31, 100)},
            "over-refusal rose to 1.00; task accuracy fell to 0.31",
        ),
    ],
)
def test_what_was_measured_may_speak_against_it(before: Rates, after: Rates, told: str | None) -> None:
    said = words.evaluated_against(rates(before, after))
    assert said == (told and f"What was measured speaks against serving this adapter: {told}.")


def test_hard_spaces_are_shown_and_what_hides_is_not() -> None:
    assert words.shown("lost 10\u00a0% of it") == "lost 10\u00a0% of it"
    assert words.shown("a\u202eb\u200bc\x1b") == "a\ufffdb\ufffdc\ufffd"


def test_several_strengths_are_compared_in_a_line_each() -> None:
    sample = five()
    first, *_, last = words.compared(sample)
    assert plain(first) == (
        "0.1: 37 % kept, changed by 71 %, similarity 0.70 → 0.98; none acts more on safety prompts than on general ones"
    )
    assert last.startswith("3: ")
    assert all(line in plain(str(story(sample, Look(200, False, True)))) for line in map(plain, words.compared(sample)))


@pytest.mark.parametrize(("after", "told"), [((0.71, 0.9), "none"), ((0.5, 0.9), "some"), ((0.5, 0.6), "most")])
def test_how_many_modules_still_lean(after: tuple[float, float], told: str) -> None:
    sample = five()
    low, middle = after
    found = sample.summary.model_copy(update={"similarity_after": Spread(min=low, median=middle, max=0.99)})
    even = sample.model_copy(update={"method": sample.method.model_copy(update={"break_even": 0.7})})
    assert words.still_leaning(even, found) == told
    assert words.still_leaning(sample.model_copy(update={"method": report(lines(1)).method}), found) is None


def test_what_was_measured_on_one_side_alone_is_not_compared() -> None:
    found = rates({"harm_score": (1, 2)}, {"harm_score": (1, 2)})
    found = found.model_copy(update={"after": found.after.model_copy(update={"over_refusal": Share(hits=0, total=2)})})
    assert [name for name, _, _ in found.measures()] == ["harm_score"]


@pytest.mark.parametrize(
    ("sizes", "layers", "told"),
    [
        ({"a": 1.0, "b": 2.0}, 1, "2 modules in 1 layer, rank 8; the update is largest in b"),
        ({"a": 1.0, "b": 0.0}, 2, "2 modules in 2 layers, rank 8; the update is largest in a, and zero in 1 module"),
        ({"lm_head": 0.0}, 0, "1 module, rank 8; the update is zero everywhere: the adapter does nothing"),
    ],
)
def test_an_adapter_alone_has_a_headline_too(sizes: dict[str, float], layers: int, told: str) -> None:
    assert words.inspected(sizes, layers, 8) == told


@pytest.mark.parametrize(
    ("value", "told"), [(0.314, "+0.31"), (-0.02, "−0.02"), (0.001, "0.00"), (-0.001, "0.00"), (float("nan"), "–")]
)
def test_a_difference_has_its_sign(value: float, told: str) -> None:
    assert words.signed(value) == told


def test_zero_has_the_middle_of_the_scale_of_differences() -> None:
    for values in ([0.4, 0.0], [-0.31, 0.1], [0.0], []):
        scale = Scale.around_zero(values)
        assert scale.low == -scale.high
        assert scale.level(0.0) == DIFFERENCE_LEVELS // 2
        assert scale.high >= 0.1, "rounding noise must not look like a change"
