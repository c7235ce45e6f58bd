"""Fine-tune the base model with LoRA, from the latest checkpoint on, and leave the adapter and its figures on disk.

The result is ``adapter/`` and ``report/`` below the output directory, sealed.
"""

from job.train.session import train

__all__ = ["train"]
