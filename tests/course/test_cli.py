"""The command line: exit codes and messages."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from medtut import cli
from medtut.errors import MedtutError

HEAVY = (
    "torch",
    "monai",
    "transformers",
    "papermill",
    "matplotlib",
    "nbformat",
    "numpy",
)


def call(monkeypatch, capsys, *arguments):
    """Run ``medtut ...`` in this process; return exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["medtut", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "which lesson"),
        (["run", "90", "--all"], "not both"),
        (["run", "77"], "no lesson '77'"),
        (["run", "90", "--set", "stepz=1"], "did you mean 'steps'"),
        (["run", "90", "--set", "steps=ten"], "whole number"),
        (["run", "90", "--set", "steps"], "name=value"),
        (["run", "90", "--profile", "big"], "big"),
        (["run", "90", "--out", "file/below"], "cannot write to the output folder"),
        (["run", "90", "--data", "nowhere"], "no such folder"),
        (["sweep", "90", "--arms", "lra"], "did you mean 'lora'"),
        (["sweep", "90", "--seeds", "x"], "0-4"),
        (["sweep", "77"], "the lessons are: 90_tiny"),
        (["bench", "speed"], "no benchmark"),
        (["bench", "lora"], "come with the repository"),
        (["predict", "ct", "nowhere.nii"], "no file nowhere.nii; give one CT"),
        (["predict", "ct", "x.nii", "--prompt", " "], "1 --prompt, 0 --against, 1 emp"),
        (["predict", "mri", "nowhere.nii"], "mri"),
        (["nonsense"], "nonsense"),
    ],
)
def test_refusals_leave_with_2(course, monkeypatch, capsys, arguments, says):
    (course / "file").write_text("x", encoding="utf-8")
    code, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_cache_that_cannot_be_made_is_refused_before_anything_runs(
    course, monkeypatch, capsys, command
):
    (course / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("MEDTUT_CACHE", str(course / "file"))
    code, err = call(monkeypatch, capsys, command, "90", "--profile", "smoke")
    assert code == 2
    assert "MEDTUT_CACHE" in err
    assert not (course / "build").exists()
    assert not (course / "benchmarks").exists()


def test_fetching_several_assets_goes_on_after_one_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    monkeypatch.setenv("MEDTUT_OFFLINE", "1")
    names = ["nope", "pyradiomics-brain", "mni152-2mm"]
    monkeypatch.setattr(sys, "argv", ["medtut", "assets", "fetch", *names])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    assert left.value.code == 2
    assert "no asset 'nope'" in said.err
    assert "'brain1_image' is not in the cache" in said.err
    assert said.out.count("mni152-2mm") == 3


def test_fetching_into_a_cache_that_is_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("MEDTUT_OFFLINE", "1")
    code, err = call(monkeypatch, capsys, "assets", "fetch", "litemedsam")
    assert code == 2
    assert "MEDTUT_CACHE" in err


def test_a_decoded_result_is_text_for_a_host(monkeypatch, capsys):
    from medtut.course.doctor_code import CHECK_NAMES, encode

    code = encode(
        {**dict.fromkeys(CHECK_NAMES, "ok"), "network": "warning"}, "cpu", 11, {}
    )
    monkeypatch.setattr(sys, "argv", ["medtut", "doctor", "--decode", code])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.startswith("OK: Python 3.11, cpu, versions")


def test_profile_from_the_environment_is_checked_too(course, monkeypatch, capsys):
    monkeypatch.setenv("MEDTUT_PROFILE", "big")
    assert call(monkeypatch, capsys, "run", "90")[0] == 2


def test_run_passes_everything_on(course, monkeypatch, capsys):
    from medtut.course import runner

    seen = {}

    def fake(*args, **kwargs):
        seen.update(args=args, kwargs=kwargs)
        return [type("Run", (), {"ok": False})()]

    monkeypatch.setattr(runner, "run_lessons", fake)
    line = "run 90 01 --profile smoke --set lr=1e-4 --set ranks=[2] --solve --timeout 5"
    code, _ = call(monkeypatch, capsys, *line.split())
    assert code == 1
    lessons, profile, overrides, data, out, solve, timeout = seen["args"]
    assert (lessons, profile) == (["90", "01"], "smoke")
    assert overrides == {"lr": 1e-4, "ranks": [2]}
    assert (data, out, solve, timeout) == (None, None, True, 5.0)


def test_sweep_from_the_command_line(course, monkeypatch, capsys):
    line = "sweep 90 --arms lora --seeds 0-1 --profile smoke --set lr=1e-4"
    assert call(monkeypatch, capsys, *line.split())[0] == 0
    folder = course / "benchmarks" / "sweeps" / "90_tiny" / "lora"
    assert sorted(path.name for path in folder.iterdir()) == [
        "seed0.json",
        "seed1.json",
    ]
    assert call(monkeypatch, capsys, "sweep", "90", "--seeds", "13")[0] == 1


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(MedtutError("no cure"), 2, "no cure"), (KeyboardInterrupt(), 130, "stopped")],
)
def test_how_errors_leave(monkeypatch, capsys, error, code, says):
    def app():
        raise error

    monkeypatch.setattr(cli, "app", app)
    left, err = call(monkeypatch, capsys)
    assert left == code
    assert says in err


def test_bench_runs_the_script_of_the_clone(course, monkeypatch, capsys):
    script = course / "benchmarks" / "lora.py"
    script.parent.mkdir()
    (course / "pyproject.toml").write_text('name = "medtut"\n', encoding="utf-8")
    script.write_text(
        "import sys\nif __name__ == '__main__':\n    sys.exit(' '.join(sys.argv[1:]))",
        encoding="utf-8",
    )
    below = course / "notebooks"
    monkeypatch.chdir(below)
    code, _ = call(monkeypatch, capsys, "bench", "lora", "--out", "here")
    assert code == "--out here"


def test_every_command_has_help():
    runner = CliRunner()
    for name in ("run", "sweep", "doctor", "assets", "audit", "bench", "predict"):
        result = runner.invoke(cli.app, [name, "--help"])
        assert result.exit_code == 0
        assert name in runner.invoke(cli.app, ["--help"]).output


@pytest.mark.parametrize("module", ["medtut", "medtut.cli", "medtut.course"])
def test_import_loads_nothing_heavy(module):
    code = (
        f"import sys, {module}; "
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.strip() == ""
