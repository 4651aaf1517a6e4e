"""Cached generation equals the model over whole documents: bytes, log-probabilities, patches."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.blt_model.generation_oracle import (
    Recorder,
    Ties,
    check_completion,
    document_entropies,
    fresh_blt,
    fresh_byte_lm,
    fresh_seed,
    run_uncaptured,
)
from tests.blt_model.test_blt import OPTIONS

from blt_data.framing import frame
from blt_model import (
    BLT,
    ByteLM,
    Completion,
    Generator,
    ModelError,
    Request,
    SamplingOptions,
    next_byte_entropy,
    pack_documents,
)
from blt_model.generation import Finish
from blt_model.generation.reference import generate_uncached
from blt_patcher import (
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    IncrementalPatcher,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
)

#: Window of blt-debug's local stacks and of entropy-debug.
WINDOW = 8


@pytest.fixture
def seed() -> int:
    return fresh_seed()


def prompts_of(rng: random.Random, lengths: Sequence[int]) -> list[bytes]:
    """Prompts of these lengths, of letters, spaces and any bytes."""
    alphabets = (range(256), b"abc  ", "é 日本".encode())
    return [bytes(rng.choices(alphabets[index % 3], k=length)) for index, length in enumerate(lengths)]


def middle_entropy(model: ByteLM, rng: random.Random) -> float:
    """A threshold that cuts random text about every second byte."""
    tokens = torch.tensor([1, *rng.choices(range(4, 260), k=100), 2])
    with torch.no_grad():
        return float(next_byte_entropy(model(pack_documents([tokens.numpy()])[0])).median())


def scheme_of(name: str, threshold: float, limit: int | None) -> PatchScheme:
    schemes: dict[str, PatchScheme] = {
        "entropy": EntropyScheme(threshold=threshold, max_patch_length=limit),
        "monotonic": EntropyMonotonicScheme(relative_threshold=0.02, max_patch_length=limit),
        "combined": EntropyCombinedScheme(threshold=threshold, relative_threshold=0.01, max_patch_length=limit),
        "space": SpaceScheme(max_patch_length=limit),
        "static": StaticScheme(patch_length=3, max_patch_length=limit),
        "byte": ByteScheme(max_patch_length=limit),
    }
    return schemes[name]


def run(
    model: BLT | ByteLM,
    prompts: Sequence[bytes],
    scheme: PatchScheme | None,
    entropy_model: ByteLM | None,
    *,
    rows: int,
    new_bytes: int = 20,
    sampling: SamplingOptions | None = None,
    tolerance: float = 1e-5,
    context_start: int | None = None,
) -> tuple[list[Completion], Ties]:
    """Generate in a batch and hold every text to its whole document."""
    recorder = None if scheme is None else Recorder(scheme)
    options = [
        SamplingOptions() if sampling is None else SamplingOptions(temperature=sampling.temperature, seed=index)
        for index in range(len(prompts))
    ]
    requests = [
        Request(prompt=prompt, max_new_bytes=new_bytes, sampling=option)
        for prompt, option in zip(prompts, options, strict=True)
    ]
    generator = Generator(
        model, new_patcher=recorder, entropy_model=entropy_model, context_start=context_start, rows=rows
    )
    done = generator.generate(requests)
    ties = Ties()
    for prompt, completion in zip(prompts, done, strict=True):
        record = None
        if recorder is not None:
            record = recorder.of([1, *(byte + 4 for byte in prompt + completion.content)])
        check_completion(
            model,
            prompt,
            completion,
            record,
            entropy_model,
            ties,
            greedy=sampling is None,
            tolerance=tolerance,
            context_start=context_start,
        )
    sys.stderr.write(f"{ties.report()}\n")
    # Rounding differs by 1e-6 where float16 values lie 1e-3 apart: rare, or it is no rounding.
    assert ties.roundings <= 2 + 0.02 * ties.tokens
    return done, ties


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_architecture(options: dict[str, Any], seed: int) -> None:
    """Prompts on both sides of the window, in a batch whose rows begin and end at different times."""
    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed, **options), fresh_byte_lm(seed + 1)
    scheme = scheme_of("entropy", middle_entropy(entropy_model, rng), rng.choice([None, 4]))
    prompts = prompts_of(rng, [0, 1, 2, WINDOW - 1, WINDOW, 3 * WINDOW + 1, rng.randrange(60)])
    done, _ = run(model, prompts, scheme, entropy_model, rows=rng.randrange(2, 6))
    assert sum(completion.patches for completion in done) > 0


@pytest.mark.parametrize("limit", [None, 1, 2, 5])
@pytest.mark.parametrize("name", ["entropy", "monotonic", "combined", "space", "static", "byte"])
def test_every_scheme(name: str, limit: int | None, seed: int) -> None:
    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed), fresh_byte_lm(seed + 1)
    scheme = scheme_of(name, middle_entropy(entropy_model, rng), limit)
    prompts = prompts_of(rng, [rng.randrange(30) for _ in range(4)])
    run(model, prompts, scheme, entropy_model if scheme.needs_entropies else None, rows=3)


@pytest.mark.parametrize("length", range(2 * WINDOW + 3))
def test_every_prompt_length(length: int, seed: int) -> None:
    """Alone in its batch, across window size and patch borders."""
    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed), fresh_byte_lm(seed + 1)
    scheme = scheme_of("entropy", middle_entropy(entropy_model, rng), None)
    run(model, prompts_of(rng, [length]), scheme, entropy_model, rows=1, new_bytes=10)


def test_contexts_that_start_at_new_lines(seed: int) -> None:
    """The entropy model forgets at every newline, in prompts and in what is generated, and the BLT does not."""
    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed), fresh_byte_lm(seed + 1)
    with torch.no_grad():
        # Newlines come often.
        model.decoder.head.weight[ord("\n") + 4] = model.decoder.head.weight[[80, 90, 100]].sum(0)
    scheme = scheme_of("entropy", middle_entropy(entropy_model, rng), 9)
    prompts = [bytes(rng.choices(b"ab \n", k=length)) for length in (1, 4, 9, 30, 50)] + [b"\n", b"abc\n", b""]
    sampling = SamplingOptions(temperature=1.0)
    options: dict[str, Any] = {"sampling": sampling, "context_start": ord("\n") + 4, "new_bytes": 40}
    # One time in 25 none comes.
    for _ in range(8):
        done, _ = run(model, prompts, scheme, entropy_model, rows=3, **options)
        if any(b"\n" in completion.content for completion in done):
            return
        prompts = [prompt + b"a" for prompt in prompts]
    pytest.fail("nothing that was generated holds a newline")


def test_float64_leaves_nothing_to_rounding(seed: int) -> None:
    """In float64 the two ways differ by 1e-12: what differs in float32 is rounding."""
    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed).double(), fresh_byte_lm(seed + 1).double()
    scheme = scheme_of("entropy", middle_entropy(entropy_model, rng), 6)
    prompts = prompts_of(rng, [0, 5, 40, 17])
    _, ties = run(model, prompts, scheme, entropy_model, rows=2, new_bytes=30, tolerance=1e-12)
    assert ties.roundings == 0


def test_recomputation_gives_the_same_bytes(seed: int) -> None:
    """Byte by byte against the generator that runs the whole prefix again for each."""
    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed), fresh_byte_lm(seed + 1)
    scheme = scheme_of("entropy", middle_entropy(entropy_model, rng), None)
    prompts = prompts_of(rng, [0, 3, 21])
    done, ties = run(model, prompts, scheme, entropy_model, rows=2)
    for prompt, completion in zip(prompts, done, strict=True):
        again = generate_uncached(
            model,
            prompt,
            next_patch=IncrementalPatcher(scheme),
            entropy_model=entropy_model,
            max_new_bytes=20,
        )
        assert bytes(again) == completion.content or ties.decisions


def test_buffers_grow(seed: int) -> None:
    """Patches longer than their buffer, more patches than the latent cache holds at first, and long prompts."""
    rng = random.Random(seed)
    model = fresh_blt(seed)
    long_patches = StaticScheme(patch_length=70)
    run(model, prompts_of(rng, [10, 33, 200]), long_patches, None, rows=2, new_bytes=150)
    run(model, prompts_of(rng, [240, 3]), ByteScheme(), None, rows=2, new_bytes=40)
    run(model, prompts_of(rng, [1015]), StaticScheme(patch_length=2), None, rows=1, new_bytes=30)


def test_sampled_texts_have_the_log_probabilities_of_the_model(seed: int) -> None:
    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed), fresh_byte_lm(seed + 1)
    scheme = scheme_of("combined", middle_entropy(entropy_model, rng), 8)
    sampling = SamplingOptions(temperature=1.0)
    run(model, prompts_of(rng, [4, 0, 50]), scheme, entropy_model, rows=2, new_bytes=60, sampling=sampling)


@pytest.mark.parametrize("overrides", [{}, {"transformer": {"num_kv_heads": 1, "window": 5}}])
def test_byte_lm(overrides: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    run(fresh_byte_lm(seed, **overrides), prompts_of(rng, [0, 1, 7, 8, 9, 40]), None, None, rows=4)


def test_a_text_does_not_depend_on_its_batch(seed: int) -> None:
    """Alone, and in batches of any size and order: the same sampled bytes."""
    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed).double(), fresh_byte_lm(seed + 1).double()
    scheme = scheme_of("entropy", middle_entropy(entropy_model, rng), None)
    requests = [
        Request(
            prompt=prompt,
            max_new_bytes=rng.randrange(1, 40),
            sampling=SamplingOptions(
                temperature=rng.choice([0.0, 0.8, 1.5]),
                top_k=rng.choice([None, 20]),
                top_p=rng.choice([None, 0.9]),
                min_p=rng.choice([None, 0.05]),
                repetition_penalty=rng.choice([1.0, 1.3]),
                seed=rng.randrange(1000),
            ),
        )
        for prompt in prompts_of(rng, [rng.randrange(40) for _ in range(9)])
    ]

    def contents(rows: int, order: list[int], prefill_tokens: int = 1000) -> list[bytes]:
        generator = Generator(
            model,
            new_patcher=lambda: IncrementalPatcher(scheme),
            entropy_model=entropy_model,
            rows=rows,
            prefill_tokens=prefill_tokens,
        )
        done = generator.generate([requests[index] for index in order])
        return [done[order.index(index)].content for index in range(len(requests))]

    plain = list(range(len(requests)))
    alone = contents(1, plain)
    assert len(set(alone)) > len(alone) // 2
    assert contents(4, rng.sample(plain, len(plain))) == alone
    assert contents(9, plain, prefill_tokens=50) == alone
    assert contents(9, plain[::-1], prefill_tokens=1) == alone


def test_a_generator_serves_again(seed: int) -> None:
    """Nothing of earlier texts, ended or abandoned, is left in the rows."""
    rng = random.Random(seed)
    model = fresh_blt(seed)
    generator = Generator(model, new_patcher=lambda: IncrementalPatcher(SpaceScheme()), rows=2)
    requests = [Request(prompt=prompt, max_new_bytes=12) for prompt in prompts_of(rng, [50, 3, 0])]
    first = [completion.content for completion in generator.generate(requests)]
    stream = generator.stream(requests[0])
    next(stream)
    del stream
    assert [completion.content for completion in generator.generate(requests[::-1])] == first[::-1]


def test_events_make_up_the_contents(seed: int) -> None:
    generator = Generator(fresh_blt(seed), new_patcher=lambda: IncrementalPatcher(SpaceScheme()), rows=2)
    sampling = SamplingOptions(temperature=1.5, seed=seed)
    requests = [Request(prompt=p, max_new_bytes=n, sampling=sampling) for p, n in ((b"a", 9), (b"", 0), (b"b c", 30))]
    pieces: dict[int, bytes] = {0: b"", 1: b"", 2: b""}
    taken: list[int] = []

    def ask() -> Any:
        for index, request in enumerate(requests):
            taken.append(index)
            yield request

    completions: dict[int, Completion] = {}
    for index, event in generator.events(ask()):
        assert index not in completions
        if isinstance(event, Completion):
            completions[index] = event
        else:
            assert event
            pieces[index] += event
    assert {index: completion.content for index, completion in completions.items()} == pieces
    assert completions[1].finish == Finish.LENGTH
    assert len(pieces[0]) == 9 or completions[0].finish == Finish.END
    assert taken == [0, 1, 2]


def test_requests_are_taken_when_there_is_room() -> None:
    """Prompts that wait are not asked for early: a file of millions streams through."""
    generator = Generator(fresh_byte_lm(0), rows=2)
    taken: list[int] = []

    def ask() -> Any:
        for index in range(6):
            taken.append(index)
            yield Request(prompt=b"x", max_new_bytes=3, sampling=SamplingOptions(temperature=1.0, seed=index))

    events = generator.events(ask())
    index, _ = next(events)
    assert index in (0, 1)
    assert len(taken) <= 3
    assert {index for index, event in events if isinstance(event, Completion)} == set(range(6))


def test_stop_strings(seed: int) -> None:
    model = fresh_byte_lm(seed)
    sampling = SamplingOptions(temperature=2.0, seed=seed % 1000)
    generator = Generator(model, rows=1)
    whole = generator.generate([Request(prompt=b"q", max_new_bytes=60, sampling=sampling)])[0]
    content = whole.content
    cut = len(content) // 2
    stop = content[cut : cut + 3]
    first = content.index(stop)
    stops = (b"\0\1\2\3 never", stop, stop + b"x")
    (event,) = generator.generate([Request(prompt=b"q", max_new_bytes=60, sampling=sampling, stop=stops)])
    assert event.finish == Finish.STOP
    assert event.stop == stop
    assert event.content == content[:first]
    assert event.log_probabilities == whole.log_probabilities[:first]
    streamed = b"".join(generator.stream(Request(prompt=b"q", max_new_bytes=60, sampling=sampling, stop=stops)))
    assert streamed == content[:first]


def test_end_of_document() -> None:
    model = fresh_byte_lm(0)
    with torch.no_grad():
        # Whatever the state, EOS is by far the likeliest.
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        model.embedding.weight[:] = 1
        model.head.weight.zero_()
        model.head.weight[2] = 1
    (done,) = Generator(model).generate([Request(prompt=b"x", max_new_bytes=3)])
    assert (done.content, done.finish) == (b"", Finish.END)
    assert done.end_log_probability is not None
    assert -1e-6 < done.end_log_probability <= 0


def test_special_tokens_are_never_chosen() -> None:
    model = fresh_byte_lm(0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[[0, 1, 3]] = 5 * model.norm.weight * torch.randn(32).sign()
    for temperature in (0.0, 1.0, 100.0):
        sampling = SamplingOptions(temperature=temperature, seed=1)
        (done,) = Generator(model).generate([Request(prompt=b"x", max_new_bytes=300, sampling=sampling)])
        assert len(done.content) == 300 or done.finish == Finish.END


def test_half_precision_runs_close_to_float32(seed: int) -> None:
    model = fresh_blt(seed)
    request = Request(prompt=b"some text of a few bytes", max_new_bytes=1)
    exact, rough = (
        Generator(each, new_patcher=lambda: IncrementalPatcher(SpaceScheme())).generate([request])[0]
        for each in (model, fresh_blt(seed).bfloat16())
    )
    assert rough.log_probabilities[0] == pytest.approx(exact.log_probabilities[0], abs=0.5)
    sampling = SamplingOptions(temperature=1.0)
    Generator(model.bfloat16(), new_patcher=lambda: IncrementalPatcher(SpaceScheme())).generate(
        [Request(prompt=b"ab", max_new_bytes=20, sampling=sampling)]
    )


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ModelError, match="new_patcher"):
        Generator(fresh_blt(0))
    with pytest.raises(ModelError, match="rows is 0"):
        Generator(fresh_byte_lm(0), rows=0)
    with pytest.raises(ModelError, match="max_new_bytes is -1"):
        Request(prompt=b"", max_new_bytes=-1)
    with pytest.raises(ModelError, match="stop string is empty"):
        Request(prompt=b"", max_new_bytes=1, stop=(b"a", b""))

    class OnePatch:
        def push(self, token_id: int, entropy: float) -> bool:
            return False

        def reset(self) -> None: ...

    with pytest.raises(ModelError, match="patch of BOS"):
        Generator(fresh_blt(0), new_patcher=OnePatch).generate([Request(prompt=b"a", max_new_bytes=1)])


@pytest.mark.parametrize("options", [OPTIONS["default"], OPTIONS["latent window"]], ids=["default", "latent window"])
def test_steps_of_fixed_shapes(options: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that CUDA graphs capture, with padded rows, whole windows and masks, on the CPU."""

    run_uncaptured(monkeypatch)
    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed, **options), fresh_byte_lm(seed + 1)
    scheme = scheme_of("entropy", middle_entropy(entropy_model, rng), 40)
    prompts = prompts_of(rng, [0, 1, WINDOW, 30, 3, 260, 17])
    newline = ord("\n") + 4
    run(model, prompts, scheme, entropy_model, rows=5, new_bytes=50, context_start=newline)
    run(model, prompts_of(rng, [5, 40]), StaticScheme(patch_length=70), None, rows=2, new_bytes=80)
    run(entropy_model, prompts, None, None, rows=3)
    # One row runs ahead of the entropy model, whatever chooses the bytes.
    run(model, prompts, scheme, entropy_model, rows=1, new_bytes=50, context_start=newline)
    run(model, prompts[:2], StaticScheme(patch_length=70), None, rows=1, new_bytes=80)
    options_of = (
        SamplingOptions(temperature=0.8, top_p=0.9, seed=7),
        SamplingOptions(temperature=1.0, min_p=0.05, repetition_penalty=1.5),
        SamplingOptions(repetition_penalty=1.5),
    )
    drawn = [
        Request(prompt=prompt, max_new_bytes=30, sampling=sampling, stop=(b"e",))
        for prompt in prompts[:4]
        for sampling in options_of
    ]
    contents = []
    # In float64, as a draw beside a boundary may fall on its other side by rounding: in float32 once in 200 runs.
    model, entropy_model = model.double(), entropy_model.double()
    for rows in (1, 3):
        generator = Generator(
            model, new_patcher=lambda: IncrementalPatcher(scheme), entropy_model=entropy_model, rows=rows
        )
        contents.append([(done.content, done.patches, done.finish) for done in generator.generate(drawn)])
    assert contents[0] == contents[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("graphs", [False, True])
def test_cuda(graphs: bool, seed: int) -> None:
    """With and without graphs, the bytes of the CPU."""
    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed).double(), fresh_byte_lm(seed + 1).double()
    scheme = scheme_of("entropy", middle_entropy(entropy_model, rng), 40)
    requests = [
        Request(prompt=prompt, max_new_bytes=90, sampling=SamplingOptions(temperature=t, seed=3))
        for prompt in prompts_of(rng, [0, 7, 100, 20, 260])
        for t in (0.0, 1.0)
    ]
    results = []
    for device in ("cpu", "cuda"):
        generator = Generator(
            model.to(device),
            new_patcher=lambda: IncrementalPatcher(scheme),
            entropy_model=entropy_model.to(device),
            rows=3,
            graphs=graphs,
        )
        results.append([(done.content, done.patches) for done in generator.generate(requests)])
    assert results[0] == results[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_one_text_in_half_precision(seed: int) -> None:
    """The kernels' entropies are those of their bytes, which the host reads meanwhile, and they decide its patches."""
    from blt_model.generation import fused

    rng = random.Random(seed)
    model, entropy_model = fresh_blt(seed), fresh_byte_lm(seed + 1)
    with torch.no_grad():
        # Far enough apart for half precision to tell entropies from each other.
        entropy_model.head.weight.mul_(5)
        # No text ends early.
        model.decoder.head.weight[2] = 0
    threshold = middle_entropy(entropy_model, rng)
    model, entropy_model = model.bfloat16().cuda(), entropy_model.bfloat16().cuda()
    assert fused.available(model)
    assert fused.available(entropy_model)
    recorder = Recorder(EntropyScheme(threshold=threshold, max_patch_length=40))
    generator = Generator(model, new_patcher=recorder, entropy_model=entropy_model)
    judge, lm_judge = copy.deepcopy(model).float().cpu(), copy.deepcopy(entropy_model).float().cpu()
    # What is found, against what it should be and against what it would be a byte late.
    entropy_errors, late_entropy_errors = [], []
    errors: dict[bool, list[float]] = {False: [], True: []}
    patches = 0
    for prompt in prompts_of(rng, [0, 7, 100, 1]):
        (done,) = generator.generate([Request(prompt=prompt, max_new_bytes=90)])
        framed = frame(prompt + done.content)
        record = recorder.of(framed.tolist())
        exact = document_entropies(lm_judge, framed, None)[: len(record.entropies)]
        entropies = torch.tensor([record.entropies, exact], dtype=torch.float64)
        entropy_errors += (entropies[0] - entropies[1]).abs().tolist()
        late_entropy_errors += (entropies[0, 1:] - entropies[1, :-1]).abs().tolist()
        ends = 1 + np.flatnonzero(record.answers[: len(framed) - 1])
        taken = torch.tensor([byte + 4 for byte in done.content], dtype=torch.int64)
        for is_late in errors:
            cuts = np.unique([0, 1, *(ends + is_late), len(framed)])
            with torch.no_grad():
                logits = judge(pack_documents([framed], [np.diff(cuts)])[0])[len(prompt) :][: len(taken)]
            wanted = torch.log_softmax(logits.double(), -1)[torch.arange(len(taken)), taken]
            errors[is_late] += (wanted - torch.tensor(done.log_probabilities)).abs().tolist()
        patches += len(ends)
    assert patches > 40
    assert np.mean(entropy_errors) < 0.1 * np.mean(late_entropy_errors)
    assert np.mean(errors[False]) < 0.2 * np.mean(errors[True])
