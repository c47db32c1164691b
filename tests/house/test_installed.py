"""What is installed: wheel and sdist, torch's build for processors, and the recipes in jobs/recipes."""

import configparser
import email
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement
from processes import TESTS

import apts_mpi

ROOT = TESTS.parent
RECIPES = ROOT / "jobs" / "recipes"

settings = configparser.ConfigParser()
settings.read(ROOT / "setup.cfg")
REQUIRED = {
    requirement.name: requirement.specifier
    for requirement in map(Requirement, settings["options"]["install_requires"].strip().splitlines())
}


def least(specifiers):
    """The least version that specifiers allow."""
    return next(specifier.version for specifier in specifiers if specifier.operator == ">=")


@pytest.fixture(scope="module")
def tracked():
    """Files under version control."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the files under version control")
    return subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")[
        :-1
    ]


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """Directory with sdist and wheel of what is under version control."""
    pytest.importorskip("setuptools_scm")
    path = tmp_path_factory.mktemp("built")
    for file in tracked:
        (path / "tree" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, path / "tree" / file)
    for command in (["git", "init", "-q"], ["git", "add", "--all", "--force"]):
        subprocess.run(command, cwd=path / "tree", check=True)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]
    subprocess.run(commit, cwd=path / "tree", check=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", str(path), "tree"]
    done = subprocess.run(build, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return path


@pytest.mark.processes
def test_sdist_and_wheel_are_complete(built, tracked):
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked) <= names
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"apts_mpi-{apts_mpi.__version__}.dist-info/METADATA"))
    package = {file for file in tracked if file.startswith("apts_mpi/") and not file.endswith(".md")}
    assert package <= names and "apts_mpi/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"apts_mpi", f"apts_mpi-{apts_mpi.__version__}.dist-info"}
    assert "Typing :: Typed" in metadata.get_all("Classifier") and len(metadata.get_all("Project-URL")) >= 2
    links = re.findall(r"\]\(([^)]*)\)", metadata.get_payload())
    assert links and all(link.startswith("https://") for link in links)


def test_the_build_for_processors_is_that_of_the_scripts():
    """jobs/local_environment.sh installs from it in every run of the tests; a reader is told the same."""
    index = re.search(r"TORCH_INDEX-(\S+)}", (ROOT / "jobs" / "local_environment.sh").read_text())[1]
    for page in ("README.md", "docs/installation.md", "docs/description.md", "jobs/recipes/Dockerfile"):
        assert index in (ROOT / page).read_text(), page


def test_version_and_extras_are_told_everywhere():
    citation = yaml.safe_load((ROOT / "docs" / "CITATION.cff").read_text())
    assert citation["version"] == apts_mpi.__version__ and citation["cff-version"] == "1.2.0"
    assert re.search(rf"^## {re.escape(apts_mpi.__version__)} \({citation['date-released']}\)$",
                     (ROOT / "docs" / "changelog.md").read_text(), re.MULTILINE)  # fmt: skip
    told = (ROOT / "docs" / "installation.md").read_text()
    assert all(f"`{extra}`" in told or f"[{extra}]" in told for extra in settings["options.extras_require"])


def shell_of_dockerfile(text):
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    words = {line.split()[0] for line in lines}
    assert words <= {"FROM", "ARG", "RUN", "COPY", "USER", "WORKDIR", "ENV", "CMD"}, words
    assert lines[0].startswith("FROM python:3.") and any(line.startswith("USER ") for line in lines)
    return [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]


def shell_of_apptainer(text):
    head, *sections = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    assert re.fullmatch(r"Bootstrap: docker\nFrom: python:3\.\d+-slim\n+", head)
    sections = dict(zip(sections[::2], sections[1::2], strict=True))
    assert sections.keys() == {"help", "arguments", "files", "post", "environment", "runscript", "test"}
    assert set(re.findall(r"{{ (\w+) }}", text)) == set(re.findall(r"^ +(\w+)=", sections["arguments"], re.MULTILINE))
    return [
        sections[name].replace("{{ ", "").replace(" }}", "") for name in ("post", "environment", "runscript", "test")
    ]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("recipe", "shell"), [("Dockerfile", shell_of_dockerfile), ("apptainer.def", shell_of_apptainer)]
)
def test_containers_are_well_formed(recipe, shell):
    """Their parts, and what their shells run: `bash -n`, and shellcheck where it is."""
    text = (RECIPES / recipe).read_text()
    checks = [["bash", "-n"]] + ([["shellcheck", "-s", "sh", "-"]] if shutil.which("shellcheck") else [])
    for script in shell(text):
        for check in checks:
            done = subprocess.run(check, input=script, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    assert "--no-binary mpi4py" in text and "/opt/apts_mpi[plot]" in text


def test_spack_package_has_the_requirements(monkeypatch):
    """Its file is run with stand-ins for Spack's directives, which note what they are called with."""
    called = []
    spack = types.ModuleType("spack.package")
    for name in ("license", "version", "variant", "depends_on"):
        setattr(spack, name, lambda *values, name=name, **_: called.append((name, *values)))
    python = types.ModuleType("spack_repo.builtin.build_systems.python")
    python.PythonPackage = object
    for name in ("spack", "spack_repo", "spack_repo.builtin", "spack_repo.builtin.build_systems"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "spack.package", spack)
    monkeypatch.setitem(sys.modules, python.__name__, python)
    assert "PyAptsMpi" in runpy.run_path(str(RECIPES / "spack" / "package.py"))
    assert ("version", apts_mpi.__version__) in called
    depends = [values[0] for name, *values in called if name == "depends_on"]
    for name, specifiers in REQUIRED.items():
        assert any(re.match(rf"py-{name.lower()}@{re.escape(least(specifiers))}:", spec) for spec in depends), name


def test_conda_recipe_has_the_requirements():
    recipe = yaml.safe_load((RECIPES / "conda" / "recipe.yaml").read_text())
    assert recipe["schema_version"] == 1 and recipe["package"] == {"name": "apts_mpi", "version": apts_mpi.__version__}
    run = dict(line.partition(" ")[::2] for line in recipe["requirements"]["run"])
    for name, specifiers in REQUIRED.items():
        assert f">={least(specifiers)}" in run[{"torch": "pytorch"}.get(name, name)], name
    command = settings["options.entry_points"]["console_scripts"].strip()
    assert recipe["build"]["python"]["entry_points"] == [command]
    assert (RECIPES / "conda" / recipe["source"]["path"]).resolve() == ROOT
