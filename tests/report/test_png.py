"""The pictures open, are slides whatever the model is, and touch no global state."""

import io
import subprocess
import sys
import warnings
from typing import Any

import pytest
from PIL import Image

from safegraft.contracts.methods import STRENGTH, SafetyLockParameters
from safegraft.contracts.report import ModuleLine, ReferenceUsed, Report, Share
from safegraft.report import figures, headline, to_png, words
from safegraft.report.grid import level_colours
from safegraft.report.png import _balanced, _drawable, _origin, _wrapped
from safegraft.report.slide import Slide, inches
from tests.report.samples import BIASES, KINDS, METHODS, evaluation, five, line, lines, report, sweep, variant


def picture(modules: list[ModuleLine], **changes: object) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Image.open(io.BytesIO(to_png(report(modules, **changes))))  # type: ignore[arg-type]
        image.load()
    assert image.format == "PNG"
    return image


@pytest.mark.parametrize("layers", [1, 30, 70, 126])
def test_every_picture_is_a_slide(layers: int) -> None:
    for name, data in figures(report(lines(layers))).items():
        image = Image.open(io.BytesIO(data))
        assert image.size == (1920, 1080), name
        assert len(data) < 400_000, name


def test_there_are_pictures_of_what_there_is_to_see() -> None:
    assert set(figures(report(lines(3)))) == {"png", "layers.png", "changes.png"}
    assert set(figures(five())) == {"png", "layers.png", "changes.png", "strengths.png"}
    assert set(figures(report([line("lm_head", None, 0.4, 0.8)]))) == {"png", "changes.png"}
    different = list(figures(five()).values())
    assert len(set(different)) == len(different)


def test_the_cells_have_the_scales_colours() -> None:
    modules = [line("model.layers.0.q_proj", 0, 0.2, 0.9), line("model.layers.1.q_proj", 1, 0.9)]
    colours = colours_of(picture(modules))
    assert {"#0b1f5c", "#e9f5b0"} <= colours, "lowest and highest"
    assert {"#2d004b", "#f7f7f7"} <= colours, "the largest difference, and none"


def test_analysis_has_one_map_and_no_difference() -> None:
    colours = colours_of(picture(lines(30, share=0), mode="analyze"))
    assert not colours & {back for back, _ in level_colours("difference")}
    analysed, untouched = (to_png(report(lines(2, share=0), mode=mode)) for mode in ("analyze", "patch"))
    assert analysed != untouched, "their headlines differ"


def colours_of(image: Image.Image) -> set[str]:
    found = image.convert("RGB").getcolors(image.width * image.height) or []
    return {"#{:02x}{:02x}{:02x}".format(*colour) for count, colour in found if count > 500}  # type: ignore[misc]


def test_very_deep_models_are_drawn() -> None:
    image = picture([line(f"model.layers.{layer}.q_proj", layer, 0.5, 0.9) for layer in range(400)])
    assert image.size == (1920, 1080)


