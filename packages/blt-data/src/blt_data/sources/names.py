"""Short names of public collections, and where the hub keeps their files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from blt_data.errors import InputError

#: A crawl of Common Crawl, by which FineWeb is divided.
_CRAWL: Final = re.compile(r"CC-MAIN-\d{4}-\d{2}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """A dataset of the hub that has a short name."""

    dataset: str
    """OWNER/NAME on the hub."""
    configs: Mapping[str, str]
    """Config to the glob of its files in the repository; `default` is what the bare name means."""
    crawls: str | None = None
    """Glob of the files of one crawl, with `{crawl}` for its name, if the dataset is divided by crawls."""
    id_column: str | None = None
    """Where the ids are, if not under `id`."""

    def pattern(self, name: str, config: str) -> str:
        """Return the glob of a config's files.

        Args:
            name: the short name, for messages.
            config: the config.

        Raises:
            InputError: there is no such config.
        """
        if config in self.configs:
            return self.configs[config]
        if self.crawls is not None and _CRAWL.fullmatch(config):
            return self.crawls.format(crawl=config)
        known = [*self.configs, *(["CC-MAIN-YYYY-WW"] if self.crawls else [])]
        near = difflib.get_close_matches(config, known, n=1)
        hint = f"did you mean {name}/{near[0]}?" if near else f"it has {', '.join(known)}"
        raise InputError(f"{name}/{config}: there is no such path here, and {name} has no config {config!r}; {hint}")


_FINEWEB_CONFIGS: Final = {
    "default": "data/*/*.parquet",
    "sample-10BT": "sample/10BT/*.parquet",
    "sample-100BT": "sample/100BT/*.parquet",
    "sample-350BT": "sample/350BT/*.parquet",
}

COLLECTIONS: Final[Mapping[str, Collection]] = {
    "fineweb-edu": Collection(
        dataset="HuggingFaceFW/fineweb-edu", configs=_FINEWEB_CONFIGS, crawls="data/{crawl}/*.parquet"
    ),
    "fineweb": Collection(dataset="HuggingFaceFW/fineweb", configs=_FINEWEB_CONFIGS, crawls="data/{crawl}/*.parquet"),
    "dclm-baseline-1.0": Collection(
        dataset="mlfoundations/dclm-baseline-1.0",
        configs={"default": "global-shard_*_of_10/local-shard_*_of_10/*.jsonl.zst"}
        | {
            f"global-shard_{index:02d}_of_10": f"global-shard_{index:02d}_of_10/local-shard_*_of_10/*.jsonl.zst"
            for index in range(1, 11)
        },
        id_column="metadata.WARC-Record-ID",
    ),
}


def collection_of(source: str) -> tuple[Collection, str, str] | None:
    """Return the collection that a short name means, the glob of its files, and what the source is called.

    Args:
        source: such as `fineweb-edu` or `fineweb-edu/sample-10BT`.

    Raises:
        InputError: the collection has no such config.
    """
    name, _, config = source.partition("/")
    collection = COLLECTIONS.get(name)
    if collection is None:
        return None
    return collection, collection.pattern(name, config.strip("/") or "default"), source.strip("/")
