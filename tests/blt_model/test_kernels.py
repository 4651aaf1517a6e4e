"""The Triton kernels of generation against the plain steps: on CUDA as they are, elsewhere by Triton's interpreter."""

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from tests.blt_model.generation_oracle import (
    Odd,
    fresh_blt,
    fresh_seed,
    one_layer_models,
    run_uncaptured,
    without_ties,
)
from tests.blt_model.triton_runs import CUDA, DEVICE, need_kernels, run_interpreted, runs_interpreted
from torch import Tensor, nn

from blt_model import BLT, ByteLM, Generator, Request, SamplingOptions
from blt_model.byte_lm import next_byte_entropy
from blt_model.caches import AttentionCache
from blt_model.config import CrossAttentionConfig, HashEmbeddingConfig, Placement, Pooling, TransformerConfig
from blt_model.cross_attention import BytesReadPatches, PatchesReadBytes
from blt_model.generation import fused
from blt_model.generation.absorbed import AbsorbedPatch, absorbed_weights
from blt_model.generation.patch_steps import PatchSteps
from blt_model.generation.steps import BlockStep, CrossStep, HashHistory, Norm, pool_patches
from blt_model.hash_embedding import HashEmbedding
from blt_model.layers import Block
from blt_patcher import EntropyScheme, IncrementalPatcher

# The interpreter knows no bfloat16; float32 on CUDA may go through TF32 in torch's own products.
DTYPES = [torch.bfloat16] if CUDA else [torch.float32]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def seed() -> int:
    return fresh_seed()


@pytest.fixture
def kernels() -> ModuleType:
    need_kernels()
    from blt_model.generation import kernels as module

    return module


@runs_interpreted
def test_in_the_interpreter() -> None:
    """All other tests of this file, in a process whose Triton interprets."""
    run_interpreted(__file__)


