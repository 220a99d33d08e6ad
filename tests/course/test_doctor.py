"""The doctor: every failure shows its cure, and the code survives being typed."""

import io
import urllib.error
from pathlib import Path

import pytest
from rich.console import Console

from medtut.course import doctor, doctor_facts
from medtut.course.doctor import CHECKS, CodeError, Facts, decode, run_doctor
from medtut.course.doctor_code import CHECK_NAMES, encode
from medtut.errors import MedtutError

GOOD = "medtut-device cpu CPU only\nmedtut-pair 2.15.0+cpu 0.29.2+cpu\n"


class Fine(Facts):
    """A machine on which everything is well; tests spoil one thing."""

    versions = {"torch": "2.15.0", "monai": "1.6.1"}  # noqa: RUF012
    pins = ("numpy", "torch (>=2.14.0)")

    def python(self):
        return (3, 12, 1)

    def probe(self):
        return (0, GOOD, "")

    def requirements(self):
        return ["torch>=2.11", "monai>=1.5", 'peft>=0.17; extra == "test"']

    def version(self, package):
        return self.versions.get(package)

    def requires(self, package):
        return list(self.pins)

    def memory_gb(self):
        return 8.0

    def cache_folder(self):
        return Path.cwd()

    def prove_cache(self):
        pass

    def free_gb(self, folder):
        return 50.0

    def reach(self):
        pass


def raising(error):
    def method(self):
        raise error

    return method


def probe(status, out, err):
    return {"probe": lambda self: (status, out, err)}


DEVICE = "medtut-device cuda Some GPU\n"
MISMATCH = "RuntimeError: operator torchvision::nms does not exist\n"
SPOILED = [
    ("python", {"python": lambda self: (3, 10, 4)}, "3.10.4, needs 3.11", "install Py"),
    (
        "packages",
        {"versions": {"torch": "2.15.0"}},
        "monai is missing",
        'pip install "monai>=1.5"',
    ),
    (
        "packages",
        {"versions": {"torch": "2.15.0", "monai": "1.2.0"}},
        "monai is 1.2.0, needs >=1.5",
        'pip install "monai>=1.5"',
    ),
    ("torch_pair", probe(1, DEVICE, MISMATCH), "do not match", "--force-reinstall"),
    (
        "torch_pair",
        {"pins": ("torch==2.14.0",)},
        "asks for torch ==2.14.0, not 2.15.0",
        "--force-reinstall",
    ),
    (
        "torch_pair",
        probe(1, DEVICE, "ModuleNotFoundError: No module named 'torchvision'"),
        "torchvision is missing",
        "pip install torch torchvision",
    ),
    (
        "torch_pair",
        probe(1, DEVICE, "x\nOSError: bad.so\n"),
        "OSError: bad.so",
        "force",
    ),
    ("torch_pair", probe(-11, DEVICE, ""), "exit status -11", "--force-reinstall"),
    ("torch_pair", probe(124, DEVICE, "longer than 180 s"), "longer", "once more"),
    ("memory", {"memory_gb": lambda self: 2.25}, "2.2 GB free", "--profile smoke"),
    ("disk", {"free_gb": lambda self, folder: 1.0}, "1.0 GB free", "MEDTUT_CACHE"),
    (
        "cache",
        {"prove_cache": raising(MedtutError("The cache folder x cannot be written"))},
        "cannot be written",
        "MEDTUT_CACHE",
    ),
    ("cache", {"prove_cache": raising(OSError("read-only"))}, "read-only", "MEDTUT"),
    (
        "memory",
        {"memory_gb": raising(ValueError("no psutil"))},
        "check itself failed: ValueError: no psutil",
        "pip install",
    ),
]


def report_of(changes):
    return run_doctor(type("Spoiled", (Fine,), changes)())


def rendered(report):
    out = io.StringIO()
    report.render(Console(file=out, width=60))
    return out.getvalue()


def test_all_well():
    report = run_doctor(Fine())
    assert report.exit_code == 0
    assert all(one.status == "ok" and not one.cure for one in report.checks)
    assert report.code.startswith("MT1-OK-")
    assert "cure" not in report.to_text()


@pytest.mark.parametrize(("name", "changes", "said", "cure"), SPOILED)
def test_failure_shows_its_cure(name, changes, said, cure):
    report = report_of(changes)
    assert report.exit_code == 1
    assert [one.name for one in report.checks if one.status == "failure"] == [name]
    one = next(one for one in report.checks if one.name == name)
    assert said in one.message
    assert cure in one.cure
    assert "\n" not in one.cure + one.message
    for text in (report.to_text(), rendered(report)):
        assert one.cure in text
        assert report.code in text
    assert report.code.startswith("MT1-FAIL-")
    assert decode(report.code).checks[name] == "failure"


