"""tfds without TensorFlow: a stand-in for what its builders use, and downloads that fail fast.

tfds reads prepared data without TensorFlow, but its builders open files, encode arrays as PNG and
name dtypes through it. `without_tensorflow` puts a small stand-in in the one place from which tfds
takes the lazily imported module; it never enters `sys.modules`.

tfds's own downloader tries ten times with growing pauses and no time limit. `Downloader` takes its
place behind the same four methods.
"""

import errno
import glob
import hashlib
import io
import json
import logging
import os
import queue
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxeco.data.cache import locked, progress
from jaxeco.errors import UserError

CONNECT_SECONDS = 5.0  # to reach one address
STALL_SECONDS = 10.0  # for a first answer, all redirects and look-ups included; then between bytes
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
BUILT_IN = (
    "prepared copies elsewhere are found through $TFDS_DATA_DIR; to run without any download:"
    " experiments/digits_mlp.py or, on text, experiments/docs_bpe.py"
)

_one_at_a_time = threading.RLock()


class NeedsTensorFlow(AttributeError):
    """A builder asked the stand-in for something that it does not have."""


class NeedsBeam(Exception):
    """A builder uses Apache Beam, and nobody has said how it is to run."""


class _NoBeam:
    """Stands for the options of a pipeline that must not start by itself: some take weeks."""

    def view_as(self, kind: type) -> Any:
        raise NeedsBeam


