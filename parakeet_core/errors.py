"""The exception tree of the package. A message says which item or file, what was found and expected, and what to do.

    ParakeetError
    ├── CheckpointError   the checkpoint cannot be used; stops a job before any work
    ├── ConfigError       an option or a combination of options cannot be used; stops a job before any work
    ├── WorkerError       this machine or process cannot go on; stops a job in the middle, and a rerun resumes it
    │   └── CredentialsError   a store rejects the run's credentials, whatever the object
    └── InputError        one item cannot be transcribed; becomes that item's row, under its `kind`

Third-party exceptions are mapped at one boundary each (`audio.py`, `checkpoint.py`, `tokenizer.py`), with `from`.
"""

from enum import StrEnum


class ErrorKind(StrEnum):
    """Why an item has no transcript: the values of the table's `error_kind` column.

    Most are properties of the data: a retry gives the same row. Those in `RETRYABLE_KINDS` may pass when tried again.
    """

    EMPTY_FILE = "empty_file"  # zero bytes, or a header with no sample after it
    NOT_AUDIO = "not_audio"  # no decoder recognises the content
    TRUNCATED = "truncated"  # fewer samples than the header or the container promises
    ABSURD_HEADER = "absurd_header"  # declared sizes that the bytes cannot hold
    NON_FINITE = "non_finite"  # NaN, infinity or values beyond any full scale among the samples
    DECODER_MISSING = "decoder_missing"  # a known format whose optional decoder is not installed
    BAD_CHANNEL = "bad_channel"  # a channel that the audio does not have
    BAD_SEGMENT = "bad_segment"  # negative offset or duration, or a segment outside the audio
    TOO_LONG = "too_long"  # over the limit on decoded length
    BAD_RECORD = "bad_record"  # a manifest line, tar member or Parquet row that does not describe an item
    TORN_ARCHIVE = (
        "torn_archive"  # an archive that ends or breaks in the middle: the row stands for the members after the tear
    )
    MISSING_OBJECT = "missing_object"  # the listing or manifest names it, but the storage does not have it
    FORBIDDEN = "forbidden"  # the storage refuses access to it
    STORAGE = "storage"  # the storage failed after all retries, or the package that reaches it is not installed
    DECODER_CRASH = "decoder_crash"  # decoding crashed, hung or took more memory than the limit, in a new process
    OUT_OF_MEMORY = "out_of_memory"  # the item alone does not fit the device
    UNEXPECTED = "unexpected"  # a defect of this program that the item exposed; the message names it


# Kinds whose cause lies outside the item, in storage or environment, so that an operator can fix it. DECODER_MISSING:
# install it. DECODER_CRASH: on a machine that stalls or is full, a good item can reach the limits of time and memory,
# and another version of the decoder may not crash. UNEXPECTED: a host without memory, or a defect that a later version
# does not have. TOO_LONG is not among them: its limits are constants. A retry costs one shard.
RETRYABLE_KINDS = frozenset(
    {
        *(ErrorKind.MISSING_OBJECT, ErrorKind.FORBIDDEN, ErrorKind.STORAGE),
        *(ErrorKind.DECODER_MISSING, ErrorKind.DECODER_CRASH, ErrorKind.OUT_OF_MEMORY, ErrorKind.UNEXPECTED),
    }
)


MESSAGE_CHARACTERS = 4000  # a message repeats what was found, which a damaged or hostile file can make a gigabyte


class ParakeetError(Exception):
    """Base of every error raised on purpose by this project; a message that is too long loses its middle."""

    def __init__(self, message: str = ""):
        if len(message) > MESSAGE_CHARACTERS:
            half = MESSAGE_CHARACTERS // 2
            message = f"{message[:half]} [{len(message) - 2 * half} characters left out] {message[-half:]}"
        super().__init__(message)


class CheckpointError(ParakeetError):
    """The checkpoint is missing, damaged, or describes a model that is not implemented."""


class ConfigError(ParakeetError):
    """An option, or a combination of options, cannot be used."""


class WorkerError(ParakeetError):
    """This machine or process cannot work, whatever the item is."""


class CredentialsError(WorkerError):
    """A store rejects all of this run's requests: the credentials are missing, wrong or expired."""


class InputError(ParakeetError):
    """One item cannot be transcribed.

    Args:
        kind: the reason, from `ErrorKind`.
        message: what was found, what was expected, what to do.
    """

    def __init__(self, kind: ErrorKind, message: str):
        super().__init__(message)
        self.kind = ErrorKind(kind)
        self.message = str(self)

    def __reduce__(self):  # survives pickling between processes
        return type(self), (self.kind, self.message)
