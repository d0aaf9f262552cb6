"""A local web server, and tiny archives in the formats of CIFAR-10 and MNIST to put on it."""

import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading

import numpy as np
import tensorflow_datasets
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.image_classification import cifar, mnist

CLASSES = ("airplane", "automobile", "bird", "cat", "deer",
           "dog", "frog", "horse", "ship", "truck")  # fmt: skip
ARCHIVE = "cifar-10-binary.tar.gz"


class Server:
    """Serves `files` (path -> bytes) in the way `mode` says, and counts requests."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
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
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

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
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue(), train


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
