"""Export the weights after a run's last step as a model; the run exports those that were best on its validation set.

    python last_weights.py RUN OUTPUT

Everything except the weights comes from RUN/model.
"""

import argparse
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from jobs.training.checkpoint import FOLDER  # noqa: E402

WEIGHTS = "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the --output of train.py")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    committed = max((options.run / FOLDER).glob("step-*.json"))
    stored = {}
    for path in sorted(committed.parent.glob(f"{committed.stem}-*.safetensors")):
        stored |= load_file(path)
    shutil.copytree(options.run / "model", options.output)
    exported = load_file(options.output / WEIGHTS)
    weights = {name: stored[f"model.{name}"].to(tensor.dtype).contiguous() for name, tensor in exported.items()}
    save_file(weights, options.output / WEIGHTS, metadata={"format": "pt"})
    print(f"{committed.stem}: {options.output}")


if __name__ == "__main__":
    main()
