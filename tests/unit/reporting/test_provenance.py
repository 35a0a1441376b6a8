"""The command as it can be typed, and the environment in one sentence."""

import importlib.machinery
import subprocess
import sys

from e2sad_jax.reporting import provenance


def test_the_command_can_be_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--data=my file.npz", "--steps=3"])
    assert provenance.command().endswith(" '--data=my file.npz' --steps=3")
    for name in ("package", "package.__main__"):
        spec = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec, raising=False)
        assert provenance.command() == "python -m package '--data=my file.npz' --steps=3"


def test_the_command_that_goes_on_names_the_interpreter_where_python_is_another(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--steps=3"])
    for folder in (tmp_path / "other", tmp_path / "my env"):
        folder.mkdir()
        (folder / "python").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "my env"))
    assert provenance.again() == provenance.command()
    (tmp_path / "my env" / "python3.99").touch(mode=0o755)
    with monkeypatch.context() as beside:
        beside.setattr(sys, "executable", str(tmp_path / "my env" / "python3.99"))
        assert provenance.again().startswith(f"'{tmp_path}/my env/python3.99' "), "another one in the same folder"
    for elsewhere in (tmp_path / "other", tmp_path / "nothing"):
        monkeypatch.setenv("PATH", str(elsewhere))
        assert provenance.again() == f"'{tmp_path}/my env/python'{provenance.command().removeprefix('python')}"
    monkeypatch.chdir(tmp_path)
    assert provenance.again().startswith("'my env/python' "), "as short as it can be typed"


def test_what_commands_write_into_results_does_not_mark_a_commit(tmp_path):
    package = tmp_path / "package" / "inner"
    for file in ("package/inner/__init__.py", "results/table.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    assert provenance.commit_of(package) is None

    def git(*arguments):
        who = ("-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert provenance.commit_of(package) == commit
    (tmp_path / "results" / "table.json").write_text("2")
    assert provenance.commit_of(package) == commit
    (package / "__init__.py").write_text("2")
    assert provenance.commit_of(package) == f"{commit} with changes"


def test_hardware_is_what_a_run_uses():
    """One device, however many there are (these tests have four)."""
    assert " x " not in provenance.environment()["hardware"]


def test_the_console_script_is_named_with_its_subcommand(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["e2sad train mnist", "--steps=3"])
    assert provenance.command() == provenance.again() == "e2sad train mnist --steps=3"


def test_a_defense_of_ones_own_is_named_before_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["e2sad train mnist", "--steps=3"])
    monkeypatch.setenv("E2SAD_JAX_DEFENSES", "my defense")
    assert provenance.command() == provenance.again() == "E2SAD_JAX_DEFENSES='my defense' e2sad train mnist --steps=3"


def test_an_environment_is_one_sentence():
    sentence = provenance.sentence({**provenance.environment(), "date": "today", "commit": "abc"})
    assert sentence.startswith("Measured today on CPU, ")
    assert sentence.endswith("; commit abc.")
