"""Numerics on the GPU: what every fast path gives, in half and single precision, against plain formulas in float64.

    python -m tools.bench.gpu.numerics

Fresh random ragged packs every run (the seed is printed): self-attention by every backend, the two cross-attentions,
hash embeddings, gradients that are added up in place, loss and gradients of a whole small BLT, entropies as they are
scored, and cached generation in bfloat16 against recomputation. The error is |ours - reference| / |reference| over all
entries; it must stay below 1e-2 in bfloat16 and 1e-4 in float32.
Generation may leave the recomputed text only where the same weights in float32 find the two bytes within rounding of
each other; such near-ties are counted. Exits with 1 if anything is beyond. The last line is JSON.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tools.bench.gpu.harness import Row, Settings, report, settings
from tools.bench.gpu.texts import Tokens, patch_lengths
from torch import Tensor

from blt_model import BLT, BLTConfig, ByteLM, ByteLMConfig, Generator, PackedBatch, Request, pack_documents, preset
from blt_model.attention import AttentionBackend, attend, plan_attention
from blt_model.config import Pooling
from blt_model.errors import ModelError
from blt_model.generation.reference import generate_uncached
from blt_model.hash_embedding import HashEmbedding
from blt_model.loss import cross_entropy_sum
from blt_model.row_gradients import add_rows
from blt_model.segments import Segments, bytes_read_patches, patches_read_bytes, segment_max
from blt_model.weightless import Linear
from blt_patcher import EntropyScheme, IncrementalPatcher
from blt_patcher.entropies import EntropyScorer
from blt_train.parallel.accumulation import accumulate_in_place, begin_accumulation

LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-10}
GRADIENT_LIMITS = {torch.bfloat16: 5e-2, torch.float32: 1e-4, torch.float64: 1e-10}
"""Of a whole model's gradients, through all of its layers."""
ENTROPY_LIMITS = {torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Of entropies of a model whose logits are spread ten times as wide as fresh ones."""
NEAR_TIE = 0.1
"""Nats between two bytes below which bfloat16 may prefer the other."""

Leaves = Sequence[Tensor]


def error(ours: Tensor, reference: Tensor) -> float:
    """Relative error over all entries; nan never passes."""
    wide = ours.detach().double().cpu()
    expected = reference.detach().double().cpu()
    return float((wide - expected).norm() / expected.norm())


def compare(
    what: str, leaves: Leaves, ours: Callable[..., Tensor], reference: Callable[..., Tensor], dtype: torch.dtype
) -> Row:
    """Errors of a function and its gradients on the same (rounded) inputs."""
    device = leaves[0].device
    rounded = [leaf.to(dtype) for leaf in leaves]
    mine = [leaf.clone().requires_grad_() for leaf in rounded]
    exact = [leaf.double().requires_grad_() for leaf in rounded]
    result, expected = ours(*mine), reference(*exact)
    upstream = torch.randn(expected.shape, dtype=torch.float64, device=device).to(dtype)
    gradients = torch.autograd.grad(result, mine, upstream.to(result.dtype))
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    worst = max(error(one, other) for one, other in zip(gradients, wanted, strict=True))
    return _judged(what, dtype, error(result, expected), worst, LIMITS[dtype])


def _judged(what: str, dtype: torch.dtype, forward: float, backward: float | None, limit: float) -> Row:
    worst = forward if backward is None else max(forward, backward)
    return {
        "what": what,
        "dtype": str(dtype).removeprefix("torch."),
        "error": forward,
        "gradient_error": backward,
        "limit": limit,
        "ok": bool(worst < limit),
    }


def random_offsets(rng: np.random.Generator, total: int) -> list[int]:
    """Documents of random lengths, the last of them empty."""
    cuts = np.sort(rng.choice(np.arange(1, total), size=min(6, total - 1), replace=False))
    return [0, *cuts.tolist(), total, total]


def dense_attention(query: Tensor, key: Tensor, value: Tensor, offsets: Sequence[int], window: int | None) -> Tensor:
    """Softmax attention with a full mask."""
    places = torch.arange(len(query), device=query.device)
    document = torch.bucketize(places, torch.tensor(offsets[1:], device=query.device), right=True)
    allowed = (document[:, None] == document) & (places[:, None] >= places)
    if window is not None:
        allowed &= places[:, None] - places < window
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("ihe,jhe->hij", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhe->ihe", weights, value)


def attention_rows(run: Settings, rng: np.random.Generator) -> Iterator[Row]:
    """Every backend that runs here, with and without window, with shared key heads."""
    total, width = (75, 16) if run.tiny else (1500, 64)
    for backend in (AttentionBackend.SDPA, AttentionBackend.VARLEN, AttentionBackend.TRITON, AttentionBackend.FLEX):
        for dtype in (torch.bfloat16, torch.float32):
            for window, kv_heads in ((None, 4), (33 if run.tiny else 256, 4), (33 if run.tiny else 256, 2)):
                offsets = random_offsets(rng, total)
                plan_offsets = torch.tensor(offsets, dtype=torch.int32, device=run.device)
                shapes = ((total, 4, width), (total, kv_heads, width), (total, kv_heads, width))
                leaves = [torch.randn(shape, device=run.device) for shape in shapes]

                def ours(
                    q: Tensor,
                    k: Tensor,
                    v: Tensor,
                    at: Tensor = plan_offsets,
                    by: AttentionBackend = backend,
                    reach: int | None = window,
                ) -> Tensor:
                    return attend(q, k, v, plan_attention(at, total, window=reach, backend=by))

                def reference(
                    q: Tensor, k: Tensor, v: Tensor, at: list[int] = offsets, reach: int | None = window
                ) -> Tensor:
                    return dense_attention(q, k, v, at, reach)

                name = f"{backend}, window {window}, {kv_heads} of 4 heads"
                if _refused(backend, run.device, dtype):
                    continue
                yield compare(name, leaves, ours, reference, dtype)


def _refused(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend says that it cannot run here."""
    from blt_model.attention import resolve_backend

    try:
        resolve_backend(backend, device, dtype)
    except ModelError:
        return True
    return False


def segment_rows(run: Settings, rng: np.random.Generator) -> Iterator[Row]:
    """The two cross-attentions and pooling, against masks."""
    tokens, heads, width, vectors = (40, 2, 8, 2) if run.tiny else (700, 16, 64, 2)
    lengths = patch_lengths(tokens, 4.5, rng)
    patches = len(lengths)
    ids = torch.from_numpy(np.repeat(np.arange(patches), lengths)).to(run.device)
    segments = Segments.from_ids(ids, patches)
    of = ids[None, :] == torch.arange(patches, device=run.device)[:, None]

    def patches_read(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("pkhe,the->pkht", query, key) * width**-0.5
        return torch.einsum("pkht,the->pkhe", scores.masked_fill(~of[:, None, None], -torch.inf).softmax(-1), value)

    def bytes_read(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("the,tkhe->thk", query, key[ids]) * width**-0.5
        return torch.einsum("thk,tkhe->the", scores.softmax(-1), value[ids])

    def pooled(values: Tensor) -> Tensor:
        return torch.stack([values[of[patch]].amax(0) for patch in range(patches)])

    by_patch, by_token = (patches, vectors, heads, width), (tokens, heads, width)
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [torch.randn(shape, device=run.device) for shape in (by_patch, by_token, by_token)]
        yield compare(
            "patches read bytes",
            leaves,
            lambda q, k, v: patches_read_bytes(q, torch.stack([k, v], 1), segments),
            patches_read,
            dtype,
        )
        leaves = [torch.randn(shape, device=run.device) for shape in (by_token, by_patch, by_patch)]
        yield compare(
            "bytes read patches",
            leaves,
            lambda q, k, v: bytes_read_patches(q, torch.stack([k, v], 2), segments),
            bytes_read,
            dtype,
        )
        # Distinct values: bfloat16 would tie, and ties share a gradient that amax gives to them in another way.
        spread = torch.randperm(tokens * width, device=run.device).view(tokens, width).float() / 256
        spread = spread if dtype == torch.float32 else spread.floor() % 200 + torch.arange(width, device=run.device)
        if dtype == torch.float32:
            yield compare("pooling by maximum", [spread], lambda x: segment_max(x, segments), pooled, dtype)


def hash_rows_of(run: Settings, rng: np.random.Generator) -> Iterator[Row]:
    """Hash embeddings against n-grams hashed one by one in Python's integers."""
    config = preset("blt-debug")
    if not isinstance(config, BLTConfig):
        raise TypeError("the preset is no blt")
    hashes = config.hash_embedding
    dim = 32 if run.tiny else 1024
    module = HashEmbedding(hashes, dim).to(run.device)
    tokens = torch.from_numpy(rng.integers(4, 260, 30 if run.tiny else 300)).to(run.device)
    positions = torch.arange(len(tokens), device=run.device)
    wanted = torch.tensor(
        [
            [_row(tokens.tolist(), place, n, index, hashes.table_size) for index, n in enumerate(hashes.ngram_sizes)]
            for place in range(len(tokens))
        ],
        device=run.device,
    )
    for dtype in (torch.bfloat16, torch.float32):
        table = torch.randn(module.weight.shape, device=run.device)

        def ours(weight: Tensor) -> Tensor:
            result: Tensor = torch.func.functional_call(module, {"weight": weight}, (tokens, positions))
            return result

        yield compare("hash embeddings", [table], ours, lambda weight: weight[wanted].sum(1), dtype)


def _row(tokens: Sequence[int], place: int, n: int, table: int, size: int) -> int:
    """The row of one n-gram by the released models' rule."""
    grams = [tokens[at] if at >= 0 else 0 for at in range(place - n + 1, place + 1)]
    total = 0
    # The oldest symbol counts prime ** 0, as in the released models.
    for symbol in reversed(grams):
        total = total * 1000000007 + symbol
    wrapped = (total + 2**63) % 2**64 - 2**63
    return wrapped % size + table * size


def accumulation_rows(run: Settings, rng: np.random.Generator) -> Iterator[Row]:
    """Gradients that are added up in place: of rows, some of them in all tokens, and of linear maps."""
    tokens, width, count = (60, 40, 30) if run.tiny else (8192, 1024, 60_000)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    rows = torch.distributions.Exponential(20.0).sample((tokens, 6)).mul_(count).long().clamp_(max=count - 1)
    rows[:, 0] = 1
    values = torch.randn(tokens, width, generator=generator)
    total = torch.randn(count, width, generator=generator)
    wanted = total.double()
    for column in range(rows.shape[1]):
        wanted.index_add_(0, rows[:, column], values.double())
    found = [total.clone().to(run.device) for _ in range(2)]
    for sums in found:
        add_rows(sums, rows.to(run.device), values.to(run.device))
    row = _judged("rows added in place", torch.float32, error(found[0], wanted), None, LIMITS[torch.float32])
    yield {**row, "ok": row["ok"] and torch.equal(*found)}
    layer = Linear(width, 3 * width).to(run.device)
    accumulate_in_place(layer, maps=True)
    begin_accumulation(layer)
    exact = torch.zeros(3 * width, width, dtype=torch.float64, device=run.device)
    for _ in range(3):
        x = torch.randn(tokens, width, device=run.device).bfloat16().requires_grad_()
        upstream = torch.randn(tokens, 3 * width, device=run.device).bfloat16()
        exact += upstream.double().T @ x.detach().double()
        with torch.autocast(run.device.type, torch.bfloat16):
            layer(x).backward(upstream)
    if layer.weight.grad is None:
        raise RuntimeError("the map has no gradient")
    # Of half precision's inputs, but summed in single precision.
    limit = LIMITS[torch.float32]
    yield _judged("gradient of a map, added up", torch.bfloat16, error(layer.weight.grad, exact), None, limit)


def small_models(run: Settings, pooling: Pooling = Pooling.MAX) -> tuple[BLT, ByteLM]:
    """A BLT and an entropy model in float32, small but of the real shapes' kinds."""
    local = {"dim": 256, "num_heads": 4, "window": 128}
    shape: dict[str, Any] = {
        "encoder": local,
        "decoder": {**local, "num_layers": 3},
        "latent": {"dim": 512, "num_heads": 8, "num_layers": 4},
        "cross_attention": {"num_heads": 4},
    }
    config = preset("blt-debug") if run.tiny else preset("blt-tiny", **shape)
    lm_config = preset("entropy-debug") if run.tiny else preset("entropy-tiny", transformer=local)
    if not isinstance(config, BLTConfig) or not isinstance(lm_config, ByteLMConfig):
        raise TypeError("the presets are not a blt and a byte-lm")
    config = replace(config, cross_attention=replace(config.cross_attention, pooling=pooling))
    with torch.device(run.device):
        return BLT(config).eval(), ByteLM(lm_config).eval()


def model_rows(run: Settings, rng: np.random.Generator) -> Iterator[Row]:
    """Loss and all gradients of a small BLT over a ragged pack."""
    lengths = rng.integers(3, 60 if run.tiny else 900, 5)
    texts: list[Tokens] = [np.concatenate([[1], rng.integers(4, 260, n), [2]]).astype(np.uint16) for n in lengths]
    patches = [patch_lengths(len(text), 4.5, rng) for text in texts]
    batch, targets = pack_documents([text.astype(np.int64) for text in texts], patches)
    batch, targets = batch.to(run.device), targets.to(run.device)

    def gradients(of: BLT, half: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=half):
            loss = cross_entropy_sum(of(batch), targets) / len(targets)
        found = torch.autograd.grad(loss, list(of.parameters()))
        return loss, torch.cat([gradient.double().flatten() for gradient in found])

    # Half precision's rounding decides which byte is a patch's maximum, and its gradient then goes elsewhere.
    for dtype, pooling in ((torch.bfloat16, Pooling.MEAN), (torch.float32, Pooling.MAX)):
        model, _ = small_models(run, pooling)
        exact = copy.deepcopy(model).double()
        exact.attention_backend = AttentionBackend.SDPA
        wanted = gradients(exact, False)
        loss, found = gradients(model, dtype == torch.bfloat16)
        row = _judged("loss of a BLT", dtype, error(loss, wanted[0]), None, LIMITS[dtype])
        yield row
        yield _judged("gradients of a BLT", dtype, 0.0, error(found, wanted[1]), GRADIENT_LIMITS[dtype])


def scoring_rows(run: Settings, rng: np.random.Generator) -> Iterator[Row]:
    """Entropies of ragged documents cut into windows: by the trunk that scores, and by the model's own blocks."""
    _, lm = small_models(run)
    with torch.no_grad():
        # Fresh weights are almost equally unsure everywhere.
        lm.head.weight.mul_(10)
    rows = [rng.integers(0, 256, int(n), dtype=np.uint8) for n in rng.integers(0, 50 if run.tiny else 3000, 6)]
    content = np.concatenate(rows)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    exact = []
    for row in rows:
        tokens = torch.from_numpy(np.concatenate([[1], row.astype(np.int64) + 4, [2]])).to(run.device)
        bounds = torch.tensor([0, len(tokens)], dtype=torch.int32, device=run.device)
        with torch.no_grad():
            logits = copy.deepcopy(lm).double()(PackedBatch(tokens=tokens, document_offsets=bounds))
        logarithms = logits.log_softmax(-1)
        exact.append(-(logarithms.exp() * logarithms).sum(-1))
    wanted = torch.cat(exact)
    for precision, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        scorer = EntropyScorer(
            lm, device=run.device, window_tokens=64 if run.tiny else 4096, precision=precision, compile=None
        )
        found = torch.from_numpy(scorer.score(content, offsets).astype(np.float64))
        yield _judged("entropies", dtype, error(found, wanted), None, ENTROPY_LIMITS[dtype])


def generation_rows(run: Settings, rng: np.random.Generator) -> Iterator[Row]:
    """Cached generation in the device's precision against recomputation with the same weights."""
    model, lm = small_models(run)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    with torch.no_grad():
        # Sharper than fresh weights are, so that fewer bytes are near-ties.
        model.decoder.head.weight.mul_(3)
        model.decoder.head.weight[2] = 0
    model, lm = model.to(dtype), lm.to(dtype)
    scheme = EntropyScheme(threshold=5.2, max_patch_length=6)
    new_bytes, count = (12, 2) if run.tiny else (64, 4)
    prompts = [rng.integers(32, 127, int(n), dtype=np.uint8).tobytes() for n in rng.integers(0, 300, count)]
    generator = Generator(model, new_patcher=lambda: IncrementalPatcher(scheme), entropy_model=lm, rows=count)
    completions = generator.generate([Request(prompt=prompt, max_new_bytes=new_bytes) for prompt in prompts])
    judge = Generator(
        copy.deepcopy(model).float(),
        new_patcher=lambda: IncrementalPatcher(scheme),
        entropy_model=copy.deepcopy(lm).float(),
        rows=count,
    )
    equal = 0
    gaps: list[float] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        for index in range(new_bytes):
            text = prompt + completion.content[:index]
            patcher = IncrementalPatcher(scheme)
            recomputed = next(
                generate_uncached(model, text, next_patch=patcher, entropy_model=lm, max_new_bytes=1), None
            )
            if recomputed == completion.content[index]:
                equal += 1
                continue
            other = [recomputed, completion.content[index]]
            scores = [
                judge.score([text], [bytes([byte])])[0].log_probabilities[0] for byte in other if byte is not None
            ]
            gaps.append(abs(scores[0] - scores[-1]) if len(scores) == 2 else math.inf)
    wrong = sum(not gap < NEAR_TIE for gap in gaps)
    total = equal + len(gaps)
    row = _judged("cached generation: bytes that differ", dtype, len(gaps) / total, None, 0.1)
    yield {
        **row,
        "ok": wrong == 0,
        "bytes": total,
        "near_ties": len(gaps) - wrong,
        "wrong": wrong,
        "gap": max(gaps, default=0.0),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare everything for which there is time."""
    run = settings(__doc__, arguments, budget=90)
    seed = int(os.environ.get("BLT_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"BLT_TEST_SEED={seed}")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    torch.set_float32_matmul_precision("highest")
    parts = {
        "segments": segment_rows,
        "hashes": hash_rows_of,
        "accumulation": accumulation_rows,
        "model": model_rows,
        "scoring": scoring_rows,
        "generation": generation_rows,
        "attention": attention_rows,
    }
    rows: list[Row] = []
    for name, part in parts.items():
        for row in part(run, rng) if run.wants(name) else ():
            # At once: a run that is cut short has shown what it found.
            print(row, flush=True)
            rows.append(row)
    report("numerics", run, rows, seed=seed)
    if not all(row["ok"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
