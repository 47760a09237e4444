"""The model alone, true widths, random weights: RTFx beside transformers with the same weights in one run.

    python tests/bench/bench_engine.py [--quick] [--threads N] [--device cpu|cuda] [--models 0.6b 1.1b]

On the CPU: a sweep over batch sizes at 10 s and the real length mix, in float32, in bfloat16 and, if `--dtype` asks for
it, in int8 beside transformers in bfloat16. With CUDA: RTFx, share of the measured matrix peak, memory and padding,
beside transformers eager and compiled. Needs only torch, transformers, numpy, safetensors and sentencepiece. `--quick`
runs 4 layers on the CPU, and fewer batch sizes and lengths on CUDA.
"""

import dataclasses
import gc
import time
from collections.abc import Callable

import harness
import torch
from harness import print_table, race
from torch import Tensor

from parakeet_core.batching import padding_share, plan_batches
from parakeet_core.checkpoint import INT8, resolve_dtype
from parakeet_core.config import EncoderConfig
from parakeet_core.engine import Engine

MODELS = {"0.6b": EncoderConfig(), "1.1b": EncoderConfig(n_layers=42)}  # sizes of nvidia/parakeet-ctc-*
CLIP_FRAMES = 1000  # 10 s
HOUR_FRAMES = 360_000
CPU_BATCHES = (1, 2, 4, 8)
CUDA_BATCHES = (1, 16, 64, 256)
MIX_BATCHES = (1, 4, 8)  # of transformers on the length mix, sorted by length
PEAK_SIZE = 8192  # rows and columns of the matrices that measure the device's peak
CUDNN = "cuDNN's attention"
FLOPS_PER_S_OUTSIDE_LAYERS = 0.19e9  # subsampling and head, per second of audio, at 256 channels and 1024 wide


def main() -> None:
    parser = harness.bench_arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=["0.6b"], choices=list(MODELS))
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16", INT8]
    )
    options = parser.parse_args()
    if options.device != "cpu" and INT8 in options.dtype:
        parser.error("int8 is for CPUs")
    torch.set_num_threads(options.threads)
    harness.print_machine(options.device)
    print(f"float32 matrix precision: {torch.get_float32_matmul_precision()}")
    for name in options.models:
        config = MODELS[name]
        if options.quick and options.device == "cpu":
            config = dataclasses.replace(config, n_layers=4)
        bench = _bench_cpu if options.device == "cpu" else _bench_cuda
        with torch.inference_mode():
            bench(f"{name}, {config.n_layers} layers", config, options)


def model_flops(config: EncoderConfig, frames: int) -> float:
    """Floating-point operations of one item of `frames` feature frames; a multiplication and an addition are two."""
    width, encoder_frames = config.d_model, config.subsample(frames)
    per_frame = 2 * width * (4 * config.d_ff + 7 * width + config.conv_kernel)  # linears and depthwise convolution
    per_frame += 8 * width * encoder_frames  # scores by content, by distance (twice as many), and values
    return config.n_layers * encoder_frames * per_frame + FLOPS_PER_S_OUTSIDE_LAYERS * frames / harness.FRAMES_PER_S


def _peak_flops(device: str, dtype: torch.dtype) -> float:
    """Rate of one large product of random matrices, in operations per second."""
    size = PEAK_SIZE if device != "cpu" else PEAK_SIZE // 8
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    seconds = race({"product": lambda: left @ right}, 10, device)["product"]
    return 2 * size**3 / seconds


