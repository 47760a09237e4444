"""`python -m parakeet_core MODEL AUDIO...`: transcribe files in this process, to text or to JSON lines with words."""

import argparse
import dataclasses
import json
import sys

from parakeet_core.errors import ParakeetError
from parakeet_core.transcriber import Transcriber


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a file could not be transcribed, 2 if the model could not be loaded."""
    parser = argparse.ArgumentParser(prog="python -m parakeet_core", description="Transcribe audio files.")
    parser.add_argument("model", help="checkpoint: a Hugging Face directory or a .nemo file")
    parser.add_argument("audio", nargs="+", help="audio files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "int8"])
    parser.add_argument("--json", action="store_true", help="one JSON object per line, with words and their times")
    options = parser.parse_args(arguments)
    try:
        # Uncompiled: a few files take less time than compiling.
        transcriber = Transcriber.load(options.model, options.device, options.dtype, compiled=False)
    except ParakeetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = False
    transcripts = transcriber.transcribe_stream(options.audio)
    for name, transcript in zip(options.audio, transcripts, strict=True):
        failed |= transcript.error is not None
        if options.json:
            row = dataclasses.asdict(transcript) | {"audio": name, "error": None}
            if transcript.error is not None:
                row["error"] = {"kind": transcript.error.kind, "message": transcript.error.message}
            print(json.dumps(row, ensure_ascii=False))
        elif transcript.error is None:
            print(f"{name}\t{transcript.text}")
        else:
            print(f"{name}: {transcript.error.kind}: {transcript.error.message}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
