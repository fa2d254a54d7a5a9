"""A whole checkpoint from the Hugging Face Hub: the files a conversion reads, and never a pickle.

They stay in the Hub's own cache, where its other tools find and clear them: a second conversion loads nothing again.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .download import hub_errors, is_offline, tqdm_for
from .errors import DownloadFailed, HashMismatch
from .files import Progress, check_free, sha256_file
from .sources import HubRepo

_WANTED = re.compile(
    r"(model[\w.-]*\.safetensors(\.index\.json)?|config\.json|generation_config\.json|tokenizer[\w.-]*\.json|"
    r"tokenizer\.model|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|"
    r"chat_templates/[\w.-]+\.jinja)"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def fetch_checkpoint(source: HubRepo, progress: Progress | None = None) -> Path:
    """The folder that holds the checkpoint's files, fetched where they are missing.

    Weights are checked against the sha256 that the Hub promises. Raises DownloadFailed (no such repository, no access,
    no safetensors in it …), HashMismatch, or StoreError when the disk is too small.
    """
    with hub_errors(source):
        from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

        endpoint = os.environ.get("HF_ENDPOINT")
        if is_offline():
            return Path(snapshot_download(source.repo, revision=source.revision, local_files_only=True))
        info = HfApi(endpoint=endpoint).model_info(source.repo, revision=source.revision, files_metadata=True)
        files = _chosen(source, info.siblings or [])
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        check_free(cache, sum(file.size or 0 for file in files))
        done = 0
        for file in files:
            path = hf_hub_download(
                source.repo,
                file.rfilename,
                # The name of the last one's revision is noted in the cache, which answers for it without a network.
                revision=source.revision if file is files[-1] else info.sha,
                cache_dir=cache,
                endpoint=endpoint,
                tqdm_class=tqdm_for(progress, done),
            )
            _check(source, file, Path(path))
            done += file.size or 0
    folder = Path(path).parent
    if folder.name != info.sha:
        raise DownloadFailed(f"{source} changed while it was fetched ({info.sha} to {folder.name}); fetch it again")
    return folder


def _chosen(source: HubRepo, siblings: Sequence[Any]) -> list[Any]:
    """What to fetch, the configuration last: its folder is the checkpoint's."""
    chosen = [file for file in siblings if _WANTED.fullmatch(file.rfilename)]
    names = [file.rfilename for file in chosen]
    if "config.json" not in names:
        raise DownloadFailed(f"{source} is no checkpoint: it has no 'config.json'")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [file.rfilename for file in siblings if file.rfilename.endswith(_PICKLES)]
        why = f"its weights are pickles ({pickles[0]!r} …), which are not opened" if pickles else "it has no weights"
        raise DownloadFailed(f"{source} has no model*.safetensors: {why}; save the model as safetensors")
    return sorted(chosen, key=lambda file: (file.rfilename == "config.json", file.rfilename))


def _check(source: HubRepo, file: Any, path: Path) -> None:
    promised = file.lfs.sha256 if file.lfs is not None else None
    if promised is not None and (found := sha256_file(path)) != promised:
        # The Hub's client would take the damaged file for the right one ever after.
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise HashMismatch(f"{source}: {file.rfilename!r} has sha256 {found}, the Hub says {promised}; fetch it again")
