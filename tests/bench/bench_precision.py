"""What a lower precision does to the texts: each dtype against float32, and all against the transcripts.

    python tests/bench/bench_precision.py [--model DIR] [--manifest FILE ...] [--device cpu|cuda] [--dtype ...]

`fp8` is emulated: inputs and weights of the feed-forwards' linears are rounded to float8 (e4m3) with a scale for each
frame and each output channel, as a GPU's scaled product takes them, and multiplied in float32.
"""

import json
from pathlib import Path

import harness
import jiwer
import torch
from harness import print_table
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.table.schema import normalise_words
from parakeet_core import Transcriber
from parakeet_core.inference import FusedFeedForward
from parakeet_core.transcriber import Transcript

PROMPTS = harness.ROOT / "tests" / "data" / "prompts" / "prompts.jsonl"
LIBRISPEECH = harness.SPEECH / "librispeech-dev-clean.jsonl"
HELD_OUT_SPEAKERS = (
    "1988",
    "2035",
    "2428",
    "777",
)  # not in the bundled model's training (tiny-en-recipe/real_speech.py)
FP8 = torch.float8_e4m3fn


def main() -> None:
    parser = harness.bench_arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(harness.TINY_CHECKPOINT))
    parser.add_argument("--manifest", nargs="+", type=Path, default=[PROMPTS, LIBRISPEECH])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "int8", "fp8"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    harness.print_machine(options.device)
    for manifest in options.manifest:
        if manifest.exists():
            _compare(manifest, options)
        else:
            print(f"{manifest}: not here")


def _compare(manifest: Path, options) -> None:
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    if manifest == LIBRISPEECH:
        lines = [line for line in lines if line["speaker"] in HELD_OUT_SPEAKERS]
    lines = lines[:: 8 if options.quick else 1]
    paths = [manifest.parent / line["audio_filepath"] for line in lines]
    references = [normalise_words(line["text"]) for line in lines]
    rows, exact = [], None
    for dtype in ["float32", *options.dtype]:
        found = _transcribe(paths, dtype, options)
        exact = exact or found
        same = sum(found[i].text == exact[i].text for i in range(len(lines)))
        rows.append(
            [
                dtype,
                f"{same} of {len(lines)}",
                100 * _error_rate(_ids(exact), _ids(found)),
                100 * _error_rate([one.text for one in exact], [one.text for one in found]),
                100 * _error_rate(references, [normalise_words(one.text) for one in found]),
            ]
        )
    columns = ["dtype", "texts as in float32", "ids changed, %", "WER between the two, %", "WER, %"]
    print_table(f"{Path(options.model).name}, {len(lines)} items of {manifest.name}", columns, rows)


def _transcribe(paths: list[Path], dtype: str, options) -> list[Transcript]:
    transcriber = Transcriber.load(options.model, options.device, "float32" if dtype == "fp8" else dtype)
    if dtype == "fp8":
        emulate_fp8(transcriber.engine.model)
    return transcriber.transcribe(paths)


def _ids(transcripts: list[Transcript]) -> list[str]:
    return [" ".join(map(str, transcript.token_ids)) for transcript in transcripts]


def _error_rate(expected: list[str], found: list[str]) -> float:
    """Edits of words over expected words, for all items together; items without expected words are left out."""
    pairs = [pair for pair in zip(expected, found, strict=True) if pair[0]]
    return jiwer.process_words(*map(list, zip(*pairs, strict=True))).wer


class Fp8Linear(nn.Module):
    """A linear whose products are those of float8 numbers: [..., K] -> [..., N]."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.weight, self.bias = round_to_fp8(plain.weight.detach()), plain.bias

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(round_to_fp8(states), self.weight, self.bias)


def round_to_fp8(rows: Tensor) -> Tensor:
    """[..., K] rounded to float8, with a scale for each row that maps its largest number to float8's largest."""
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny * 1024) / torch.finfo(FP8).max
    return (rows / scale).to(FP8).to(rows.dtype) * scale


def emulate_fp8(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FusedFeedForward):
            module.linear1, module.linear2 = Fp8Linear(module.linear1), Fp8Linear(module.linear2)


if __name__ == "__main__":
    main()
