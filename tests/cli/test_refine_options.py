"""Options of refine that others feed: the doctor's list, and loggers; and the page at the end."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.reporting import Reporter
from mim_refiner.training.recipes import REFINE_RECIPES
from mim_refiner.training.resolve import START_SHARE, start_share


def test_a_list_of_the_doctor_and_a_logger(cli, mae, shapes, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    listed, out = tmp_path / "exclude.txt", tmp_path / "run"
    listed.write_text("circle/circle-00.png\tconstant\n")
    arguments = [*cli.refine(shapes, mae.export, out), "--exclude", str(listed), "--log", "tensorboard"]
    outcome = cli.call(*arguments)
    assert outcome.code == 0, outcome.err
    assert f"{cli.images - 1} images" in outcome.err
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["exclude"] == str(listed)
    assert list((out / "logs" / "tensorboard").glob("events.*"))
    again = cli.call(*cli.refine(shapes, mae.export, out))  # without the list: other data
    assert again.code == 2
    assert "another recipe" in again.err


def test_the_run_ends_in_a_page_with_pictures(refined):
    gallery = json.loads((refined.path / "evaluation" / "gallery.json").read_text())
    assert gallery["models"].keys() == {"before", "after"}
    assert gallery["class_names"] == ["circle", "square", "triangle"]
    page = (refined.path / "report.html").read_text()
    assert "circle-00.png" in page
    assert f"report: {refined.path / 'report.html'}" in refined.outcome.err


def test_a_report_that_cannot_be_written_costs_no_run(refined, tmp_path, monkeypatch):
    from mim_refiner.commands import report

    said: list[str] = []

    class Listener(Reporter):
        def message(self, text):
            said.append(text)

    monkeypatch.setattr(report, "write_report", lambda runs: 1 / 0)
    report.finish_with_report(tmp_path, Listener())
    assert len(said) == 1
    assert said[0].startswith(
        "warning: no report was written (division by zero); the run is complete, try: mim-refiner report"
    )


def test_a_logger_that_is_unknown_stops_before_anything_is_written(cli, mae, shapes, tmp_path):
    outcome = cli.call(*cli.refine(shapes, mae.export, tmp_path / "run"), "--log", "wanbd", "--quiet")
    assert outcome.code == 2
    assert "did you mean 'wandb'?" in outcome.err
    assert not (tmp_path / "run").exists()


def stages_of(run):
    """Exported weights, those of the last checkpoint, and their average, of the encoder alone."""
    last = run / "checkpoints" / "last"
    raw, average = load_file(last / "model.safetensors"), load_file(last / "ema.safetensors")
    return (
        load_file(run / "export" / "model.safetensors"),
        {name.removeprefix("backbone.model."): value for name, value in raw.items() if name.startswith("backbone.")},
        {name.removeprefix("module.model."): value for name, value in average.items()},
    )


def test_the_average_is_exported_where_the_run_is_long_enough_and_both_are_measured(cli, mae, shapes, tmp_path):
    out = tmp_path / "run"
    words = ("export_weights=auto", "ema_decay=0.5")
    first = cli.call(*cli.refine(shapes, mae.export, out, *words), "--json")
    assert first.code == 0, first.err
    summary = json.loads(first.out)
    assert summary["weights"]["exported"] == "average"
    assert summary["weights"]["both_measured"]
    assert summary["weights"]["start_share"] < 0.1
    card = (out / "export" / "README.md").read_text()
    assert "| Exported weights | average (export_weights=ema); " in card
    assert yaml.safe_load((out / "recipe.yaml").read_text())["export_weights"] == "ema"
    assert summary["after"].keys() == summary["raw"].keys()
    assert summary["verdict"]["raw"].keys() >= {"verdict", "reason"}
    exported, raw, average = stages_of(out)
    name = "blocks.2.mlp.fc1.weight"
    assert torch.equal(exported[name], average[name])
    assert not torch.equal(raw[name], average[name])
    # the raw ones are one setting away, also in a finished run
    again = cli.call(*cli.refine(shapes, mae.export, out, "export_weights=model", "ema_decay=0.5"), "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["weights"]["exported"] == "raw"
    assert json.loads(again.out)["after"] == summary["raw"]
    assert torch.equal(stages_of(out)[0][name], raw[name])


def test_a_run_too_short_for_its_average_exports_the_raw_weights_and_says_so(cli, mae, shapes, tmp_path):
    outcome = cli.call(*cli.refine(shapes, mae.export, tmp_path / "run", "export_weights=auto", "ema_decay=0.9999"))
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["weights"]["exported"] == "raw"
    assert "raw" not in summary
    assert "weights exported: raw (export_weights=model); 99." in outcome.out
    exported, raw, _ = stages_of(tmp_path / "run")
    assert torch.equal(exported["blocks.2.mlp.fc1.weight"], raw["blocks.2.mlp.fc1.weight"])


def test_the_papers_recipes_export_the_average():
    """The published weights are averages (decay 0.9999)."""
    papers = {name: recipe() for name, recipe in REFINE_RECIPES.items() if name not in ("tiny", "demo")}
    assert {recipe.export_weights for recipe in papers.values()} == {"auto"}
    for name, recipe in papers.items():
        assert start_share(recipe, steps_per_epoch=1_281_167 // recipe.batch_size) <= START_SHARE, name


def test_a_cuda_graph_on_a_cpu_is_refused_in_one_line(mae, unlabelled, cli, tmp_path):
    for value in ("on", "true"):
        outcome = cli.call(*cli.refine(unlabelled, mae.export, tmp_path / "run", f"cuda_graphs={value}"), "--quiet")
        assert outcome.code == 2
        assert outcome.err == "error: cuda_graphs=on: the device is cpu, and graphs are CUDA's; set it to off\n"
    assert not (tmp_path / "run").exists()


def test_images_on_the_device_refine_as_others_do(mae, unlabelled, cli, tmp_path):
    for setting in ("on", "off"):
        words = cli.refine(unlabelled, mae.export, tmp_path / setting, f"images_on_device={setting}")
        outcome = cli.call(*words)
        assert outcome.code == 0, outcome.err
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("on", "off")]
    first = [json.loads(log[0])["loss"] for log in logs]
    assert first[0] == pytest.approx(first[1], rel=1e-3)  # crops differ by roundings


def test_anchor_adapter_guidance_and_temperatures_in_one_run(cli, mae, shapes, tmp_path):
    out = tmp_path / "run"
    chosen = ("anchor.weight=10", "adapter=lora", "lora.rank=2", "guidance=restrict",
              "sweep.temperatures=[0.1,0.5]", "sweep.poolings=[mean,cls]")  # fmt: skip
    arguments = [*cli.refine(shapes, mae.export, out), *(word for each in chosen for word in ("--set", each))]
    outcome = cli.call(*arguments)
    assert outcome.code == 0, outcome.err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["dense"]["measure"] == "patch_agreement"
    assert summary["verdict"]["dense"] == summary["dense"]["reason"]
    assert summary["dense"]["reason"] in (out / "report.html").read_text()
    sweep = summary["head_sweep"]
    assert json.loads((out / "head_sweep.json").read_text()) == sweep
    assert yaml.safe_load((out / "recipe.yaml").read_text())["heads"]["temperature"] == sweep["chosen"]["temperature"]
    assert len(sweep["values"]) == 4
    assert sweep["reason"] in outcome.err
    for line in (f"patch features: {summary['dense']['reason']}", f"head sweep: {sweep['reason']}"):
        assert line in outcome.out.splitlines()
    assert not [line for line in outcome.out.splitlines() if line.startswith(("dense:", "dense.", "head sweep."))]
    assert "adapter: LoRA of rank 2" in outcome.err
    merged = load_backbone(str(out / "export")).model.state_dict()
    for name, tensor in load_backbone(str(out / "adapter")).model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6, msg=name)
    assert cli.call(*arguments).code == 0  # a finished run goes on with the temperature it has
    (out / "head_sweep.json").unlink()
    stored = yaml.safe_load((out / "recipe.yaml").read_text())
    stored["warmup"]["layer_decay"] = 0.5  # of another release
    del stored["sweep"]["poolings"]
    (out / "recipe.yaml").write_text(yaml.safe_dump(stored))
    old = cli.call(*arguments)
    assert old.code == 2
    assert (
        "another recipe (sweep.poolings: no such setting there, ['mean', 'cls'] now; warmup.layer_decay: 0.5 there, no "
        "such setting now); use another --out, or --overwrite to start anew"
    ) in old.err
    assert "sweep of heads" in outcome.err
    assert "sweep of heads" not in old.err  # nor is anything else done first


def test_guidance_without_labels_stops_before_anything_is_written(cli, mae, unlabelled, tmp_path):
    arguments = [*cli.refine(unlabelled, mae.export, tmp_path / "run"), "--set", "guidance=prefer"]
    outcome = cli.call(*arguments)
    assert outcome.code == 2
    assert "guidance=prefer needs some; give labelled images, or leave guidance out" in outcome.err
    assert " images): no labels (" in outcome.err.splitlines()[-1]  # said once
    assert not (tmp_path / "run").exists()


def test_a_run_may_end_after_the_warm_up_with_its_forecast(cli, mae, shapes, tmp_path):
    out = tmp_path / "run"
    settings = ("refinement.epochs=0", "warmup.epochs=2", "knn_every=5")
    planned = cli.call(*cli.refine(shapes, mae.export, out, *settings), "--plan", "--json")
    assert planned.code == 0, planned.err
    assert "forecast" not in json.loads(planned.out)["plan"]  # nothing is refined
    outcome = cli.call(*cli.refine(shapes, mae.export, out, *settings))
    assert outcome.code == 0, outcome.err
    [told] = [line for line in outcome.err.splitlines() if "forecast: " in line]
    summary = json.loads((out / "summary.json").read_text())
    found = summary["forecast"]
    assert told.endswith(found["reason"])
    assert (found["draws"], found["value"]) == (0, None)
    assert not [line for line in summary["verdict"]["next"] if "epochs=0" in line]
    assert f"forecast: {found['reason']}" in outcome.out.splitlines()
    assert "forecast before it: ten times the draws gained" in (out / "report.html").read_text()
    [longer] = [line for line in summary["verdict"]["next"] if "draws" in line]
    assert longer.startswith("a longer run: the encoder saw 0 draws")  # as the forecast counts
    (out / "checkpoints" / "ended.json").unlink()  # killed between the warm-up and the refinement
    [again] = [
        line
        for line in cli.call(*cli.refine(shapes, mae.export, out, *settings)).err.splitlines()
        if "forecast: " in line
    ]
    assert again.endswith(found["reason"])
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    [measured] = [record for record in log if "knn_heads" in record]  # at the end of the warm-up, whatever knn_every
    assert (measured["phase"], measured["epoch"]) == ("warmup", 2)
    assert found["knn_heads"] == measured["knn_heads"]
    before, after = (load_backbone(str(each)).model.state_dict() for each in (mae.export, out / "export"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, msg=name)
