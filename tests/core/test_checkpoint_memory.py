"""Loading holds the weights about once: peak resident memory in a separate process, beyond what its imports took."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import TINY_EN, randomise, small_config, write_hf, write_nemo

from parakeet_core.ctc import ParakeetCTC

REPO = Path(__file__).resolve().parents[2]
LIMIT = 1.3  # of the stored weights' bytes
PROGRAM = """
import sys
from pathlib import Path
import torch
from parakeet_core import load_checkpoint

def status_bytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def load_and_read(path):
    checkpoint = load_checkpoint(path, dtype=sys.argv[2])
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.model.parameters())  # every page is read
    return checkpoint

load_and_read(sys.argv[3])  # whatever is imported, mapped or allocated once
before = status_bytes("VmRSS")
checkpoint = load_and_read(sys.argv[1])
print(status_bytes("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model of two layers as wide as the published ones, in both forms, and the bytes of its weights."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    sizes = {"d_model": 1024, "n_heads": 8, "d_ff": 4096, "subsampling_channels": 256, "n_layers": 2}
    model = randomise(ParakeetCTC(small_config(**sizes)), 0)
    write_hf(folder / "hf", model)
    write_nemo(folder / "m.nemo", model)
    yield folder, sum(tensor.nbytes for tensor in model.state_dict().values())
    for file in (folder / "m.nemo", folder / "hf" / "model.safetensors"):
        file.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["hf", "m.nemo"])
def test_peak_of_loading(stored, form, dtype, capsys):
    folder, weight_bytes = stored
    assert weight_bytes > 200 << 20
    command = [sys.executable, "-c", PROGRAM, str(folder / form), dtype, str(TINY_EN)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    share = int(done.stdout) / weight_bytes
    with capsys.disabled():
        print(f"\n{form} float32 -> {dtype}: peak {share:.2f} of {weight_bytes / 2**20:.0f} MiB of weights", end="")
    assert 0.4 < share < LIMIT