@pytest.mark.parametrize(
    "modules",
    [
        lines(1, KINDS[:1], 1.0),
        [line("lm_head", None, 0.4, 0.8)],
        [line("lm_head", None, 0.4), *lines(2)],
        [line(f"model.layers.0.experts.{index}.w1", 0, 0.2 * index, 0.9 if index else None) for index in range(3)],
        [line(f"model.layers.0.kind{index}", 0, 0.5, 0.9) for index in range(60)],
        [line("model.layers.0.q_proj", 0, float("nan"), float("nan"))],
    ],
    ids=["one", "no layer", "mixed", "experts", "many kinds", "nan"],
)
def test_unusual_shapes_are_drawn(modules: list[ModuleLine]) -> None:
    picture(modules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "changes.png" in figures(report(modules))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_named_under_the_title(method: str) -> None:
    sample = report(lines(2), method=method)
    (origin,) = _origin(sample, 20)
    *parts, how, caution = origin.split("  ·  ")
    assert parts == [sample.base_model, f"reference {sample.reference.name}"]
    assert how == words.with_strength(sample)
    assert how.partition(",")[0] == method
    assert caution == "weights, not behaviour"
    assert caution not in _origin(report(lines(2), evaluation=evaluation()), 20)[0]
    assert ("," in words.with_strength(sample)) == (method in STRENGTH)
    assert picture(lines(2), method=method).width > 500


def test_a_picture_of_several_strengths_says_of_which_one_its_maps_are() -> None:
    assert "  ·  gram, shown at general_weight 0.3  ·  " in _origin(five(), 20)[0]
    assert to_png(five()) != to_png(five(variants=[]))


def test_the_title_is_the_headline_to_the_letter() -> None:
    turned = sweep(variant(-0.5, 0.4, 0.6), variant(0.5, 0.7, 0.3), method="safelora")
    for sample in (five(), turned, report([line("a.q_proj", 0, -0.25)], mode="analyze")):
        assert _drawable(headline(sample)) == headline(sample), "signs and hard spaces included"
    assert _drawable("模型") == "??"


ORIGIN_OF_FIVE = "gram, shown at general_weight 0.3  ·  weights, not behaviour"


def test_what_does_not_fit_under_the_title_takes_more_lines() -> None:
    sample = five(base_model="m" * 50, reference=ReferenceUsed(id="r", name="m" * 40, sha256="0"))
    assert _origin(sample, 9.5) == ["m" * 50, f"reference {'m' * 40}", ORIGIN_OF_FIVE]


WIDE = [line(f"model.layers.{layer}.{'W' * 60}", layer, 0.4, 0.8, kind="W" * 20) for layer in range(2)]
BOUND = SafetyLockParameters(output="lora_bias")
GRAM = report(lines(70), method="gram")


@pytest.mark.parametrize(
    "sample",
    [
        report(lines(30, share=1.0), method=BOUND, warnings=[BIASES]),
        GRAM,
        sweep(variant(0.1, 0.3, 37.0), variant(1, 0.5, 2.9), variant(3, 0.8, 0.3)),
        report(WIDE, base_model="W" * 60, reference=ReferenceUsed(id="r", name="M" * 60, sha256="0")),
    ],
    ids=["biases", "counted", "strengths", "wide letters"],
)
def test_nothing_runs_off_the_picture(sample: Report) -> None:
    for name, data in figures(sample).items():
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for box in ((0, 0, 60, 1080), (1860, 0, 1920, 1080)):
            assert image.crop(box).getcolors() == [(60 * 1080, (255, 255, 255))], name


def test_lines_are_cut_by_their_width() -> None:
    for text in ("W" * 300, "l" * 300, "many words of bold text, " * 20):
        found = _wrapped(text, 5.0, 24, "bold")
        assert "".join(found).replace(" ", "") == text.replace(" ", "")
        assert all(inches(line_, 24, "bold") <= 5.0 for line_ in found)
        assert min(inches(line_, 24, "bold") for line_ in found[:-1]) > 3.5, "as much as fits"
    assert len(_balanced(headline(GRAM), 12.0)) == 3
    widths = [inches(line_, 24, "bold") for line_ in _balanced(headline(GRAM), 12.0)]
    assert max(widths) - min(widths) < 2.5


def test_the_slide_of_the_strengths_says_where_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = Slide.write

    def note(slide: Slide, text: str, *where: float, **style: Any) -> None:
        written.append(text)
        write(slide, text, *where, **style)

    monkeypatch.setattr(Slide, "write", note)
    for edit, said in ((3.9, False), (4.1, True)):
        written.clear()
        figures(sweep(variant(0.1, 0.3, edit), variant(3, 0.8, 0.3)))
        assert (words.CUT in written) is said


def test_no_slide_hides_what_was_measured_against_the_adapter() -> None:
    def told(after: int) -> str:
        measured = evaluation()
        harmful = measured.after.model_copy(update={"harm_score": Share(hits=after, total=24)})
        sample = report(lines(2), evaluation=measured.model_copy(update={"after": harmful}))
        return " ".join(_origin(sample, 20))

    assert "What was measured speaks against serving this adapter: harm score is still" in told(23)
    assert "speaks against" not in told(0)


def test_the_slide_of_the_strengths_says_which_leave_modules_that_lean() -> None:
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slide, "write", lambda slide, text, *where, **style: written.append(text))
        figures(five())
        assert "Modules that still lean to safety prompts: none at 0.1, 0.3, 0.5, 1, 3." in written
        written.clear()
        figures(sweep(variant(0.1, 0.3, 0.9, 0.6), variant(1, 0.5, 0.5, 0.9), method="gram"))
        assert "Modules that still lean to safety prompts: most at 0.1; none at 1." in written
        written.clear()
        figures(five("safelora"))
        assert not any("lean" in text for text in written)


def test_names_are_no_formulas() -> None:
    name = r"$\frac{\oops$ 模型 😀 \x00" + "x" * 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strange = [line(f"model.layers.{layer}.{name}", layer, 0.4, 0.8, kind=name) for layer in range(2)]
        used = ReferenceUsed(id="r", name=name, sha256="0")
        figures(report(strange, base_model=name, reference=used))
        figures(five(strength_parameter=name))


def test_neither_torch_nor_pyplot_is_imported() -> None:
    code = (
        "import sys, safegraft.report\n"
        "assert not {'torch', 'matplotlib', 'safegraft.engine'} & set(sys.modules)\n"
        "from tests.report.samples import lines, report\n"
        "safegraft.report.to_png(report(lines(1)))\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
