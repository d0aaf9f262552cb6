import dataclasses
import hashlib
import os

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jaxeco.data.pipeline import Feed
from jaxeco.data.sources import Arrays, Digits, ImageFolder
from jaxeco.errors import UserError

TEST_LABELS = [4, 6, 3, 0, 6, 2, 9, 2, 5, 2, 3, 7, 1, 6, 2, 3, 7, 6, 9, 6]


def rows(dataset):
    return {x.tobytes() + y.tobytes() for x, y in zip(*everything(dataset), strict=True)}


def everything(dataset):
    index = np.arange(len(dataset))
    return dataset.fields["x"][index], dataset.fields["y"][index]


def test_digits_are_scikit_learns():
    theirs = load_digits()
    x, y = everything(Digits("all").open())
    assert x.dtype == np.uint8 and x.shape == (1797, 8, 8, 1) and x.min() == 0 and x.max() == 16
    assert y.dtype == np.int32
    ours = sorted(zip(x.reshape(-1, 64).tolist(), y.tolist(), strict=True))
    assert ours == sorted(
        zip(theirs.data.astype(int).tolist(), theirs.target.tolist(), strict=True)
    )


def test_digits_split_is_whole_disjoint_and_balanced():
    train, test = Digits("train").open(), Digits("test").open()
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")
    assert not rows(train) & rows(test)
    assert rows(train) | rows(test) == rows(Digits("all").open())
    assert train.fingerprint == Digits().open().fingerprint != test.fingerprint
    assert np.bincount(test.fields["y"]).min() > 20
    # The split itself must never change: published numbers rest on it.
    assert test.fields["y"][:20].tolist() == TEST_LABELS
    assert Digits("test[:20]").open().fields["y"].tolist() == TEST_LABELS


@pytest.mark.parametrize("cut", ["0%", "1%", "33%", "80%", "100%", "0", "7", "1437"])
def test_slices_meet_without_gap_or_overlap(cut):
    whole = Digits("train").open()
    parts = []
    for split in (f"train[:{cut}]", f"train[{cut}:]"):
        try:
            parts.append(Digits(split).open())
        except UserError:  # one side of 0% and 100% is empty
            assert cut in ("0%", "100%", "0", "1437")
    assert sum(map(len, parts)) == len(whole)
    np.testing.assert_array_equal(np.concatenate([p.fields["x"] for p in parts]), whole.fields["x"])


@pytest.mark.parametrize("split", ["trian", "", "train[80%]", "train[:-1]", "train+test", "all[:"])
def test_a_malformed_split_is_an_error(split):
    with pytest.raises(ValueError, match=r'split: got ".*", expected "all", "train" or "test"'):
        Digits(split)


def test_a_split_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="at most 100%"):
        ImageFolder("x", 8, "train[:101%]")
    with pytest.raises(UserError, match=r"examples 0 to 400 of the 360"):
        Digits("test[:400]").open()
    with pytest.raises(UserError, match=r"examples 9 to 9"):
        Digits("test[9:9]").open()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scikit-learn, which is not installed.*pip install"):
        Digits().open()


def test_arrays_open_to_themselves():
    x, y = np.arange(12.0).reshape(3, 2, 2), np.array([0, 1, 1])
    dataset = Arrays(x, y, classes=("no", "yes"), name="toy").open()
    assert len(dataset) == 3 and dataset.name == "toy" and dataset.classes == ("no", "yes")
    np.testing.assert_array_equal(dataset.fields["x"][np.array([2, 0])], x[[2, 0]])
    with pytest.raises(ValueError, match="read-only"):
        dataset.fields["x"][0] = 1
    x[0] = 5  # ... the caller's own array is left as it was


def test_arrays_are_described_and_compared_by_content():
    x, y = np.zeros((1000, 8), np.float32), np.zeros(1000, np.int32)
    one, same, other = Arrays(x, y), Arrays(x.copy(), y.copy()), Arrays(x + 1, y)
    assert one == same and hash(one) == hash(same) and one != other and one != "arrays"
    assert one.open().fingerprint == same.open().fingerprint != other.open().fingerprint
    assert "x=float32[1000, 8], y=int32[1000]" in repr(one) and len(repr(one)) < 200
    assert one != Arrays(x.reshape(1000, 2, 4), y)  # the same bytes in another shape
    assert dataclasses.replace(one, name="mine").name == "mine" and one != dataclasses.replace(
        one, name="mine"
    )


