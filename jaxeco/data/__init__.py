"""What an experiment file names: `from jaxeco import data`, then `data.Digits(split="train")`."""

from jaxeco.data.dataset import Dataset, Source
from jaxeco.data.image import Crop, Cutout, Flip, Normalize, augmented
from jaxeco.data.pipeline import Feed, assemble, fits
from jaxeco.data.sources import Arrays, Digits, ImageFolder
from jaxeco.data.tfds import Tfds

__all__ = [
    "Arrays",
    "Crop",
    "Cutout",
    "Dataset",
    "Digits",
    "Feed",
    "Flip",
    "ImageFolder",
    "Normalize",
    "Source",
    "Tfds",
    "assemble",
    "augmented",
    "fits",
]