class _StandIn(SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        raise NeedsTensorFlow(f"its builder needs TensorFlow's `{name}`")


def stand_in() -> _StandIn:
    """The part of TensorFlow's interface that image builders use, in Python and PIL."""
    from PIL import Image

    def encoder(kind: str, **options: Any) -> Any:
        def encode(image_HxWxC: np.ndarray) -> Any:
            file = io.BytesIO()
            grey = image_HxWxC.shape[-1] == 1
            Image.fromarray(image_HxWxC[..., 0] if grey else image_HxWxC).save(
                file, kind, **options
            )
            return SimpleNamespace(numpy=file.getvalue)

        return encode

    def open_file(name: Any, mode: str = "r") -> Any:
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        return open(name, mode, **text)  # type: ignore[call-overload]

    gfile = _StandIn(
        GFile=open_file,
        exists=os.path.exists,
        isdir=os.path.isdir,
        listdir=os.listdir,
        glob=lambda pattern: sorted(glob.glob(os.fspath(pattern))),
        walk=os.walk,
        makedirs=lambda path: os.makedirs(path, exist_ok=True),
        copy=lambda source, target, overwrite=False: shutil.copyfile(source, target),
        rename=lambda source, target, overwrite=False: os.replace(source, target),
        remove=os.remove,
        rmtree=shutil.rmtree,
    )
    text = lambda value: value.decode() if isinstance(value, bytes) else str(value)  # noqa: E731
    numbers = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64"
    unlike = "UnimplementedError ResourceExhaustedError FailedPreconditionError AbortedError"
    return _StandIn(
        io=_StandIn(gfile=gfile),
        image=_StandIn(
            encode_png=encoder("PNG"),
            encode_jpeg=encoder("JPEG", quality=95),  # TensorFlow's default quality
        ),
        compat=_StandIn(as_text=text, as_str=text, as_str_any=text),
        errors=_StandIn(
            NotFoundError=FileNotFoundError,
            OutOfRangeError=EOFError,
            PermissionDeniedError=PermissionError,
            **{name: type(name, (Exception,), {}) for name in unlike.split()},
        ),
        executing_eagerly=lambda: True,
        string=np.object_,
        **{name: np.dtype(name).type for name in numbers.split()},
    )


@contextmanager
def without_tensorflow() -> Iterator[None]:
    """Within: tfds cannot import TensorFlow, draws no progress bars, and logs errors only.

    Nor does it import what a data set's features.json names: only classes that are known already,
    and its own.
    """
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.features.feature import FeatureConnector
    from tensorflow_datasets.core.utils import lazy_imports_utils, tqdm_utils

    by_name = vars(FeatureConnector)["cls_from_name"]

    def known_by_name(cls: Any, name: str) -> Any:
        if name not in cls._registered_features and not name.startswith("tensorflow_datasets."):
            raise ValueError(f"its features.json names {name}, which is no feature of tfds")
        return by_name.__get__(None, cls)(name)

    absl = logging.getLogger("absl")
    with _one_at_a_time:
        lazy = vars(lazy_imports_utils.tensorflow)
        before = lazy.get("_module"), downloader.MAX_RETRIES, tqdm_utils._active, absl.level
        lazy["_module"] = stand_in()
        downloader.MAX_RETRIES = 0
        tqdm_utils._active = False
        FeatureConnector.cls_from_name = classmethod(known_by_name)
        absl.setLevel(logging.ERROR)
        try:
            yield
        finally:
            FeatureConnector.cls_from_name = by_name
            lazy["_module"], downloader.MAX_RETRIES, tqdm_utils._active, level = before
            absl.setLevel(level)
            if lazy["_module"] is None:
                del lazy["_module"]


def prepare(builder: Any, beam: Sequence[str] | None = None) -> None:
    """Downloads a data set and writes it as array_record; call it within `without_tensorflow`.

    Args:
      builder: of tfds.
      beam: options of Apache Beam's pipeline, such as "--runner=DirectRunner", for a builder that
        uses it. Its workers are given the stand-in, too.

    Raises:
      UserError: no network, a download that broke off, a wrong checksum, a damaged archive, no
        space or no permission, a builder that needs more than the stand-in has, or Apache Beam
        where `beam` is None. Whatever could be taken for good by a second attempt is removed.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import download_manager, extractor

    root, folder = Path(builder.data_dir_root), Path(builder.data_dir)
    downloads = root / "downloads"
    fetch = Downloader(builder, downloads)
    make = builder._make_download_manager

    def make_download_manager(**config: Any) -> Any:
        manager = make(**config)
        fetch.expected = manager._url_infos
        manager._DownloadManager__downloader = fetch
        return manager

    builder._make_download_manager = make_download_manager
    builder._log_download_bytes = builder._log_download_done = lambda: None
    what = f"{builder.info.full_name} cannot be prepared"
    instead = f"or put a prepared copy of it at {folder}; {BUILT_IN}"
    elsewhere = f"prepare it as array_record where there is TensorFlow, and copy it to {folder}"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with locked(downloads / f"{builder.info.full_name.replace('/', '-')}.lock"):
            if not folder.exists():
                config = tfds.download.DownloadConfig(
                    try_download_gcs=False, beam_options=_beam_options(beam)
                )
                builder.download_and_prepare(download_config=config, file_format="array_record")
    except UserError:
        raise
    except NeedsBeam as error:
        raise UserError(_by_beam(builder.info.full_name, what, instead)) from error
    except download_manager.NonMatchingChecksumError as error:  # of a file put there by hand
        raise UserError(_line(str(error).rpartition("\nTo debug")[0])) from error
    except ImportError as error:
        if error.name == "apache_beam":
            raise UserError(_by_beam(builder.info.full_name, what, instead)) from error
        raise UserError(f"{what}: it needs `pip install {error.name}`, {instead}") from error
    except OSError as error:
        raise UserError(f"{what} in {root}: {_line(str(error))}") from error
    except extractor.ExtractError as error:
        if getattr(error.__cause__, "errno", None) in DISK_ERRORS:
            raise UserError(f"{what}: {_line(str(error))}") from error
        fetch.forget(str(error))
        raise UserError(f"{what}: {_line(str(error))}; run again to download anew") from error
    except Exception as error:  # a builder's own code, on data that may not be what it expects
        if NeedsTensorFlow.__name__ in f"{type(error).__name__}: {error}":  # tfds wraps some errors
            raise UserError(
                f"{what} without TensorFlow: {_line(str(error))}; {elsewhere}; {BUILT_IN}"
            ) from error
        fetch.forget(str(error))
        message = f"its builder failed with {type(error).__name__}: {_line(str(error))}"
        raise UserError(f"{what}: {message}; {instead}") from error


def _by_beam(name: str, what: str, instead: str) -> str:
    return (
        f"{what} by itself: its builder uses Apache Beam, some for weeks. `pip install apache-beam`"
        f" and `python -m jaxeco.prepare {name} --beam-pipeline-options runner=DirectRunner` do it"
        f" on this machine; docs/data.md says how on many; {instead}"
    )


def _beam_options(beam: Sequence[str] | None) -> Any:
    if beam is None:
        return _NoBeam()
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "Apache Beam is not installed: `pip install apache-beam` where it runs on Python "
            f"{sys.version_info.major}.{sys.version_info.minor}, or leave out its options"
        ) from error
    return PipelineOptions([*beam, f"--beam_plugin={__package__}.beam_worker"])


class Downloader:
    """Stands in for tfds's downloader: no second attempts, time limits, errors of one line."""

    expected: Mapping[str, Any] = {}  # url -> registered size and sha256

    def __init__(self, builder: Any, downloads: Path):
        self.name, self.folder = builder.info.full_name, builder.data_dir
        self.kept, self.extracted = downloads / builder.name, downloads / "extracted"
        self.by_hand = downloads / "manual"

    @contextmanager
    def tqdm(self) -> Iterator[None]:
        yield

    def increase_tqdm(self, url_info: Any) -> None:
        pass

    def download(self, url: str, destination_path: Any, verify: bool = True) -> Any:
        """Fetches `url` into the folder `destination_path`, at once, and checks what came."""
        import promise
        from etils import epath
        from tensorflow_datasets.core.download import checksums, downloader
        from tensorflow_datasets.core.utils import Size

        target = Path(destination_path)
        try:
            path, size, sha256 = self._fetch(url, target, verify)
            want = self.expected.get(url)
            if want is not None and (want.size, want.checksum) != (size, sha256):
                raise UserError(
                    f"{url} is not the file that {self.name} expects: expected {int(want.size)} "
                    f"bytes with sha256 {want.checksum}, got {size} bytes with sha256 {sha256}; "
                    "nothing was kept. If the same happens again, the file has changed on its "
                    f"server: put the right one into {self.by_hand}; {BUILT_IN}"
                )
        except BaseException:  # Ctrl-C too
            shutil.rmtree(target, ignore_errors=True)
            raise
        info = checksums.UrlInfo(size=Size(size), checksum=sha256, filename=path.name)
        return promise.Promise.resolve(
            downloader.DownloadResult(path=epath.Path(path), url_info=info)
        )

    def _fetch(self, url: str, target: Path, verify: bool) -> tuple[Path, int, str]:
        from tensorflow_datasets.core.download import downloader

        copy = self.by_hand / downloader._basename_from_url(url)
        if copy.is_file():
            path = target / copy.name
            shutil.copyfile(copy, path)
            return path, path.stat().st_size, _sha256(path)
        size, total, context = 0, 0, None
        try:
            context, response, blocks = _open(url, verify)
            path = target / downloader._get_filename(response)
            if not response.headers.get("Content-Encoding"):
                total = int(response.headers.get("Content-Length", 0))
            sha256 = hashlib.sha256()
            with path.open("wb") as file, progress(f"downloading {url}", total) as report:
                for block in blocks:
                    file.write(block)
                    sha256.update(block)
                    size += len(block)
                    report(size)
            if total and size != total:
                raise EOFError("the connection was closed")
            return path, size, sha256.hexdigest()
        except Exception as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            far = f" after {size} of {total or 'an unknown number of'} bytes" if size else ""
            raise UserError(
                f"{self.name} is not at {self.folder} and its download failed{far}: {url}: "
                f"{_reason(error)}. Put {copy.name} into {self.by_hand} by hand, or a prepared "
                f"copy of the data set at {self.folder}, and run again; {BUILT_IN}"
            ) from error
        finally:
            if context is not None:
                with suppress(Exception):
                    context.__exit__(None, None, None)

    def forget(self, complaint: str) -> None:
        """Removes downloads that no checksum vouches for or that an error complains of.

        tfds keeps what it downloaded and extracted, and does not look at it again.
        """
        for note in self.kept.rglob("*.INFO"):
            file = note.with_suffix("")
            verified = any(url in self.expected for url in json.loads(note.read_text())["urls"])
            if verified and str(file) not in complaint:
                continue
            for extracted in self.extracted.glob(f"*.{file.name}"):
                (shutil.rmtree if extracted.is_dir() else os.remove)(extracted)
            file.unlink(missing_ok=True)
            note.unlink()


def _open(url: str, verify: bool) -> tuple[Any, Any, Iterator[bytes]]:
    """Opens a URL; its answer must begin within STALL_SECONDS.

    A name server, a proxy or a chain of redirects can each hang in a place that takes no time
    limit, so the wait is limited from outside, by a thread that may be left behind.
    """
    from tensorflow_datasets.core.download import downloader

    context = downloader._open_url(url, verify=verify, timeout=(CONNECT_SECONDS, STALL_SECONDS))
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put(context.__enter__())
        except BaseException as error:
            answer.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        opened = answer.get(timeout=STALL_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {STALL_SECONDS:g} s") from None
    if isinstance(opened, BaseException):
        raise opened
    return context, *opened


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    """The innermost of the exceptions that requests and urllib3 wrap around each other."""
    while True:
        inner = getattr(error, "reason", None) or next(iter(error.args), None)
        if not isinstance(inner, BaseException):
            return _line(str(error)) or type(error).__name__
        error = inner


def _line(text: str) -> str:
    return " ".join(text.split())
