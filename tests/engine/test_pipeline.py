"""Score → select → patch → write, on folders."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safegraft.adapter import describe
from safegraft.contracts.methods import GramParameters, NlsrParameters
from safegraft.engine.adapter import AdapterReader
from safegraft.engine.pipeline import detect_kinship, realign
from safegraft.engine.reference import LoadedReference
from safegraft.errors import Incompatible, InvalidTensors
from tests import tiny

WEIGHTS = "adapter_model.safetensors"
PARAMETERS: list[NlsrParameters | GramParameters] = [
    NlsrParameters(),
    NlsrParameters(form="neuron", skip_share=0.0),
    NlsrParameters(selection="bernoulli", seed=3),
    GramParameters(),
]


def delta(folder: Path, name: str, scaling: float = 2.0) -> torch.Tensor:
    """ΔW as PEFT adds it; the tiny adapters have α/r = 2."""
    tensors = load_file(folder / WEIGHTS)
    a = tensors[f"base_model.model.{name}.lora_A.weight"].double()
    b = tensors[f"base_model.model.{name}.lora_B.weight"].double()
    return scaling * b @ a


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: f"{p.type}-{getattr(p, 'form', '')}")
@pytest.mark.parametrize("lineage", ["fresh", "continued"])
def test_the_report_says_what_the_files_say(
    reference: LoadedReference,
    aligned: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    lineage: str,
    parameters: NlsrParameters | GramParameters,
) -> None:
    folder: Path = request.getfixturevalue(lineage)
    report = realign(folder, reference, parameters, tmp_path / "out")
    assert report.lineage == lineage
    energy = overlap = difference = 0.0
    for line in report.modules:
        before, after = delta(folder, line.name), delta(tmp_path / "out", line.name)
        assert bool((before != after).any()) == line.repaired
        inner = delta(aligned, line.name) if lineage == "continued" else torch.zeros_like(before)
        relative = before - inner
        kept = float(((after - inner) * relative).sum() / relative.square().sum())
        edit = float((after - before).norm() / relative.norm())
        assert line.kept == pytest.approx(kept, abs=1e-3)
        assert line.edit == pytest.approx(edit, abs=1e-3)
        energy += float(relative.square().sum())
        overlap += float(((after - inner) * relative).sum())
        difference += float((after - before).square().sum())
    assert report.summary.kept == pytest.approx(overlap / energy, abs=1e-3)
    assert report.summary.edit == pytest.approx((difference / energy) ** 0.5, abs=1e-3)
    assert report.summary.repaired == sum(line.repaired for line in report.modules)
    assert [line.layer for line in report.layers] == [0, 1]


def test_repaired_modules_come_closer_to_the_reference(
    reference: LoadedReference, continued: Path, tmp_path: Path
) -> None:
    for number, parameters in enumerate((PARAMETERS[0], PARAMETERS[-1])):
        report = realign(continued, reference, parameters, tmp_path / str(number))
        assert all(line.similarity_after > line.similarity_before for line in report.modules if line.repaired)
        assert all(line.similarity_after == line.similarity_before for line in report.modules if not line.repaired)


def test_half_of_the_modules_are_repaired_by_default_and_they_are_the_least_similar(
    reference: LoadedReference, continued: Path, tmp_path: Path
) -> None:
    report = realign(continued, reference, NlsrParameters(), tmp_path / "out")
    repaired = [line.similarity_before for line in report.modules if line.repaired]
    others = [line.similarity_before for line in report.modules if not line.repaired]
    assert len(repaired) == len(others) == 7
    assert max(repaired) <= min(others)


def test_the_same_job_gives_the_same_bytes(reference: LoadedReference, fresh: Path, tmp_path: Path) -> None:
    for parameters in PARAMETERS:
        outs = [tmp_path / f"{parameters.type}-{id(parameters)}-{i}" for i in (0, 1)]
        digests = {realign(fresh, reference, parameters, out).output for out in outs}
        assert len(digests) == 1


def test_a_repair_of_nothing_is_the_input_even_without_metadata(
    reference: LoadedReference, fresh: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((fresh / "adapter_config.json").read_bytes())
    save_file(load_file(fresh / WEIGHTS), folder / WEIGHTS)
    report = realign(folder, reference, NlsrParameters(skip_share=1.0), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert report.output == report.input
    assert report.summary.repaired == 0


def test_an_adapter_that_is_the_reference_itself_says_that_nothing_changed(
    reference: LoadedReference, aligned: Path, base: Path, tmp_path: Path
) -> None:
    folder = tiny.save_adapter(base, tmp_path / "zero", seed=5, scale=0.0)
    report = realign(folder, reference, GramParameters(), tmp_path / "out")
    # Its B is zero, so its update is: A changes, the update does not, and that is still reported as an edit of 0.
    assert report.summary.edit == 0.0
    assert report.summary.kept == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}}, {"targets": ["o_proj"]}],
    ids=["rslora", "patterns", "one kind"],
)
def test_other_ranks_scalings_targets_and_dtypes(
    reference: LoadedReference, base: Path, tmp_path: Path, dtype: torch.dtype, config: dict[str, Any]
) -> None:
    folder = tiny.save_adapter(base, tmp_path / "in", rank=3, seed=8, dtype=dtype, **config)
    for number, parameters in enumerate(PARAMETERS[1::2]):
        out = tmp_path / str(number)
        report = realign(folder, reference, parameters, out)
        before, after = load_file(folder / WEIGHTS), load_file(out / WEIGHTS)
        assert {k: (t.shape, t.dtype) for k, t in before.items()} == {k: (t.shape, t.dtype) for k, t in after.items()}
        assert report.summary.repaired == report.summary.modules
        assert report.summary.edit > 0.0


def test_adapters_that_share_only_their_seed_are_not_kin(
    reference: LoadedReference, aligned: Path, base: Path, tmp_path: Path
) -> None:
    """Same seed, so the same A to the last bit; B was trained apart. A comparison of A alone says `continued`."""
    folder = tiny.save_adapter(base, tmp_path / "same-seed", seed=1)

    def other_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.manual_seed(99)
        return {k: torch.randn(t.shape).to(t.dtype) if "lora_B" in k else t for k, t in tensors.items()}

    tiny.change_tensors(folder, other_b)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(load_file(folder / WEIGHTS)[key], load_file(aligned / WEIGHTS)[key])
    with AdapterReader(folder, describe(folder)) as reader:
        kinship = detect_kinship(reader, reference)
    assert kinship.lineage == "fresh"


def test_a_continued_adapter_in_another_basis_is_kin_but_shares_no_factors(
    reference: LoadedReference, continued: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rotated"
    folder.mkdir()
    for path in continued.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())

    def rotate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2)))[0]
        return {
            k: ((turn @ t.float()) if "lora_A" in k else (t.float() @ turn.T)).to(torch.float32)
            for k, t in tensors.items()
        }

    tiny.change_tensors(folder, rotate)
    with AdapterReader(folder, describe(folder)) as reader:
        kinship = detect_kinship(reader, reference)
    assert kinship.lineage == "continued"
    assert not kinship.same_basis
    assert realign(folder, reference, NlsrParameters(), tmp_path / "out").method.resolved == {"form": "neuron"}
    with pytest.raises(Incompatible):
        realign(folder, reference, NlsrParameters(form="factor"), tmp_path / "never")


def test_nothing_is_left_behind_when_it_fails_or_is_stopped(
    reference: LoadedReference, fresh: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "patch" and done == 5:
            raise Stop

    with pytest.raises(Stop):
        realign(fresh, reference, GramParameters(), tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_refused_with_the_tensors_name(reference: LoadedReference, base: Path, tmp_path: Path) -> None:
    folder = tiny.save_adapter(base, tmp_path / "nan", seed=8)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][0, 0] = float("nan")
        return tensors

    tiny.change_tensors(folder, spoil)
    with pytest.raises(InvalidTensors) as caught:
        realign(folder, reference, GramParameters(), tmp_path / "out")
    assert (caught.value.code, caught.value.param) == ("non_finite", name)
    assert not (tmp_path / "out").exists()


def test_values_that_the_dtype_cannot_hold_are_refused(reference: LoadedReference, base: Path, tmp_path: Path) -> None:
    folder = tiny.save_adapter(base, tmp_path / "large", seed=8, dtype=torch.float16)
    tiny.change_config(folder, lora_alpha=1e-6)

    def grow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: (t.float() * (6e4 / t.float().abs().max())).half() for k, t in tensors.items()}

    tiny.change_tensors(folder, grow)
    with pytest.raises(InvalidTensors) as caught:
        realign(folder, reference, NlsrParameters(skip_share=0.0), tmp_path / "out")
    assert caught.value.code == "out_of_range"


def test_companions_travel_and_pickles_do_not(reference: LoadedReference, fresh: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in fresh.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"\x80\x04")
    (folder / "checkpoint-10").mkdir()
    report = realign(folder, reference, GramParameters(), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", WEIGHTS, "tokenizer_config.json"}
    assert report.dropped_files == ["checkpoint-10", "training_args.bin"]


def test_the_engine_knows_neither_web_nor_queue() -> None:
    code = (
        "import sys, safegraft.engine.pipeline, safegraft.engine.build, safegraft.engine.evaluate;"
        "print([n for n in ('fastapi','starlette','celery','kombu','redis','sqlalchemy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def rescaled(source: Path, folder: Path, power: int, *, modules: str = "") -> Path:
    """The same update to the last bit: A·2^power and B·2^-power, in float32, in every rank its own sign."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    (folder / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, tensor in tensors.items():
            rank = tensor.shape[0] if "lora_A" in name else tensor.shape[1]
            powers = torch.tensor([power if i % 2 else -power for i in range(rank)], dtype=torch.float64)
            factor = (2.0**powers)[:, None] if "lora_A" in name else 2.0**-powers
            found[name] = (tensor.double() * factor).float() if modules in name else tensor.float()
        return found

    tiny.change_tensors(folder, change)
    return folder


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: f"{p.type}-{getattr(p, 'form', '')}")
@pytest.mark.parametrize("lineage", ["fresh", "continued"])
def test_how_the_factors_share_the_size_of_the_update_changes_nothing(
    reference: LoadedReference,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    lineage: str,
    parameters: NlsrParameters | GramParameters,
) -> None:
    """Whoever could hide an update from the measurements by rescaling its factors could keep it from being repaired."""
    source: Path = request.getfixturevalue(lineage)
    if lineage == "continued" and isinstance(parameters, NlsrParameters):
        parameters = parameters.model_copy(update={"form": "neuron"})  # a rescaled one is in another basis
    plain = rescaled(source, tmp_path / "plain", 0)
    hidden = rescaled(source, tmp_path / "hidden", 70, modules="layers.0")
    wanted = realign(plain, reference, parameters, tmp_path / "out-plain")
    found = realign(hidden, reference, parameters, tmp_path / "out-hidden")
    assert found.lineage == wanted.lineage == lineage
    for one, other in zip(found.modules, wanted.modules, strict=True):
        assert one.repaired == other.repaired
        assert one.similarity_before == pytest.approx(other.similarity_before, abs=1e-5)
        assert one.similarity_after == pytest.approx(other.similarity_after, abs=1e-4)
        assert one.kept == pytest.approx(other.kept, abs=1e-3)
        assert one.edit == pytest.approx(other.edit, abs=1e-3)
        repaired = delta(tmp_path / "out-plain", one.name)
        assert float((delta(tmp_path / "out-hidden", one.name) - repaired).norm()) <= 1e-3 * float(repaired.norm())


