"""What the tests of prepared data sets share."""

import socket

import pytest


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Names do not resolve, and nothing of the user's is read or written."""
    asked = []

    def getaddrinfo(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: (real if host == "127.0.0.1" else getaddrinfo)(host, *a, **k)
    )
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("E2SAD_DATA_DIR", str(tmp_path / "default"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "library"))
    return asked
