"""The configurations of both models, their JSON form, and the presets.

A configuration describes arithmetic only: two models with equal configurations and equal weights compute the same
function. What merely changes how fast it is computed (attention backend, device, dtype) is not in here.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from blt_model.errors import ModelError

FORMAT_VERSION = 1
"""Version of the JSON form."""


class Placement(StrEnum):
    """Which layers of a local model have cross-attention."""

    ALL = "all"
    FIRST = "first"
    LAST = "last"


class Pooling(StrEnum):
    """How the bytes of a patch make the initial query of the encoder's cross-attention."""

    MAX = "max"
    MEAN = "mean"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ModelError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """A stack of pre-norm transformer blocks: RMSNorm, rotary causal self-attention, SwiGLU."""

    dim: int
    """Width of the residual stream; a multiple of 2 * num_heads."""
    num_layers: int
    """Number of blocks, at least 1."""
    num_heads: int
    """Query heads of self-attention."""
    num_kv_heads: int | None = None
    """Key and value heads, a divisor of num_heads; None means num_heads."""
    ffn_dim: int | None = None
    """Inner width of SwiGLU; None means 8/3 dim rounded up to a multiple of 256 (of 32 where dim < 256)."""
    window: int | None = None
    """Tokens that a token attends to, itself included; None means its whole document up to it."""
    rope_theta: float = 500_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""

    def __post_init__(self) -> None:
        """Refuse impossible sizes.

        Raises:
            ModelError: naming the field and the rule.
        """
        _check(self.num_layers >= 1, f"num_layers is {self.num_layers}; a stack needs at least 1 layer.")
        _check(self.num_heads >= 1, f"num_heads is {self.num_heads}; at least 1 is needed.")
        _check(
            self.dim >= 2 and self.dim % (2 * self.num_heads) == 0,
            f"dim {self.dim} is no multiple of 2 * num_heads = {2 * self.num_heads}; rotary heads need an even width.",
        )
        _check(
            self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0,
            f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}.",
        )
        _check(self.ffn_dim is None or self.ffn_dim >= 1, f"ffn_dim is {self.ffn_dim}; give at least 1, or null.")
        _check(self.window is None or self.window >= 1, f"window is {self.window}; give at least 1, or null for none.")
        _check(self.rope_theta > 0, f"rope_theta is {self.rope_theta}; it must be positive.")
        _check(self.norm_eps > 0, f"norm_eps is {self.norm_eps}; it must be positive.")

    def in_shortest_form(self) -> TransformerConfig:
        """The same architecture with None wherever None means the same, so that equal ones have equal fingerprints."""
        default = dataclasses.replace(self, ffn_dim=None)
        return dataclasses.replace(
            self,
            num_kv_heads=None if self.kv_heads == self.num_heads else self.num_kv_heads,
            ffn_dim=None if self.ffn_dim == default.feed_forward_dim else self.ffn_dim,
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def feed_forward_dim(self) -> int:
        """Inner width of SwiGLU."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        multiple = 256 if self.dim >= 256 else 32
        return -(-(8 * self.dim // 3) // multiple) * multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossAttentionConfig:
    """Cross-attention between bytes and patches, in the local encoder and the local decoder."""

    num_heads: int
    """Heads, a divisor of the local width."""
    k: int = 2
    """Vectors of local width that stand for one patch (the paper's k)."""
    encoder_placement: Placement = Placement.LAST
    """Encoder layers after which the patch vectors read their bytes; the vectors pass from one to the next."""
    decoder_placement: Placement = Placement.ALL
    """Decoder layers before which the bytes read a patch's vectors."""
    pooling: Pooling = Pooling.MAX
    """How the bytes of a patch make its first query vectors."""
    double_residual: bool = True
    """Cross-attention gives 2x + attention, as the released models do; false gives the paper's x + attention."""

    def __post_init__(self) -> None:
        """Refuse impossible sizes and turn plain strings into their enumerations.

        Raises:
            ModelError: naming the field and the rule.
        """
        _check(self.num_heads >= 1, f"cross_attention.num_heads is {self.num_heads}; at least 1 is needed.")
        _check(self.k >= 1, f"cross_attention.k is {self.k}; at least 1 is needed.")
        for field, kind in (
            ("encoder_placement", Placement),
            ("decoder_placement", Placement),
            ("pooling", Pooling),
        ):
            value = getattr(self, field)
            choices = [str(member) for member in kind]
            _check(value in choices, f"cross_attention.{field} is {value!r}; choose one of {', '.join(choices)}.")
            object.__setattr__(self, field, kind(value))


@dataclass(frozen=True, kw_only=True, slots=True)
class HashEmbeddingConfig:
    """Hash n-gram embeddings, added to the byte embeddings of the local encoder."""

    ngram_sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    """Lengths of the byte n-grams; none for no hash embedding."""
    num_functions: int = 1
    """Hash functions, each with its own table for every n-gram size; at most 11."""
    table_size: int = 500_002
    """Rows of one table."""
    newest_first: bool = False
    """The newest token takes power 0 of the prime (the paper); false gives it to the oldest (the released models)."""
    raw_bytes: bool = False
    """Hash byte values (the paper); false hashes token ids, which are byte values + 4 (the released models)."""
    omit_partial: bool = False
    """Leave out n-grams that begin before the document (the paper); false fills them with id 0 (released models)."""
    average: bool = False
    """Divide the sum by the number of embeddings in it (the paper); false leaves the sum (the released models)."""

    def __post_init__(self) -> None:
        """Refuse impossible sizes.

        Raises:
            ModelError: naming the field and the rule.
        """
        object.__setattr__(self, "ngram_sizes", tuple(self.ngram_sizes))
        sizes = self.ngram_sizes
        _check(
            all(isinstance(n, int) and n >= 1 for n in sizes) and len(set(sizes)) == len(sizes),
            f"hash_embedding.ngram_sizes is {list(sizes)}; give different whole numbers of at least 1.",
        )
        _check(
            1 <= self.num_functions <= 11,
            f"hash_embedding.num_functions is {self.num_functions}; there are 11 primes, so give 1 to 11.",
        )
        _check(self.table_size >= 1, f"hash_embedding.table_size is {self.table_size}; at least 1 row is needed.")

    @property
    def num_tables(self) -> int:
        """Number of tables of table_size rows."""
        return self.num_functions * len(self.ngram_sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteLMConfig:
    """The entropy language model: a byte-level decoder-only transformer with sliding-window attention."""

    transformer: TransformerConfig
    """The trunk; its window must be given, since documents have no length limit."""

    def __post_init__(self) -> None:
        """Refuse a trunk without window.

        Raises:
            ModelError: when transformer.window is None.
        """
        _check(self.transformer.window is not None, "transformer.window is null; a byte-lm needs a window.")

    @property
    def window(self) -> int:
        """Tokens that a token attends to, itself included."""
        if self.transformer.window is None:
            raise ModelError("transformer.window is null; a byte-lm needs a window.")
        return self.transformer.window


@dataclass(frozen=True, kw_only=True, slots=True)
class BLTConfig:
    """The Byte Latent Transformer: local encoder, latent transformer over patches, local decoder."""

    encoder: TransformerConfig
    """Local encoder, over bytes."""
    latent: TransformerConfig
    """Latent ("global") transformer, over patches."""
    decoder: TransformerConfig
    """Local decoder, over bytes; as wide as the encoder, whose byte states it starts from."""
    cross_attention: CrossAttentionConfig
    """How bytes and patches exchange information."""
    hash_embedding: HashEmbeddingConfig = HashEmbeddingConfig()
    """Hash n-gram embeddings of the encoder."""

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other.

        Raises:
            ModelError: naming the fields and the rule.
        """
        _check(
            self.encoder.dim == self.decoder.dim,
            f"encoder.dim {self.encoder.dim} and decoder.dim {self.decoder.dim} differ; the decoder starts from the "
            "encoder's byte states, so make them equal.",
        )
        _check(
            self.encoder.dim % self.cross_attention.num_heads == 0,
            f"cross_attention.num_heads {self.cross_attention.num_heads} does not divide encoder.dim "
            f"{self.encoder.dim}.",
        )

    @property
    def patch_dim(self) -> int:
        """Width of a patch as the encoder leaves it: k vectors of local width, end to end."""
        return self.encoder.dim * self.cross_attention.k

    @property
    def projects_patches(self) -> bool:
        """Whether a linear map takes the encoder's patches to the latent width (only where the widths differ)."""
        return self.patch_dim != self.latent.dim


ModelConfig = ByteLMConfig | BLTConfig
_ARCHITECTURES: dict[str, type[ByteLMConfig] | type[BLTConfig]] = {"byte-lm": ByteLMConfig, "blt": BLTConfig}
_NESTED: dict[str, type[Any]] = {
    "transformer": TransformerConfig,
    "encoder": TransformerConfig,
    "latent": TransformerConfig,
    "decoder": TransformerConfig,
    "cross_attention": CrossAttentionConfig,
    "hash_embedding": HashEmbeddingConfig,
}
_Part = TypeVar("_Part")


def architecture_of(config: ModelConfig) -> str:
    """The name of a configuration's architecture: "byte-lm" or "blt"."""
    return "byte-lm" if isinstance(config, ByteLMConfig) else "blt"


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The JSON form of a configuration: its fields, nested, with the architecture and the format version.

    Args:
        config: of either model.

    Returns:
        A dictionary of plain JSON values; from_json gives the equal configuration back.
    """
    fields = dataclasses.asdict(config)
    if isinstance(config, BLTConfig):
        fields["hash_embedding"]["ngram_sizes"] = list(config.hash_embedding.ngram_sizes)
        for field in ("encoder_placement", "decoder_placement", "pooling"):
            fields["cross_attention"][field] = str(fields["cross_attention"][field])
    return {"architecture": architecture_of(config), "format_version": FORMAT_VERSION, **fields}


def from_json(document: Mapping[str, Any]) -> ModelConfig:
    """Read a configuration from its JSON form.

    Args:
        document: what to_json returned.

    Returns:
        The configuration.

    Raises:
        ModelError: unknown architecture, version or key (with the nearest known key), missing key, or a bad value.
    """
    fields = dict(document)
    architecture = fields.pop("architecture", None)
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise ModelError(f"architecture is {architecture!r}; choose one of {', '.join(_ARCHITECTURES)}.")
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ModelError(f"format_version is {version!r}; this blt-model reads version {FORMAT_VERSION}.")
    return _build(_ARCHITECTURES[architecture], fields, "")


def _build(kind: type[_Part], fields: Mapping[str, Any], where: str) -> _Part:
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass type
    for key in fields:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ModelError(f"{where}{key} is no configuration key; did you mean {where}{nearest[0]}?")
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _NESTED:
            if not isinstance(value, Mapping):
                raise ModelError(f"{where}{name} must be a mapping of its fields.")
            values[name] = _build(_NESTED[name], value, f"{where}{name}.")
        else:
            values[name] = _plain(value, str(known[name].type), f"{where}{name}")
    missing = [
        name
        for name, field in known.items()
        if name not in fields and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ModelError(f"{where}{missing[0]} is missing from the configuration.")
    return kind(**values)


def _plain(value: Any, annotation: str, name: str) -> Any:
    """Check a leaf value against its annotation; whole numbers pass as floats, as JSON writers drop the point."""
    options = annotation.split(" | ")
    if value is None and "None" in options:
        return None
    kind = options[0]
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        return tuple(value)
    if kind in ("Placement", "Pooling") and isinstance(value, str):
        return value
    raise ModelError(f"{name} is {value!r}; it must be of type {annotation}.")


def _local(dim: int, num_layers: int, num_heads: int, window: int = 512) -> TransformerConfig:
    return TransformerConfig(dim=dim, num_layers=num_layers, num_heads=num_heads, window=window)


def _blt(
    encoder: tuple[int, int, int], latent: tuple[int, int, int], decoder: tuple[int, int, int], k: int
) -> BLTConfig:
    """A row of the paper's Table 10; every triple is layers, heads, dim."""
    return BLTConfig(
        encoder=_local(encoder[2], encoder[0], encoder[1]),
        latent=TransformerConfig(dim=latent[2], num_layers=latent[0], num_heads=latent[1]),
        decoder=_local(decoder[2], decoder[0], decoder[1]),
        cross_attention=CrossAttentionConfig(num_heads=decoder[1], k=k),
    )


def _small_blt(
    encoder: tuple[int, int, int],
    latent: tuple[int, int, int],
    decoder: tuple[int, int, int],
    window: int,
    table_size: int,
) -> BLTConfig:
    """A BLT for one CPU; every triple is layers, heads, dim."""
    return BLTConfig(
        encoder=_local(encoder[2], encoder[0], encoder[1], window),
        latent=TransformerConfig(dim=latent[2], num_layers=latent[0], num_heads=latent[1]),
        decoder=_local(decoder[2], decoder[0], decoder[1], window),
        cross_attention=CrossAttentionConfig(num_heads=decoder[1], k=2),
        hash_embedding=HashEmbeddingConfig(table_size=table_size),
    )


PRESETS: dict[str, ModelConfig] = {
    # The released entropy model's rotary base is 10,000, unlike the other parts'.
    "entropy-100m": ByteLMConfig(
        transformer=TransformerConfig(dim=768, num_layers=14, num_heads=12, window=512, rope_theta=10_000.0)
    ),
    "entropy-tiny": ByteLMConfig(transformer=_local(dim=128, num_layers=4, num_heads=4, window=128)),
    "entropy-debug": ByteLMConfig(transformer=_local(dim=32, num_layers=2, num_heads=2, window=8)),
    # Table 10 gives 10 cross-attention heads here, which do not divide 768; every other row has the local heads.
    "blt-400m": _blt((1, 12, 768), (24, 10, 1280), (7, 12, 768), k=2),
    "blt-1b": _blt((1, 16, 1024), (25, 16, 2048), (9, 16, 1024), k=2),
    "blt-2b": _blt((1, 16, 1024), (26, 20, 2560), (9, 16, 1024), k=3),
    "blt-4b": _blt((1, 16, 1024), (36, 24, 3072), (9, 16, 1024), k=3),
    "blt-8b": _blt((1, 20, 1280), (32, 32, 4096), (6, 20, 1280), k=4),
    "blt-tiny": _small_blt((1, 4, 128), (3, 6, 192), (2, 4, 128), window=128, table_size=8192),
    "blt-debug": _small_blt((1, 2, 32), (2, 4, 64), (2, 2, 32), window=8, table_size=64),
}
"""Every named configuration."""


def preset(name: str, **overrides: Any) -> ModelConfig:
    """A preset, with fields replaced.

    Args:
        name: one of PRESETS.
        overrides: fields of the configuration; a mapping replaces only the fields that it names, for example
            ``preset("blt-tiny", latent={"num_layers": 6})``.

    Returns:
        The configuration.

    Raises:
        ModelError: unknown preset (with the nearest known one), unknown field or bad value.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ModelError(f"{name!r} is no preset; did you mean {nearest[0]!r}?")
    return from_json(_merge(to_json(PRESETS[name]), overrides))


def _merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        below = merged.get(key)
        nested = isinstance(below, dict) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