def _reference_run(model, lens: list[int], features: list[Tensor], size: int) -> Callable[[], object]:
    """transformers over the items in order of length, `size` at a time, to frame ids."""
    order = sorted(range(len(lens)), key=lambda i: lens[i])
    batches = []
    for start in range(0, len(order), size):
        members = order[start : start + size]
        padded = torch.nn.utils.rnn.pad_sequence([features[i] for i in members], batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([lens[i] for i in members])[:, None]
        batches.append((padded.to(model.device, model.dtype), mask.to(model.device)))
    return lambda: [model.generate(padded, attention_mask=mask).cpu() for padded, mask in batches]


def _bench_cpu(name: str, config: EncoderConfig, options) -> None:
    reference = harness.reference_model(config)
    rounds = 2 if options.quick else 3
    best: dict[tuple[str, str], float] = {}  # (dtype, library) -> RTFx at its best batch size
    for dtype in options.dtype:
        reference = reference.to(resolve_dtype(dtype))
        engine = Engine(dataclasses.replace(harness.own_checkpoint(reference, config), int8=dtype == INT8))
        peak = _peak_flops("cpu", engine.dtype)
        if dtype == "float32":
            print(f"largest relative difference of logits: {_difference(reference, engine, config):.1e}")
        rows = []
        for batch in CPU_BATCHES[:: 2 if options.quick else 1]:
            lens, features = [CLIP_FRAMES] * batch, harness.random_features([CLIP_FRAMES] * batch, config.n_mels)
            contenders = {
                "transformers": _reference_run(reference, lens, features, batch),
                "ours": _engine_run(engine, features, float("inf")),
            }
            rates = {key: 10 * batch / seconds for key, seconds in race(contenders, rounds).items()}
            for key, rate in rates.items():
                best[dtype, key] = max(best.get((dtype, key), 0.0), rate)
            share = rates["ours"] * model_flops(config, CLIP_FRAMES) / 10 / peak
            rows.append([batch, rates["transformers"], rates["ours"], rates["ours"] / rates["transformers"], share])
        columns = ["batch of 10 s", "transformers RTFx", "ours RTFx", "ratio", f"of {peak / 1e9:.0f} GFLOP/s, ours"]
        computes = "" if dtype == INT8 else f" (ours computes in {engine.dtype})"
        print_table(f"{name}, {dtype}{computes}, 10 s; transformers in {reference.dtype}", columns, rows)
        if dtype == "float32" or not options.quick:  # an emulated dtype takes minutes
            _mix_cpu(name, config, reference, engine, dtype, options)
    print("\nEach at its best batch size at 10 s:")
    for dtype in options.dtype:
        for base in (other for other in options.dtype if other != INT8):
            ratio = best[dtype, "ours"] / best[base, "transformers"]
            print(f"  ours {dtype} / transformers {base}: {ratio:.2f}x")


def _engine_run(engine: Engine, features: list[Tensor], budget_frames: float | None) -> Callable[[], object]:
    return lambda: engine.recognise(features, budget_frames)


def _difference(reference, engine: Engine, config: EncoderConfig) -> float:
    """Relative difference of our logits from transformers', on the longer item of a padded batch of two."""
    features = torch.stack(harness.random_features([320, 320], config.n_mels))
    lens = torch.tensor([320, 201])
    mask = torch.arange(320) < lens[:, None]
    expected = reference(features, attention_mask=mask).logits[0]
    return ((engine.model(features, lens)[0][0] - expected).abs().max() / expected.abs().max()).item()


def _mix_cpu(name: str, config: EncoderConfig, reference, engine: Engine, dtype: str, options) -> None:
    durations = sorted(harness.speech_durations())
    count = 8 if options.quick else 12
    lens = harness.frames_of([durations[(2 * i + 1) * len(durations) // (2 * count)] for i in range(count)])
    features = harness.random_features(lens, config.n_mels)
    contenders = {f"transformers, {size}": _reference_run(reference, lens, features, size) for size in MIX_BATCHES}
    contenders["ours"] = _engine_run(engine, features, None)
    audio_s = sum(lens) / harness.FRAMES_PER_S
    rates = {key: audio_s / seconds for key, seconds in race(contenders, 1).items()}
    rows = [[key, rate, rates["ours"] / rate] for key, rate in rates.items()]
    padding = padding_share(lens, plan_batches(lens, engine.budget_frames))
    title = f"{name}, {dtype}, {count} lengths of real speech, {audio_s:.0f} s, padding of ours {100 * padding:.1f} %"
    print_table(title, ["batch size, sorted", "RTFx", "ours is faster by"], rows)


def _bench_cuda(name: str, config: EncoderConfig, options) -> None:
    reference = harness.reference_model(config)
    for dtype in options.dtype:
        peak = _peak_flops("cuda", getattr(torch, dtype))
        reference = reference.to("cuda", getattr(torch, dtype))
        checkpoint = harness.own_checkpoint(reference, config)
        rows = []
        for batch in CUDA_BATCHES[1:3] if options.quick else CUDA_BATCHES:
            rows += _compare_cuda(reference, checkpoint.model, config, batch, peak)
        columns = ["batch of 10 s", "what", "RTFx", f"of {peak / 1e12:.0f} TFLOP/s", "GiB", "first call, s"]
        print_table(f"{name}, {dtype}, 10 s", columns, rows)
        _mix_cuda(name, config, reference, checkpoint, dtype, options)
    del reference, checkpoint
    gc.collect()
    torch.cuda.empty_cache()


class _GraphOnFirstCall:
    """Captured as a CUDA graph when it is first called, and replayed from then on."""

    def __init__(self, run: Callable[[], object]):
        self.run, self.graph = run, None

    def __call__(self) -> None:
        if self.graph is None:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):  # what happens once, such as compilation and allocation, must not be captured
                for _ in range(3):
                    self.run()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()
        self.graph.replay()


def _compare_cuda(reference, model, config: EncoderConfig, batch: int, peak: float) -> list[list[object]]:
    """Rows for one static shape: each library eager, then compiled for it."""
    torch._dynamo.reset()  # whole models compiled for one shape each would reach torch's limit on forms
    gc.collect()
    torch.cuda.empty_cache()  # and the pools of earlier graphs
    ours, layers = model.prepare_inference(), model.prepare_inference()
    layers.compile_layers()
    layers.reserve_positions(config.subsample(CLIP_FRAMES))
    features = torch.randn(batch, CLIP_FRAMES, config.n_mels, device="cuda").to(reference.dtype)
    lens = torch.full((batch,), CLIP_FRAMES, device="cuda")
    mask = torch.ones(batch, CLIP_FRAMES, dtype=torch.bool, device="cuda")
    ours.reserve_positions(config.subsample(CLIP_FRAMES))
    contenders = {"transformers eager": lambda: reference(features, attention_mask=mask).logits.argmax(-1)}
    contenders["ours eager"] = lambda: ours(features, lens, padded=False)[0].argmax(-1)
    contenders[f"ours eager, {CUDNN}"] = contenders["ours eager"]
    # Static shapes and CUDA graphs, as transformers' generation does when it is given a CompileConfig.
    how = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
    compiled_reference = torch.compile(reference.forward, **how)
    compiled_ours = torch.compile(ours, **how)
    contenders["transformers compiled"] = lambda: compiled_reference(features, attention_mask=mask).logits.argmax(-1)
    contenders["ours compiled whole"] = lambda: compiled_ours(features, lens, padded=False)[0].argmax(-1)
    contenders["ours, layers compiled for any shape (the engine's way)"] = lambda: layers(features, lens, False)[
        0
    ].argmax(-1)
    contenders["the same in a CUDA graph"] = _GraphOnFirstCall(lambda: layers(features, lens, False)[0].argmax(-1))
    rows = []
    for what, run in contenders.items():
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cuda.enable_cudnn_sdp(not what.startswith("ours") or CUDNN in what)  # torch's default is on
        try:
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            first_s = time.perf_counter() - start
            seconds = race({what: run}, 10, "cuda")[what]
        except RuntimeError as error:  # out of memory, or code that a compiler rejects: the other rows still count
            print(f"{what}, batch {batch}: {type(error).__name__}: {str(error)[:300]}")
            rows.append([batch, what, type(error).__name__, "", "", ""])
            torch.cuda.empty_cache()
            continue
        share = batch * model_flops(config, CLIP_FRAMES) / seconds / peak
        rows.append([batch, what, 10 * batch / seconds, share, torch.cuda.max_memory_allocated() / 2**30, first_s])
    return rows


def _mix_cuda(name: str, config: EncoderConfig, reference, checkpoint, dtype: str, options) -> None:
    """The real length mix through `Engine`, over several budgets, beside transformers in sorted batches."""
    engine = Engine(checkpoint)
    durations = harness.speech_durations()
    lens = harness.frames_of(durations * (1 if options.quick else max(1, 1300 // len(durations))))
    features = harness.random_features(lens, config.n_mels)
    audio_s = sum(lens) / harness.FRAMES_PER_S
    runs = {f"transformers eager, {size} sorted": _reference_run(reference, lens, features, size) for size in (32, 128)}
    runs |= {f"{key}, {CUDNN}": run for key, run in runs.items()}
    paddings = dict.fromkeys(runs, "")
    for budget in (engine.budget_frames / 4, engine.budget_frames, engine.budget_frames * 2):
        key = f"ours, budget of {budget:,.0f} frames"
        runs[key] = _engine_run(engine, features, budget)
        paddings[key] = f"{100 * padding_share(lens, plan_batches(lens, budget)):.1f} %"
    seconds = {}
    for cudnn in (False, True):  # with it, new shapes are planned for in the first, uncounted round
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        seconds |= race({key: run for key, run in runs.items() if (CUDNN in key) == cudnn}, 2, "cuda")
    rows = [[key, audio_s / seconds[key], paddings[key]] for key in runs]
    where = f"features on the host, cuDNN {torch.backends.cudnn.version()}"
    print_table(f"{name}, {dtype}, {len(lens)} lengths of real speech, {where}", ["what", "RTFx", "padding"], rows)
    torch.backends.cuda.enable_cudnn_sdp(False)
    hours = harness.random_features([HOUR_FRAMES], config.n_mels) * 4
    seconds = race({"hours": _engine_run(engine, hours, None)}, 2, "cuda")["hours"]
    print(f"\nfour items of an hour, in windows: RTFx {len(hours) * 3600 / seconds:,.0f}")


if __name__ == "__main__":
    main()
