"""Files behind a URI: a local path or s3://BUCKET/KEY, spoken to through boto3.

Endpoint, region and keys come from the environment (`AWS_ENDPOINT_URL_S3`, `AWS_ACCESS_KEY_ID`, …), as for any
S3 client. Every failure becomes a StorageError of one line.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.errors import StorageError, StorageUnavailable

# Local files are written in a folder of this name and moved, so that a reader sees a whole file or none.
UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Entry:
    """One object or file, unread. Written again, it has another mark, be the content the same. size: bytes.
    modified: when, s since 1970.
    """

    name: str
    size: int
    mark: str
    modified: float = field(default=0.0, compare=False)


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def require(root: str) -> None:
    """Raise StorageError unless the bucket of `root` is there and ours to use; a local folder is made."""
    if not is_s3(root):
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(root, error) from error
        return
    bucket, _ = parts(root)
    with translated(root):
        client().head_bucket(Bucket=bucket)


def read(uri: str) -> bytes:
    """Content of one object. Raises StorageError when it is not there."""
    if is_s3(uri):
        bucket, key = parts(uri)
        with translated(uri):
            content: bytes = client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return content
    try:
        return Path(uri).read_bytes()
    except OSError as error:
        raise _missing(uri, error) from error


def write(uri: str, content: bytes, *, if_absent: bool = False) -> bool:
    """Write one object. With `if_absent`, False when it was there already: one winner among racing writers."""
    if is_s3(uri):
        return _put(uri, content, if_absent)
    try:
        _place(Path(uri), lambda fresh: fresh.write_bytes(content), if_absent)
    except OSError as error:
        if if_absent and isinstance(error, FileExistsError) and Path(uri).is_file():
            return False
        raise _unwritable(uri, error) from error
    return True


def _place(path: Path, fill: Callable[[Path], object], if_absent: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
        fresh = Path(folder) / path.name
        fill(fresh)
        if if_absent:
            os.link(fresh, path)  # refused when the name is taken
        else:
            fresh.replace(path)


def exists(uri: str) -> bool:
    return Path(uri).exists() if not is_s3(uri) else find(uri) is not None


def find(uri: str) -> Entry | None:
    """What is known of one object without reading it; None when it is not there."""
    if not is_s3(uri):
        return _entry(Path(uri), Path(uri).name)
    from botocore.exceptions import ClientError

    bucket, key = parts(uri)
    with translated(uri):
        try:
            found = client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise
    return _object(key.rsplit("/", 1)[-1], found["ContentLength"], found)


def names(uri: str) -> list[str]:
    """Sorted names of the objects (or files) directly or deeper below a prefix, relative to it."""
    return [entry.name for entry in listing(uri)]


def listing(uri: str) -> list[Entry]:
    """The objects (or files) directly or deeper below a prefix, sorted by name, which is relative to it."""
    if not is_s3(uri):
        return sorted(_files(Path(uri)), key=lambda entry: entry.name)
    bucket, prefix = parts(uri)
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    with translated(uri):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        objects = [item for page in pages for item in page.get("Contents", [])]
    entries = (_object(item["Key"].removeprefix(prefix), item["Size"], item) for item in objects)
    return sorted(entries, key=lambda entry: entry.name)


def download(uri: str, target: Path) -> Path:
    """Copy one object to a local file; a local path is returned as it is, uncopied."""
    if not is_s3(uri):
        if not Path(uri).is_file():
            raise _missing(uri)
        return Path(uri)
    bucket, key = parts(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    with translated(uri):
        client().download_file(bucket, key, str(target))
    return target


def download_folder(uri: str, target: Path, last: str = "") -> Path:
    """Copy everything below a prefix into a local folder; a local folder is returned as it is, uncopied.

    The file named `last` comes at the end: its presence then means that all is there.
    """
    if not is_s3(uri):
        if not Path(uri).is_dir():
            raise _missing(uri)
        return Path(uri)
    found = names(uri)
    if not found:
        raise _missing(uri)
    for name in sorted(found, key=lambda name: (name == last, name)):
        if not (target / name).resolve().is_relative_to(target.resolve()):
            raise StorageError(f"names below {uri}", f"one that leads out of it, {name!r}", "do not use this folder")
        download(join(uri, name), target / name)
    return target


def upload_folder(folder: Path, uri: str, last: str) -> None:
    """Copy a folder to a URI, the file named `last` at the end: its presence then means that all is there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == last, path)):
        upload(path, join(uri, path.relative_to(folder).as_posix()))