@pytest.mark.parametrize("value", [1e30, 3e38])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: f"{p.type}-{getattr(p, 'form', '')}")
def test_values_beyond_all_reason_are_the_customers_fault(
    reference: LoadedReference, fresh: Path, tmp_path: Path, parameters: NlsrParameters | GramParameters, value: float
) -> None:
    folder = rescaled(fresh, tmp_path / "in", 0)
    tiny.change_tensors(folder, lambda tensors: {k: torch.full_like(t, value) for k, t in tensors.items()})
    try:
        report = realign(folder, reference, parameters, tmp_path / "out")
    except InvalidTensors as error:
        assert error.code == "out_of_range"  # noqa: PT017 - either outcome is right
    else:
        assert all(math.isfinite(line.similarity_before + line.edit + line.kept) for line in report.modules)


def test_a_zero_update_that_is_replaced_is_not_reported_as_kept(
    reference: LoadedReference, base: Path, tmp_path: Path
) -> None:
    folder = tiny.save_adapter(base, tmp_path / "zero", seed=5, scale=0.0)
    report = realign(folder, reference, NlsrParameters(form="neuron", skip_share=0.0), tmp_path / "out")
    assert report.summary.repaired > 0
    assert (report.summary.kept, report.summary.edit) == (0.0, 1.0)


def test_an_unknown_label_and_a_doubtful_method_are_said(
    reference: LoadedReference, fresh: Path, continued: Path, tmp_path: Path
) -> None:
    def codes(folder: Path, parameters: NlsrParameters | GramParameters) -> set[str]:
        return {warning.code for warning in realign(folder, reference, parameters, None).warnings}

    assert "method_may_not_help" in codes(fresh, NlsrParameters())
    assert "method_may_not_help" not in codes(continued, NlsrParameters())
    assert "method_may_not_help" not in codes(fresh, GramParameters())
    assert codes(fresh, GramParameters()) == set()
    other = rescaled(fresh, tmp_path / "other", 0)
    tiny.change_config(other, base_model_name_or_path="somebody/elses-model")
    assert codes(other, GramParameters()) == {"base_label_unknown"}