@pytest.mark.parametrize(
    ("x", "y", "classes", "message"),
    [
        (np.zeros((3, 2)), np.zeros(4), (), "got 3 x and 4 y"),
        (np.zeros((0, 2)), np.zeros(0), (), r"expected \[N > 0, ...\]"),
        (np.zeros((2, 2)), np.float32(1), (), r"Arrays.y: got shape \(\)"),
        (np.array(["a", "b"]), np.zeros(2), (), "Arrays.x: got dtype <U1, expected numbers"),
        (np.zeros(2), np.array([0, 2]), ("a", "b"), "labels 0 to 2, expected 0 to 1 for 2 classes"),
        (np.zeros(2), np.array([0, -1]), ("a", "b"), "labels -1 to 0"),
        (np.zeros(2), np.zeros((2, 3)), ("a", "b"), r"expected integers \[N\] or numbers \[N, 2\]"),
        (np.zeros(2), np.zeros(2), ("a", "b"), "got float64"),
    ],
)
def test_arrays_that_do_not_fit(x, y, classes, message):
    with pytest.raises(ValueError, match=message):
        Arrays(x, y, classes)


def test_soft_labels_fit_their_classes():
    assert len(Arrays(np.zeros(2), np.ones((2, 3)) / 3, ("a", "b", "c")).open()) == 2


@pytest.fixture
def folder(tmp_path):
    """Three classes with 7, 8 and 9 images, each of one colour that no other image has."""
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name).mkdir()
        for i in range(7 + label):
            image = Image.new("RGB", (6, 4), (label * 80, i * 20, 33))
            image.save(tmp_path / name / f"{i}.{('png', 'bmp', 'PNG')[i % 3]}")
        (tmp_path / name / "notes.txt").write_text("not an image")
        (tmp_path / name / "._0.png").write_text("not an image either")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README").write_text("no class")
    return tmp_path


def test_a_folder_of_images(folder):
    dataset = ImageFolder(str(folder), 4, "all").open()
    x, y = everything(dataset)
    assert dataset.classes == ("ant", "bee", "cat")
    assert x.shape == dataset.fields["x"].shape == (24, 4, 4, 3) and x.dtype == np.uint8
    assert y.tolist() == [0] * 7 + [1] * 8 + [2] * 9 and y.dtype == np.int32
    colours = [(label * 80, i * 20, 33) for label in range(3) for i in range(7 + label)]
    assert [tuple(image[2, 1]) for image in x] == colours
    shuffled = np.array([20, 3, 3, 11])
    np.testing.assert_array_equal(dataset.fields["x"][shuffled], x[shuffled])
    assert dataset.fields["x"][np.array([], int)].shape == (0, 4, 4, 3)


def test_an_image_of_the_right_size_is_left_alone_and_others_are_cut_in_the_centre(tmp_path):
    (tmp_path / "only").mkdir()
    x = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(x).save(tmp_path / "only" / "a.png")
    wide = np.concatenate([np.full_like(x, 9), x, np.full_like(x, 9)], axis=1)
    Image.fromarray(wide).save(tmp_path / "only" / "b.png")
    Image.fromarray(x).resize((16, 16), Image.Resampling.NEAREST).save(tmp_path / "only" / "c.png")
    images, _ = everything(ImageFolder(str(tmp_path), 8, "all").open())
    np.testing.assert_array_equal(images[0], x)
    np.testing.assert_array_equal(images[1], x)
    # Halved by a triangle of four pixels, whose weights 1, 3, 3, 1 are cut off at the edges.
    weights = np.eye(8) * 6 + np.eye(8, k=1) + np.eye(8, k=-1)
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("ih,jw,hwc->ijc", weights, weights, x)
    assert np.abs(images[2] - expected).max() < 1.1
    grey = ImageFolder(str(tmp_path), 8, channels=1).open().fields["x"][np.array([0])]
    expected = x @ np.array([0.299, 0.587, 0.114])
    assert grey.shape == (1, 8, 8, 1) and np.abs(grey[0, ..., 0] - expected).max() < 1.01


def test_orientation_and_odd_modes(tmp_path):
    (tmp_path / "c").mkdir()
    x = np.zeros((4, 4, 3), np.uint8)
    x[0] = 255  # a bright top row
    exif = Image.Exif()
    exif[0x0112] = 3  # "turned by 180 degrees"
    Image.fromarray(x).save(tmp_path / "c" / "a.png", exif=exif)
    Image.fromarray(x).convert("P").save(tmp_path / "c" / "b.gif")
    Image.fromarray(x).convert("RGBA").save(tmp_path / "c" / "c.webp", lossless=True)
    images, _ = everything(ImageFolder(str(tmp_path), 4, "all").open())
    np.testing.assert_array_equal(images, [x[::-1], x, x])


def test_train_and_test_of_a_folder_share_nothing(folder):
    def opened(split):
        return rows(ImageFolder(str(folder), 4, split).open())

    train, test = opened("train"), opened("test")
    assert len(train) == 19 and len(test) == 5 and not train & test
    assert train | test == opened("all")
    names = [f"{path.parent.name}/{path.name}" for path in folder.glob("[abc]*/[0-9]*")]
    last = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[-5:]
    assert {x[:3] for x in test} == {np.array(Image.open(folder / n)).tobytes()[:3] for n in last}
    fit, held_out = opened("train[:75%]"), opened("train[75%:]")
    assert not fit & held_out and fit | held_out == train
    os.remove(folder / "bee" / "3.png")  # one file less moves at most one other across the border
    assert len(opened("train") - train) <= 1 and len(opened("test") - test) <= 1


