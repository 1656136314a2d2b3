"""The stand-in in the place of the Hub."""

import time
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http, close_session
from huggingface_hub.utils._xet import abort_xet_session
from transformers.utils import hub as transformers_hub

from .server import StandIn


TOKEN, READ_TOKEN = "hf_SecretOfTheTests", "hf_MayOnlyRead"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub that the real client of this process talks to, without waiting before it tries again."""
    with StandIn({TOKEN: "write", READ_TOKEN: "read"}) as server:
        talk_to(server.url, monkeypatch, tmp_path)
        yield server
    abort_xet_session()
    close_session()


@pytest.fixture
def xet_hub(hub, monkeypatch):
    """The stand-in, with large files by Xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    return hub


def talk_to(url, monkeypatch, folder):
    """Points the client at a server; it reads its environment only once."""
    settings = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "HF_STORED_TOKENS_PATH": str(folder / "tokens"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_XET_CACHE", str(folder / "xet"))  # it remembers what a server holds
    monkeypatch.setattr(hf_api.api, "endpoint", url)  # behind the functions of the package
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    close_session()
