"""Reading rows of a data set from the hub, and telling what went wrong on the way.

`datasets` streams: it reads as much of a set as is asked for. It obeys HF_HOME, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE. The hub's client repeats single requests and heeds Retry-After; above that, the repeats of `datasets`,
which have a fixed pace, are turned off in favour of those of :mod:`mm_rec.data.download.fetch`.
"""

from __future__ import annotations

import logging
import lzma
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm_rec.data.download.sources import BUILTIN, Source
from mm_rec.errors import UserError
from mm_rec.storage.files import reporting_errors
from mm_rec.storage.hub.client import (
    DEADLINE_SECONDS,
    causes,
    first_line,
    hub_address,
    is_connection_error,
    reach_problem,
    status_of,
    within,
)
from mm_rec.translation import Translatable

__all__ = ["Rows", "UnreachableError", "explain", "find_revision", "quiet", "retry_delay"]

_MAX_DELAY_SECONDS = 60.0
_BLOCK_BYTES = 1 << 20  # read ahead of what is asked for, for each row group
_MAX_SPLIT_FILES = 32  # splitting a Parquet file into row groups takes a request or two
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}


class UnreachableError(UserError):
    """The hub does not answer, or only with errors that pass.

    Attributes:
        what: this in words, without the remedies.
        status: that it answers with, if it does.
    """

    def __init__(self, what: str, status: int | None = None) -> None:
        self.what = what
        self.status = status
        super().__init__(
            Translatable(
                "{what}; try the same command again, set HF_ENDPOINT to a mirror, take --source {name}, which needs no "
                "network, or train with --use_synthetic",
                what=Translatable(what),
                name=BUILTIN,
            )
        )


class Rows:
    """The rows of ``source`` at the commit ``revision``, from ``state`` on, which :attr:`state` gave earlier.

    Reading on after a stop transfers the Parquet row group in which it stopped again, and the one before it. A JSONL
    file is transferred from its start, since a compressed one has no other beginning, and earlier rows are skipped.
    """

    def __init__(self, source: Source, revision: str, state: dict[str, Any] | None = None) -> None:
        import datasets
        from huggingface_hub import constants

        with reporting_errors(Path(constants.HF_HOME)):
            stream = datasets.load_dataset(
                source.hub_id,
                source.config,
                split=source.split,
                revision=revision,
                data_dir=source.data_dir,
                data_files=source.data_files,
                streaming=True,
                storage_options={"hf": {"block_size": _BLOCK_BYTES}},
            )
        if stream.num_shards <= _MAX_SPLIT_FILES:
            stream = stream.reshard()
        if source.field is not None:
            stream = stream.select_columns([source.field])
        if state is not None:
            stream.load_state_dict(state)
        self._stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self._stream

    @property
    def state(self) -> dict[str, Any]:
        """Where reading stands: plain values, ready for JSON."""
        state: dict[str, Any] = self._stream.state_dict()
        return state


def find_revision(source: Source) -> str:
    """The commit that ``source.revision`` stands for now; at the same time a check of the way to the hub.

    Raises:
        UserError: if the set is gated and there is no token.
        Exception: whatever the hub's client raises; :func:`explain` puts it into words.
    """
    from huggingface_hub import HfApi, get_token

    if source.gated and get_token() is None:
        raise _gated(source)
    return within(
        DEADLINE_SECONDS,
        lambda: str(HfApi().dataset_info(source.hub_id, revision=source.revision, timeout=5).sha),
    )


def explain(source: Source, error: Exception) -> UserError | None:
    """What an error of reading ``source`` means to a user; None for a bug."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for cause in causes(error):
        if isinstance(cause, UserError):
            return cause
        # `datasets` passes on some of the client's errors as one of its own, with nothing left but the message.
        unknown = isinstance(cause, DatasetNotFoundError)
        if isinstance(cause, GatedRepoError) or (unknown and "gated" in str(cause)):
            return _gated(source)
        if unknown or isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
            return UserError(
                "the hub at {hub} has no {hub_id} ({revision}) that you may read; check "
                "HF_ENDPOINT and HF_TOKEN, or take another --source",
                hub=hub_address(),
                hub_id=source.hub_id,
                revision=source.revision,
            )
    for cause in causes(error):
        status = status_of(cause)
        if status in (401, 403):
            return UserError(
                "the hub at {hub} refuses {hub_id} (status {status}); check HF_TOKEN",
                hub=hub_address(),
                hub_id=source.hub_id,
                status=status,
            )
        if problem := reach_problem(cause):
            return UnreachableError(problem, status)
    if any(_is_damage(cause) for cause in causes(error)):
        return UserError(
            "what the hub at {hub} sends of {hub_id} cannot be read ({error}); try the "
            "same command again, which keeps what was read so far, or take another --source",
            hub=hub_address(),
            hub_id=source.hub_id,
            error=first_line(error),
        )
    return None


def retry_delay(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before attempt number ``attempt + 1``; None if another one would change nothing.

    What the hub asks for with Retry-After, else twice as long each time, with jitter, so that many clients don't
    come back at once.
    """
    for cause in causes(error):
        status = status_of(cause)
        if status is not None and status not in _PASSING_STATUS:
            return None
        if status is not None:
            wished = cause.response.headers.get("Retry-After", "")  # type: ignore[attr-defined]
            if wished.isascii() and wished.isdigit():
                return min(float(wished), 10 * _MAX_DELAY_SECONDS)
        if status is not None or is_connection_error(cause) or _is_damage(cause):
            return min(_MAX_DELAY_SECONDS, 2.0**attempt) * random.uniform(0.5, 1.0)
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep `datasets` and the hub's client from repeating at a fixed pace, from logging and from progress bars."""
    import datasets

    settings = ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES")
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    saved = {name: getattr(datasets.config, name) for name in settings}
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for name in settings:
        setattr(datasets.config, name, 1)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(datasets.config, name, value)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _gated(source: Source) -> UserError:
    return UserError(
        "{name} is gated: accept its terms at https://huggingface.co/datasets/{hub_id} and set HF_TOKEN "
        "to a token of yours from https://huggingface.co/settings/tokens, or take another --source",
        name=source.name,
        hub_id=source.hub_id,
    )


def _is_damage(error: Exception) -> bool:
    # What pyarrow, gzip, JSON and Unicode raise; an OSError of the system, such as a full disk, has a number.
    known = isinstance(error, ValueError | EOFError | zlib.error | lzma.LZMAError)
    return known or (isinstance(error, OSError) and error.errno is None)
