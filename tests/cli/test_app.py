"""The command line as a user meets it: processes of their own, forked where starting Python is not what is tested."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import typer

from mim_refiner.cli import app as app_module

VERBS = (
    "demo",
    "pretrain",
    "refine",
    "evaluate",
    "analyze",
    "embed",
    "export",
    "inspect",
    "doctor",
    "report",
    "recipes",
)


# A fixed width and no colour, whatever the machine that runs the tests sets.
PLAIN = {
    "COLUMNS": "200",
    "TERM": "dumb",
    "NO_COLOR": "1",
    "_TYPER_FORCE_DISABLE_TERMINAL": "1",
    "MIM_REFINER_DEBUG": "",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mim_refiner", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **PLAIN},
    )


def forked(cli, *words: str) -> subprocess.CompletedProcess[str]:
    """The same, without loading everything anew."""
    started = cli.start(*words, **PLAIN)
    out, err = started.communicate()
    return subprocess.CompletedProcess(words, started.returncode, out, err)


def assert_one_error_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_verbs_without_a_model_need_no_torch(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"phase": "warmup", "step": 1, "total_step": 1, "loss": 1.0}\n')
    code = (
        "import sys\nfrom mim_refiner.cli.app import main\n"
        "for words in (['--version'], ['--help'], ['models'], ['models', 'mae_l16'], ['recipes', 'tiny'],\n"
        f"              ['report', {str(tmp_path)!r}]):\n"
        "    assert main(words) == 0\n"
        "    assert 'torch' not in sys.modules and 'timm' not in sys.modules, f'torch was imported for {words}'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **PLAIN})
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f" {verb} " in done.stdout


def test_no_arguments_show_the_help():
    done = run()
    assert done.returncode == 0
    assert "Usage: mim-refiner" in done.stdout


def test_version():
    from mim_refiner import __version__

    assert run("--version").stdout.strip() == __version__


@pytest.mark.parametrize("verb", VERBS)
def test_each_help_shows_an_example(verb, cli):
    done = forked(cli, verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"mim-refiner {verb}" in done.stdout.split("Example:")[1]


def test_mistyped_verb_names_the_nearest(cli):
    assert_one_error_line(forked(cli, "refin"), "no verb 'refin'", "did you mean 'refine'?")


def test_mistyped_option_names_the_nearest(cli):
    assert_one_error_line(forked(cli, "refine", "--dta", "x"), "no option '--dta'", "did you mean '--data'?")


def test_missing_option_is_named(cli):
    assert_one_error_line(forked(cli, "refine", "--data", "x", "--out", "y"), "missing option '--model'")


def test_unknown_device_lists_the_choices(cli):
    assert_one_error_line(
        forked(cli, "demo", "--device", "gpu"), "--device 'gpu': unknown device; use auto, cpu, cuda, cuda:1"
    )


def test_empty_name_in_a_comma_list(cli):
    assert_one_error_line(
        forked(cli, "evaluate", "--model", "m", "--data", "d", "--protocols", "knn,,linear"), "--protocols"
    )


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_bad_checkpoint_is_one_line_and_exit_2(tmp_path, cli, flags):
    file = tmp_path / "notes.pth"
    file.write_text("not a checkpoint")
    assert_one_error_line(forked(cli, "inspect", str(file), *flags), "notes.pth")


def test_a_bug_is_short_and_the_traceback_is_on_demand(monkeypatch, capsys):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(app_module, "parser", lambda: broken)
    monkeypatch.delenv(app_module.DEBUG_VARIABLE, raising=False)
    assert app_module.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ZeroDivisionError: by zero (this is a bug")
    assert error.count("\n") == 1

    monkeypatch.setenv(app_module.DEBUG_VARIABLE, "1")
    assert app_module.main(["demo"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (PermissionError(13, "Permission denied", "/locked"), 2, "error: the system refused to use '/locked'"),
        (OSError(28, "No space left on device"), 2, "error: the system refused to use a file: No space left"),
        (app_module.MimRefinerError("no such\nfolder"), 2, "error: no such folder\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, text):
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(app_module, "parser", lambda: failing)
    assert app_module.main(["demo"]) == code
    assert capsys.readouterr().err.startswith(text)


def test_guard_stop_has_its_own_exit_code(monkeypatch, capsys):
    from mim_refiner.errors import GuardStopError

    def stopped(*_: object, **__: object) -> None:
        raise GuardStopError("k-NN fell")

    monkeypatch.setattr(app_module, "parser", lambda: stopped)
    assert app_module.main(["refine"]) == 3
    assert capsys.readouterr().err == "error: k-NN fell\n"


def test_a_reader_that_has_gone_leaves_no_noise():
    command = f'"{sys.executable}" -m mim_refiner --help | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 1)  # 0 when the output went out before the reader left
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "needs more memory than the machine gives"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 17000000000000 bytes."),
            "17000.0 GB",
        ),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full"),
        (RuntimeError("Could not determine home directory."), "no home folder"),
        (OSError(36, "File name too long", "x" * 300), "File name too long"),
        (OSError(40, "Too many levels of symbolic links", b"loop"), "'loop'"),
    ],
)
def test_refusals_of_the_machine_are_one_line_and_no_bug(monkeypatch, capsys, error, said):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(app_module, "parser", lambda: fails)
    assert app_module.main(["models"]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_warnings_of_libraries_stay_inside_and_ours_are_one_line(monkeypatch, capsys):
    class OurWarning(UserWarning):
        pass

    OurWarning.__module__ = "mim_refiner.checkpoints.load"

    def warns(*arguments, **options):
        warnings.simplefilter("always")
        warnings.warn("invalid value", RuntimeWarning, stacklevel=1)
        warnings.warn("tensors stay\nrandom", OurWarning, stacklevel=1)

    monkeypatch.delenv("MIM_REFINER_DEBUG", raising=False)
    monkeypatch.setattr(app_module, "parser", lambda: warns)
    assert app_module.main(["models"]) == 0
    assert capsys.readouterr().err == "warning: tensors stay random\n"


OPTIONS = {
    "--model": "no-model",
    "--data": "no-data",
    "--arch": "vit_w32_d2_h2_p8",
    "--format": "timm",
    "--out": "out.npy",
}
DEVICE_VERBS = {  # their required options; pretrain needs one of two
    command.name: [o for p in command.params for o in p.opts if p.required] + ["--arch"] * (command.name == "pretrain")
    for command in typer.main.get_command(app_module.app).commands.values()
    if any("--device" in parameter.opts for parameter in command.params)
}


@pytest.mark.parametrize("verb", DEVICE_VERBS)
def test_every_verb_refuses_a_device_that_is_not_there(verb, tmp_path, monkeypatch, capsys):
    """Before it looks at anything else, so that nothing is half-written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    words = [word for option in DEVICE_VERBS[verb] for word in (option, OPTIONS[option])]
    for device, reason in (("cuda:1", "torch sees no GPU here"), ("mps", "no Apple GPU"), ("tpu", "unknown device")):
        assert app_module.main([verb, *words, "--device", device]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: --device {device!r}" if device == "tpu" else f"error: --device {device}: ")
        assert reason in line
    assert not list(tmp_path.iterdir())


def test_the_verbs_with_a_device():
    assert sorted(DEVICE_VERBS) == ["analyze", "demo", "doctor", "embed", "evaluate", "export", "pretrain", "refine"]


@pytest.mark.parametrize("verb", [("refine", "--model", "m"), ("pretrain", "--arch", "vit_tiny_patch16_224")])
def test_a_mistyped_recipe_is_told_before_timm_is_loaded(verb):
    code = (
        "import sys\nfrom mim_refiner.cli.app import main\n"
        f"assert main([*{verb!r}, '--data', 'none', '--out', 'o', '--recipe', 'tinny']) == 2\n"
        "assert 'timm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **PLAIN})
    assert done.returncode == 0, done.stderr
    assert "unknown recipe 'tinny'; did you mean 'tiny" in done.stderr
