"""Mean patch length by script and language, as the tables of docs/patching.md: `patches_by_language.py DIR [DIR …]`.

The directories are patchings of the same documents. A document's language is what `--by-id` finds in its id; its script
is that of most of its letters, by their Unicode names. Patches are compared with those of `--reference`, which means
something where the documents are translations of one text, as the Universal Declaration of Human Rights is.
"""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import click

from blt_data import ShardDirectory, ShardKind
from blt_data.console import friendly_errors
from blt_data.errors import InputError
from blt_patcher.grouped_stats import UNMATCHED, GroupedStats, GroupStats, by_id

#: Characters of a document that decide on its script.
_LOOKED_AT = 3000

#: Unicode names begin with these words for more than one script's letters, or for letters by another name.
_NAMES = {
    "CJK": "Han",
    "CANADIAN": "Canadian Aboriginal",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "TAGALOG": "Baybayin",
}


def script_of(text: str) -> str:
    """Return the script that most of a text's letters are of."""
    names = Counter(
        unicodedata.name(character, "?").split(" ")[0] for character in text[:_LOOKED_AT] if character.isalpha()
    )
    if not names:
        return "none"
    name = names.most_common(1)[0][0]
    return _NAMES.get(name, name.capitalize())


def scripts_of_languages(directory: ShardDirectory, expression: re.Pattern[str]) -> dict[str, str]:
    """Return the script of each language, from its first document that has letters."""
    name_of = by_id(expression)
    found: dict[str, str] = {}
    for index in range(len(directory)):
        shard = directory.shard(index)
        for row, language in enumerate(name_of(shard)):
            if language != UNMATCHED and found.get(language, "none") == "none":
                found[language] = script_of(shard.content(row).tobytes().decode("utf-8", errors="replace"))
    return found


def script_rows(
    languages: dict[str, list[GroupStats]], scripts: dict[str, str], reference: list[GroupStats]
) -> list[list[str]]:
    """Return a row for each script: languages, bytes a character, and for each directory the medians over languages."""
    members: dict[str, list[str]] = defaultdict(list)
    for language in languages:
        members[scripts[language]].append(language)
    rows = []
    for script, names in sorted(members.items(), key=lambda item: (-len(item[1]), item[0])):
        first = [languages[name][0] for name in names]
        row = [script, str(len(names)), f"{statistics.median(each.bytes_per_character for each in first):.2f}"]
        for place, own in enumerate(reference):
            groups = [languages[name][place] for name in names]
            row += [
                f"{statistics.median(each.mean for each in groups):.2f}",
                f"{statistics.median(each.characters_per_patch for each in groups):.2f}",
                f"{statistics.median(each.patches / own.patches for each in groups):.2f}",
            ]
        rows.append(row)
    return rows


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, its first column to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@click.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--by-id", "expression", required=True, help="Finds the language in a document's id.")
@click.option("--reference", default="eng", show_default=True, help="The language that patches are compared with.")
@click.option("--least-bytes", default=2000, show_default=True, help="Languages with less text are left out.")
@friendly_errors
def main(directories: tuple[Path, ...], expression: str, reference: str, least_bytes: int) -> None:
    """Print both tables."""
    pattern = re.compile(expression)
    opened = [ShardDirectory.open(path, kind=ShardKind.PATCHED) for path in directories]
    counted = []
    for directory in opened:
        grouped = GroupedStats(by_id(pattern))
        for index in range(len(directory)):
            grouped.add(directory.verified_shard(index))
        counted.append(grouped.groups)
    languages = {
        name: [groups[name] for groups in counted]
        for name, group in counted[0].items()
        if name != UNMATCHED and group.bytes >= least_bytes
    }
    if reference not in languages:
        raise InputError(f"{directories[0]}: has no language {reference!r}; name one with --reference")
    scripts = scripts_of_languages(opened[0], pattern)
    header = ["script", "languages", "bytes/character"]
    for path in directories:
        header += [f"{path.name}: mean length", "characters/patch", f"patches / {reference}"]
    click.echo(markdown(header, script_rows(languages, scripts, languages[reference])))
    click.echo()
    by_script: dict[str, list[str]] = defaultdict(list)
    for name, groups in sorted(languages.items()):
        by_script[scripts[name]].append(f"{name} {groups[0].mean:.2f}")
    for script, entries in sorted(by_script.items(), key=lambda item: (-len(item[1]), item[0])):
        click.echo(f"- **{script}**: {', '.join(entries)}")


if __name__ == "__main__":
    main()
