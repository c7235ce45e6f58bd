"""Turn data files into tokenized, masked examples on the local disk, once for each combination of what they depend on.

The result is a sealed directory: ``train.arrow``, perhaps ``eval.arrow``, ``data.json`` (counts), ``sample.txt``.
"""

from job.prepare.dataset import dataset

__all__ = ["dataset"]
