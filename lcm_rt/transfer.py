"""Bytes of the hub into its cache, resumed where an earlier try ended; knows files, not models.

The cache and its layout are huggingface_hub's. Only the transfer of weights is done here: the library, and its Xet
transfers too, begin an interrupted file anew, and these files are gigabytes.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import filelock
import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)
from huggingface_hub.utils.tqdm import silent_tqdm

from lcm_rt.errors import InputError, LcmError, NotFound, Unavailable

REPORTS_PER_S = 10
TRIES = 5  # in a row without a byte

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class File:
    """One file of a repository: ``revision`` is a commit, ``size`` is in bytes, ``present`` is whether it is here."""

    repo: str
    revision: str
    name: str
    size: int
    present: bool


Report = Callable[[File, int], None]
"""Called with a file and how many bytes of it are here, about ten times a second while they arrive, and at its end."""


def repo_folder(repo: str) -> Path:
    with plain_words(repo):
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def download(file: File) -> None:
    """Put ``file`` into its place in the cache; what is there already as a blob is only linked."""
    hf_hub_download(file.repo, file.name, revision=file.revision, tqdm_class=silent_tqdm)


def transfer(file: File, report: Report) -> None:
    """Bring the bytes of ``file`` into the cache as a blob, beginning where an earlier try ended."""
    url = hf_hub_url(file.repo, file.name, revision=file.revision)
    about = get_hf_file_metadata(url, retry_on_errors=True)
    etag, size = about.etag, about.size
    if etag is None or "/" in etag or size is None:
        raise ValueError("no etag or no size")
    folder = repo_folder(file.repo)
    blob, part = folder / "blobs" / etag, folder / "blobs" / f"{etag}.incomplete"
    lock = folder.parent / ".locks" / folder.name / f"{etag}.lock"
    for parent in (blob.parent, lock.parent):
        parent.mkdir(parents=True, exist_ok=True)
    while not blob.exists():
        try:
            with WeakFileLock(lock, timeout=1):
                if not blob.exists():
                    _append(url, part, size, partial(report, file))
                    if part.stat().st_size != size or (_SHA256.fullmatch(etag) and not _has_digest(part, etag)):
                        part.unlink()
                        raise Unavailable(f"{file.repo}:{file.name} arrived damaged; try again")
                    part.replace(blob)
        except filelock.Timeout:  # another process is at it
            report(file, part.stat().st_size if part.exists() else 0)


def _append(url: str, part: Path, size: int, report: Callable[[int], None]) -> None:
    """Bring ``part`` to ``size`` bytes, over as many connections as it takes."""
    failures, told = 0, 0.0
    with part.open("ab") as out:
        done = out.tell()
        if done > size:
            done = out.truncate(0)
        while done < size:
            headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}
            before = done
            try:
                with http_stream_backoff(
                    "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, retry_on_exceptions=()
                ) as answer:
                    hf_raise_for_status(answer)
                    if answer.status_code != 206:  # a server that knows no ranges
                        done = out.truncate(0)
                    for chunk in answer.iter_bytes():
                        out.write(chunk)
                        out.flush()
                        done += len(chunk)
                        if time.monotonic() - told > 1 / REPORTS_PER_S:
                            told = time.monotonic()
                            report(done)
                    if done < size:
                        raise httpx2.RemoteProtocolError("an answer that ends early")
            except httpx2.TransportError:
                failures = 0 if done > before else failures + 1
                if failures >= TRIES:
                    raise
                time.sleep(0.2 * 2**failures)


def _has_digest(path: Path, sha256: str) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def check_space(files: Collection[File]) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    begun = (path for repo in {file.repo for file in files} for path in repo_folder(repo).glob("blobs/*.incomplete"))
    needed = sum(file.size for file in files) - sum(path.stat().st_size for path in begun)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise Unavailable(
            f"{cache} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are to be downloaded; make room, or set "
            "HF_HOME to a folder on another disk"
        )


@contextmanager
def plain_words(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the hub, the network and the disk say into our errors."""
    endpoint = constants.ENDPOINT
    try:
        yield
    except LcmError:
        raise
    except GatedRepoError as error:
        raise NotFound(
            f"{repo} is open only to those who accepted its terms: do so at {endpoint}/{repo}, then set HF_TOKEN to a "
            "token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            f"there is no repository {repo} at {endpoint}, or it is private and HF_TOKEN does not open it"
        ) from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{repo} has no revision {revision}") from error
    except RemoteEntryNotFoundError as error:
        raise NotFound(f"{repo} lacks a file that it lists") from error
    except HFValidationError as error:
        raise InputError("model", f"{repo!r} cannot be the name of a repository") from error
    except OfflineModeIsEnabled as error:
        raise Unavailable(
            f"{repo} is not whole on this machine and HF_HUB_OFFLINE forbids to fetch it: run `lcm-rt pull` without it"
        ) from error
    except HfHubHTTPError as error:
        raise Unavailable(f"{endpoint} answered {error.response.status_code} for {repo}; try again later") from error
    except (httpx2.HTTPError, LocalEntryNotFoundError) as error:
        raise Unavailable(
            f"{repo} is not whole on this machine and {endpoint} cannot be reached; check the network (an interrupted "
            "download goes on where it ended)"
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "is full: make room, or set HF_HOME to a folder on another disk" if full else f"fails: {error}"
        raise Unavailable(f"the disk under {constants.HF_HUB_CACHE} {why}") from error
    except (httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"{endpoint} does not answer as a hub does; check HF_ENDPOINT") from error
