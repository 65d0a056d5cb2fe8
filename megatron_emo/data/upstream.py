"""The two parts of megatron.core that data preparation uses, imported late and quietly.

Their import takes seconds and warns that Transformer Engine and Apex are missing, neither of which
has any say in tokenizing: a corpus is often prepared on a machine without a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType


def import_build_tokenizer() -> Callable:
    """Return the function that builds the tokenizer in Megatron's own training, so ids agree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    return build_tokenizer


def import_indexed_dataset() -> ModuleType:
    """Return megatron.core's module with IndexedDatasetBuilder, IndexedDataset and DType."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
