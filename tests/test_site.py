"""The pages of the site that are about the whole package: their code runs, their tables hold, nobody is left out."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from test_readme import blocks, in_scratch, rows  # noqa: F401  # a fixture

import lightning_lowbit
from lightning_lowbit import Niti, QuantCallback, convert, lowbit_step
from lightning_lowbit.cli import main
from lightning_lowbit.demos import DigitsCnn, DigitsData
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import Scheme, Site

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUICKSTART, FLOW, ADDING, TUNING = (
    (DOCS / f"{name}.md").read_text() for name in ("quickstart", "how_it_flows", "adding_a_scheme", "fine_tuning")
)


def test_the_quickstart_runs_in_order(in_scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    namespace: dict[str, Any] = {}
    for block in blocks("python", QUICKSTART):
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert printed.count("scheme tqt") == 3
    assert "EQUAL" in printed
    assert set(namespace["quant"].metrics) == {"float", "calibrated", "trained"}


def test_the_file_of_the_quickstart_is_taken_by_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = blocks("yaml", QUICKSTART)
    Path("digits.yaml").write_text(text)
    schemes = []
    for line in "".join(blocks("bash", QUICKSTART)[1:]).splitlines():
        with pytest.raises(SystemExit) as stop:
            main([*line.split()[1:], "--print_config"])
        assert stop.value.code == 0
        schemes.append(yaml.safe_load(capsys.readouterr().out)["quant"]["scheme"])
    four, three, baseline = schemes
    assert (four["init_args"]["bits"], three["init_args"]["bits"], baseline) == (4, 3, "float")


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_the_page_of_fine_tuning_runs_in_order(in_scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    first, rates, layers, callbacks, kept = blocks("python", TUNING)
    namespace: dict[str, Any] = {}
    exec(first, namespace)
    assert re.findall(r"^(\d) bits: ", capsys.readouterr().out, re.M) == ["8", "4", "3", "2"]
    exec(rates, namespace)
    assert capsys.readouterr().out.count("'trained'") == 3
    exec(layers, namespace)
    worst, found = namespace["worst"], namespace["found"]
    assert f"{worst} at 8 bits: " in capsys.readouterr().out
    assert found[worst].effect.kl == max(row.effect.kl for row in found.rows)
    exec(callbacks, namespace)
    assert "sqnr_min" in capsys.readouterr().out
    exec(kept, namespace)
    assert Path("report.html").stat().st_size > 0
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(namespace["again"].eval()(x), namespace["model"].eval()(x))


def test_the_page_of_fine_tuning_quotes_the_refusal_of_a_checkpoint(in_scratch: Path) -> None:  # noqa: F811
    (quoted,) = (text for text in blocks("text", TUNING) if "nothing was loaded" in text)
    torch.save({name: value for name, value in DigitsCnn().state_dict().items() if "bn2" not in name}, "float.pt")
    with pytest.raises(ConfigError, match=re.escape(" ".join(quoted.split()))):
        L.Trainer(callbacks=[QuantCallback(init_from="float.pt")]).validate(DigitsCnn(), DigitsData())


def test_a_scheme_in_one_file_of_its_own_is_used_from_python_and_the_command_line(
    in_scratch: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scheme, use = blocks("python", ADDING)
    (in_scratch / "meanclip.py").write_text(scheme)
    monkeypatch.syspath_prepend(in_scratch)
    try:
        exec(use, {})
        printed = capsys.readouterr().out
        assert "scheme meanclip" in printed
        assert "EQUAL" in printed
        fit, export = "".join(blocks("bash", ADDING)).splitlines()
        with pytest.raises(SystemExit) as stop:
            main(export.split()[1:])
        assert stop.value.code == 0
        assert Path("digits.lowbit").is_file()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*fit.split()[1:], "--print_config"])
        assert stop.value.code == 0
        section = yaml.safe_load(capsys.readouterr().out)["quant"]["scheme"]
        assert section["class_path"] == "meanclip.MeanClip"
        assert section["init_args"]["bits"] == 3
    finally:
        sys.modules.pop("meanclip", None)


def test_tables_of_schemes_and_sites_name_what_there_is() -> None:
    for first, *_ in rows(ADDING, "What a scheme answers"):
        assert hasattr(Scheme, re.findall(r"`(\w+)", first)[0]), first
    for first, *_ in rows(ADDING, "What a site says"):
        for name in re.findall(r"`(\w+)`", first):
            assert name in Site.__dataclass_fields__


def calls_of_a_fit() -> list[tuple[str, str]]:
    """File and name of all functions of the package that a NITI run of two batches enters, in order."""
    package, calls = str(Path(lightning_lowbit.__file__).parent), []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.append((Path(frame.f_code.co_filename).relative_to(package).as_posix(), frame.f_code.co_qualname))

    quant = QuantCallback(Niti(mu=3), calibrate_batches=1, evaluate=False)
    trainer = L.Trainer(
        max_epochs=1, limit_train_batches=2, limit_val_batches=0, callbacks=[quant], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        trainer.fit(DigitsCnn(channels=4), DigitsData(batch_size=16))
    finally:
        sys.setprofile(before)
    return calls


def test_the_journey_is_the_one_that_a_tensor_takes() -> None:
    calls = calls_of_a_fit()
    last = max(at for at, (_, name) in enumerate(calls) if name == "begin_batch")
    batch = [heading for heading in re.findall(r"\n## (.*)", FLOW) if heading.startswith("Every")]
    for headings, part in ((["Once a run"], calls), (batch, calls[last:])):
        hops = [tuple(cell.strip("`") for cell in row[:2]) for heading in headings for row in rows(FLOW, heading)]
        assert len(hops) > 10
        missing = [hop for hop in hops if hop not in part]
        assert not missing
        order = [part.index(hop) for hop in hops]
        assert order == sorted(order), [hop for a, b, hop in zip(order, order[1:], hops[1:], strict=False) if b < a]


@pytest.mark.parametrize("scheme", ["tqt", "f8net", "jacinto", "bnn", "wageubn"])
def test_other_schemes_leave_the_road_where_the_page_says(scheme: str) -> None:
    net, x = DigitsCnn(channels=4), torch.rand(8, 1, 8, 8)
    convert(net, scheme, x)
    optimizer = torch.optim.SGD(net.train().parameters(), 0.01)
    package, calls = str(Path(lightning_lowbit.__file__).parent), set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.add((Path(frame.f_code.co_filename).relative_to(package).as_posix(), frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        net(x).square().mean().backward()
        lowbit_step(net, optimizer)
    finally:
        sys.setprofile(before)
    hops = [row for row in rows(FLOW, "Where other schemes leave this road") if row[0] == scheme]
    assert len(hops) == 2
    for _, file, function, _ in hops:
        assert (file.strip("`"), function.strip("`")) in calls


def test_every_table_of_figures_has_a_command_that_is_there() -> None:
    text = (DOCS / "benchmarks.md").read_text()
    for section in text.split("\n## ")[1:]:
        assert "python " in section.partition("\n|")[0] or section.startswith("On other pages"), section[:40]
    pages = [path.read_text() for path in (ROOT / "README.md", *DOCS.rglob("*.md"))]
    named = {name for page in pages for name in re.findall(r"\b(?:benchmarks|examples)/[\w/]+\.(?:py|yaml)", page)}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    programs = {path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    assert programs - set(re.findall(r"benchmarks/(\w+\.py)", text)) == set()


def test_every_page_has_a_place_in_the_site() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry if isinstance(entry, list) else entry.values()) for page in pages(part)]

    assert sorted(pages(config["nav"])) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_names_of_the_glossary_are_used() -> None:
    names = {name for row in glossary_rows() for name in re.findall(r"`([a-z_]\w+)`", row[0])}
    assert len(names) > 40
    source = "".join(path.read_text() for path in Path(lightning_lowbit.__file__).parent.rglob("*.py"))
    words = set(re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", source).lower()))
    assert {name for name in names if name not in source and not set(name.split("_")) <= words} == set()


def glossary_rows() -> list[list[str]]:
    text = (DOCS / "glossary.md").read_text()
    return [row for heading in re.findall(r"\n## (.*)", text) for row in rows(text, heading)]


def test_the_reference_shows_every_public_name_from_where_it_is_defined() -> None:
    shown = dict(
        reversed(line.rsplit(".", 1)) for line in re.findall(r"^::: (.*)", (DOCS / "reference.md").read_text(), re.M)
    )
    made_by_a_function = {"LowBitStrategy", "LowBitDDPStrategy"}  # of a namespace: strategies_of has their options
    public = set(lightning_lowbit.__all__) - made_by_a_function
    assert public <= set(shown)
    assert {name: shown[name] for name in public} == {
        name: f"lightning_lowbit.{lightning_lowbit._HOME[name]}" for name in public
    }