def error(ours: Tensor, reference: Tensor) -> float:
    wide = reference.detach().double()
    return float((ours.detach().double() - wide).norm() / wide.norm())


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_linear(kernels: ModuleType, rows: int, dtype: torch.dtype, seed: int) -> None:
    from blt_model.generation import linear_kernels

    torch.manual_seed(seed)
    x, weight, scale = random(rows, 96, dtype=dtype), random(80, 96, dtype=dtype), random(96, dtype=dtype)
    residual = random(rows, 40, dtype=dtype)
    limit = TOLERANCE[dtype]
    normed = F.rms_norm(x.double(), (96,), scale.double(), 1e-5)
    gate, value = (normed @ weight.double().T).chunk(2, dim=-1)
    assert error(linear_kernels.linear(x, weight, norm=scale, eps=1e-5, gated=True), F.silu(gate) * value) < limit
    half = weight[:40].contiguous()
    wanted = x.double() @ half.double().T + 2 * residual
    assert error(linear_kernels.linear(x, half, residual=residual, residual_scale=2.0), wanted) < limit
    wanted = F.silu(gate) * value + 2 * residual
    found = linear_kernels.linear(x, weight, norm=scale, eps=1e-5, gated=True, residual=residual, residual_scale=2.0)
    assert error(found, wanted) < limit
    wide = linear_kernels.linear(x, half, residual=residual, dtype=torch.float32)
    assert error(wide, x.double() @ half.double().T + residual) < limit
    wide = linear_kernels.linear(x, half, norm=scale, eps=1e-5, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert error(wide, normed @ half.double().T) < limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_block(kernels: ModuleType, rows: list[int] | None, window: int | None, dtype: torch.dtype, seed: int) -> None:
    """One row and two, in a ring that is not full, full and wrapped, and in a cache without window."""
    torch.manual_seed(seed)
    config = TransformerConfig(dim=32, num_layers=1, num_heads=2, window=window)
    block = Block(config).to(DEVICE, dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 1.0)
    plain = BlockStep.of(block)
    quick = fused.FusedBlock(plain)
    for count in (1, 2):
        at = None if rows is None else torch.tensor(rows[:count], device=DEVICE)
        caches = [AttentionCache(config, 3, dtype=dtype, device=DEVICE, capacity=32) for _ in range(2)]
        for buffer in ("keys", "values"):
            filled = torch.randn_like(getattr(caches[0], buffer))
            for cache in caches:
                getattr(cache, buffer).copy_(filled)
        for places in ((0, 3), (7, 20), (11, 8)):
            positions = torch.tensor(places[:count], device=DEVICE)
            x = random(count, 32, dtype=dtype)
            wanted = plain(x, caches[0], 0, caches[0].plan_static(positions, at, caches[0].capacity))
            found = quick(x, caches[1], 0, fused.FusedStep(positions, at))
            assert error(found, wanted) < TOLERANCE[dtype]
            assert error(caches[1].keys, caches[0].keys) < TOLERANCE[dtype]
            assert error(caches[1].values, caches[0].values) < TOLERANCE[dtype]


@pytest.mark.parametrize("options", [{}, {"omit_partial": True, "raw_bytes": True}, {"average": True}], ids=str)
def test_embeddings(kernels: ModuleType, options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    config = HashEmbeddingConfig(table_size=97, **options)
    module = HashEmbedding(config, 48).to(DEVICE)
    nn.init.normal_(module.weight)
    byte_table = random(260, 48)
    plain, quick = HashHistory(module, 3), HashHistory(module, 3)
    for step in range(4):
        tokens = torch.randint(4, 260, (2,), device=DEVICE)
        positions = torch.tensor([step, step + 1], device=DEVICE)
        wanted = plain.push(tokens, positions) + F.embedding(tokens, byte_table)
        if config.average:
            wanted = wanted / (1 + config.num_tables)
        found, other = fused.embed(tokens, positions, quick, byte_table, average=config.average)
        assert other is None
        assert error(found, wanted) < 1e-6
        assert torch.equal(plain.symbols, quick.symbols)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count_of_vectors", [2, 5])
def test_cross_attention(kernels: ModuleType, count_of_vectors: int, dtype: torch.dtype, seed: int) -> None:
    """A byte of each row reads a patch, and all layers' keys and values come from one product."""
    torch.manual_seed(seed)
    config = CrossAttentionConfig(num_heads=4, k=count_of_vectors)
    modules = [BytesReadPatches(config, 64, 1e-5).to(DEVICE) for _ in range(3)]
    for module in modules:
        module.reset_parameters(2)
        nn.init.uniform_(module.key_norm.weight, 0.5, 1.5)
        module.to(dtype)
    layers = [CrossStep.of(module) for module in modules]
    vectors = random(3, count_of_vectors, 64, dtype=dtype)
    patch_keys = fused.PatchKeys(layers)
    keys, values = patch_keys(vectors)
    first = patch_keys.of_one(vectors[0])
    assert error(first.permute(2, 1, 3, 0, 4)[:, :, None], torch.stack([keys, values])[:, :, :1]) < TOLERANCE[dtype]
    x = random(2, 64, dtype=dtype)
    for index, layer in enumerate(layers):
        key, value = layer.keys_values(vectors)
        assert error(keys[index], key) < TOLERANCE[dtype]
        assert error(values[index], value) < TOLERANCE[dtype]
        key, value = key.contiguous(), value.contiguous()
        for count in (1, 2):
            wanted = layer(x[:count, None], key[:count], value[:count]).squeeze(1)
            assert error(fused.read_patches(layer, x[:count], key, value), wanted) < TOLERANCE[dtype]


def test_entropies_and_choice(kernels: ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    logits = 3 * random(3, 260)
    out = torch.zeros(4, device=DEVICE)
    from blt_model.generation import token_kernels

    token_kernels.entropy(logits, out)
    assert error(out[:3], next_byte_entropy(logits)) < 1e-5
    tokens, log_probabilities = fused.likeliest(logits, 4, 2)
    allowed = torch.log_softmax(logits.double(), dim=-1)
    allowed[:, [0, 1, 3]] = -torch.inf
    assert torch.equal(tokens, allowed.argmax(-1))
    torch.testing.assert_close(log_probabilities, allowed.amax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", [0, 1])
def test_a_step_is_handed_over(kernels: ModuleType, before: int) -> None:
    """Into the half of the place's parity, where the place is a counter itself, too."""
    log_probability = torch.tensor([-1.25], dtype=torch.float64, device=DEVICE)
    tokens, counters = torch.tensor([3], device=DEVICE), torch.tensor([4, 5, 6], device=DEVICE)
    result = torch.full((2, 2), 7.0, dtype=torch.float64, pin_memory=DEVICE.type == "cuda")
    length = torch.tensor([9], device=DEVICE)
    for step, (token, cleared) in enumerate(((77, None), (78, length))):
        taken = torch.tensor([token], device=DEVICE)
        fused.hand_over(taken, log_probability, tokens, counters, counters[:1], result, before=before, cleared=cleared)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        assert tokens.tolist() == [token]
        assert counters.tolist() == [5 + step, 6 + step, 7 + step]
        assert length.tolist() == [0 if step else 9]
        assert result[(step + before) % 2].tolist() == [token, -1.25]
    assert result[before].tolist() == [77.0, -1.25]
    state = [part.tolist() for part in (tokens, counters, length, result)]
    skipped = torch.tensor([1], device=DEVICE)
    options: dict[str, Any] = {"before": before, "cleared": length}
    length.fill_(9)
    state[2] = [9]
    taken = torch.tensor([79], device=DEVICE)
    fused.hand_over(taken, log_probability, tokens, counters, counters[:1], result, **options, skipped=skipped)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert [part.tolist() for part in (tokens, counters, length, result)] == state
    fused.hand_over(taken, log_probability, tokens, counters, counters[:1], result, **options, skipped=skipped - 1)
    assert tokens.tolist() == [79]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocabulary", "dim"), [(260, 64), (7, 32)])
def test_a_head_chooses(kernels: ModuleType, vocabulary: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    """Logits, and what is made of them by the program that is the last to end, at every launch anew."""
    torch.manual_seed(seed)
    norm, weight = Norm(random(dim, dtype=dtype), 1e-5), random(vocabulary, dim, dtype=dtype)
    head = fused.Head(norm, weight)
    tokens, counters = torch.tensor([3], device=DEVICE), torch.tensor([4, 5], device=DEVICE)
    length, entropy = torch.tensor([9], device=DEVICE), torch.zeros(2, device=DEVICE)
    result = torch.full((2, 2), torch.nan, dtype=torch.float64, pin_memory=DEVICE.type == "cuda")
    for step in range(3):
        x = random(1, dim, dtype=dtype) / 4
        logits = F.rms_norm(x.double(), (dim,), norm.weight.double(), 1e-5) @ weight.double().T
        head.entropy(x, entropy)
        head.likeliest(x, tokens, counters, counters[:1], result, before=1, cleared=length if step == 2 else None)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        assert abs(float(entropy[0]) - float(next_byte_entropy(logits))) < TOLERANCE[dtype]
        allowed = torch.log_softmax(logits, dim=-1)[0].cpu()
        allowed[[0, 1, 3]] = -torch.inf
        chosen, log_probability = result[(3 + step) % 2].tolist()
        assert tokens.tolist() == [int(chosen)]
        assert abs(float(allowed[int(chosen)]) - log_probability) < TOLERANCE[dtype]
        # The likeliest but for what rounding decides.
        assert float(allowed.amax() - allowed[int(chosen)]) < TOLERANCE[dtype]
        assert counters.tolist() == [5 + step, 6 + step]
        assert length.tolist() == [9 if step < 2 else 0]
    assert entropy[1] == 0
    state = [part.tolist() for part in (tokens, counters, length, result, entropy)]
    skipped = torch.tensor([1], device=DEVICE)
    head.entropy(-x, entropy, skipped)
    head.likeliest(-x, tokens, counters, counters[:1], result, before=1, cleared=length, skipped=skipped)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert [part.tolist() for part in (tokens, counters, length, result, entropy)] == state
    # What is no number is told apart from what has not come.
    head.entropy(x * torch.nan, entropy, skipped - 1)
    assert float(entropy[0]) == float("inf")


@pytest.mark.skipif(CUDA, reason="compares bytes, which half precision leaves to rounding")
def test_a_text_runs_ahead(kernels: ModuleType, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next byte is launched before the present one is read: after patches, at stops, and with drawn bytes."""
    model, entropy_model = one_layer_models(seed)
    limits = EntropyScheme(threshold=5.5, max_patch_length=2)
    requests = [
        Request(prompt=b"ab ", max_new_bytes=3),
        Request(prompt=b"", max_new_bytes=2, sampling=SamplingOptions(temperature=1.0, seed=seed % 1000)),
        Request(prompt=b"a text", max_new_bytes=1),
    ]

    def generate() -> list[tuple[bytes, int]]:
        generator = Generator(model, new_patcher=lambda: IncrementalPatcher(limits), entropy_model=entropy_model)
        first = generator.generate(requests)
        # Ends at a byte that is not read before what follows it is launched; the last text begins after that.
        stop = Request(prompt=b"ab ", max_new_bytes=3, stop=(first[0].content[1:2],))
        return [(done.content, done.patches) for done in (*first, *generator.generate([stop, requests[0]]))]

    wanted = generate()
    run_uncaptured(monkeypatch)
    monkeypatch.setattr(fused, "available", lambda model: True)
    assert generate() == wanted
    assert wanted[0] == wanted[-1]


@pytest.mark.skipif(CUDA, reason="compares bytes, which half precision leaves to rounding")
def test_results_are_not_those_of_a_trial(kernels: ModuleType, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device works while the host goes on: what the trial before a capture leaves must not be taken for a result."""

    def generate(model: BLT, entropy_model: ByteLM) -> tuple[bytes, int]:
        generator = Generator(model, new_patcher=Odd, entropy_model=entropy_model)
        (done,) = generator.generate([Request(prompt=b"ab ", max_new_bytes=5)])
        return done.content, done.patches

    model, entropy_model, wanted = without_ties(seed, generate)
    monkeypatch.setattr(fused, "available", lambda model: True)
    monkeypatch.setattr("blt_model.generation.single_row._LOOKS", 10**9)
    with ThreadPoolExecutor(1) as device:
        run_uncaptured(monkeypatch, device)
        assert generate(model, entropy_model) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "vectors"), [(4, 3), (2, 1), (4, 16)])
def test_readers_weights_are_absorbed(
    kernels: ModuleType, heads: int, vectors: int, dtype: torch.dtype, seed: int
) -> None:
    """Two small matrices of a patch give what a byte that reads it takes from it."""
    from blt_model.generation import patch_kernels

    torch.manual_seed(seed)
    dim, width = 16 * heads + 16, 16
    crosses = [
        CrossStep(
            Norm(random(dim, dtype=dtype), 1e-5),
            Norm(random(dim, dtype=dtype), 1e-5),
            random(heads * width, dim, dtype=dtype),
            random(2 * heads * width, dim, dtype=dtype),
            random(dim, heads * width, dtype=dtype),
            width,
            residual=2,
        )
        for _ in range(2)
    ]
    of_patch, weights = random(vectors, 2, 2, heads, width, dtype=dtype), absorbed_weights(crosses)
    keys, values = of_patch.permute(2, 1, 3, 0, 4)[:, :, None].unbind(0)
    patch = AbsorbedPatch.empty(weights, vectors)
    patch_kernels.absorb(of_patch, weights, patch)
    assert patch.keys.shape[1] % 32 == 0
    x = random(1, dim, dtype=dtype)
    for index, cross in enumerate(crosses):
        scores = patch.keys[index].float() @ cross.query_norm(x)[0].float()
        shares = scores[: patch.scores].view(heads, vectors).softmax(1).flatten()
        assert not patch.keys[index, patch.scores :].any()
        assert not patch.values[index, :, patch.scores :].any()
        found = 2 * x.float() + patch.values[index, :, : patch.scores].float() @ shares
        wanted = cross(x[:, None], keys[index], values[index])[0]
        assert error(found, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize(("length", "room"), [(1, 1), (1, 8), (5, 8), (8, 8), (11, 16)])
def test_a_patch_is_pooled(
    kernels: ModuleType, length: int, room: int, pooling: Pooling, dtype: torch.dtype, seed: int
) -> None:
    """Into sizes that are powers of two, and that are not; all numbers may be below nought."""
    torch.manual_seed(seed)
    lengths = torch.tensor([length], device=DEVICE)
    mask = torch.arange(room, device=DEVICE)[None] < length
    for outputs, dim in [(128, 64), (90, 48)]:
        # Room beyond the patch holds what earlier patches left.
        states, projection = random(room, dim, dtype=dtype) - 3, random(outputs, dim, dtype=dtype) / dim**0.5
        projection += 1
        found = fused.pooled(states, lengths, projection, pooling)
        # The pooled row is rounded as the prefill rounds it.
        wanted = pool_patches(states[None], mask, pooling).double() @ projection.double().T
        assert found.shape == (1, outputs)
        assert error(found, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 5, 8])
def test_the_vectors_of_a_patch_read(
    kernels: ModuleType, length: int, vectors: int, dtype: torch.dtype, seed: int
) -> None:
    """As many vectors as a kernel takes at once, and more."""
    torch.manual_seed(seed)
    module = PatchesReadBytes(CrossAttentionConfig(num_heads=4, k=vectors), 64, 1e-5).to(DEVICE)
    module.reset_parameters(1)
    for norm in (module.query_norm, module.key_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    cross = CrossStep.of(module.to(dtype))
    states, readers = random(8, 64, dtype=dtype), random(vectors, 64, dtype=dtype)
    mask = torch.arange(8, device=DEVICE)[None] < length
    with torch.no_grad():
        found = fused.PatchReader(cross, states)(readers, torch.tensor([length], device=DEVICE))
        reference = cross(readers[None], *cross.keys_values(states[None]), mask[:, None, None])[0]
        assert error(found, reference) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("placement", [Placement.ALL, Placement.LAST])
def test_a_patch_is_completed(kernels: ModuleType, placement: Placement, dtype: torch.dtype, seed: int) -> None:
    """Through all layers of encoder and latent transformer to what the decoder reads, as by the plain steps."""
    options = {"k": 2, "encoder_placement": placement}
    model = fresh_blt(seed, cross_attention=options, encoder={"num_layers": 2}).to(DEVICE, dtype)
    row, lengths = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.tensor([5], device=DEVICE)
    mask = torch.arange(8, device=DEVICE)[None] < 5
    with torch.inference_mode():
        plain, quick = PatchSteps(model, 1), PatchSteps(model, 1, is_fused=True)
        assert len(plain.open_bytes) == (2 if placement == Placement.ALL else 1)
        plain.open_bytes.normal_()
        quick.open_bytes.copy_(plain.open_bytes)
        # At a text's second patch.
        plan = plain.latent.plan_static(row + 1, row, plain.latent.capacity)
        plain.complete(row, plan, 8, mask)
        quick.complete_one(row, fused.FusedStep(row + 1, row), 8, lengths)
        # Roundings of all layers add up.
        assert error(quick.keys, plain.keys) < 3 * TOLERANCE[dtype]
        assert error(quick.values, plain.values) < 3 * TOLERANCE[dtype]


def test_norms_are_read_from_modules(kernels: ModuleType) -> None:
    """A normalisation's own scale is used, not another's."""
    norm = Norm(torch.full((32,), 2.0, device=DEVICE), 1e-5)
    x, weight = random(1, 32), random(16, 32)
    assert error(fused.normed_linear(x, norm, weight), F.rms_norm(x, (32,), norm.weight, 1e-5) @ weight.T) < 1e-2