def test_torch_missing_fails_pair_and_device():
    report = report_of(probe(1, "", "ModuleNotFoundError: No module named 'torch'"))
    failed = {one.name: one for one in report.checks if one.status == "failure"}
    assert set(failed) == {"torch_pair", "device"}
    assert all(one.cure for one in failed.values())
    assert decode(report.code).device == "none"


def test_offline_is_a_warning_with_a_cure():
    report = report_of({"reach": raising(urllib.error.URLError("no route"))})
    one = next(one for one in report.checks if one.name == "network")
    assert (one.status, report.exit_code) == ("warning", 0)
    assert "no route" in one.message
    assert "medtut assets fetch" in one.cure
    assert decode(report.code).checks["network"] == "warning"


def test_device_is_named_and_in_the_code():
    report = report_of(probe(0, DEVICE + GOOD.splitlines()[1], ""))
    one = next(one for one in report.checks if one.name == "device")
    assert one.message == "cuda: Some GPU"
    assert decode(report.code).device == "cuda"


def test_optional_requirement_is_not_asked_for():
    message = next(o for o in run_doctor(Fine()).checks if o.name == "packages").message
    assert message == "all 2 within their ranges"


def test_code_tells_versions_apart_and_names_nobody():
    a = decode(report_of({}).code)
    b = decode(report_of({"versions": {"torch": "2.15.1", "monai": "1.6.1"}}).code)
    assert a.versions != b.versions
    assert (a.python, a.device, a.ok) == ("3.12", "cpu", True)
    assert len(report_of({}).code) == len("MT1-OK-XXXXXXXX-XX")
    assert "all checks ok" in str(a)


def test_every_status_and_device_survives_the_code():
    statuses = ("ok", "warning", "failure", "not run")
    for shift in range(4):
        said = {n: statuses[(k + shift) % 4] for k, n in enumerate(CHECK_NAMES)}
        for device in ("none", "cpu", "cuda", "mps"):
            back = decode(encode(said, device, 14, {"torch": "2"}))
            assert (back.checks, back.device, back.python) == (said, device, "3.14")
            assert not back.ok
    assert tuple(CHECKS) == CHECK_NAMES


def test_typing_errors_are_noticed_and_look_alikes_read():
    code = run_doctor(Fine()).code
    sloppy = code.replace("MT1-OK-", "").replace("O", "0").replace("I", "1")
    assert decode(f" mt1-ok-{sloppy.lower()} ") == decode(code)
    body = code[7:15]
    for place in range(8):
        other = "C" if body[place] != "C" else "D"
        wrong = code[:7] + body[:place] + other + body[place + 1 :] + code[15:]
        with pytest.raises(CodeError):
            decode(wrong)
    for wrong in ("", "hello", code.replace("-OK-", "-FAIL-"), "MT1-OK-????????-AA"):
        with pytest.raises(CodeError):
            decode(wrong)


def test_real_facts_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "new" / "cache"))
    facts = Facts()
    assert facts.free_gb(facts.cache_folder()) > 0
    assert facts.memory_gb() > 0
    assert any(line.startswith("torch") for line in facts.requirements())
    assert facts.version("no-such-package-here") is None
    facts.prove_cache()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "file"))
    assert doctor.check_cache(facts).status == "failure"


def test_requirements_without_installed_package(monkeypatch):
    def missing(name):
        raise doctor_facts.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor_facts.metadata, "requires", missing)
    assert any(line.startswith("torch") for line in Facts().requirements())
    assert Facts().requires("torchvision") == []


@pytest.mark.parametrize(
    ("code", "status"), [(None, "ok"), (403, "ok"), ("down", "warning")]
)
def test_any_answer_is_online(monkeypatch, code, status):
    def urlopen(request, timeout):
        assert request.get_method() == "HEAD"
        assert timeout == doctor_facts.TIMEOUT_S
        if code == "down":
            raise TimeoutError("timed out")
        if code:
            raise urllib.error.HTTPError(request.full_url, code, "no", {}, None)
        return io.BytesIO()

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert doctor.check_network(Facts()).status == status


def test_probe_runs_in_its_own_process(monkeypatch):
    script = "import sys; print('medtut-device cpu CPU only'); sys.exit('nms: boom')"
    monkeypatch.setattr(doctor_facts, "_PROBE", script)
    facts = Facts()
    status, out, err = facts.probe()
    assert (status, doctor.device_kind(facts)) == (1, "cpu")
    assert "boom" in err
    assert "medtut-pair" not in out
    assert "boom" in doctor.check_torch_pair(facts).message
