"""Sections of tensors in one file or several: any rows come back as they were written, and damage is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blt_model import ByteLM, ByteLMConfig, ModelError, load, load_model, model_fingerprint, preset, save_model
from blt_model.weights.native import CONFIG_FILE, config_text, weights_metadata
from blt_model.weights.section_reading import SectionReader
from blt_model.weights.section_writing import (
    BLOCK_BYTES,
    CHECKSUM_KEY,
    ROWS_KEY,
    SAVE_KEY,
    Piece,
    section_file_name,
    write_section_file,
)


def tensors() -> dict[str, torch.Tensor]:
    """Some of every kind: more than a block, fewer rows than files, no dimension, no rows, other dtypes, not dense."""
    generator = torch.Generator().manual_seed(0)
    rows = BLOCK_BYTES // 4 // 100 + 1000
    return {
        "large": torch.randn(rows, 100, generator=generator),
        "half": torch.randn(37, 3, generator=generator).bfloat16(),
        "few": torch.randn(2, generator=generator),
        "scalar": torch.tensor(3.5),
        "count": torch.arange(11),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(5, 7, generator=generator).T,
    }


def write_split(
    directory: Path, stored: Mapping[str, torch.Tensor], count: int, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a section `model` as `count` processes would, cutting rows unevenly."""
    directory.mkdir(exist_ok=True)
    for index in range(count):
        pieces = []
        for name, tensor in stored.items():
            if tensor.ndim == 0:
                pieces += [Piece(name, tensor)] if index == 0 else []
                continue
            bounds = [tensor.shape[0] * part * part // count**2 for part in (index, index + 1)]
            pieces.append(Piece(name, tensor[bounds[0] : bounds[1]], bounds[0], tensor.shape[0]))
        entries = {SAVE_KEY: "step-00000002", **(metadata or {})}
        write_section_file(directory / section_file_name("model", index, count), pieces, entries)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_rows_come_back(tmp_path: Path, count: int) -> None:
    stored = tensors()
    write_split(tmp_path, stored, count)
    reader = SectionReader(tmp_path, "model")
    assert {name: info.shape for name, info in reader.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    for name, tensor in stored.items():
        whole = torch.full(tensor.shape, 77, dtype=tensor.dtype)
        reader.read(name, whole)
        assert torch.equal(whole, tensor)
        for first, stop in ((0, 1), (1, 5), (2, 2), (tensor.shape[0] // 3, tensor.shape[0])) if tensor.ndim else ():
            rows = torch.full_like(tensor[first:stop].contiguous(), 77)
            reader.read_rows(name, first, rows)
            assert torch.equal(rows, tensor[first:stop])
    into = torch.empty(stored["large"].shape, dtype=torch.float64)
    reader.read("large", into)
    assert torch.equal(into, stored["large"].double())


def test_files_are_what_safetensors_reads_and_writes(tmp_path: Path) -> None:
    stored = {name: tensor.contiguous() for name, tensor in tensors().items()}
    write_section_file(tmp_path / "ours.safetensors", [Piece(name, item) for name, item in stored.items()])
    theirs = load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == stored.keys()
    assert all(torch.equal(theirs[name], stored[name]) for name in stored)
    save_file(stored, tmp_path / "theirs.safetensors")
    reader = SectionReader(tmp_path, "theirs")
    for name, tensor in stored.items():
        back = torch.empty_like(tensor)
        reader.read(name, back)
        assert torch.equal(back, tensor)


@pytest.mark.parametrize("position", [0.0, 0.4, 0.999])
def test_a_changed_byte_is_found_by_whoever_needs_it(tmp_path: Path, position: float) -> None:
    stored = {"large": tensors()["large"]}
    write_split(tmp_path, stored, 2)
    path = tmp_path / section_file_name("model", 1, 2)
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    at = begin + int(position * (len(data) - begin))
    data[at] ^= 1
    path.write_bytes(data)
    reader = SectionReader(tmp_path, "model")
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is damaged: what it holds of large"):
        reader.read("large", torch.empty_like(stored["large"]))
    # Rows of the other file are sound, and are read without it.
    sound = torch.empty(10, 100)
    reader.read_rows("large", 0, sound)
    assert torch.equal(sound, stored["large"][:10])


def _second(directory: Path) -> Path:
    return directory / section_file_name("model", 1, 3)


def _lose(directory: Path) -> None:
    _second(directory).unlink()


def _cut(directory: Path) -> None:
    _second(directory).write_bytes(_second(directory).read_bytes()[:-1])


def _lengthen(directory: Path) -> None:
    _second(directory).write_bytes(_second(directory).read_bytes() + b"x")


def _mix_saves(directory: Path) -> None:
    _change_metadata(directory, SAVE_KEY, "step-00000004")


def _lose_checksums(directory: Path) -> None:
    _change_metadata(directory, CHECKSUM_KEY, "00")


def _mix_counts(directory: Path) -> None:
    (directory / section_file_name("model", 0, 2)).write_bytes(_second(directory).read_bytes())


def _overlap(directory: Path) -> None:
    _change_metadata(directory, ROWS_KEY, '{"rows":[2,9]}')


def _leave_a_gap(directory: Path) -> None:
    _change_metadata(directory, ROWS_KEY, '{"rows":[4,9]}')


def _leave_the_end_out(directory: Path) -> None:
    path = directory / section_file_name("model", 2, 3)
    write_section_file(path, [], {SAVE_KEY: "step-00000002"})


def _disagree(directory: Path) -> None:
    _change_metadata(directory, ROWS_KEY, '{"rows":[3,10]}')


def _put_rows_outside(directory: Path) -> None:
    _change_metadata(directory, ROWS_KEY, '{"rows":[8,9]}')


def _spoil_rows(directory: Path) -> None:
    _change_metadata(directory, ROWS_KEY, '{"rows":3}')


def _change_metadata(directory: Path, key: str, value: str) -> None:
    path = _second(directory)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    save_file(load_file(path), path, metadata={**metadata, key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_lose, r"model-00002-of-00003\.safetensors is missing; copy the directory again"),
        (_cut, r"model-00002-of-00003\.safetensors is damaged"),
        (_lengthen, r"model-00002-of-00003\.safetensors is damaged \(it is longer than its header says\)"),
        (_mix_saves, r"model-00002-of-00003\.safetensors is of step-00000004, not of step-00000002 like the files"),
        (_lose_checksums, r"model-00002-of-00003\.safetensors is damaged \(checksums are missing\)"),
        (_mix_counts, r"holds model files of 2 and of 3: they are of different checkpoints"),
        (_overlap, r"model-00002-of-00003.* and .*model-00001-of-00003.* both hold row 2 of rows"),
        (_leave_a_gap, r"hold all rows of rows but those from 3 to 3"),
        (_leave_the_end_out, r"hold all rows of rows but those from 6 to 8"),
        (_disagree, r"hold parts of rows that do not fit each other"),
        (
            _put_rows_outside,
            r"model-00002-of-00003.* is damaged \(it holds 3 rows of rows from 8 on, of 9\)",
        ),
        (_spoil_rows, r"model-00002-of-00003\.safetensors is damaged"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    for index in range(3):
        piece = Piece("rows", torch.arange(3.0) + 3 * index, 3 * index, 9)
        path = tmp_path / section_file_name("model", index, 3)
        write_section_file(path, [piece], {SAVE_KEY: "step-00000002"})
    SectionReader(tmp_path, "model")
    change(tmp_path)
    with pytest.raises(ModelError, match=words) as caught:
        SectionReader(tmp_path, "model")
    assert str(caught.value).startswith(str(tmp_path))
    assert re.search(r"[^.]\.$", str(caught.value))


def byte_lm() -> ByteLM:
    torch.manual_seed(1)
    config = preset("entropy-debug")
    assert isinstance(config, ByteLMConfig)
    return ByteLM(config)


def test_a_model_in_several_files_is_a_model_directory(tmp_path: Path) -> None:
    model = byte_lm()
    metadata = weights_metadata(model.config)
    write_split(tmp_path / "split", model.state_dict(), 3, metadata)
    (tmp_path / "split" / CONFIG_FILE).write_text(config_text(model.config))
    assert model_fingerprint(load_model(tmp_path / "split")) == model_fingerprint(model)
    assert model_fingerprint(load(tmp_path / "split").model) == model_fingerprint(model)
    half = load_model(tmp_path / "split", dtype=torch.bfloat16)
    assert all(torch.equal(tensor, model.state_dict()[name].bfloat16()) for name, tensor in half.state_dict().items())
    # The same model in one file is the same to whoever loads it.
    save_model(load_model(tmp_path / "split"), tmp_path / "whole")
    save_model(model, tmp_path / "direct")
    names = ("config.json", "model.safetensors")
    assert [(tmp_path / "whole" / name).read_bytes() for name in names] == [
        (tmp_path / "direct" / name).read_bytes() for name in names
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full disk for tests")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_section_file(path, [Piece("large", tensors()["large"])])
    assert caught.value.filename == str(path)