def upload(path: Path, uri: str) -> None:
    """Copy one local file: readers see it whole or not at all."""
    if not is_s3(uri):
        try:
            _place(Path(uri), lambda fresh: shutil.copyfile(path, fresh))
        except OSError as error:
            raise _unwritable(uri, error) from error
        return
    bucket, key = parts(uri)
    with translated(uri), path.open("rb") as file:
        client().upload_fileobj(file, bucket, key)


def remove(uri: str) -> None:
    """Remove one object or file, if it is there."""
    if not is_s3(uri):
        try:
            Path(uri).unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(uri, error) from error
        return
    bucket, key = parts(uri)
    with translated(uri):
        client().delete_object(Bucket=bucket, Key=key)


def _object(name: str, size: int, found: Mapping[str, Any]) -> Entry:
    """An answer about one has its time in whole seconds, a listing may have more."""
    modified = found["LastModified"].timestamp()
    return Entry(name, size, f"{found['ETag']} {int(modified)}", modified)


def _files(root: Path) -> Iterator[Entry]:
    # os.walk goes on where a folder vanishes while it looks, as a racing writer's does; rglob does not.
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if not name.startswith(UNFINISHED)]
        for path in (Path(folder) / name for name in files):
            if entry := _entry(path, path.relative_to(root).as_posix()):
                yield entry


def _entry(path: Path, name: str) -> Entry | None:
    """None when there is no such file, or no longer."""
    try:
        about = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(about.st_mode):
        return None
    return Entry(name, about.st_size, str(about.st_mtime_ns), about.st_mtime)


def _put(uri: str, content: bytes, if_absent: bool) -> bool:
    from botocore.exceptions import ClientError

    bucket, key = parts(uri)
    condition = {"IfNoneMatch": "*"} if if_absent else {}
    with translated(uri):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=content, **condition)
        except ClientError as error:
            if if_absent and error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                return False
            raise
    return True


def client() -> Any:
    """boto3's client of the server that the environment names."""
    return _connect(os.environ.get("AWS_ENDPOINT_URL_S3"), os.environ.get("AWS_ACCESS_KEY_ID"))


@functools.cache
def _connect(endpoint: str | None, key_id: str | None) -> Any:
    """One client a server and identity; the arguments are only the cache's key, boto3 reads the environment."""
    import boto3
    from botocore.config import Config

    # Three tries: a server that cannot be reached is reported within ten seconds instead of the default minutes.
    patience = Config(connect_timeout=3, read_timeout=30, retries={"total_max_attempts": 3, "mode": "standard"})
    return boto3.Session().client("s3", config=patience)


def parts(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError("s3://BUCKET/KEY", repr(uri), "name a bucket")
    return bucket, key


def _missing(uri: str, error: Exception | None = None) -> StorageError:
    why = type(error).__name__ if error else "nothing there"
    return StorageError(f"a readable file or object at {uri}", why, "check the path, bucket and key")


def _unwritable(uri: str, error: OSError) -> StorageError:
    found = error.strerror or type(error).__name__
    return StorageError(f"a place to write at {uri}", found, "check the path, its rights and the disk")


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn boto3's exceptions into ours, for the length of the block."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    bucket, _ = parts(uri)
    try:
        yield
    except NoCredentialsError as error:
        raise StorageError(
            f"S3 credentials for {uri}", "none in the environment", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except ClientError as error:
        code = str(error.response["Error"]["Code"])
        if error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500:
            raise StorageUnavailable(
                f"an S3 server that serves {uri}", f"S3 said {code}", "look at its log and its disk"
            ) from error
        raise _refused(uri, bucket, code) from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageUnavailable(
            f"an S3 server that answers for {uri}",
            type(error).__name__,
            "start it, or correct AWS_ENDPOINT_URL_S3",
        ) from error


def _refused(uri: str, bucket: str, code: str) -> StorageError:
    if code == "NoSuchBucket" or (code in ("404", "NoSuchKey") and not _bucket_exists(bucket)):
        return StorageError(f"bucket {bucket!r}", "no such bucket", "create it or correct the URI")
    if code in ("404", "NoSuchKey"):
        return StorageError(f"an object at {uri}", "no such key", "check the key; names are case-sensitive")
    return StorageError(f"access to {uri}", f"S3 said {code}", "check the keys and their rights")


def _bucket_exists(bucket: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        client().head_bucket(Bucket=bucket)
    except ClientError:
        return False
    return True
