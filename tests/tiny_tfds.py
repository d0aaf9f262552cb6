"""A local web server, and tiny archives in the formats of tfds's data sets to put on it."""

import csv
import gzip
import hashlib
import http.server
import importlib
import io
import struct
import tarfile
import threading

import numpy as np
import tensorflow_datasets
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.image_classification import cifar, mnist

from jaxeco.data import prepare

CLASSES = ("airplane", "automobile", "bird", "cat", "deer",
           "dog", "frog", "horse", "ship", "truck")  # fmt: skip
ARCHIVE = "cifar-10-binary.tar.gz"


class Server:
    """Serves `files` (path -> bytes) in the way `mode` says, and counts requests."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.mode, self.requests = "good", 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests += 1
                body = outer.files.get(self.path)
                if outer.mode == "hanging":
                    outer.released.wait(30)
                    return
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                if outer.mode != "no length":
                    self.send_header("Content-Length", str(len(body)))
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                whole = outer.mode not in ("truncated", "no length", "stalling")
                self.wfile.write(body if whole else body[: len(body) // 2])
                if outer.mode == "stalling":
                    self.wfile.flush()
                    outer.released.wait(30)

            def log_message(self, *args):
                pass

        self.released = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


def cifar_archive(rng):
    """A tiny archive in CIFAR-10's binary format: 5 x 4 training and 6 test images."""
    files, train = {}, []
    for name in [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]:
        n = 4 if name.startswith("data") else 6
        x_NxCxHxW = rng.integers(0, 256, (n, 3, 32, 32), np.uint8)
        y_N = rng.integers(0, 10, n, np.uint8)
        files[name] = b"".join(
            bytes([y]) + x.tobytes() for x, y in zip(x_NxCxHxW, y_N, strict=True)
        )
        if n == 4:
            train += zip(x_NxCxHxW.transpose(0, 2, 3, 1), y_N, strict=True)
    files["batches.meta.txt"] = "\n".join([*CLASSES, ""]).encode()
    return tar({f"cifar-10-batches-bin/{name}": data for name, data in files.items()}), train


def tar(files):
    """A .tar.gz of `files` (path -> bytes)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def url_info(data, filename, checksum=None):
    size = tensorflow_datasets.core.utils.Size(len(data))
    checksum = checksum or hashlib.sha256(data).hexdigest()
    return checksums.UrlInfo(size=size, checksum=checksum, filename=filename)


def serve_cifar10(server, monkeypatch):
    """Points tfds's own CIFAR-10 builder at the server.

    Returns:
      the url, the archive's bytes, and the training examples as (image, label).
    """
    archive, train = cifar_archive(np.random.default_rng(0))
    url = f"{server.url}/{ARCHIVE}"
    server.files[f"/{ARCHIVE}"] = archive
    real = cifar.Cifar10._cifar_info.fget(cifar.Cifar10)
    monkeypatch.setattr(cifar.Cifar10, "_cifar_info", real._replace(url=url))
    monkeypatch.setattr(cifar.Cifar10, "url_infos", {url: url_info(archive, ARCHIVE)})
    return url, archive, train


def serve_mnist(server, monkeypatch, train=12, test=5):
    """Points tfds's own MNIST builder at the server; returns the training examples."""
    rng, examples, infos = np.random.default_rng(1), [], {}
    monkeypatch.setattr(mnist.MNIST, "URL", f"{server.url}/")
    for part, n in (("train", train), ("t10k", test)):
        x, y = rng.integers(0, 256, (n, 28, 28, 1), np.uint8), rng.integers(0, 10, n, np.uint8)
        images = struct.pack(">4i", 2051, n, 28, 28) + x.tobytes()
        labels = struct.pack(">2i", 2049, n) + y.tobytes()
        for name, data in (("images-idx3", images), ("labels-idx1", labels)):
            file = f"{part}-{name}-ubyte.gz"
            server.files[f"/{file}"] = gzip.compress(data)
            infos[f"{server.url}/{file}"] = url_info(server.files[f"/{file}"], file)
        if part == "train":
            examples = list(zip(x, y, strict=True))
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", train)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", test)
    monkeypatch.setattr(mnist.MNIST, "url_infos", infos)
    return examples


def _serve(server, monkeypatch, name, url, data, filename):
    """Points tfds's own builder of `name`, which downloads from `url`, at the server."""
    builder = tensorflow_datasets.builder_cls(name)
    opened = prepare._open
    here = f"/{name}/{filename}"
    server.files[here] = data

    def redirected(asked, verify):
        return opened(server.url + here if asked == url else asked, verify)

    monkeypatch.setattr(prepare, "_open", redirected)
    monkeypatch.setattr(builder, "url_infos", {url: url_info(data, filename)})


def _module(name):
    return importlib.import_module(f"tensorflow_datasets.datasets.{name}.{name}_dataset_builder")


def serve_tiny_shakespeare(server, monkeypatch, text):
    github = "https://raw.githubusercontent.com/karpathy/char-rnn/master"
    url = f"{github}/data/tinyshakespeare/input.txt"
    _serve(server, monkeypatch, "tiny_shakespeare", url, text.encode(), "input.txt")


def serve_imdb_reviews(server, monkeypatch, train, test, unlabelled):
    """Reviews as (text, "neg" or "pos"), and texts without a label."""
    files = {f"train/unsup/{i}_0.txt": text for i, text in enumerate(unlabelled)}
    for split, reviews in (("train", train), ("test", test)):
        files |= {f"{split}/{label}/{i}_5.txt": text for i, (text, label) in enumerate(reviews)}
    archive = tar({f"aclImdb/{name}": text.encode() for name, text in files.items()})
    url = _module("imdb_reviews")._DOWNLOAD_URL
    _serve(server, monkeypatch, "imdb_reviews", url, archive, "aclImdb_v1.tar.gz")


def serve_ag_news(server, monkeypatch, train, test):
    """Articles as (class from 1 on, title, description)."""
    files = {}
    for split, articles in (("train", train), ("test", test)):
        rows = io.StringIO()
        csv.writer(rows, quoting=csv.QUOTE_ALL).writerows(articles)
        files[f"ag_news_csv/{split}.csv"] = rows.getvalue().encode()
    url = _module("ag_news_subset")._DOWNLOAD_URL
    _serve(server, monkeypatch, "ag_news_subset", url, tar(files), "ag_news_csv.tar.gz")


def serve_lm1b(server, monkeypatch, train, test):
    """Lines of training and heldout text."""
    module = _module("lm1b")
    formats = (module._TRAIN_FILE_FORMAT, train), (module._HELDOUT_FILE_FORMAT, test)
    files = {
        pattern.replace("*", "00001-of-00100"): "".join(f"{line}\n" for line in lines).encode()
        for pattern, lines in formats
    }
    _serve(server, monkeypatch, "lm1b", module._DOWNLOAD_URL, tar(files), "lm1b.tar.gz")
