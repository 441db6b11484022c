"""A Hugging Face checkpoint on disk, read lazily: headers when it is opened, a tensor when it is asked for.

A checkpoint from the internet is untrusted data. Nothing in it is executed, every name and number in it is
checked before use, and whatever is wrong is a CheckpointError.
"""

from tersely.checkpoint.files import CHUNK, is_plain_name, stream
from tersely.checkpoint.folder import INDEX, SINGLE, open_checkpoint, refuse_foreign_link
from tersely.checkpoint.header import DTYPES, MAX_HEADER, TensorSpec, read_header, read_tensor
from tersely.checkpoint.tensors import Checkpoint

__all__ = [
    "CHUNK",
    "DTYPES",
    "INDEX",
    "MAX_HEADER",
    "SINGLE",
    "Checkpoint",
    "TensorSpec",
    "is_plain_name",
    "open_checkpoint",
    "read_header",
    "read_tensor",
    "refuse_foreign_link",
    "stream",
]
