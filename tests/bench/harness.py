"""What the benches share: interleaved timing, tables, lengths of real speech, and one model shape in both libraries.

Imports only torch, numpy and transformers, so that benches of the model run without audio libraries and without Ray.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Read when torch loads its OpenMP, whose threads otherwise spin at every barrier. On a machine that runs anything else,
# each wait then costs a time slice: features on two threads fell from 3,000 to 40 x real time in both libraries.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the benches also run from a checkout that is not installed

from parakeet_core.checkpoint import Checkpoint  # noqa: E402
from parakeet_core.config import EncoderConfig, ModelConfig  # noqa: E402
from parakeet_core.ctc import ParakeetCTC  # noqa: E402
from parakeet_core.features import LogMelFrontend  # noqa: E402

SPEECH = ROOT.parent / "shared" / "speech"
TINY_CHECKPOINT = ROOT / "tests" / "data" / "tiny-en"
FRAMES_PER_S = 100  # feature frames
# Quantiles (0 %, 5 %, ... 100 %) of the durations of LibriSpeech dev-clean, in seconds, for machines without the set.
LIBRISPEECH_QUANTILES_S = (
    1.5, 2.3, 2.7, 3.0, 3.4, 3.8, 4.3, 4.6, 5.0, 5.5, 6.0,
    6.6, 7.1, 7.9, 8.6, 9.4, 10.4, 11.8, 14.2, 16.8, 32.6,
)  # fmt: skip


def bench_arguments(description: str) -> argparse.ArgumentParser:
    """Options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and smaller models")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads on the CPU")
    return parser


def race(contenders: dict[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Best time of each contender, in seconds.

    They run in turn, round by round, so that whatever else the machine does affects all of them alike. An extra first
    round warms caches and is not counted. With one torch thread on the CPU, the clock is the thread's own, which leaves
    out the time that other processes take.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    best = dict.fromkeys(contenders, float("inf"))
    for timed in [False] + [True] * rounds:
        for name, run in contenders.items():
            _synchronize(device)
            start = clock()
            run()
            _synchronize(device)
            if timed:
                best[name] = min(best[name], clock() - start)
    return best


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table, as RESULTS.md has them."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = [f"{cell:.3g}" if isinstance(cell, float) and cell < 100 else cell for cell in row]
        print("| " + " | ".join(f"{cell:,.0f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    sys.stdout.flush()


def print_machine(device: str = "cpu") -> None:
    """Processor, threads, load and versions, without which a number means nothing."""
    import transformers

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else "CPU"
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}, ", end="")
    print(
        f"{torch.backends.cpu.get_cpu_capability()}; torch {torch.__version__}, transformers {transformers.__version__}"
    )
    if device != "cpu":
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")


def speech_durations() -> list[float]:
    """Seconds of each utterance of the LibriSpeech manifest, or a hundred with the same distribution."""
    manifest = SPEECH / "librispeech-dev-clean.jsonl"
    if manifest.exists():
        return [json.loads(line)["duration"] for line in manifest.read_text().splitlines()]
    steps = np.linspace(0, 1, len(LIBRISPEECH_QUANTILES_S))
    return np.interp((np.arange(100) + 0.5) / 100, steps, LIBRISPEECH_QUANTILES_S).tolist()


def frames_of(durations: Sequence[float]) -> list[int]:
    """Feature frames of items of these durations, in seconds."""
    return [int(duration * FRAMES_PER_S) for duration in durations]


def random_features(lens: Sequence[int], n_mels: int) -> list[torch.Tensor]:
    """Random numbers in place of normalised features: [T, M] for each item."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(frames, n_mels, generator=generator) for frames in lens]


def reference_model(config: EncoderConfig, vocab_size: int = 1025):
    """transformers' model of these sizes with random weights, float32 on the CPU, in eval mode."""
    from transformers import ParakeetCTCConfig, ParakeetForCTC

    encoder = {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "conv_kernel_size": config.conv_kernel,
        "num_mel_bins": config.n_mels,
        "subsampling_conv_channels": config.subsampling_channels,
        "attention_bias": config.attention_bias,
        "convolution_bias": config.convolution_bias,
        "scale_input": config.scale_input,
    }
    torch.manual_seed(0)
    return ParakeetForCTC(
        ParakeetCTCConfig(vocab_size=vocab_size, pad_token_id=vocab_size - 1, encoder_config=encoder)
    ).eval()


def own_checkpoint(reference, config: EncoderConfig) -> Checkpoint:
    """The same weights as a checkpoint of this library, sharing the reference's memory; it has no tokenizer."""
    vocab_size = reference.config.vocab_size
    model_config = ModelConfig(encoder=config, vocab_size=vocab_size, blank_id=vocab_size - 1)
    with torch.device("meta"):
        model = ParakeetCTC(model_config)
    model.load_state_dict(reference.state_dict(), assign=True)
    frontend = LogMelFrontend(model_config.frontend)
    return Checkpoint(Path("random"), model_config, model.eval(), None, frontend, None)