def test_a_folders_fingerprint_follows_its_content(folder):
    def fingerprint(**changes):
        return dataclasses.replace(ImageFolder(str(folder), 4, "all"), **changes).open().fingerprint

    before = fingerprint()
    assert before == fingerprint()
    others = [fingerprint(image_size=5), fingerprint(channels=1), fingerprint(split="train")]
    Image.new("RGB", (6, 4)).save(folder / "ant" / "0.png")
    others.append(fingerprint())
    os.utime(folder / "ant" / "1.bmp", (0, 0))
    assert len({before, *others, fingerprint()}) == 6


def test_links_are_followed(folder, tmp_path_factory):
    linked = tmp_path_factory.mktemp("linked")
    (linked / "ant").symlink_to(folder / "ant")
    (linked / "bug").mkdir()
    (linked / "bug" / "b.png").symlink_to(folder / "bee" / "0.png")
    assert ImageFolder(str(linked), 4, "all").open().classes == ("ant", "bug")
    assert len(everything(ImageFolder(str(linked), 4, "all").open())[0]) == 8
    (linked / "bug" / "lost.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(UserError, match=r"lost\.png: No such file"):
        ImageFolder(str(linked), 4, "all").open()


@pytest.mark.parametrize("damage", ["text", "truncated", "deep"])
def test_an_unreadable_image_is_named(folder, damage):
    victim = folder / "bee" / "0.png"
    if damage == "text":
        victim.write_text("this is no image")
    elif damage == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(victim)
        victim.write_bytes(victim.read_bytes()[:3000])
    else:
        Image.fromarray(np.zeros((4, 4), np.uint16)).save(victim)
    dataset = ImageFolder(str(folder), 4, "all").open()
    with pytest.raises(UserError, match=rf"{victim}: not a readable image .*; mend or remove it"):
        everything(dataset)


def test_images_that_lie_on_the_device_are_decoded_once(folder):
    def resident():
        with Feed.evaluation(ImageFolder(str(folder), 4, "all").open(), 24, resident=True) as feed:
            return np.asarray(feed.resident["x"])

    before = resident()
    bee = folder / "bee" / "0.png"
    times, size = (bee.stat().st_atime_ns, bee.stat().st_mtime_ns), bee.stat().st_size
    bee.write_bytes(b"x" * size)
    os.utime(bee, ns=times)  # by all that can be seen from outside it is the same file
    np.testing.assert_array_equal(resident(), before)
    os.utime(bee)
    with pytest.raises(UserError, match=r"bee/0\.png: not a readable image"):
        resident()


def test_a_process_opens_the_files_of_its_share_and_no_others(folder):
    dataset = ImageFolder(str(folder), 4, "all").open()
    share, colours = np.array([0, 3]), dataset.fields["x"][np.arange(24)]
    with Feed.training(dataset, 6, 0, resident=False, share=share) as feed:
        mine = np.concatenate([feed.plan(step)["row"][share] for step in range(4)])  # one pass
    names = [f"{c}/{i}.{('png', 'bmp', 'PNG')[i % 3]}" for n, c in enumerate(("ant", "bee", "cat"))
             for i in range(7 + n)]  # fmt: skip
    for row in set(range(24)) - set(mine.tolist()):
        (folder / names[row]).unlink()
    with Feed.evaluation(dataset, 24, resident=False, share=np.sort(mine)) as feed:
        np.testing.assert_array_equal(feed.fed(0)["x"][0], colours[np.sort(mine)])
    with Feed.evaluation(dataset, 24, resident=False) as feed, pytest.raises(UserError):
        feed.fed(0)


def test_folders_without_images(tmp_path):
    with pytest.raises(UserError, match=r"absent: No such file.*expected folders of images"):
        ImageFolder(str(tmp_path / "absent"), 4).open()
    with pytest.raises(UserError, match="no folders in it; expected folders of images"):
        ImageFolder(str(tmp_path), 4, "all").open()
    (tmp_path / "ant").mkdir()
    with pytest.raises(UserError, match="ant: no images in it"):
        ImageFolder(str(tmp_path), 4, "all").open()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        ImageFolder(str(tmp_path / "file"), 4).open()


@pytest.mark.parametrize(("size", "channels"), [(0, 3), (4, 2)])
def test_folder_arguments_out_of_range(size, channels):
    with pytest.raises(ValueError, match="ImageFolder"):
        ImageFolder("somewhere", size, channels=channels)
