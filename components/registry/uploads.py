"""Writes that were broken off: multipart uploads in S3, `.unfinished-*` folders on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components import storage
from components.registry.garbage import Thing
from components.storage import Entry


def unfinished(uri: str) -> Iterator[Thing]:
    """What was begun to be written below a place and is not there yet."""
    return _in_s3(uri) if storage.is_s3(uri) else _on_disk(Path(uri))


def abort(thing: Thing) -> None:
    """End a multipart upload: its parts are freed, and its writer, if there is one after all, is refused."""
    bucket, key = storage.parts(thing.place)
    with storage.translated(thing.place), _unless_ended():
        storage.client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=thing.mark)


@contextmanager
def _unless_ended() -> Iterator[None]:
    """An upload that was ended meanwhile is none any more."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchUpload":
            raise


def _in_s3(uri: str) -> Iterator[Thing]:
    bucket, prefix = storage.parts(uri)
    with storage.translated(uri):
        pages = storage.client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        found = [upload for page in pages for upload in page.get("Uploads", ())]
        for upload in found:
            if not upload["Key"].startswith(f"{prefix}/"):  # a server that heeds no prefix
                continue
            name = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            parts: list[Any] = []
            with _unless_ended():
                pages = storage.client().get_paginator("list_parts").paginate(**name)
                parts = [part for page in pages for part in page.get("Parts", ())]
            begun = upload["Initiated"].timestamp()
            files = tuple(
                Entry(str(part["PartNumber"]), part["Size"], part["ETag"], part["LastModified"].timestamp())
                for part in parts
            )
            place = f"s3://{bucket}/{upload['Key']}"
            modified = max([begun, *(file.modified for file in files)])
            yield Thing("upload", place, place, files, modified, mark=upload["UploadId"])


def _on_disk(root: Path) -> Iterator[Thing]:
    for folder, names, _ in os.walk(root):
        for name in [name for name in names if name.startswith(storage.UNFINISHED)]:
            path = Path(folder) / name
            entries = []
            try:
                for file in sorted(each for each in path.rglob("*") if each.is_file()):
                    about = file.stat()
                    inner = file.relative_to(folder).as_posix()
                    entries.append(Entry(inner, about.st_size, str(about.st_mtime_ns), about.st_mtime))
                modified = max([path.stat().st_mtime, *(entry.modified for entry in entries)])
            except FileNotFoundError:  # its writer has finished
                continue
            yield Thing("unfinished", str(path), folder, tuple(entries), modified)
