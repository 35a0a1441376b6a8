"""An audit that could not ask is no success."""

import json
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "audit.sh"
CLEAN = {"name": "numpy", "version": "2.4.6", "vulns": []}
SKIPPED = {"name": "jax", "skip_reason": "not found"}
KNOWN = {"name": "pillow", "version": "13.0.0", "vulns": [{"id": "CVE-1", "fix_versions": ["13.0.1"]}]}


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        ([CLEAN], 0, "audit: 0 known vulnerabilities in 1 packages"),
        ([CLEAN, KNOWN], 1, "audit: pillow 13.0.0: CVE-1, mended in 13.0.1"),
        ([CLEAN, SKIPPED], 2, "audit: 1 of 2 packages were not checked (jax)"),
        ([KNOWN, SKIPPED], 1, "this is no success"),
        (None, 2, "no route to host\naudit: the service of known vulnerabilities could not be asked"),
    ],
)
def test_exit_code_and_words(answer, code, words, tmp_path):
    """With a pip-audit that says this, and that it found nothing, whatever it found."""
    tool = tmp_path / "pip-audit"
    write = (
        f"cat >\"${{@: -1}}\" <<'X'\n{json.dumps({'dependencies': answer})}\nX\necho 'No known vulnerabilities found'"
    )
    tool.write_text("#!/usr/bin/env bash\n" + (write if answer else "echo no route to host\nexit 1") + "\n")
    tool.chmod(0o755)
    done = subprocess.run([SCRIPT, tool], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert "No known vulnerabilities found" not in done.stdout + done.stderr
