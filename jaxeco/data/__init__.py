"""What an experiment file names: `from jaxeco import data`, then `data.Digits(split="train")`."""

from jaxeco.data.dataset import Dataset, Source
from jaxeco.data.image import (
    AlternatingFlip,
    Crop,
    Cutout,
    Flip,
    MirrorShift,
    Normalize,
    augmented,
)
from jaxeco.data.numbers import NumberWords
from jaxeco.data.pipeline import Feed, assemble, fits
from jaxeco.data.records import ArrayRecords, write_records
from jaxeco.data.sources import Arrays, Digits, ImageFolder
from jaxeco.data.text import (
    Documents,
    JsonLines,
    PydocTopics,
    StdlibDocstrings,
    TextFiles,
    Texts,
    TextSource,
    TfdsText,
)
from jaxeco.data.tfds import Tfds
from jaxeco.data.tokenizers import (
    MASK,
    PAD,
    SEPARATOR,
    Bpe,
    Bytes,
    Characters,
    Tokenizer,
    TokenizerFile,
    load_tokenizer,
)
from jaxeco.data.tokens import (
    LabelledText,
    MaskTokens,
    PackedText,
    TextPairs,
    TextWindows,
    Translation,
)

__all__ = [
    "MASK",
    "PAD",
    "SEPARATOR",
    "AlternatingFlip",
    "ArrayRecords",
    "Arrays",
    "Bpe",
    "Bytes",
    "Characters",
    "Crop",
    "Cutout",
    "Dataset",
    "Digits",
    "Documents",
    "Feed",
    "Flip",
    "ImageFolder",
    "JsonLines",
    "LabelledText",
    "MaskTokens",
    "MirrorShift",
    "Normalize",
    "NumberWords",
    "PackedText",
    "PydocTopics",
    "Source",
    "StdlibDocstrings",
    "TextFiles",
    "TextPairs",
    "TextSource",
    "TextWindows",
    "Texts",
    "Tfds",
    "TfdsText",
    "Tokenizer",
    "TokenizerFile",
    "Translation",
    "assemble",
    "augmented",
    "fits",
    "load_tokenizer",
    "write_records",
]
