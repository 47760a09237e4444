"""Models from a path, from an object store through the node's cache, and from ids that cannot be fetched here."""

import shutil

import pytest
from job_layouts import TINY_EN

from jobs.models import CACHE_VARIABLE, local_model, resolve_model
from jobs.storage.connections import StorageOptions
from parakeet_core import CheckpointError, load_checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote(s3_server):
    """(URL of the bundled model in a bucket, the folder that the server serves it from)."""
    bucket = s3_server.bucket()
    folder = s3_server.folder / bucket / "models" / "tiny-en"
    shutil.copytree(TINY_EN, folder)
    return f"s3://{bucket}/models/tiny-en", folder


def test_a_path_is_used_where_it_lies():
    model = resolve_model(str(TINY_EN), StorageOptions())
    checkpoint = model.load("float32", "cpu")
    assert checkpoint.path == TINY_EN.resolve()
    assert model.digest == checkpoint.digest == load_checkpoint(TINY_EN).digest
    assert model.parameters == sum(parameter.numel() for parameter in checkpoint.model.state_dict().values()) - 10


def test_a_url_is_fetched_once_into_the_cache(cache, remote, s3_server):
    url, folder = remote
    first = resolve_model(url, s3_server.options)
    path = local_model(url, s3_server.options)
    assert path.parent == cache
    assert first.digest == resolve_model(str(TINY_EN), StorageOptions()).digest
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    first.load("float32", "cpu")
    assert (path / "model.safetensors").stat().st_mtime_ns == stamp
    assert not list(cache.glob("*.partial"))


def test_a_model_replaced_under_its_url_is_refused(cache, remote, s3_server):
    url, folder = remote
    model = resolve_model(url, s3_server.options)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(weights + b"")
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")  # another size: another copy
    with pytest.raises(CheckpointError, match="the job began with"):
        model.load("float32", "cpu")


def test_a_nemo_archive_behind_a_url(cache, s3_server, pytestconfig):
    archive = pytestconfig.rootpath.parent / "shared/golden/tiny_a.nemo"
    if not archive.exists():
        pytest.skip("needs shared/golden beside the checkout")
    bucket = s3_server.bucket()
    shutil.copy(archive, s3_server.folder / bucket / "tiny_a.nemo")
    model = resolve_model(f"s3://{bucket}/tiny_a.nemo", s3_server.options)
    assert model.config.encoder.n_layers == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such-model-anywhere", "no such path"),
        ("/no/such/folder", "no such file"),
        ("s3://{bucket}/nothing", "no checkpoint|no such object"),
    ],
)
def test_what_cannot_be_had_says_why(name, message, cache, s3_server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=message):
        resolve_model(name.format(bucket=s3_server.bucket()), s3_server.options)
