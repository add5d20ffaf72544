"""Sharded checkpoints through torch.distributed.checkpoint, published by a manifest that is written last.

FOLDER/step-00000120/*.distcp  .metadata  manifest.json
"""

from heliostat.place import Place
from heliostat.train.checkpoint.find import Found, Rejected, choose, complete, folder_of, newest
from heliostat.train.checkpoint.state import load
from heliostat.train.checkpoint.write import Writer, save

__all__ = ["Found", "Place", "Rejected", "Writer", "choose", "complete", "folder_of", "load", "newest", "save"]
