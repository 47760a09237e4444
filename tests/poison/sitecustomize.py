"""Makes libsndfile of every Python process that finds this folder on PYTHONPATH meet files it cannot bear.

A file whose title is `poison: <deed>` makes the reading process do the deed: really crash, hang with the GIL held, or
take 8 GiB. With POISON=harmless in the environment it is refused as a damaged file would be, for a run to compare with.
"""

import ctypes
import importlib.util
import os
import sys

reads = 0


def crash() -> None:
    ctypes.string_at(0)


def hang() -> None:
    while True:
        ctypes.PyDLL(None).sleep(1_000_000)  # PyDLL, unlike CDLL, keeps the GIL


def eat() -> None:
    blocks = []
    while len(blocks) < 32:
        blocks.append(bytes(256 << 20))


def crash_used() -> None:
    """Only where the process has read another file before."""
    if reads > 1:
        crash()


def poison(soundfile) -> None:
    """Wrap opening and reading of `soundfile.SoundFile`."""
    plain_open, plain_read = soundfile.SoundFile.__init__, soundfile.SoundFile.read

    def act(file, deeds: dict) -> None:
        deed = deeds.get(file.title.removeprefix("poison: "))
        if deed is not None and os.environ.get("POISON") == "harmless":
            raise soundfile.LibsndfileError(3, "poisoned: ")
        if deed is not None:
            deed()

    def poisoned_open(self, *arguments, **options):
        plain_open(self, *arguments, **options)
        if self.mode == "r":
            act(self, {"crash at open": crash})

    def poisoned_read(self, *arguments, **options):
        global reads
        reads += 1
        act(self, {"crash": crash, "hang": hang, "eat": eat, "crash used": crash_used})
        return plain_read(self, *arguments, **options)

    soundfile.SoundFile.__init__, soundfile.SoundFile.read = poisoned_open, poisoned_read


class PoisonFinder:
    """Finds `soundfile` as usual and poisons it when it is loaded: Ray's other processes never load it."""

    def find_spec(self, name, path=None, target=None):
        if name != "soundfile":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_poisoned(module) -> None:
            load(module)
            poison(module)

        spec.loader.exec_module = load_poisoned
        return spec


sys.meta_path.insert(0, PoisonFinder())
