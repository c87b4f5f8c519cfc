"""Score → select → patch → write, on folders."""

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safegraft.adapter import LoraModule, describe
from safegraft.contracts.methods import (
    AntidoteParameters,
    AutoParameters,
    GramParameters,
    NlsrParameters,
    NoneParameters,
    SafeLoraParameters,
    SafetyLockParameters,
)
from safegraft.contracts.report import Report, Warning
from safegraft.engine import measure, parallel, pipeline
from safegraft.engine.adapter import AdapterReader
from safegraft.engine.measure import Measured
from safegraft.engine.methods.base import Kinship, Module
from safegraft.engine.pipeline import _of_strengths, detect_kinship, realign
from safegraft.engine.reference import LoadedReference
from safegraft.errors import Incompatible, InvalidAdapter, InvalidParameter, InvalidTensors
from safegraft.report import to_json
from tests import tiny

WEIGHTS = "adapter_model.safetensors"
PARAMETERS: list[Any] = [
    NlsrParameters(),
    NlsrParameters(form="neuron", skip_share=0.0),
    NlsrParameters(selection="bernoulli", seed=3),
    GramParameters(),
    SafeLoraParameters(threshold=1.0),
    AntidoteParameters(),
    SafetyLockParameters(heads=3),
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


def test_a_repair_that_would_change_no_update_is_an_error_with_its_cause(
    reference: LoadedReference, aligned: Path, base: Path, tmp_path: Path
) -> None:
    folder = tiny.save_adapter(base, tmp_path / "zero", seed=5, scale=0.0)
    # Its B is zero, so its update is: A would change, the update would not.
    with pytest.raises(Incompatible) as caught:
        realign(folder, reference, GramParameters(amplification=0.0), tmp_path / "out")
    assert caught.value.code == "repair_without_effect"
    assert "update is zero" in str(caught.value)
    assert not (tmp_path / "out").exists()
    report = realign(folder, reference, GramParameters(), None)
    assert (report.summary.edit, report.summary.kept) == (0.0, 1.0)


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
    assert realign(folder, reference, NlsrParameters(), tmp_path / "out").method.resolved["form"] == "neuron"
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


def test_names_of_dropped_files_can_be_written_whatever_they_are(
    reference: LoadedReference, fresh: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(fresh, folder)
    for name in (b"tok\xff.bin", b"a\x1b[2J\n.txt", "ü.txt".encode()):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"")
    report = realign(folder, reference, GramParameters(), None)
    assert report.dropped_files == ["a\\x1b[2J\\n.txt", "tok\\xff.bin", "ü.txt"]
    assert Report.model_validate_json(to_json(report)).dropped_files == report.dropped_files


def test_what_a_folder_may_not_hold_is_refused_before_any_work(
    reference: LoadedReference, fresh: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(fresh, folder)
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    stages: list[str] = []
    for out in (tmp_path / "out", None):
        with pytest.raises(InvalidAdapter) as caught:
            realign(folder, reference, GramParameters(), out, progress=lambda stage, done, total: stages.append(stage))
        assert (caught.value.code, caught.value.param) == ("link_leaves_folder", "tokenizer.json")
    assert stages == []
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_snapshot_of_links_gives_files(reference: LoadedReference, fresh: Path, tmp_path: Path) -> None:
    blobs, snapshot = (tmp_path / "models--a--b" / name for name in ("blobs", "snapshots/r"))
    shutil.copytree(fresh, blobs)
    (blobs / "tokenizer_config.json").write_text("{}")
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    realign(snapshot, reference, GramParameters(), tmp_path / "out")
    found = list((tmp_path / "out").iterdir())
    assert {path.name for path in found} == {"adapter_config.json", WEIGHTS, "tokenizer_config.json"}
    assert not any(path.is_symlink() for path in found)


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


def test_of_many_modules_some_tell_the_lineage_and_all_where_these_do_not(
    reference: LoadedReference, continued: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(folder: Path) -> tuple[Kinship, int]:
        totals: list[int] = []
        with AdapterReader(folder, describe(folder)) as reader:
            read, module = [], reader.module

            def counted(item: LoraModule) -> Module:
                read.append(item.name)
                return module(item)

            monkeypatch.setattr(reader, "module", counted)
            kinship = detect_kinship(reader, reference, lambda stage, done, total: totals.append(total))
        assert len(set(read)) == len(read)
        return kinship, len(read)

    modules = len(describe(fresh).modules)
    everything = {folder: compared(folder)[0] for folder in (continued, fresh)}
    monkeypatch.setattr(pipeline, "COMPARED", 3)
    for folder in (continued, fresh):
        kinship, count = compared(folder)
        assert count == 3
        assert (kinship.lineage, kinship.same_basis) == (everything[folder].lineage, everything[folder].same_basis)
    monkeypatch.setattr(pipeline, "UNCLEAR", 2.0)
    for folder in (continued, fresh):
        kinship, count = compared(folder)
        assert count == modules
        assert kinship.lineage == everything[folder].lineage
        assert kinship.cosine == pytest.approx(everything[folder].cosine, abs=1e-6)


@pytest.mark.parametrize("kinds", [2, 4, 7])
@pytest.mark.parametrize("layers", [12, 16, 24, 32, 48, 64, 80, 126])
def test_the_modules_that_are_compared_are_of_all_kinds_and_depths(layers: int, kinds: int) -> None:
    names = [f"model.layers.{layer}.mlp.kind{kind}_proj" for layer in range(layers) for kind in range(kinds)]
    wanted = min(pipeline.COMPARED, len(names))
    chosen = pipeline.spread_evenly(names, wanted)
    assert len(chosen) == wanted
    shares = [sum(f"kind{kind}_" in name for name in chosen) / wanted for kind in range(kinds)]
    assert min(shares) > 0.8 / kinds
    depths = {int(name.split(".")[2]) for name in chosen}
    assert len(depths) >= min(layers, wanted // kinds) // 2
    assert {4 * depth // layers for depth in depths} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "method", [SafeLoraParameters(threshold=1.0), GramParameters(), NlsrParameters(skip_share=0.0)]
)
def test_what_changed_does_not_depend_on_the_units_of_the_factors(
    reference: LoadedReference, fresh: Path, tmp_path: Path, method: Any
) -> None:
    """A·2²⁰ and B·2⁻²⁰ are the same update; before and after may be balanced by other powers of two."""
    other = tmp_path / "other"
    shutil.copytree(fresh, other)
    tiny.change_tensors(
        other, lambda tensors: {k: t * (2.0**20 if "lora_A" in k else 2.0**-20) for k, t in tensors.items()}
    )
    one = realign(fresh, reference, method, tmp_path / "one")
    two = realign(other, reference, method, tmp_path / "two")
    assert two.summary.edit == pytest.approx(one.summary.edit, rel=1e-3)
    assert two.summary.kept == pytest.approx(one.summary.kept, rel=1e-3, abs=1e-4)
    for mine, theirs in zip(one.modules, two.modules, strict=True):
        assert theirs.edit == pytest.approx(mine.edit, rel=1e-3), mine.name


def test_what_is_nearly_deleted_or_outgrown_is_said(
    reference: LoadedReference, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def codes(name: str, parameters: Any) -> set[str]:
        return {warning.code for warning in realign(fresh, reference, parameters, tmp_path / name).warnings}

    assert not {"little_left", "much_added"} & codes("gram", GramParameters())
    deleted = [Measured(line, 1.0, 0.01, 0.98) for line in realign(fresh, reference, GramParameters(), None).modules]
    deleted = [replace(item, line=item.line.model_copy(update={"repaired": True})) for item in deleted]
    assert (found := measure._little_left(deleted)) is not None
    assert "1.0\u00a0% is left" in found.message
    assert measure._overwhelmed(deleted) is None
    nothing = [replace(item, energy=0.0, overlap=0.0) for item in deleted]
    assert measure._little_left(nothing) is None, "a zero update that was replaced"
    lock = SafetyLockParameters(heads=3, strength=100.0)
    monkeypatch.setattr(measure, "MUCH", 0.01)
    assert {"much_added", "method_may_not_help"} <= codes("lock", lock)
    assert not {"much_added", "method_may_not_help"} & codes("weak", SafetyLockParameters(heads=3, strength=0.001))
    monkeypatch.setattr(measure, "LITTLE", 2.0)
    assert "little_left" in codes("little", GramParameters())
    monkeypatch.undo()
    outgrown = [replace(item, overlap=1.0, difference=100.0) for item in deleted]
    assert measure._little_left(outgrown) is None
    assert (found := measure._overwhelmed(outgrown)) is not None
    assert "10 times its own size" in found.message


def test_an_unknown_label_and_a_doubtful_method_are_said(
    reference: LoadedReference, fresh: Path, continued: Path, tmp_path: Path
) -> None:
    def codes(folder: Path, parameters: NlsrParameters | GramParameters) -> set[str]:
        return {warning.code for warning in realign(folder, reference, parameters, None).warnings}

    assert "method_may_not_help" in codes(fresh, NlsrParameters())
    assert "method_may_not_help" in codes(continued, NlsrParameters())
    assert "method_may_not_help" not in codes(continued, NlsrParameters(skip_share=0.0))
    assert "method_may_not_help" not in codes(fresh, GramParameters())
    assert codes(fresh, GramParameters()) == set()
    other = rescaled(fresh, tmp_path / "other", 0)
    tiny.change_config(other, base_model_name_or_path="somebody/elses-model")
    assert codes(other, GramParameters()) == {"base_label_unknown"}


def test_a_label_that_the_reference_does_not_know_makes_an_unrelated_adapter_foreign(
    reference: LoadedReference, fresh: Path, continued: Path, tmp_path: Path
) -> None:
    def relabelled(folder: Path, name: str) -> str:
        other = tmp_path / name
        other.mkdir()
        for path in folder.iterdir():
            (other / path.name).write_bytes(path.read_bytes())
        tiny.change_config(other, base_model_name_or_path="somebody/else")
        report = realign(other, reference, GramParameters(), None)
        assert "base_label_unknown" in {warning.code for warning in report.warnings}
        return report.lineage

    assert realign(fresh, reference, GramParameters(), None).lineage == "fresh"
    assert relabelled(fresh, "fresh") == "foreign"
    # What an adapter contains tells more than its label.
    assert relabelled(continued, "continued") == "continued"


def test_without_a_method_the_recommended_one_runs_and_the_report_says_why(
    reference: LoadedReference, fresh: Path, tmp_path: Path
) -> None:
    chosen = realign(fresh, reference, AutoParameters(), tmp_path / "auto")
    named = realign(fresh, reference, GramParameters(), tmp_path / "gram")
    assert chosen.method.parameters == GramParameters()
    assert chosen.output == named.output
    assert chosen.recommendation.method == "gram"
    assert "fresh" in chosen.recommendation.reason
    other = realign(fresh, reference, NlsrParameters(), tmp_path / "nlsr")
    assert other.recommendation == chosen.recommendation


def test_none_returns_the_input_s_bytes(reference: LoadedReference, fresh: Path, tmp_path: Path) -> None:
    report = realign(fresh, reference, NoneParameters(), tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (fresh / path.name).read_bytes()
    assert report.output == report.input


def test_several_strengths_are_single_runs_side_by_side(
    reference: LoadedReference, fresh: Path, tmp_path: Path
) -> None:
    strengths = [1.0, 0.1, 0.3]
    report = realign(fresh, reference, GramParameters(), tmp_path / "out", strengths=strengths)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.1", "0.3", "1"]
    assert report.strength_parameter == "general_weight"
    assert [variant.strength for variant in report.variants] == strengths
    for variant in report.variants:
        single = realign(
            fresh, reference, GramParameters(general_weight=variant.strength), tmp_path / f"single-{variant.strength}"
        )
        assert variant.output == single.output
        assert variant.summary == single.summary
    # The modules are those of the first.
    assert report.method.parameters == GramParameters(general_weight=1.0)
    assert report.output == report.variants[0].output
    edits = [variant.summary.edit for variant in sorted(report.variants, key=lambda variant: variant.strength)]
    assert edits == sorted(edits, reverse=True)


@pytest.mark.parametrize(
    ("parameters", "strengths"),
    [
        (GramParameters(), [0.3, 0.3]),
        (GramParameters(), [0.0]),
        (GramParameters(), [1.0 + i for i in range(17)]),
        (NlsrParameters(), [0.5, 1.5]),
        (NoneParameters(), [0.5]),
    ],
)
def test_strengths_that_cannot_be_are_refused(
    reference: LoadedReference, fresh: Path, tmp_path: Path, parameters: Any, strengths: list[float]
) -> None:
    with pytest.raises(InvalidParameter) as caught:
        realign(fresh, reference, parameters, tmp_path / "out", strengths=strengths)
    assert caught.value.code == "bad_strengths"
    assert list(tmp_path.iterdir()) == []


def test_a_side_car_lies_beside_the_adapter_which_stays_as_it_was(
    reference: LoadedReference, fresh: Path, tmp_path: Path
) -> None:
    report = realign(fresh, reference, SafetyLockParameters(heads=3, output="side_car"), tmp_path / "out")
    assert report.output == report.input
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.side_car"]
    biases = load_file(tmp_path / "out.side_car" / "side_car.safetensors")
    assert {name.rpartition(".")[2] for name in biases} == {"bias", "displacement"}
    assert "side_car" in {warning.code for warning in report.warnings}


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: f"{p.type}-{getattr(p, 'form', '')}")
def test_threads_do_not_change_a_single_byte(
    reference: LoadedReference, continued: Path, tmp_path: Path, parameters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Modules this small are otherwise worked on by one.
    monkeypatch.setattr(parallel, "HELD", 1e-9)
    before = torch.get_num_threads()
    outputs = set()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            report = realign(continued, reference, parameters, tmp_path / f"{threads}")
            outputs.add((report.output, report.summary.model_dump_json()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(outputs) == 1


def test_modules_beyond_the_aligned_adapter_s_reach_are_left_alone(
    base: Path, aligned: Path, bundle: Path, fresh: Path, tmp_path: Path
) -> None:
    from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
    from safegraft.engine.bundle import BuildSettings

    narrow = tiny.save_adapter(base, tmp_path / "narrow", targets=["q_proj"])
    build_reference(
        tmp_path / "reference",
        sources=BuildSources(aligned=narrow, base=base),
        prompts=BuildPrompts(safety=tiny.HARMFUL),
        settings=BuildSettings(),
    )
    report = realign(
        fresh, LoadedReference(tmp_path / "reference"), SafeLoraParameters(threshold=1.0), tmp_path / "out"
    )
    assert {line.kind for line in report.modules if line.repaired} == {"q_proj"}
    assert {line.similarity_before for line in report.modules if line.kind != "q_proj"} == {1.0}
    assert "modules_not_reached" in {warning.code for warning in report.warnings}


def test_auto_is_refused_where_nothing_would_serve(base: Path, tmp_path: Path) -> None:
    """Not taken for `none`: unrepaired bytes must not pass for a patched adapter."""
    from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
    from safegraft.engine.bundle import BuildSettings

    build_reference(
        tmp_path / "reference",
        sources=BuildSources(aligned=base),
        prompts=BuildPrompts(safety=tiny.HARMFUL),
        settings=BuildSettings(),
    )
    narrow = tiny.save_adapter(base, tmp_path / "narrow", targets=["q_proj"])
    known = LoadedReference(tmp_path / "reference")
    with pytest.raises(Incompatible) as caught:
        realign(narrow, known, AutoParameters(), tmp_path / "out")
    assert caught.value.code == "no_method"
    assert not (tmp_path / "out").exists()
    assert realign(narrow, known, NoneParameters(), tmp_path / "none").recommendation.method == "none"


def test_alignment_that_a_continued_adapter_lost_with_its_modules_is_told(
    reference: LoadedReference, continued: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    for path in continued.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tiny.change_tensors(folder, lambda tensors: {k: t for k, t in tensors.items() if "layers.0" in k})
    report = realign(folder, reference, GramParameters(), None)
    assert report.lineage == "continued"
    told = {warning.code: warning.message for warning in report.warnings}
    assert "7 modules" in told["alignment_incomplete"]


def test_a_module_that_only_grows_by_zeros_is_not_called_repaired(
    base: Path, aligned: Path, continued: Path, tmp_path: Path
) -> None:
    """Of the exact rank that others need; its own update is zero, so the repair leaves it as it was."""
    from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
    from safegraft.engine.bundle import BuildSettings

    narrow = tmp_path / "narrow"
    narrow.mkdir()
    for path in aligned.iterdir():
        (narrow / path.name).write_bytes(path.read_bytes())
    tiny.change_tensors(narrow, lambda tensors: {k: t for k, t in tensors.items() if "layers.0" in k})
    tiny.change_config(narrow, layers_to_transform=[0])
    build_reference(
        tmp_path / "reference",
        sources=BuildSources(base=base, aligned=narrow, labels=["tiny-llama"]),
        prompts=BuildPrompts(safety=tiny.HARMFUL, general=tiny.GENERAL),
        settings=BuildSettings(),
    )
    folder = tmp_path / "in"
    folder.mkdir()
    for path in continued.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    still = "layers.1.mlp.up_proj.lora_A"
    tiny.change_tensors(folder, lambda tensors: {k: t * 0 if still in k else t for k, t in tensors.items()})
    report = realign(
        folder, LoadedReference(tmp_path / "reference"), GramParameters(), tmp_path / "out", output_rank="exact"
    )
    repaired = {line.name: line.repaired for line in report.modules}
    assert not repaired["model.layers.1.mlp.up_proj"]
    assert repaired["model.layers.0.mlp.up_proj"]


def test_pruning_nothing_is_no_repair(reference: LoadedReference, fresh: Path, tmp_path: Path) -> None:
    """The same update in the basis of its SVD would have other bytes."""
    with pytest.raises(Incompatible) as caught:
        realign(fresh, reference, AntidoteParameters(density=1e-4), tmp_path / "out")
    assert caught.value.code == "repair_without_effect"


def test_the_report_s_digests_are_those_of_the_files(reference: LoadedReference, fresh: Path, tmp_path: Path) -> None:
    import hashlib

    def sha(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    parameters = SafetyLockParameters(heads=3, output="side_car")
    report = realign(fresh, reference, parameters, tmp_path / "out", strengths=[2.0, 6.0])
    beside = tmp_path / "out.side_car"
    assert report.side_cars == {path.name: sha(path) for path in beside.iterdir()}
    assert list(report.side_cars) == ["2.safetensors", "6.safetensors"]
    biased = realign(fresh, reference, SafetyLockParameters(heads=3, output="lora_bias"), tmp_path / "biased")
    assert biased.output is not None
    assert biased.output.config_sha256 == sha(tmp_path / "biased" / "adapter_config.json")
    assert biased.output.config_sha256 != biased.input.config_sha256 == sha(fresh / "adapter_config.json")
    # A folder that is in the way is told before anything is written.
    (tmp_path / "again.side_car").mkdir()
    with pytest.raises(FileExistsError):
        realign(fresh, reference, parameters, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_zero_and_minus_zero_are_one_strength(reference: LoadedReference, fresh: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter):
        realign(fresh, reference, SafeLoraParameters(), tmp_path / "out", strengths=[0.0, -0.0])


def test_what_avoids_safety_inputs_is_said(reference: LoadedReference, fresh: Path, tmp_path: Path) -> None:
    """Whoever knows the reference can train outside of it; nothing honest comes near."""

    def codes(report: Report) -> set[str]:
        return {warning.code for warning in report.warnings}

    thorough = GramParameters(general_weight=0.01)
    assert "safety_inputs_avoided" not in codes(realign(fresh, reference, thorough, tmp_path / "once"))
    again = realign(tmp_path / "once", reference, thorough, tmp_path / "twice")
    assert again.summary.similarity_before.median > measure.AVOIDING
    assert "safety_inputs_avoided" in codes(again)
    assert "safety_inputs_avoided" in codes(realign(tmp_path / "once", reference, thorough, None)), "before a repair"
    other = realign(tmp_path / "once", reference, NlsrParameters(skip_share=0.0), tmp_path / "nlsr")
    assert "safety_inputs_avoided" not in codes(other), "a cosine says nothing of it"


def test_a_repair_that_leaves_most_modules_as_they_leaned_is_said(
    reference: LoadedReference, fresh: Path, tmp_path: Path
) -> None:
    def told(weight: float, out: Path | None) -> list[str]:
        report = realign(fresh, reference, GramParameters(general_weight=weight), out)
        even = report.method.break_even
        assert even is not None
        before = sum(line.similarity_before < even for line in report.modules)
        after = sum(line.similarity_after < even for line in report.modules)
        assert before
        found = [item.message for item in report.warnings if item.code == "repair_fell_short"]
        assert bool(found) == (out is not None and 2 * after > before)
        for message in found:
            assert f"{before} modules acted" in message, "the headline's own figures"
            assert f"after it {after} do" in message
        return found

    (message,) = told(1000.0, tmp_path / "weak")
    assert "the strength is too weak" in message
    assert told(0.01, tmp_path / "strong") == []
    assert told(1000.0, None) == [], "nothing was repaired, nor meant to be"
    control = realign(fresh, reference, NoneParameters(), tmp_path / "control")
    assert "repair_fell_short" not in {warning.code for warning in control.warnings}


def test_a_strength_at_which_refusals_stay_away_is_warned_of_also_where_no_module_leans(
    reference: LoadedReference, fresh: Path, tmp_path: Path
) -> None:
    def codes(weight: float, out: Path | None) -> set[str]:
        report = realign(fresh, reference, GramParameters(general_weight=weight), out)
        return {warning.code for warning in report.warnings}

    assert "weak_strength" in codes(0.5, tmp_path / "half")
    assert "weak_strength" not in codes(GramParameters().general_weight, tmp_path / "default")
    assert "weak_strength" not in codes(10.0, None), "nothing was repaired, nor meant to be"


def test_of_several_strengths_a_warning_names_those_of_which_it_holds(
    reference: LoadedReference, fresh: Path, tmp_path: Path
) -> None:
    def told(*strengths: float) -> str | None:
        out = tmp_path / "-".join(map(str, strengths))
        report = realign(fresh, reference, GramParameters(), out, strengths=strengths)
        return next((item.message for item in report.warnings if item.code == "repair_fell_short"), None)

    alone = told(1000.0)
    assert alone is not None
    assert alone.startswith("Before the repair")
    assert told(0.01, 1000.0) == f"At general_weight 1000: {alone}"
    assert told(0.01) is None
    assert told(1000.0, 0.01, 999.0) == f"At general_weight 1000 and 999: {alone}"
    several = realign(fresh, reference, GramParameters(), tmp_path / "weak", strengths=(0.2, 0.5, 1.0, 3.0))
    (weak,) = [item.message for item in several.warnings if item.code == "weak_strength"]
    assert weak.startswith("At general_weight 0.5, 1 and 3: So weak a repair")


def test_a_warning_with_other_figures_at_other_strengths_says_so() -> None:
    def held(strength: float, message: str) -> tuple[Any, Warning]:
        return SimpleNamespace(strength=strength, method=GramParameters()), Warning(code="w", message=message)

    found = _of_strengths([held(1.0, "a"), held(2.0, "b"), held(3.0, "a")], everywhere=True)
    assert found.message == "At general_weight 1 and 3 (and, with other figures, at 2): a"
    assert _of_strengths([held(1.0, "a"), held(2.0, "a")], everywhere=True).message == "a"


def test_an_update_of_nothing_avoids_nothing(reference: LoadedReference, fresh: Path, tmp_path: Path) -> None:
    shutil.copytree(fresh, tmp_path / "zero")
    tiny.change_tensors(
        tmp_path / "zero", lambda tensors: {name: t * ("lora_A" in name) for name, t in tensors.items()}
    )
    report = realign(tmp_path / "zero", reference, GramParameters(), None)
    assert report.summary.similarity_before.median == 1.0
    assert "safety_inputs_avoided" not in {warning.code for warning in report.warnings}


def test_the_page_explains_every_warning() -> None:
    root = Path(__file__).parent.parent.parent
    told = re.findall(r'Warning\(\s*code="(\w+)"', (root / "safegraft" / "engine" / "measure.py").read_text("utf-8"))
    page = (root / "docs" / "report.md").read_text("utf-8").partition("## Warnings")[2].partition("\n## ")[0]
    assert sorted(told) == sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
