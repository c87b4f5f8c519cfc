"""The picture opens, is as large as its grid, and touches no global state."""

import io
import subprocess
import sys
import warnings

import pytest
from PIL import Image

from safegraft.contracts.report import ModuleLine, ReferenceUsed
from safegraft.report import headline, to_png
from safegraft.report.png import CELL_WIDTH, DPI, ROW_HEIGHT, TALLEST, _drawable, _origin
from tests.report.samples import KINDS, METHODS, five, line, lines, report, sweep, variant


def picture(modules: list[ModuleLine], **changes: object) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Image.open(io.BytesIO(to_png(report(modules, **changes))))  # type: ignore[arg-type]
        image.load()
    assert image.format == "PNG"
    return image


def test_each_layer_adds_a_row_and_each_projection_two_columns() -> None:
    image = picture(lines(40))
    assert picture(lines(50)).height - image.height == pytest.approx(10 * ROW_HEIGHT * DPI, abs=2)
    narrower = picture(lines(40, KINDS[:6]))
    assert image.width - narrower.width == pytest.approx(2 * CELL_WIDTH * DPI, abs=2)


def test_the_cells_have_the_scales_colours() -> None:
    image = picture([line("model.layers.0.q_proj", 0, 0.2, 0.9), line("model.layers.1.q_proj", 1, 0.9)]).convert("RGB")
    colours = {colour for _, colour in image.getcolors(image.width * image.height) or []}
    assert {(0x0B, 0x1F, 0x5C), (0xE9, 0xF5, 0xB0)} <= colours, "lowest and highest"


def test_analysis_has_one_map() -> None:
    both, one = picture(lines(30)), picture(lines(30, share=0), mode="analyze")
    assert one.width < both.width - 5 * CELL_WIDTH * DPI
    assert picture(lines(30, share=0)).width == one.width, "nothing repaired: before is after"


def test_very_deep_models_are_squeezed() -> None:
    image = picture([line(f"model.layers.{layer}.q_proj", layer, 0.5, 0.9) for layer in range(400)])
    assert image.height < (TALLEST + 5) * DPI


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
    image = picture(modules)
    assert 500 < image.width < 6000
    assert 200 < image.height < 4000


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_named_under_the_title(method: str) -> None:
    sample = report(lines(2), method=method)
    assert _origin(sample, 200) == [f"{sample.base_model}  ·  reference {sample.reference.name}  ·  {method}"]
    assert picture(lines(2), method=method).width > 500


def test_a_picture_of_several_strengths_says_of_which_one_its_maps_are() -> None:
    assert _origin(five(), 200)[0].endswith("gram, shown at general_weight 0.3")
    assert to_png(five()) != to_png(five(variants=[]))


def test_the_title_is_the_headline_to_the_letter() -> None:
    turned = sweep(variant(-0.5, 0.4, 0.6), variant(0.5, 0.7, 0.3), method="safelora")
    for sample in (five(), turned, report([line("a.q_proj", 0, -0.25)], mode="analyze")):
        assert _drawable(headline(sample)) == headline(sample), "signs and hard spaces included"
    assert _drawable("模型") == "??"


def test_what_does_not_fit_under_the_title_takes_more_lines() -> None:
    sample = five(base_model="m" * 50, reference=ReferenceUsed(id="r", name="r" * 50, sha256="0"))
    assert _origin(sample, 96) == ["m" * 50, f"reference {'r' * 50}", "gram, shown at general_weight 0.3"]


def test_names_are_no_formulas() -> None:
    name = r"$\frac{\oops$ 模型 😀 \x00" + "x" * 200
    picture(
        [line(f"model.layers.0.{name}", 0, 0.4, 0.8, kind=name)],
        base_model=name,
        reference=ReferenceUsed(id="r", name=name, sha256="0"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_png(five(strength_parameter=name))


def test_neither_torch_nor_pyplot_is_imported() -> None:
    code = (
        "import sys, safegraft.report\n"
        "assert not {'torch', 'matplotlib', 'safegraft.engine'} & set(sys.modules)\n"
        "from tests.report.samples import lines, report\n"
        "safegraft.report.to_png(report(lines(1)))\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
