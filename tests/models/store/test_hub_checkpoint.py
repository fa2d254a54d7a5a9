"""A repository of a checkpoint comes whole, checked and without pickles; what is there is not fetched again."""

from pathlib import Path

import pytest

from models.errors import DownloadFailed, HashMismatch
from models.store.catalog import HubRepo, parse_repo
from models.store.hub import fetch_checkpoint
from tests.support.models.hub import COMMIT, REPO, Hub

SOURCE = HubRepo(REPO)
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_templates/tools.jinja": b"{{ messages }}",
    "additional_chat_templates/rag.jinja": b"{{ messages }}",
    "processor_config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first shard",
    "model-00002-of-00002.safetensors": b"second shard",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "consolidated.safetensors": b"the same weights once more",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"words",
}


def test_what_a_conversion_reads_is_fetched_and_nothing_else(hub: Hub) -> None:
    hub.others = dict(FILES)
    seen: list[int] = []
    folder = fetch_checkpoint(SOURCE, lambda done, total: seen.append(done))
    wanted = {name for name in FILES if not name.startswith(("consolidated", "pytorch", "README"))}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == wanted
    assert all((folder / name).read_bytes() == FILES[name] for name in wanted)
    assert seen == sorted(seen)
    n_gets = len(hub.gets)
    assert fetch_checkpoint(HubRepo(REPO, COMMIT)) == folder
    assert len(hub.gets) == n_gets


def test_pickled_weights_are_refused_before_anything_is_fetched(hub: Hub) -> None:
    hub.others = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    with pytest.raises(DownloadFailed, match=r"pytorch_model\.bin.*not opened.*safetensors"):
        fetch_checkpoint(SOURCE)
    assert hub.gets == []


def test_a_repository_without_a_configuration_is_no_checkpoint(hub: Hub) -> None:
    with pytest.raises(DownloadFailed, match=r"no 'config\.json'"):
        fetch_checkpoint(SOURCE)


def test_a_damaged_shard_is_refused_and_not_kept(hub: Hub) -> None:
    hub.others = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub.delivered = b"WEIGHTS"
    with pytest.raises(HashMismatch, match=r"'model\.safetensors' has sha256"):
        fetch_checkpoint(SOURCE)
    hub.delivered = None
    assert (fetch_checkpoint(SOURCE) / "model.safetensors").read_bytes() == b"weights"


def test_an_unknown_repository_is_a_failed_download(hub: Hub) -> None:
    with pytest.raises(DownloadFailed, match="team/nope"):
        fetch_checkpoint(HubRepo("team/nope"))


def test_without_the_network_the_cache_will_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.others = {"config.json": b"{}", "model.safetensors": b"weights"}
    folder = fetch_checkpoint(SOURCE)
    n_gets = len(hub.gets)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_checkpoint(SOURCE) == folder
    assert len(hub.gets) == n_gets


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("hf://team/model", HubRepo("team/model")),
        ("hf://team/model@v1.0", HubRepo("team/model", "v1.0")),
        ("hf://team/model/file.gguf", None),
        ("team/model", None),
        (str(Path("hf:") / "x"), None),
    ],
)
def test_a_repository_is_told_from_a_file(text: str, repo: HubRepo | None) -> None:
    assert parse_repo(text) == repo
